"""torch: runs `.pt2` archives of exported graphs, the one artefact that holds bf16 for a CPU without OpenVINO.

Rules: `torch.export.load` can execute code that hides in an archive, so whoever calls `load` has decided to trust the
file (the server: `--trust-torch-archives`, then the manifest's sha256); nothing here can tell a good archive from
a bad one. The precision is part of the graph. torch is imported only when an archive is loaded or saved.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from variants import datatypes
from variants.hardware import Hardware, possible_precision
from variants.runtimes.onnx_signature import has_batch_axis
from variants.runtimes.runtime import Array, RuntimeUnavailable
from variants.variant import TensorSpec

if TYPE_CHECKING:
    import torch

_NAMES = "output_names.json"  # an exported graph has no public output names: they travel beside it in the archive


class TorchRuntime:
    """Runs exported programs in whatever precision they were exported in."""

    name = "torch"
    suffix = ".pt2"

    def why_not(self, artefact: Path, precision: str, hardware: Hardware) -> str | None:
        """The reason not to try, or None. Trust is not asked here: see the rules of this file."""
        if artefact.suffix != ".pt2":
            return f"torch reads .pt2 archives, not {artefact.suffix or artefact.name}"
        if importlib.util.find_spec("torch") is None:
            return "torch is not installed"
        if precision == "fp16" and not hardware.cuda:
            return "fp16 needs a CUDA device; on a CPU it is never faster than fp32"
        if precision == "bf16" and not hardware.cuda:
            amp = possible_precision(hardware, "cpu")
            return None if amp.precision == "bf16" else amp.reason
        return None

    def load(self, artefact: Path, *, precision: str, threads: int, device: str) -> TorchSession:  # noqa: ARG002 - see rules
        """Load a trusted archive. `threads` holds for the whole process. Raises RuntimeUnavailable with a reason."""
        # read when torch is first imported: threads that spin while they wait starve the other executors
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        import torch

        torch.set_num_threads(threads)  # its OpenMP team collapses when it has more threads than free cores
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise RuntimeUnavailable("this torch cannot use CUDA here")
        names = {_NAMES: ""}
        try:
            program = torch.export.load(artefact, extra_files=names)
        except Exception as error:  # a damaged archive fails in many ways, all with the same meaning
            raise RuntimeUnavailable(f"torch cannot load {artefact.name}: {error}") from error
        if device.startswith("cuda"):
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, device)
        return TorchSession(program, json.loads(names[_NAMES] or "[]"), device)


def save_archive(program: torch.export.ExportedProgram, artefact: Path, output_names: Sequence[str]) -> None:
    """Write an exported program as a `.pt2` whose outputs keep their names. Raises ValueError if the count differs."""
    import torch

    outputs = program.graph_signature.user_outputs
    if len(outputs) != len(output_names):
        raise ValueError(f"the program has {len(outputs)} outputs, got the names {list(output_names)}")
    torch.export.save(program, artefact, extra_files={_NAMES: json.dumps(list(output_names))})


class TorchSession:
    """A loaded exported program; see the `Session` protocol."""

    def __init__(self, program: torch.export.ExportedProgram, output_names: list[str], device: str) -> None:
        values = {node.name: node.meta.get("val") for node in program.graph.nodes}
        signature = program.graph_signature
        if not all(isinstance(name, str) for name in (*signature.user_inputs, *signature.user_outputs)):
            raise RuntimeUnavailable("the program takes or returns constants, not only tensors")
        inputs, outputs = list(map(str, signature.user_inputs)), list(map(str, signature.user_outputs))
        self.inputs = tuple(_spec(name, values[name]) for name in inputs)
        self.outputs = tuple(
            _spec(name, values[node]) for name, node in zip(output_names or outputs, outputs, strict=True)
        )
        self.batch_axis = has_batch_axis(
            [_first_dim(values[name]) for name in inputs], [_first_dim(values[name]) for name in outputs]
        )
        self._module = program.module()
        self._device = device

    def run(self, inputs: Mapping[str, Array]) -> list[np.ndarray[Any, Any]]:
        """One batch: every input by name, every output in the order of `outputs`."""
        import torch

        with torch.inference_mode():
            tensors = [_to_tensor(inputs[spec.name]).to(self._device) for spec in self.inputs]
            return [_to_array(tensor) for tensor in _leaves(self._module(*tensors))]


def _spec(name: str, value: Any) -> TensorSpec:
    """The spec of a traced tensor. Raises RuntimeUnavailable for what is not a tensor of the protocol."""
    try:
        datatype = datatypes.from_torch(str(value.dtype)).name
    except (AttributeError, KeyError):
        raise RuntimeUnavailable(f"{name!r} is no tensor that the inference protocol knows: {value}") from None
    return TensorSpec(name, datatype, tuple(dim if isinstance(dim, int) else -1 for dim in value.shape))


def _first_dim(value: Any) -> str | int | None:
    """A traced tensor's dim 0: its size, or its symbol."""
    if not len(value.shape):
        return None
    return value.shape[0] if isinstance(value.shape[0], int) else str(value.shape[0])


def _leaves(answer: Any) -> Iterator[torch.Tensor]:
    """The tensors of whatever structure the module returned, in the order of its output names."""
    if isinstance(answer, (tuple, list)):
        for item in answer:
            yield from _leaves(item)
    elif isinstance(answer, dict):
        yield from _leaves(list(answer.values()))
    else:
        yield answer


def _to_tensor(array: Array) -> torch.Tensor:
    """A tensor over the array's memory; copied only where torch cannot share it (read-only, strided, foreign order)."""
    import torch

    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    shared = np.require(native, requirements=["C", "W"])
    if shared.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(shared.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(shared)


def _to_array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """A numpy array of a tensor, bf16 included."""
    import torch

    tensor = tensor.cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
