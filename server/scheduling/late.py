"""Late work: requests that nobody can answer in time any more, and that asked to be answered all the same.

It runs only in capacity that costs nobody else a deadline: when nobody else waits, or, so that it does not wait for
ever under steady load, now and then when those who wait, and the arrivals to be expected, are still in time behind it.
Of a load that was replaced, late work takes its turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from server.scheduling.drain import left_behind, shortage
from server.scheduling.model_queue import ModelQueue
from server.scheduling.policy import Choice, Moment

LATE_PAUSE = 10
"""After late work went first, so many times its duration passes before it may again: it takes at most a tenth."""
_BLOCKS_AT_MOST_NS = 50_000_000
_AGED_NS = 500_000_000  # so long after its deadline, late work may go first if that costs nobody a deadline


def late_batch(model: ModelQueue, spare_ns: int | None) -> Choice | None:
    """Late work, oldest first, on the fastest variant and in a batch short enough to hold up nobody for long.

    None when not even its first request could be answered within the time that is to spare.
    """
    first = model.late.first()
    variant = model.fastest(first.allowed, first.samples)
    if variant is None:
        raise AssertionError("late work without a usable variant must have ended. This is a bug.")
    batch, samples = [first], first.samples
    most_ns = _BLOCKS_AT_MOST_NS if spare_ns is None else min(_BLOCKS_AT_MOST_NS, spare_ns)
    most = model.latency.largest_batch(variant, most_ns, first.step) if model.variants[variant].batchable else 0
    for _, _, request in model.late.queues[first.queue_key].entries[1:]:
        if samples + request.samples > most:
            break
        batch.append(request)
        samples += request.samples
    predicted_ns = model.latency.predict_ns(variant, samples, first.step)
    if spare_ns is not None and predicted_ns > spare_ns:
        return None
    return Choice(variant, tuple(batch), samples, predicted_ns, "late")


def aged_late_batch(
    model: ModelQueue, waiting: Sequence[ModelQueue], moment: Moment
) -> tuple[ModelQueue, Choice] | None:
    """Late work of any model that has waited long, where those of `model`, whose turn it is, are in time behind it.

    The most urgent of every other model are, too: also of one that has had more than its share.
    """
    moment = replace(moment, rivals=[other for other in waiting if other is not model and other.queues])
    for late in waiting:
        if not late.late:
            continue
        aged = moment.now_ns >= late.late.first().deadline_ns + _AGED_NS
        choice = late_batch(late, None) if aged else None
        if choice is None:
            continue
        if not any(shortage(left_behind(model, moment), moment.now_ns + choice.predicted_ns)):
            return late, choice
    return None


def late_room(model: ModelQueue, max_requests: int, max_bytes: int) -> int | None:
    """Bytes of late work that may yet be queued: half of each bound, for it would keep out who can be in time.

    One such request may always wait, so that it can be served at all. None where no more requests may.
    """
    if not model.late:
        return max_bytes
    if len(model.late) >= max_requests // 2:
        return None
    return max_bytes // 2 - model.late.size_bytes
