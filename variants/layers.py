"""Time per layer: what each operator of a graph, or each module of a torch network, takes in one run.

Rules of this file: times are the runtime's own, on one thread, without warm-up, and each layer's without the layers
inside it (a Scan without its body, a container without its members). To be watched costs a layer some microseconds,
so the shares of large layers hold, and those of tiny ones are too large. A layer's time is the mean of the middle half
of its runs: as deaf to disturbances as a median, and finer than the whole microseconds that ONNX Runtime counts in.
Whatever a runtime cannot tell is no layer, never an error.
"""

from __future__ import annotations

import json
import tempfile
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from variants.data import Array
from variants.export import input_names
from variants.layer_names import LayerNames, name_nodes
from variants.measurements import LayerTime
from variants.quiet import without_library_noise
from variants.runtimes.onnx_signature import read_signature
from variants.runtimes.onnxruntime_runtime import OnnxRuntimeSession

if TYPE_CHECKING:
    from torch import nn

_WARM_UP, _LEAST_RUNS, _MOST_RUNS = 2, 3, 30
BUDGET_S = 0.3
"""How long the runs of one variant may take together, beyond the least number."""

_FATAL = 4
_KERNEL = "_kernel_time"
_US = 1000


@dataclass(frozen=True, slots=True)
class Event:
    """One layer at work: when it began and ended, in nanoseconds of any clock."""

    name: str
    operator: str
    start_ns: int
    end_ns: int


Run = Mapping[tuple[str, str], int]
"""Nanoseconds by (name, operator)."""


def graph_layers(artefact: Path, inputs: Mapping[str, Array], *, budget_s: float = BUDGET_S) -> tuple[LayerTime, ...]:
    """The operators of an ONNX file on ONNX Runtime, dearest first, under the names of the file's own nodes.

    Operators are those that really run: fused and quantised ones. Nothing where it cannot be run or profiled.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="gearshift-layers-") as folder:
            return _summary(_profiled(artefact, inputs, Path(folder), budget_s))
    except Exception:  # the runtime's own exceptions share no narrower base, and this is no reason to stop
        return ()


def archive_layers(artefact: Path, inputs: Mapping[str, Array], *, budget_s: float = BUDGET_S) -> tuple[LayerTime, ...]:
    """The modules of a trusted `.pt2` archive, which keeps their names. Nothing where it cannot be run."""
    import torch

    try:
        with without_library_noise():
            program = torch.export.load(artefact)
            module = torch.export.unflatten(program)
        tensors = [torch.from_numpy(np.array(inputs[str(name)])) for name in program.graph_signature.user_inputs]
        return _of_module(module, lambda: module(*tensors), budget_s)
    except Exception:  # a program may hold what cannot be told apart again; this is no reason to stop
        return ()


def module_layers(
    module: nn.Module, inputs: Mapping[str, Array], *, budget_s: float = BUDGET_S
) -> tuple[LayerTime, ...]:
    """The modules of a torch network, run eagerly. Nothing where it cannot be run."""
    import torch

    try:
        tensors = [torch.from_numpy(np.array(inputs[name])) for name in input_names(module, inputs)]
        return _of_module(module, lambda: module(*tensors), budget_s)
    except Exception:  # it is someone's own code, and this is no reason to stop
        return ()


def _of_module(module: nn.Module, run: Callable[[], object], budget_s: float) -> tuple[LayerTime, ...]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode(), _heard(module) as events:
            marks = [len(events) for _ in _repeat(run, budget_s)]
    finally:
        torch.set_num_threads(threads)
    return _summary(events[start:end] for start, end in zip(marks[_WARM_UP - 1 :], marks[_WARM_UP:], strict=False))


def _repeat(run: Callable[[], object], budget_s: float) -> Iterator[None]:
    """Run to warm up and then until the budget is spent, within reason; yields after each run."""
    start = time.perf_counter()
    for number in range(1, _WARM_UP + _MOST_RUNS + 1):
        run()
        yield
        if number >= _WARM_UP + _LEAST_RUNS and time.perf_counter() - start > budget_s:
            return


@contextmanager
def _heard(module: nn.Module) -> Iterator[list[Event]]:
    """The events of all modules inside, while the context lasts."""
    events: list[Event] = []
    begun: dict[str, list[int]] = defaultdict(list)  # a module may call itself
    hooks = []
    for name, part in module.named_modules():
        operator = _operator(part)

        def begin(*_: object, name: str = name) -> None:
            begun[name].append(time.perf_counter_ns())

        def end(*_: object, name: str = name, operator: str = operator) -> None:
            now = time.perf_counter_ns()
            events.append(Event(name or operator, operator, begun[name].pop(), now))

        hooks += [part.register_forward_pre_hook(begin), part.register_forward_hook(end)]
    try:
        yield events
    finally:
        for hook in hooks:
            hook.remove()


def _operator(module: nn.Module) -> str:
    """A module's class; one that comes from an archive only remembers the name of its own."""
    remembered: Any = getattr(module, "type_name", None)
    return str((remembered and remembered()) or type(module).__name__).rpartition(".")[2]


def _profiled(artefact: Path, inputs: Mapping[str, Array], folder: Path, budget_s: float) -> Iterator[list[Event]]:
    """The events of each run after the warm-up, from ONNX Runtime's own profiler."""
    import onnx
    from onnxruntime import InferenceSession, SessionOptions

    model = name_nodes(onnx.load(artefact))
    options = SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = _FATAL
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    profiled = InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    session = OnnxRuntimeSession(profiled, read_signature(artefact))
    for _ in _repeat(lambda: session.run(inputs), budget_s):
        pass
    records = sorted(json.loads(Path(profiled.end_profiling()).read_text()), key=lambda record: int(record["ts"]))
    names = LayerNames(model.graph, onnx.load(folder / "optimised.onnx").graph)
    events = _events([record for record in records if record["cat"] == "Node"], names)
    starts = [event.start_ns for event in events]
    for run in [record for record in records if record["name"] == "model_run"][_WARM_UP:]:
        start, end = int(run["ts"]) * _US, (int(run["ts"]) + int(run["dur"])) * _US
        yield events[bisect_left(starts, start) : bisect_left(starts, end)]


def _events(records: Iterable[Mapping[str, Any]], names: LayerNames) -> list[Event]:
    """The kernels that ran, from ONNX Runtime's own records, which count microseconds."""
    kernels = [
        (str(each["name"]).removesuffix(_KERNEL), str(each["args"]["op_name"]), int(each["ts"]), int(each["dur"]))
        for each in records
        if each["name"].endswith(_KERNEL)
    ]
    known = {(name, operator): names.of(name, operator) for name, operator, _, _ in kernels}
    return [
        Event(known[name, operator], operator, start * _US, (start + length) * _US)
        for name, operator, start, length in kernels
    ]


def self_times(events: Iterable[Event]) -> Run:
    """One run's time by layer, each without what ran inside it; a layer that ran several times counts as their sum."""
    times: dict[tuple[str, str], int] = defaultdict(int)
    around: list[Event] = []
    for event in sorted(events, key=lambda e: (e.start_ns, -e.end_ns)):
        while around and around[-1].end_ns <= event.start_ns:
            around.pop()
        length = event.end_ns - event.start_ns
        times[event.name, event.operator] += length
        if around:
            times[around[-1].name, around[-1].operator] -= length
        around.append(event)
    return times


def _summary(runs: Iterable[Sequence[Event]]) -> tuple[LayerTime, ...]:
    """The layers of several runs, dearest first."""
    found = [self_times(run) for run in runs]
    keys = dict.fromkeys(key for run in found for key in run)
    layers = (LayerTime(*key, _middle([run.get(key, 0) for run in found])) for key in keys)
    return tuple(sorted(layers, key=lambda layer: -layer.time_ns))


def _middle(values: Sequence[int]) -> int:
    """The mean of the middle half."""
    cut = len(values) // 4
    middle = sorted(values)[cut : len(values) - cut]
    return max(0, round(sum(middle) / len(middle)))
