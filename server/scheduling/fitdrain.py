"""FitDrain: which requests run together now, and on which variant.

The theory, in the order of the code:

1. **Anchor.** The request with the least laxity (time left beyond its fastest possible run) must be in the batch.
2. **Fit: size first.** The largest batch that fits the anchor's slack over its allowed variants. Choosing accuracy
   first buys the best variant for a few and forces the worst on the many.
3. **Drain: then accuracy.** The most accurate variant for that batch such that everybody left behind, and the
   arrivals to be expected meanwhile, would still finish in time on their fastest allowed variants. SlackFit
   (NSDI'25), which looks at the slack alone, lets a backlog build up and then has no slack left.
4. **Overload.** When nothing is safe, give up on the few most urgent requests if the batch behind them yields more
   weighted goodput per executor time (as Nexus, SOSP'19, drops early so that batches stay large).

A request may run on any variant of its class, so batches mix floor classes: the batch's variant decides who can join,
and nobody joins a variant outside its class. That makes hard floors unbreakable here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace, merge
from itertools import islice

from server.scheduling.deadline_queue import DeadlineQueue
from server.scheduling.model_queue import REPLY_RESERVE_NS, ModelQueue
from server.scheduling.slo import Request

_FILL = 0.85  # a variant that cannot take this share of the fitting batch is passed over for the next
_DRAIN_STEPS = 32  # chunks of backlog tested one by one; the rest is tested as a fluid
_GIVE_UP_MOST = 12  # urgent requests that overload may pass over
_GIVE_UP_PENALTY = 0.7


@dataclass(frozen=True, slots=True)
class Choice:
    """A batch: who runs, on which variant, for how long as predicted, and why that variant (a short code)."""

    variant: int
    requests: tuple[Request, ...]
    samples: int
    predicted_ns: int
    reason: str


def choose(model: ModelQueue, now_ns: int, others_free_ns: Sequence[int]) -> Choice:
    """The batch an idle executor should run now; `model` has waiting requests, none of them hopeless.

    `others_free_ns` holds, for every other executor, the instant from now on at which it is expected to be free.
    """
    anchor = model.most_urgent()
    allowed = model.fitting(anchor.allowed, anchor.samples)
    slack_ns = _slack_ns(anchor, now_ns)
    joiners = _joiners(model, anchor, allowed)
    size = max(_fit(model, variant, anchor, joiners[variant], slack_ns) for variant in allowed)
    sizes = {variant: min(size, model.latency.max_batch_size(variant)) for variant in allowed}
    fills = {key: _Fill(anchor, *key) for key in dict.fromkeys((joiners[v], sizes[v]) for v in allowed)}
    most = max(fill.samples for fill in fills.values())
    reason = "retry" if anchor.solo else "pinned" if anchor.pinned else "best"
    for variant in allowed:
        fill = fills[joiners[variant], sizes[variant]]
        predicted_ns = model.latency.predict_ns(variant, fill.samples)
        if now_ns + predicted_ns + REPLY_RESERVE_NS > fill.deadline_ns:
            reason = "slack"
        elif fill.samples < _FILL * min(most, _waiting_for(anchor, joiners[variant])):
            reason = "batch"
        elif not _drains(model, fill.behind(model), now_ns, now_ns + predicted_ns, others_free_ns):
            reason = "drain"
        else:
            return Choice(variant, fill.requests, fill.samples, predicted_ns, reason)
    return _most_goodput(model, anchor, now_ns)


Joiners = tuple[DeadlineQueue, ...]
"""The classes that may join an anchor on one variant; none may where batch-mates would change an answer."""


def _joiners(model: ModelQueue, anchor: Request, variants: Sequence[int]) -> dict[int, Joiners]:
    shape = anchor.queue_key[1]
    mates = [(allowed, queue) for (allowed, other), queue in model.queues.items() if other == shape]
    return {
        v: tuple(queue for allowed, queue in mates if allowed >> v & 1) if model.variants[v].batchable else ()
        for v in variants
    }


def _waiting_for(anchor: Request, joiners: Joiners) -> int:
    return sum(queue.samples for queue in joiners) or anchor.samples


def _fit(model: ModelQueue, variant: int, anchor: Request, joiners: Joiners, slack_ns: int) -> int:
    """The largest batch around the anchor that this variant can finish within the slack; 0 when not even the anchor."""
    largest = model.latency.largest_batch(variant, slack_ns)
    return min(largest, _waiting_for(anchor, joiners)) if largest >= anchor.samples else 0


class _Fill:
    """The anchor, then whoever is next in order among those who may join and can wait so long, up to `size` samples."""

    def __init__(self, anchor: Request, joiners: Joiners, size: int, finish_ns: int = 0) -> None:
        batch, samples = [anchor], anchor.samples
        for _, _, request in merge(*(queue.entries for queue in joiners)):
            if samples >= size:
                break
            if request is not anchor and samples + request.samples <= size and request.deadline_ns >= finish_ns:
                batch.append(request)
                samples += request.samples
        self.requests = tuple(batch)
        self.samples = samples
        self.deadline_ns = min(request.deadline_ns for request in batch)
        self._behind: _Behind | None = None

    def behind(self, model: ModelQueue) -> _Behind:
        """The work that this batch leaves behind."""
        if self._behind is None:
            self._behind = _behind(model, self.requests)
        return self._behind


@dataclass(frozen=True, slots=True)
class _Behind:
    """Waiting work as (deadline, executor time) of chunks on their fastest variants, and the tail beyond these."""

    chunks: list[tuple[int, int]]
    tail_ns: int
    last_deadline_ns: int


def _behind(model: ModelQueue, taken: Sequence[Request]) -> _Behind:
    gone, taken_from = set(taken), Counter(request.queue for request in taken)
    streams, total_ns, last_deadline_ns = [], 0, 0
    for (allowed, _), queue in model.queues.items():
        left = len(queue) - taken_from[queue]
        if left:
            stride, chunk_ns = model.chunk(allowed, queue)
            streams.append(_chunks(queue, gone, stride, chunk_ns))
            total_ns += -(-left // stride) * chunk_ns
            last_deadline_ns = max(last_deadline_ns, queue.entries[-1][2].deadline_ns)
    chunks = [(deadline_ns, chunk_ns) for deadline_ns, _, chunk_ns in islice(merge(*streams), _DRAIN_STEPS)]
    return _Behind(chunks, max(0, total_ns - sum(chunk_ns for _, chunk_ns in chunks)), last_deadline_ns)


def _chunks(queue: DeadlineQueue, gone: set[Request], stride: int, chunk_ns: int) -> Iterator[tuple[int, int, int]]:
    """What one class leaves behind, chunk by chunk: the deadline and number of its first request, its executor time."""
    place = 0
    while place < len(queue.entries):
        head = queue.entries[place][2]
        if head in gone:
            place += 1
        else:
            yield head.deadline_ns, head.number, chunk_ns
            place += stride


def _slack_ns(request: Request, now_ns: int) -> int:
    return request.deadline_ns - REPLY_RESERVE_NS - now_ns


def _drains(model: ModelQueue, behind: _Behind, now_ns: int, free_ns: int, others_free_ns: Sequence[int]) -> bool:
    """Whether everybody left behind, and the forecast, would finish in time on their fastest allowed variants."""
    free = [free_ns, *others_free_ns]
    heapify(free)
    for deadline_ns, chunk_ns in behind.chunks:
        finish_ns = free[0] + chunk_ns
        if finish_ns > deadline_ns - REPLY_RESERVE_NS:
            return False
        heapreplace(free, finish_ns)
    if behind.tail_ns and max(free) + behind.tail_ns // len(free) > behind.last_deadline_ns:
        return False
    arriving_ns = _arriving_ns(model, now_ns, free_ns)
    drained_ns = (sum(free) + behind.tail_ns + arriving_ns) // len(free)
    return not arriving_ns or drained_ns <= now_ns + model.typical_budget_ns


def _arriving_ns(model: ModelQueue, now_ns: int, free_ns: int) -> int:
    """Executor time of the arrivals to be expected during the batch, as a fluid on the fastest variant."""
    fastest = model.fastest(model.eligible)
    if fastest is None:
        return 0
    batch = model.throughput_batch(fastest)
    return int(model.forecast.expected(free_ns - now_ns, now_ns) * model.latency.predict_ns(fastest, batch) / batch)


def _most_goodput(model: ModelQueue, anchor: Request, now_ns: int) -> Choice:
    """Overload: the batch on a fastest variant that earns the most weight per executor time, giving up on a few."""
    ordered = merge(*(queue.entries for queue in model.queues.values()))
    urgent = [request for _, _, request in islice(ordered, _GIVE_UP_MOST)]
    best: Choice | None = None
    best_score = 0.0
    given_up = 0.0
    for head in dict.fromkeys((anchor, *urgent)):
        candidate = _fastest_batch(model, head, now_ns)
        earned = sum(request.weight for request in candidate.requests) - _GIVE_UP_PENALTY * given_up
        score = earned / candidate.predicted_ns
        if best is None or score > best_score:
            best, best_score = candidate, score
        if candidate.samples == model.latency.max_batch_size(candidate.variant):
            break  # giving up on more could not make the batch any larger
        given_up += head.weight
    assert best is not None  # noqa: S101 - the anchor is always a candidate
    return best


def _fastest_batch(model: ModelQueue, head: Request, now_ns: int) -> Choice:
    """The largest batch around `head` that finishes within its slack, on the variant that takes the most."""
    slack_ns = _slack_ns(head, now_ns)
    joiners = _joiners(model, head, model.fitting(head.allowed, head.samples))
    fits = {v: _fit(model, v, head, joiners[v], slack_ns) for v in joiners}
    variant = max(fits, key=lambda v: (fits[v], -model.latency.predict_ns(v, head.samples)))
    full_ns = model.latency.predict_ns(variant, max(fits[variant], head.samples))
    fill = _Fill(head, joiners[variant], fits[variant], now_ns + full_ns + REPLY_RESERVE_NS)
    return Choice(variant, fill.requests, fill.samples, model.latency.predict_ns(variant, fill.samples), "overload")
