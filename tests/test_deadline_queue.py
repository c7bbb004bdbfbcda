from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.scheduling.deadline_queue import DeadlineList, DeadlineQueue
from server.scheduling.slo import ModelKey, OnInfeasible, Request


def request(number: int, *, order_ns: int = 0, deadline_ns: int = 0, samples: int = 1) -> Request:
    """A request of which only its place, deadline and size matter."""
    return Request(
        number=number,
        model=ModelKey("m", "1"),
        allowed=1,
        asked=1,
        fallback=0,
        samples=samples,
        size_bytes=1,
        arrival_ns=0,
        deadline_ns=deadline_ns,
        order_ns=order_ns,
        weight=1.0,
        shape=(8,),
        on_infeasible=(OnInfeasible.REJECT,),
        pinned=False,
    )


def test_a_queue_is_sorted_by_order_and_then_by_number() -> None:
    """Ties in order go to whoever came first, whatever the order of insertion."""
    queue = DeadlineQueue()
    for number, order_ns in [(3, 5), (1, 9), (2, 5), (0, 9)]:
        queue.add(request(number, order_ns=order_ns))
    assert [entry[2].number for entry in queue.entries] == [2, 3, 0, 1]
    assert queue.first().number == 2


def test_discarding_takes_out_exactly_that_request() -> None:
    """Equal orders do not confuse one request with another, and the samples are kept in step."""
    queue = DeadlineQueue()
    requests = [request(number, order_ns=7, samples=number + 1) for number in range(4)]
    for one in requests:
        queue.add(one)
    queue.discard(requests[2])
    assert [entry[2] for entry in queue.entries] == [requests[0], requests[1], requests[3]]
    assert queue.samples == 1 + 2 + 4


def test_discarding_a_stranger_is_a_bug_that_says_so() -> None:
    """A request that is not queued, or is queued elsewhere under equal keys, raises KeyError."""
    queue = DeadlineQueue()
    queue.add(request(1, order_ns=7))
    for stranger in (request(1, order_ns=7), request(2, order_ns=7), request(0, order_ns=9)):
        with pytest.raises(KeyError, match="not queued"):
            queue.discard(stranger)


def test_a_newcomer_with_an_equal_order_waits_behind() -> None:
    """`ahead_of` counts ties as ahead, since the newcomer has the higher number."""
    queue = DeadlineQueue()
    for number, order_ns in enumerate([1, 5, 5, 8]):
        queue.add(request(number, order_ns=order_ns))
    assert [queue.ahead_of(order_ns) for order_ns in (0, 1, 4, 5, 8, 9)] == [0, 1, 1, 3, 4, 4]


def test_the_soonest_deadline_is_first_whoever_left() -> None:
    """After requests left in any order the least deadline is found, and ties go by number."""
    waiting = DeadlineList()
    requests = [request(number, deadline_ns=deadline_ns) for number, deadline_ns in enumerate([5, 3, 3, 9])]
    for one in requests:
        waiting.add(one)
    for gone, left in [(0, 1), (1, 2), (2, 3)]:
        waiting.discard(requests[gone])
        assert waiting.soonest() is requests[left]


def test_the_soonest_deadline_from_an_instant_on() -> None:
    """Deadlines before the instant are passed over; one at the instant counts."""
    waiting = DeadlineList()
    requests = [request(number, deadline_ns=deadline_ns) for number, deadline_ns in enumerate([5, 3, 9])]
    for one in requests:
        waiting.add(one)
    assert [waiting.soonest(instant) for instant in (0, 4, 5, 6, 10)] == [
        requests[1], requests[0], requests[0], requests[2], None
    ]  # fmt: skip


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.booleans()), max_size=60))
def test_both_orders_agree_with_a_plain_sorted_list(steps: list[tuple[int, int, bool]]) -> None:
    """After any mixture of additions and removals, both structures hold what a sorted list would."""
    queue, by_deadline, waiting = DeadlineQueue(), DeadlineList(), list[Request]()
    for number, (order_ns, deadline_ns, leaves) in enumerate(steps):
        if leaves and waiting:
            gone = waiting.pop(order_ns % len(waiting))
            queue.discard(gone)
            by_deadline.discard(gone)
        else:
            waiting.append(request(number, order_ns=order_ns, deadline_ns=deadline_ns, samples=1 + number % 3))
            queue.add(waiting[-1])
            by_deadline.add(waiting[-1])
        by_order = sorted(waiting, key=lambda one: (one.order_ns, one.number))
        assert [entry[2] for entry in queue.entries] == by_order
        assert queue.samples == sum(one.samples for one in waiting)
        assert len(by_deadline) == len(waiting)
        if waiting:
            assert by_deadline.soonest() is min(waiting, key=lambda one: (one.deadline_ns, one.number))
