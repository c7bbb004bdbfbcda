from __future__ import annotations

import pytest
from scheduling_models import MS, Arrival, ask, model_of, slo

from server.scheduling.model_queue import ModelQueue
from server.scheduling.patience import Patience

SECOND = 1000 * MS


def seen(*latencies_ms: float, gap_ns: int = 10 * MS) -> tuple[ModelQueue, Patience, int]:
    """What is remembered of requests that came one after the other, and the instant of the last."""
    model, patience = model_of(), Patience()
    for number, latency_ms in enumerate(latencies_ms):
        patience.arrived(ask(model, Arrival(number * gap_ns, slo(latency_ms)), number), number * gap_ns)
    return model, patience, (len(latencies_ms) - 1) * gap_ns


def laxity_ms(model: ModelQueue, patience: Patience, now_ns: int, within_ms: float = 100) -> float | None:
    """The least laxity in milliseconds, for batches of so long."""
    found = patience.laxity_ns(model.quickest_ns, now_ns, int(within_ms * MS))
    return None if found is None else found / MS


def test_nothing_seen_leaves_all_the_time() -> None:
    """Without traffic nobody need be kept in mind."""
    model, patience, _ = seen()
    assert laxity_ms(model, patience, 0) is None


def test_the_tightest_of_those_expected_counts() -> None:
    """Ten in a tenth of a second with 30 and 300 ms: the tighter kind decides, less its fastest run."""
    model, patience, now_ns = seen(*[30, 300] * 10)
    quickest = model.quickest_ns(0b11111, 1)
    assert quickest is not None
    assert laxity_ms(model, patience, now_ns) == pytest.approx(30 - quickest / MS)


def test_a_lone_tight_request_is_no_reason_to_hold_anything_back() -> None:
    """One a second does not come within a batch of a few milliseconds; in one of a second it may."""
    model, patience, now_ns = seen(8, 8, 8, gap_ns=SECOND)
    assert laxity_ms(model, patience, now_ns, within_ms=8) is None
    assert laxity_ms(model, patience, now_ns, within_ms=1000) is not None


def test_who_is_too_tight_for_anything_does_not_stand_in_the_way_of_others() -> None:
    """Where nothing that could run leaves room for the tightest, the next tightest decides."""
    model, patience, now_ns = seen(*[30, 100] * 10)
    found = patience.laxity_ns(model.quickest_ns, now_ns, 100 * MS, least_ns=40 * MS)
    assert found is not None
    assert found > 40 * MS


def test_a_new_kind_counts_at_once() -> None:
    """The first tight request is kept in mind although the laxities were worked out only just now."""
    model, patience, now_ns = seen(*[300] * 10)
    before = laxity_ms(model, patience, now_ns)
    patience.arrived(ask(model, Arrival(now_ns, slo(30)), 99), now_ns)
    after = laxity_ms(model, patience, now_ns)
    assert before is not None
    assert after is not None
    assert after < before


def test_what_is_long_gone_is_forgotten() -> None:
    """A rush of tight requests does not bind the traffic of ten seconds later."""
    model, patience, now_ns = seen(*[30] * 50)
    assert laxity_ms(model, patience, now_ns + 10 * SECOND) is None


def test_kinds_are_bounded() -> None:
    """Clients who ask for something new each time leave no more than a few kinds behind."""
    model, patience = model_of(), Patience()
    for number in range(1000):
        arrival = Arrival(number * MS, slo(2 ** (number % 30) / 1e3 + 20), samples=1 + number % 16)
        patience.arrived(ask(model, arrival, number), arrival.at_ns)
    assert len(patience._kinds) <= 64
