"""The waiting requests of a model in every order: the orders agree, and what is empty is forgotten."""

from __future__ import annotations

import pytest
from scheduling_models import MS, Arrival, ask, model_of, slo

from server.scheduling.slo import Request
from server.scheduling.waiting import Waiting


def requests(*arrivals: Arrival) -> list[Request]:
    """Requests that are not queued yet, numbered in order."""
    model = model_of()
    return [ask(model, arrival, number) for number, arrival in enumerate(arrivals)]


def test_a_request_is_found_by_shape_and_by_class() -> None:
    """Two shapes of one class are two queues of one class; another floor is another class."""
    first, second, strict = requests(
        Arrival(0, slo(50), shape=(8,)), Arrival(0, slo(40), shape=(9,)), Arrival(0, slo(60, 0.913), shape=(8,))
    )
    waiting = Waiting()
    for request in (first, second, strict):
        waiting.add(request)
    assert {key: len(queue) for key, queue in waiting.queues.items()} == {
        (first.allowed, (8,)): 1,
        (first.allowed, (9,)): 1,
        (strict.allowed, (8,)): 1,
    }
    assert {shape: set(each) for shape, each in waiting.by_shape.items()} == {
        (8,): {first.allowed, strict.allowed},
        (9,): {first.allowed},
    }
    assert waiting.by_shape[(8,)][first.allowed] is waiting.queues[first.allowed, (8,)] is first.queue
    assert {key: (len(each), each.shapes) for key, each in waiting.classes.items()} == {
        (first.allowed, 0): (2, 2),
        (strict.allowed, 0): (1, 1),
    }
    assert waiting.first() is second
    assert set(waiting) == {first, second, strict}


def test_counts_follow_what_is_added_and_taken_out() -> None:
    """Requests, samples and bytes add up at every moment."""
    one, other = requests(Arrival(0, slo(50), samples=3, size_bytes=7), Arrival(0, slo(50), samples=2, size_bytes=5))
    waiting = Waiting()
    waiting.add(one)
    waiting.add(other)
    assert (len(waiting), waiting.samples, waiting.size_bytes) == (2, 5, 12)
    waiting.remove(one)
    assert (len(waiting), waiting.samples, waiting.size_bytes) == (1, 2, 5)
    assert (one.queue, waiting.first()) == (None, other)


def test_ten_thousand_shapes_leave_nothing_behind() -> None:
    """Shapes are the clients' to choose, so each is forgotten with its last request."""
    waiting, many = Waiting(), requests(*[Arrival(0, slo(50), shape=(size,)) for size in range(10_000)])
    for request in many:
        waiting.add(request)
    assert next(iter(waiting.classes.values())).shapes == len(waiting.by_shape) == len(waiting.queues) == 10_000
    for request in many[:-1]:
        waiting.remove(request)
    assert next(iter(waiting.classes.values())).shapes == len(waiting.by_shape) == len(waiting.queues) == 1
    waiting.remove(many[-1])
    assert (waiting.queues, waiting.by_shape, waiting.classes) == ({}, {}, {})


def test_a_request_that_is_tried_again_is_a_shape_of_its_own() -> None:
    """Of two equal requests the one that must run alone shares neither queue nor shape, but the class."""
    one, alone = requests(Arrival(0, slo(50)), Arrival(0, slo(50)))
    alone.solo = True
    waiting = Waiting()
    waiting.add(one)
    waiting.add(alone)
    assert len(waiting.queues) == len(waiting.by_shape) == 2
    assert waiting.classes[one.allowed, 0].shapes == 2


def test_ties_go_to_whoever_came_first() -> None:
    """Equal deadlines are served in the order of arrival, whatever the order of queueing."""
    one, other = requests(Arrival(0, slo(50)), Arrival(0, slo(50)))
    waiting = Waiting()
    waiting.add(other)
    waiting.add(one)
    assert waiting.first() is one


def test_taking_out_what_does_not_wait_is_an_error() -> None:
    """Neither a stranger nor one that was taken out before is ignored; nor is there a first of nobody."""
    one, other = requests(Arrival(0, slo(50)), Arrival(0, slo(int(50 + MS // MS))))
    waiting = Waiting()
    with pytest.raises(ValueError, match="empty"):
        waiting.first()
    waiting.add(one)
    with pytest.raises(KeyError, match="not queued"):
        waiting.remove(other)
    waiting.remove(one)
    with pytest.raises(KeyError):
        waiting.remove(one)
