"""What a policy is asked, and what it answers: which requests run together now, and on which variant.

Rules: `decide` looks and never changes anything, so it can also be asked "what if"; what a policy learns, it learns in
`arrived` and `finished`. A policy belongs to one model. Requests that could not finish in time on any variant they
allow were taken out before it is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from server.scheduling.model_queue import ModelQueue
from server.scheduling.slo import ModelKey, Request


class PassedOver(NamedTuple):
    """A more accurate variant that was not taken: why (a short code), and what was missing for it.

    `short` is nanoseconds of time for "slack", "reserve" and "drain", samples for "batch".
    """

    variant: int
    reason: str
    short: int


@dataclass(frozen=True, slots=True)
class Choice:
    """A batch: who runs, on which variant, for how long as predicted, and why that variant (a short code)."""

    variant: int
    requests: tuple[Request, ...]
    samples: int
    predicted_ns: int
    reason: str
    passed_over: tuple[PassedOver, ...] = ()


@dataclass(frozen=True, slots=True)
class Decision:
    """What to run now, if anything, whom to give up on, and when to ask again though nothing happens."""

    choice: Choice | None = None
    give_up: tuple[Request, ...] = ()
    wake_ns: int | None = None


@dataclass(frozen=True, slots=True)
class Moment:
    """The idle executor that asks, and how the others stand.

    `others_free_ns` holds, for every other working executor, the instant from now on at which it is expected to be
    free; `others` are all other models, `rivals` those with work waiting that have had no more executor time.
    `others_load` is the share of all executor time that the arrivals of the others take.
    """

    now_ns: int
    executor: int
    others_free_ns: Sequence[int] = ()
    rivals: Sequence[ModelQueue] = ()
    others: Sequence[ModelQueue] = ()
    others_load: float = 0.0


@dataclass(frozen=True, slots=True)
class Run:
    """An executor is to run this batch now. `busy` counts the other executors that are busy at its start."""

    executor: int
    model: ModelKey
    variant: str
    place: int
    requests: tuple[Request, ...]
    samples: int
    predicted_ns: int
    reason: str
    started_ns: int
    busy: int
    slowdown: int
    passed_over: tuple[PassedOver, ...] = ()


class Policy(Protocol):
    """Forms batches and chooses variants for one model."""

    admits: bool
    """Whether requests that are predicted to miss are refused on arrival."""

    def arrived(self, model: ModelQueue, request: Request, now_ns: int) -> None:
        """A request was queued."""
        ...

    def decide(self, model: ModelQueue, moment: Moment) -> Decision:
        """What an idle executor should do; `model` has waiting requests."""
        ...

    def finished(self, model: ModelQueue, run: Run, compute_ns: int, now_ns: int) -> None:
        """A batch of this model was answered."""
        ...
