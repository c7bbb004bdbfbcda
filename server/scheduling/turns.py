"""Whose turn it is: which model goes first, and which lets a batch wait to grow.

Models share the executors by time (start-time fair queueing): one that has had more than its share waits. Among those
that have had about as much, the most urgent request decides, so that fairness costs no deadline.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from server.scheduling.model_queue import ModelQueue
from server.scheduling.slo import ModelKey

_UNFAIR_AT_MOST_NS = 50_000_000
"""How much more executor time than another a model may have had and still go first because it is more urgent."""


def in_turn(models: Iterable[ModelQueue], now_ns: int) -> list[ModelQueue]:
    """The models with work: the most urgent first among those that have had about as much time as the others."""
    waiting = [model for model in models if model.waiting]
    if len(waiting) < 2:
        return waiting
    least_ns = min(model.served_ns for model in waiting)

    def turn(model: ModelQueue) -> tuple[bool, int, int, ModelKey]:
        had_more = model.served_ns > least_ns + _UNFAIR_AT_MOST_NS
        anchor = None if had_more else model.most_urgent(now_ns)
        urgency_ns = anchor.deadline_ns if anchor is not None else 1 << 62
        return had_more, urgency_ns, model.served_ns, model.key

    return sorted(waiting, key=turn)


def rivals(model: ModelQueue, others: Sequence[ModelQueue]) -> list[ModelQueue]:
    """Of the other models those with work waiting that have had no more executor time: whom a batch would hold up."""
    return [other for other in others if other.queues and other.served_ns <= model.served_ns]


def load_of(models: Iterable[ModelQueue], now_ns: int, executors: int) -> float:
    """The share of all executor time that the arrivals of these models take."""
    return sum(model.utilisation(now_ns, executors) for model in models)


def held_until_ns(model: ModelQueue, now_ns: int) -> int | None:
    """Until when a batch may wait to grow: the configured delay, unless it is full or somebody has no time left."""
    if not model.max_queue_delay_ns:
        return None
    fastest = model.fastest(model.eligible)
    if fastest is None or model.regular.samples >= model.latency.max_batch_size(fastest):
        return None
    oldest_ns = min(request.arrival_ns for request in model.regular)  # fewer wait than fill a batch
    full_batch_ns = model.latency.crowded_ns(fastest, model.latency.max_batch_size(fastest))
    hopeless_ns = model.soonest_hopeless_ns()
    latest_ns = now_ns if hopeless_ns is None else hopeless_ns - full_batch_ns
    return min(oldest_ns + model.max_queue_delay_ns, latest_ns)
