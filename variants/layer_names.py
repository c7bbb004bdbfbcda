"""Which node of a graph an operator of its optimised form came from.

ONNX Runtime keeps the names of nodes that it leaves alone; those that it fuses, lays out anew or quantises get names
of its own. Rules: a name that contains a node's name is that node's; else the tensor that the operator makes tells;
an operator that carries weights belongs to the node that had them, not to the activation that was fused into it.
"""

from __future__ import annotations

import re
from collections import deque
from itertools import count

import onnx

from variants.runtimes.onnx_signature import nested_graphs

_CARRIES = ("Conv", "Gemm", "MatMul", "LSTM", "GRU", "RNN", "Attention")
_LAID_OUT = "_nchwc"  # follows the name of the tensor that such an operator makes
_LAYOUT = ("ReorderInput", "ReorderOutput")
_MOST_STEPS = 16


def name_nodes(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model with a name, operator and number, for every node that has none of its own."""
    taken = {node.name for graph in nested_graphs(model.graph) for node in graph.node}
    for graph in nested_graphs(model.graph):
        for number, node in enumerate(graph.node):
            if not node.name:
                free = (f"{node.op_type}_{number}{'_' * tries}" for tries in count())
                node.name = next(name for name in free if name not in taken)
                taken.add(node.name)
    return model


class LayerNames:
    """Knows the nodes of a graph, all of which have names, and what its optimised form makes of them."""

    def __init__(self, graph: onnx.GraphProto, optimised: onnx.GraphProto) -> None:
        nodes = [node for each in nested_graphs(graph) for node in each.node]
        self._nodes = {node.name: node for node in nodes}
        self._maker = {output: node for node in nodes for output in node.output if output}
        self._outputs = {node.name: node.output for each in nested_graphs(optimised) for node in each.node}

    def of(self, name: str, operator: str) -> str:
        """The node that an optimised operator came from, its own name where nothing tells."""
        if operator in _LAYOUT:
            return name
        found = self._nodes.get(name) or self._within(name) or self._making(name)
        if found is None:
            return name
        if _carries(operator) and not _carries(found.op_type):
            found = self._before(found) or found
        return str(found.name)

    def _within(self, name: str) -> onnx.NodeProto | None:
        """The node with the longest name that stands whole inside another."""
        inside = [own for own in self._nodes if _stands_whole(own, name)]
        return self._nodes[max(inside, key=len)] if inside else None

    def _making(self, name: str) -> onnx.NodeProto | None:
        """The node that makes what the optimised operator makes."""
        tensors = (name.removesuffix(_LAID_OUT), *self._outputs.get(name, ()))
        return next((self._maker[tensor] for tensor in tensors if tensor in self._maker), None)

    def _before(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """The nearest node with weights on the way to a node, breadth first."""
        waiting = deque([node])
        for _ in range(_MOST_STEPS):
            if not waiting:
                return None
            each = waiting.popleft()
            if _carries(each.op_type):
                return each
            waiting.extend(self._maker[tensor] for tensor in each.input if tensor in self._maker)
        return None


def _carries(operator: str) -> bool:
    return any(kind in operator for kind in _CARRIES)


def _stands_whole(part: str, name: str) -> bool:
    """Whether a part of a name is anywhere no piece of a longer word: `Conv_9` is one in `Conv_93`."""
    return re.search(rf"(?<![^\W_]){re.escape(part)}(?![^\W_])", name) is not None
