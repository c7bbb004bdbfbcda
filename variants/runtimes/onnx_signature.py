"""What an ONNX file promises, read before any runtime loads it: its tensors, its batch axis, and what we refuse.

Rules: the graph is read, never run; no second file is ever opened. External data could name any file of the host
and a custom operator means foreign native code, so both are refused whatever the runtime would say.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from variants import datatypes
from variants.runtimes.runtime import RuntimeUnavailable
from variants.variant import TensorSpec

_KNOWN_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})


@dataclass(frozen=True, slots=True)
class Signature:
    """Inputs and outputs in the graph's order, and whether dim 0 of all of them is one batch."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batch_axis: bool

    def fits(self, other: Signature) -> bool:
        """Whether a client of one can use the other; how far an output's shape is known may differ."""
        ours, theirs = ([(spec.name, spec.datatype) for spec in each.outputs] for each in (self, other))
        return self.inputs == other.inputs and ours == theirs and self.batch_axis == other.batch_axis


def read_signature(artefact: Path) -> Signature:
    """The signature of an ONNX file. Raises RuntimeUnavailable, with the reason, if we refuse to run it."""
    try:
        model = onnx.load(artefact, load_external_data=False)
    except Exception as error:  # a damaged file fails in many ways, all with the same meaning
        raise RuntimeUnavailable(f"{artefact.name} is not a readable ONNX file: {error}") from error
    if model.ByteSize() == 0 or not model.graph.output:
        raise RuntimeUnavailable(f"{artefact.name} holds no ONNX graph with an output")
    _refuse_foreign_parts(model)
    if any(not value.type.tensor_type.HasField("shape") for value in model.graph.output):
        model = onnx.shape_inference.infer_shapes(model)
    weights = {tensor.name for tensor in model.graph.initializer}  # old files list them among the inputs
    inputs = [value for value in model.graph.input if value.name not in weights]
    outputs = list(model.graph.output)
    return Signature(
        tuple(_spec(value, needs_rank=True) for value in inputs),
        tuple(_spec(value, needs_rank=False) for value in outputs),
        has_batch_axis([_first_dim(value) for value in inputs], [_first_dim(value) for value in outputs]),
    )


def has_batch_axis(inputs: Sequence[str | int | None], outputs: Sequence[str | int | None]) -> bool:
    """Whether dim 0 is a batch: every input and output has a variable one, and those with a name share it.

    Each entry is one tensor's dim 0: its size, its symbol ("" if it has none), or None for a tensor without dims.
    """
    dims = [*inputs, *outputs]
    symbols = {dim for dim in dims if dim}
    return bool(inputs and outputs) and all(isinstance(dim, str) for dim in dims) and len(symbols) <= 1


def _first_dim(value: onnx.ValueInfoProto) -> str | int | None:
    dims = value.type.tensor_type.shape.dim
    if not dims:
        return None
    return int(dims[0].dim_value) if dims[0].HasField("dim_value") else str(dims[0].dim_param)


def _spec(value: onnx.ValueInfoProto, *, needs_rank: bool) -> TensorSpec:
    """One tensor's spec; an output of unknown rank reads as (-1,), an input of unknown rank cannot be validated."""
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type"):
        raise RuntimeUnavailable(f"{value.name!r} is not a tensor but a {value.type.WhichOneof('value')}")
    try:
        datatype = datatypes.from_onnx(tensor.elem_type).name
    except KeyError:
        name = onnx.TensorProto.DataType.Name(tensor.elem_type)
        raise RuntimeUnavailable(f"{value.name!r} has type {name}, which the inference protocol lacks") from None
    if tensor.HasField("shape"):
        dims = (int(dim.dim_value) if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim)
        return TensorSpec(value.name, datatype, tuple(max(dim, -1) for dim in dims))
    if needs_rank:
        raise RuntimeUnavailable(f"the input {value.name!r} declares no shape, so requests cannot be validated")
    return TensorSpec(value.name, datatype, (-1,))


def _refuse_foreign_parts(model: onnx.ModelProto) -> None:
    """Raise RuntimeUnavailable for external data and for operators that no runtime brings by itself."""
    local = {(function.domain, function.name) for function in model.functions}
    graphs = list(nested_graphs(model.graph))
    for graph in graphs:
        for tensor in _tensors(graph):
            if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
                raise RuntimeUnavailable(f"weight {tensor.name!r} lies in another file; store the model as one file")
    nodes = [node for graph in graphs for node in graph.node]
    nodes += [node for function in model.functions for node in function.node]
    for node in nodes:
        if node.domain not in _KNOWN_DOMAINS and (node.domain, node.op_type) not in local:
            raise RuntimeUnavailable(f"{node.op_type} of {node.domain!r} is a custom operator, which is refused")


def nested_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and every graph inside it: the branches of If, the bodies of Loop and Scan."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
                yield from nested_graphs(inner)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every constant stored in one graph, without those of inner graphs."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield from (*([attribute.t] if attribute.HasField("t") else ()), *attribute.tensors)
