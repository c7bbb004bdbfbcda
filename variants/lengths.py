"""Latency by the length of the inputs, for models with variable axes other than the batch: text, sound, image sizes.

Rules: all variable axes of all inputs are scaled alike, since a `TensorSpec` does not say which of them are the same
one; a length is the number of elements that one sample has in all inputs together. What would take longer than the
budget is not measured: for a large batch its samples one after another are the bound, or a whole length is left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from math import log

import numpy as np

from variants.measure import Example, Inputs, Key, batch_of, find_failures, measure_profiles
from variants.runtimes.runtime import Array, Session
from variants.variant import LatencyProfile, TensorSpec

_FACTORS = (0.25, 0.5, 2.0, 4.0)
_RUNS = 4
"""The fewest times that a measurement runs a session: to see whether it fails, to warm up, to estimate, to measure."""


def scaled_examples(example: Example, specs: Sequence[TensorSpec], *, batched: bool) -> dict[int, Example]:
    """The example at other lengths, by length; none where nothing but the batch varies. See `length_of`."""
    sample = batch_of(example, 1)
    axes = {spec.name: variable_axes(spec, batched=batched) for spec in specs}
    most_axes = max(map(len, axes.values()), default=0)
    if not most_axes or not length_of(sample):
        return {}
    examples: dict[int, Example] = {}
    for factor in _FACTORS:  # an image that is twice as large has both its sides longer by the root of two
        inputs = {name: _scaled(array, axes[name], factor ** (1 / most_axes)) for name, array in sample.items()}
        examples[length_of(inputs)] = inputs if batched else _always(inputs)
    examples.pop(length_of(sample), None)
    return examples


def variable_axes(spec: TensorSpec, *, batched: bool) -> tuple[int, ...]:
    """The axes whose size a request chooses, the batch left out."""
    return tuple(axis for axis, dim in enumerate(spec.shape) if dim < 0 and not (batched and axis == 0))


def length_of(sample: Inputs) -> int:
    """The elements of one sample, over all inputs."""
    return sum(array.size for array in sample.values())


def _always(inputs: Inputs) -> Callable[[int], Inputs]:
    return lambda _: inputs


def _scaled(array: Array, axes: Sequence[int], factor: float) -> Array:
    """The array with these axes `factor` times as long: cut off, or repeated from the start, so that it stays valid."""
    for axis in axes:
        before = array.shape[axis]
        array = np.take(array, np.arange(max(1, round(before * factor))) % before, axis)
    return array


def measure_lengths(
    sessions: Mapping[Key, Session],
    examples: Mapping[int, Example],
    alone: Mapping[Key, LatencyProfile],
    length: int,
    *,
    budget_s: float,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> dict[Key, tuple[tuple[int, LatencyProfile], ...]]:
    """Profiles by rising length for each session, those `alone` at the example's own `length` among them.

    Only batch size 1 and the largest are measured, up to which every profile goes. A length that a session refuses is
    left out for it.
    """
    known = {key: {length: alone[key]} for key in sessions}
    end = clock() + int(budget_s * 1e9)
    order = sorted(examples, key=lambda other: (other < length, abs(log(other / length))))
    for place, other in enumerate(order):  # longer ones first, which break deadlines; each foretells the next
        sizes = _affordable(known, other, end - clock())
        if sizes:
            failures = find_failures(sessions, examples[other], sizes)
            healthy = {key: session for key, session in sessions.items() if key not in failures}
            share_s = max(0, end - clock()) / (len(order) - place) / 1e9
            measured = measure_profiles(healthy, examples[other], sizes, budget_s=share_s, clock=clock)
            for key, profile in measured.items():
                known[key][other] = _up_to(alone[key].max_batch_size, profile)
    return {key: tuple(sorted(found.items(), key=lambda entry: entry[0])) for key, found in known.items()}


def _up_to(largest: int, profile: LatencyProfile) -> LatencyProfile:
    """The profile up to the largest batch, which takes at most as long as its samples one after another."""
    if profile.max_batch_size == largest:
        return profile
    bound_ns = profile.latencies_ns[-1] * largest // profile.max_batch_size
    return LatencyProfile((*profile.batch_sizes, largest), (*profile.latencies_ns, bound_ns))


def _affordable(known: Mapping[Key, Mapping[int, LatencyProfile]], length: int, budget_ns: int) -> tuple[int, ...]:
    """The batch sizes that all sessions together can be measured at within the budget."""
    most = max((profile.max_batch_size for found in known.values() for profile in found.values()), default=1)
    for sizes in ((1, most), (1,)):
        cost_ns = sum(_foretold_ns(found, length, size) for found in known.values() for size in sizes)
        if _RUNS * cost_ns <= budget_ns:
            return tuple(sorted(set(sizes)))
    return ()


def _foretold_ns(found: Mapping[int, LatencyProfile], length: int, size: int) -> float:
    """The most that a batch may take, by what is known of the nearest length: the square of it, as attention does."""
    nearest = min(found, key=lambda known: abs(log(length / known)))
    profile = found[nearest]
    return profile.latency_ns(min(size, profile.max_batch_size)) * max(1.0, length / nearest) ** 2
