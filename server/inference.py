"""One client's inference on its way: cut into parts that fit a batch, run, and put together again.

Rules: nothing here waits, locks or decides. The engine counts parts (`part_answered`) under its lock; the rest is read
by the one thread that made the inference, or by the one that answered its last part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np

from server.errors import InvalidRequest
from server.models import ServedModel
from server.scheduling.slo import Outcome, Request
from server.transport.transport import Call
from server.wire.inference import InferRequest, ParameterValue, encode_response
from variants.variant import Variant

Array = np.ndarray[Any, Any]

MAX_PARTS = 256
"""How many batches one request may fill."""


@dataclass(slots=True, eq=False)
class Part:
    """What one scheduled request carries: its share of the inputs, then its share of the outputs and how they came."""

    inference: Inference
    inputs: Mapping[str, Array]
    samples: int
    outputs: Sequence[Array] = ()
    place: int = 0
    reason: str = ""
    batch_size: int = 0
    queue_ns: int = 0
    compute_ns: int = 0
    floor_met: bool = True
    failed_on: str = ""
    """The variant that failed at it last, if one did."""


@dataclass(slots=True, eq=False)
class Inference:
    """One ModelInfer. `requests` are its scheduled parts; `ended` is set once, when its one outcome is known."""

    call: Call
    request: InferRequest
    model: ServedModel
    deadline_ns: int = 0
    requests: list[Request] = field(default_factory=list)
    open_parts: int = 0
    ended: bool = False

    @property
    def timeout_ns(self) -> int | None:
        """The least time that the gRPC deadline and the `timeout` parameter leave it; None where neither is set."""
        rpc_ns = None if self.call.deadline_ns is None else self.call.deadline_ns - self.call.arrival_ns
        return min((each for each in (rpc_ns, self.request.timeout_ns) if each is not None), default=None)

    def parts(self) -> Iterator[Part]:
        """The request cut into pieces of at most the model's maximum batch size, as views of its inputs.

        Raises InvalidRequest for so many that admitting them would hold up everybody.
        """
        most = self.model.signature.max_batch_size
        total = self.request.samples
        if most and total > most * MAX_PARTS:
            raise InvalidRequest(f"a request may hold at most {most * MAX_PARTS} samples, got {total}")
        if not most or total <= most:
            yield Part(self, self.request.inputs, total)
            return
        for start in range(0, total, most):
            inputs = {name: array[start : start + most] for name, array in self.request.inputs.items()}
            yield Part(self, inputs, min(most, total - start))

    def part_answered(self) -> bool:
        """Count a part as answered; True when it was the last and nobody ended the inference before."""
        self.open_parts -= 1
        return self.open_parts == 0 and not self.ended

    def outcome(self, now_ns: int) -> Outcome:
        """How an inference whose parts are all answered ends."""
        if now_ns > self.deadline_ns:
            return Outcome.LATE
        return Outcome.OK if all(part.floor_met for part in self._parts()) else Outcome.DEGRADED

    def least_accurate(self) -> Part:
        """The part that was answered by the lowest in the ranking: it speaks for the whole."""
        return max(self._parts(), key=lambda part: part.place)

    def variant(self) -> Variant:
        """The variant that speaks for the whole."""
        return self.model.queue.variants[self.least_accurate().place]

    def answer(self, outcome: Outcome) -> bytes:
        """The serialised ModelInferResponse."""
        parts = self._parts()
        outputs = parts[0].outputs
        if len(parts) > 1:
            outputs = [np.concatenate(pieces) for pieces in zip(*(part.outputs for part in parts), strict=True)]
        signature = self.model.signature
        return encode_response(
            self.request,
            self.model.version,
            {spec.name: array for spec, array in zip(signature.outputs, outputs, strict=True)},
            self._parameters(parts, outcome),
            batched=signature.max_batch_size > 0,
        )

    def _parts(self) -> list[Part]:
        return [request.payload for request in self.requests]  # type: ignore[misc]

    def _parameters(self, parts: Sequence[Part], outcome: Outcome) -> dict[str, ParameterValue]:
        worst, variant = self.least_accurate(), self.variant()
        return {
            "variant": variant.name,
            "variant_accuracy": variant.proven_accuracy,
            "reason": worst.reason,
            "batch_size": worst.batch_size,
            "queue_us": max(part.queue_ns for part in parts) // 1000,
            "compute_us": max(part.compute_ns for part in parts) // 1000,
            "slo_met": outcome is not Outcome.LATE,
            "floor_met": all(part.floor_met for part in parts),
        }


def gather(parts: Sequence[Part]) -> Mapping[str, Array]:
    """The inputs of a batch: one copy, or none for a batch of one."""
    if len(parts) == 1:
        return parts[0].inputs
    return {name: np.concatenate([part.inputs[name] for part in parts]) for name in parts[0].inputs}


def scatter(parts: Sequence[Part], outputs: Sequence[Array], *, batched: bool) -> list[Sequence[Array]]:
    """Every part's rows of the batch's outputs. Raises ValueError when the model lost or invented rows."""
    total = sum(part.samples for part in parts)
    if batched:
        for array in outputs:
            if array.shape[:1] != (total,):
                raise ValueError(f"a batch of {total} samples came back with shape {array.shape}")
    if len(parts) == 1:
        return [outputs]
    starts = accumulate((part.samples for part in parts), initial=0)
    return [
        [array[start : start + part.samples] for array in outputs] for start, part in zip(starts, parts, strict=False)
    ]
