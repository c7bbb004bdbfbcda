"""What the published policies share: requests in order, batches filled to a size, lazy and early drop.

A published policy is here a `Rule`: it looks at the most urgent request and says on which variant, and in a batch of
how many samples, that one runs now. `Baseline` asks it and forms the batch, so that all of them keep the same rules:

- Requests go by order (the deadline moved by the priority, less the fastest run). Where all are alike that is the order
  of deadlines that the papers have; else "the earliest deadline" is that of the first. A batch is of one shape, and
  nobody joins a variant that they do not allow.
- **Lazy drop**: a request that its variant could not finish in time even alone is given up, for it would block those
  behind it.
- **Early drop** (Nexus, SOSP'19), where asked for: a request that could be saved only by a batch smaller than the one
  which the backlog needs is given up, and so is whoever would be late in the batch that runs. Without it, a rule
  that sizes batches by the head's slack is trapped in overload: less slack, smaller batches, less throughput.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from heapq import merge
from typing import NamedTuple

from server.scheduling.deadline_queue import DeadlineQueue
from server.scheduling.model_queue import REPLY_RESERVE_NS, ModelQueue
from server.scheduling.policy import Choice, Decision, Moment, Run
from server.scheduling.slo import Request

FASTEST = "fastest"


class Line:
    """The waiting requests of one shape, handed out once each, the most urgent first."""

    def __init__(self, model: ModelQueue, queues: Sequence[tuple[int, DeadlineQueue]]) -> None:
        self.model = model
        self._queues = queues
        self._gone: dict[int, int] = defaultdict(int)
        self._requests = merge(*(queue.entries for _, queue in queues))

    def __iter__(self) -> Iterator[Request]:
        return (request for _, _, request in self._requests)

    def samples(self, variant: int) -> int:
        """The samples that may run on a variant, without those taken out."""
        waiting = sum(queue.samples for allowed, queue in self._queues if allowed >> variant & 1)
        return waiting - sum(samples for allowed, samples in self._gone.items() if allowed >> variant & 1)

    def take_out(self, request: Request) -> None:
        """Count a request no longer."""
        self._gone[request.allowed] += request.samples


def lines(model: ModelQueue) -> Iterator[Line]:
    """The waiting requests by shape, the shape with the most urgent one first."""
    shapes: dict[Hashable, list[tuple[int, DeadlineQueue]]] = defaultdict(list)
    for (allowed, shape), queue in model.queues.items():
        shapes[shape].append((allowed, queue))
    for queues in sorted(shapes.values(), key=lambda queues: min(queue.entries[0][:2] for _, queue in queues)):
        yield Line(model, queues)


class Pick(NamedTuple):
    """What a rule wants for the head: the variant, and the most samples in its batch; 0 when it cannot be in time.

    `keeps` is the batch, (variant, samples), that early drop does not let the head shrink.
    """

    variant: int
    size: int
    keeps: tuple[int, int]


HOPELESS = Pick(0, 0, (0, 0))
"""The service as it stands cannot answer this request in time, or at all."""


class Rule(ABC):
    """How a published policy chooses. What it learns, it learns in `arrived` and `finished`; `pick` only looks."""

    def arrived(self, request: Request, now_ns: int) -> None:  # noqa: B027 - most rules learn nothing
        """A request was queued."""

    def finished(self, model: ModelQueue, run: Run, compute_ns: int) -> None:  # noqa: B027
        """A batch was answered."""

    @abstractmethod
    def pick(self, head: Request, line: Line, moment: Moment) -> Pick | None:
        """What the head should run on; None leaves it to a faster executor. `line` is what waits beside it."""


class Baseline:
    """A published policy: its rule, with lazy drop or with early drop. Nobody is refused on arrival."""

    admits = False

    def __init__(self, rule: Rule, *, early_drop: bool) -> None:
        self._rule = rule
        self._early_drop = early_drop

    def arrived(self, model: ModelQueue, request: Request, now_ns: int) -> None:  # noqa: ARG002 - no rule asks
        """The rule may learn from it."""
        self._rule.arrived(request, now_ns)

    def finished(self, model: ModelQueue, run: Run, compute_ns: int, now_ns: int) -> None:  # noqa: ARG002
        """The rule may learn from it; late work runs beside the policy and teaches it nothing."""
        if not run.requests[0].late:
            self._rule.finished(model, run, compute_ns)

    def decide(self, model: ModelQueue, moment: Moment) -> Decision:
        """The batch around the first request that is not given up."""
        given_up: list[Request] = []
        for line in lines(model):
            for head in line:
                pick = self._rule.pick(head, line, moment)
                if pick is None:
                    continue
                if pick.size < head.samples or (self._early_drop and _too_late(head, line, pick.keeps, moment.now_ns)):
                    given_up.append(head)
                    line.take_out(head)
                    continue
                choice, late = fill(head, line, pick, moment.now_ns, early_drop=self._early_drop)
                return Decision(choice, (*given_up, *late))
        return nothing(given_up, moment.now_ns)


def nothing(given_up: Sequence[Request], now_ns: int) -> Decision:
    """Nothing to run; those given up may come back on other variants, so ask again at once."""
    return Decision(give_up=tuple(given_up), wake_ns=now_ns + 1 if given_up else None)


def fill(head: Request, line: Line, pick: Pick, now_ns: int, *, early_drop: bool) -> tuple[Choice, list[Request]]:
    """The batch of the head and those behind it who may join, up to a size; with early drop also who would be late."""
    model, variant = line.model, pick.variant
    batch, samples, late = [head], head.samples, list[Request]()
    if model.variants[variant].batchable:
        expected = min(pick.size, max(line.samples(variant), samples))
        finish_ns = now_ns + needed_ns(model, variant, expected, head.step) if early_drop else 0
        for request in line:
            if samples >= pick.size:
                break
            if not may_run(model, variant, request) or samples + request.samples > pick.size:
                continue
            if request.deadline_ns < finish_ns:
                late.append(request)
                continue
            batch.append(request)
            samples += request.samples
    predicted_ns = model.latency.predict_ns(variant, samples, head.step)
    return Choice(variant, tuple(batch), samples, predicted_ns, "policy"), late


def _too_late(head: Request, line: Line, keeps: tuple[int, int], now_ns: int) -> bool:
    variant, size = keeps
    together = min(size, line.samples(variant)) if line.model.variants[variant].batchable else 0
    samples = max(head.samples, together)
    return now_ns + needed_ns(line.model, variant, samples, head.step) > head.deadline_ns


def needed_ns(model: ModelQueue, variant: int, samples: int, step: int) -> int:
    """From the start of a batch to its answers."""
    return model.latency.predict_ns(variant, samples, step) + REPLY_RESERVE_NS


def slack_ns(request: Request, now_ns: int) -> int:
    """How long its batch may take if it starts now."""
    return request.deadline_ns - REPLY_RESERVE_NS - now_ns


def sizes(model: ModelQueue, variant: int, head: Request) -> range:
    """The batch sizes, in samples, that a batch around the head may have on a variant."""
    most = model.latency.max_batch_size(variant) if model.variants[variant].batchable else head.samples
    return range(head.samples, most + 1)


def largest(model: ModelQueue, variant: int, head: Request, now_ns: int) -> int:
    """The most samples around the head that a variant finishes by its deadline; 0 when not even the head."""
    most = model.latency.largest_batch(variant, slack_ns(head, now_ns), head.step)
    if most < head.samples:
        return 0
    return most if model.variants[variant].batchable else head.samples


def throughput_batch(model: ModelQueue, variant: int) -> tuple[int, int]:
    """The batch that the variant needs for its throughput: what fits half of the usual deadline (Nexus)."""
    return variant, model.throughput_batch(variant)


def fastest_for(model: ModelQueue, head: Request) -> int | None:
    """The variant of the highest throughput among those that may run a request; None when none may."""
    return model.fastest(sum(1 << variant for variant in model.fitting(head.allowed, head.samples)))


def place_of(model: ModelQueue, name: str) -> int | None:
    """Where the variant of a service with only one stands; None when there is none, or "fastest" finds none."""
    if name == FASTEST:
        return model.fastest(model.eligible)
    return next((place for place, variant in enumerate(model.variants) if variant.name == name), None)


def may_run(model: ModelQueue, variant: int, request: Request) -> bool:
    """Whether a variant may and can run a request at all."""
    allowed = request.allowed & model.usable
    return bool(allowed >> variant & 1) and request.samples <= model.latency.max_batch_size(variant)
