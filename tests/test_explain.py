"""Explanations: the policy is asked for real, and asking changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from server.errors import NotFound
from server.scheduling.admission import Defaults, Load, make_request
from server.scheduling.explain import Explanation, explain
from server.scheduling.model_queue import REPLY_RESERVE_NS, ModelQueue
from server.scheduling.policies.fitdrain import FitDrain
from server.scheduling.slo import ModelKey, OnInfeasible, Slo
from variants.variant import Interval, LatencyProfile, State, Variant

MS = 1_000_000
NOW = 1_000_000 * MS


def variant(name: str, latency_ms: float, drop: float, state: State = State.ELIGIBLE) -> Variant:
    """A measured variant whose score is what `drop` leaves of 0.9."""
    score, base = 0.9 - drop, int(latency_ms * MS)
    profile = LatencyProfile((1, 8), (base, base * 4))
    found = Interval(score, score, score), Interval(drop, drop, drop)
    return Variant(name, state, f"is {state}", "fp32", "onnxruntime", "cpu", *found, profile)


FP32, INT8, SLOW = variant("fp32", 10, 0.0), variant("int8", 2, 0.01), variant("slow", 30, 0.0, State.NO_BENEFIT)
ABSENT = replace(variant("amp", 1, 0.0, State.UNSUPPORTED), profile=None)
VARIANTS = (FP32, INT8, SLOW, ABSENT)
DEFAULTS = Defaults(latency_ns=1000 * MS)


def ask(slo: Slo, *, busy_ms: float = 0, queue: ModelQueue | None = None, defaults: Defaults = DEFAULTS) -> Explanation:
    """Explain on a server with one executor that is busy for so long."""
    load = Load(NOW, [NOW + int(busy_ms * MS)], 0, 10**9)
    return explain(queue or ModelQueue(ModelKey("m", "1"), VARIANTS), VARIANTS, slo, defaults, load, FitDrain())


def whys(explanation: Explanation) -> Mapping[str, str]:
    """Every variant's reason."""
    return {standing.variant: standing.why for standing in explanation.standings}


def test_an_idle_server_gives_the_most_accurate() -> None:
    """And says for each other variant why not."""
    found = ask(Slo())
    assert found.variant == "fp32"
    assert whys(found)["fp32"] == "chosen"
    assert whys(found)["slow"] == "no_benefit: is no_benefit"
    assert whys(found)["amp"] == "unsupported: is unsupported"
    assert {s.variant: s.allowed for s in found.standings} == {"fp32": True, "int8": True, "slow": False, "amp": False}
    assert [s.variant for s in found.standings] == [v.name for v in VARIANTS]


def test_a_tight_budget_gives_the_faster() -> None:
    """With 6 ms only int8 fits, and fp32 is said to be too slow."""
    found = ask(Slo(latency_ns=6 * MS))
    assert found.variant == "int8"
    assert whys(found)["fp32"].startswith("too slow: predicted 11.80 ms, the budget is 6.00 ms")


def test_a_floor_excludes() -> None:
    """A variant below the floor is not allowed, with what is proven of it."""
    for slo in (Slo(max_accuracy_drop=0.0), Slo(min_accuracy=0.895)):
        found = ask(slo)
        assert found.variant == "fp32"
        assert whys(found)["int8"] == "below the floor: proven accuracy 0.8900, proven drop 0.0100"
        assert not next(s for s in found.standings if s.variant == "int8").allowed


def test_an_impossible_wish_is_refused_as_the_request_would_be() -> None:
    """No variant is chosen, and the reason is the refusal's text with what could be had."""
    found = ask(Slo(latency_ns=MS // 2))
    assert found.variant is None
    assert "even when idle" in found.reason
    assert "achievable here: fp32" in found.reason
    assert ask(Slo(min_accuracy=0.99)).variant is None


def test_a_busy_server_refuses_or_is_late_as_asked() -> None:
    """Behind 100 ms of work a request for 20 ms is refused; one that accepts to be late gets the fastest."""
    refused = ask(Slo(latency_ns=20 * MS), busy_ms=100)
    assert refused.variant is None
    assert "too busy" in refused.reason
    late = ask(Slo(latency_ns=20 * MS, on_infeasible=(OnInfeasible.LATE,)), busy_ms=100)
    assert (late.variant, late.reason) == ("int8", "late")


def test_a_soft_floor_is_degraded() -> None:
    """A soft floor that the latency makes impossible gives the faster variant and says so."""
    slo = Slo(latency_ns=6 * MS, max_accuracy_drop=0.0, hard=False, on_infeasible=(OnInfeasible.DEGRADE,))
    found = ask(slo)
    assert (found.variant, found.reason) == ("int8", "degraded")
    assert whys(found)["int8"] == "chosen"


def test_a_pin() -> None:
    """A pinned variant answers although it takes no other traffic; an unknown one is refused."""
    found = ask(Slo(variant="slow"))
    assert found.variant == "slow"
    assert whys(found)["fp32"] == "the request pins slow"
    with pytest.raises(NotFound):
        ask(Slo(variant="nope"))


def test_the_models_own_floor_shows() -> None:
    """A request that names no floor is judged by the model's, and so are the explanations of the others."""
    found = ask(Slo(), defaults=Defaults(latency_ns=1000 * MS, max_accuracy_drop=0.005))
    assert found.variant == "fp32"
    assert whys(found)["int8"].startswith("below the floor")


def test_a_disabled_variant() -> None:
    """What an operator disabled is said to be disabled."""
    queue = ModelQueue(ModelKey("m", "1"), VARIANTS)
    queue.set_states({**queue.states, "fp32": State.DISABLED})
    found = ask(Slo(), queue=queue)
    assert found.variant == "int8"
    assert whys(found)["fp32"].startswith("disabled")


def test_asking_leaves_no_trace() -> None:
    """The queue, its backlog and its forecast are what they were."""
    queue = ModelQueue(ModelKey("m", "1"), VARIANTS)
    waiting = make_request(queue, Slo(), DEFAULTS, number=1, samples=1, size_bytes=8, shape=(2,), arrival_ns=NOW - MS)
    queue.add(waiting)

    def state() -> tuple[object, ...]:
        classes = {key: list(each.entries) for key, each in queue.queues.items()}
        return queue.waiting, queue.waiting_bytes, queue.typical_budget_ns, classes, dict(queue.late.queues)

    before = state()
    for slo in (Slo(), Slo(latency_ns=6 * MS), Slo(latency_ns=1), Slo(variant="slow"), Slo(min_accuracy=2.0)):
        ask(slo, queue=queue)
    assert state() == before


def test_asking_while_somebody_waits_for_a_variant_that_went() -> None:
    """The end of a request whose pinned variant was just disabled is due; the question is answered all the same."""
    queue = ModelQueue(ModelKey("m", "1"), VARIANTS)
    waiting = make_request(
        queue, Slo(variant="int8"), DEFAULTS, number=1, samples=1, size_bytes=0, shape=(), arrival_ns=NOW - MS
    )
    queue.add(waiting)
    queue.set_states({**queue.states, "int8": State.DISABLED})
    assert ask(Slo(), queue=queue).variant == "fp32"


def test_behind_others_the_answer_is_still_about_this_request() -> None:
    """A more urgent request that waits does not decide which variant is named, least of all below a hard floor."""
    queue = ModelQueue(ModelKey("m", "1"), VARIANTS)
    urgent = make_request(
        queue, Slo(latency_ns=5 * MS), DEFAULTS, number=1, samples=1, size_bytes=0, shape=(), arrival_ns=NOW
    )
    queue.add(urgent)
    found = ask(Slo(latency_ns=500 * MS, max_accuracy_drop=0.0), queue=queue)
    assert (found.variant, found.reason) == ("fp32", "queue")
    assert queue.waiting == 1


def test_where_long_inputs_wait_the_question_is_about_a_long_one() -> None:
    """A long input takes fp32 80 ms instead of 10: in 60 ms int8 answers where such a one waits, else fp32."""
    variants = []
    for each, slower in ((FP32, variant("fp32", 80, 0)), (INT8, variant("int8", 16, 0))):
        assert each.profile is not None
        assert slower.profile is not None
        variants.append(replace(each, lengths=((100, each.profile), (400, slower.profile))))
    for length, answers in ((100, "fp32"), (400, "int8")):
        queue = ModelQueue(ModelKey("m", "1"), variants)
        waiting = make_request(
            queue, Slo(), DEFAULTS, number=1, samples=1, size_bytes=0, shape=(length,), arrival_ns=NOW, length=length
        )
        queue.add(waiting)
        found = ask(Slo(latency_ns=60 * MS), queue=queue)
        assert found.variant == answers
        reference = next(standing for standing in found.standings if standing.variant == "fp32")
        assert reference.latency_ns == queue.latency.predict_ns(0, 1, waiting.step) + REPLY_RESERVE_NS
