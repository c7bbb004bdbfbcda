"""Which variants may take traffic, from verdicts and profiles alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from server.eligibility import by_speed, by_verdict, without
from variants.variant import Gate, Interval, LatencyProfile, State, Variant, Verdict


def variant(name: str, drop: float, *latencies_us: int, score: float = 0.9, batchable: bool = True) -> Variant:
    """An eligible variant measured at batch sizes 1, 2, 4 and so on."""
    profile = LatencyProfile(tuple(1 << n for n in range(len(latencies_us))), tuple(us * 1000 for us in latencies_us))
    return Variant(
        name,
        State.ELIGIBLE,
        "passed",
        "fp32",
        "onnxruntime",
        "cpu",
        Interval(score, score, score),
        Interval(drop, drop, drop),
        profile,
        batchable,
    )


REFERENCE = variant("fp32", 0.0, 1000, 1800)


def states(*variants: Variant) -> dict[str, State]:
    """What `by_speed` makes of these."""
    return {judged.name: judged.state for judged in by_speed(variants)}


@pytest.mark.parametrize(
    ("verdict", "allowed", "state"),
    [
        (Verdict.PASSED, False, State.ELIGIBLE),
        (Verdict.REJECTED, False, State.REJECTED),
        (Verdict.INCONCLUSIVE, False, State.INCONCLUSIVE),
        (Verdict.UNVERIFIED, False, State.UNVERIFIED),
        (Verdict.UNVERIFIED, True, State.ELIGIBLE),
        (Verdict.REJECTED, True, State.REJECTED),
        (Verdict.INCONCLUSIVE, True, State.INCONCLUSIVE),
    ],
)
def test_the_verdict_gives_the_state(verdict: Verdict, allowed: bool, state: State) -> None:
    """Only what passed is eligible; the operator's word lets the unverified in, and nothing that failed."""
    found, reason = by_verdict("int8", Gate(verdict, "the gate's words"), allow_unverified=allowed)
    assert found is state
    assert "the gate's words" in reason


def test_the_reference_is_always_eligible() -> None:
    """Whatever its card says."""
    assert by_verdict("fp32", Gate(Verdict.UNVERIFIED, ""), allow_unverified=False)[0] is State.ELIGIBLE


def test_slower_than_the_reference_is_no_benefit() -> None:
    """Dynamic int8 on a CNN: proven, and of no use on this host; one batch size where it is faster is enough."""
    assert states(REFERENCE, variant("int8", 0.01, 4000, 7000))["int8"] is State.NO_BENEFIT
    assert states(REFERENCE, variant("int8", 0.01, 990, 1790))["int8"] is State.NO_BENEFIT, "1 % is noise"
    assert states(REFERENCE, variant("int8", 0.01, 900, 4000))["int8"] is State.ELIGIBLE


def test_only_what_is_really_served_counts_as_speed() -> None:
    """A variant that runs alone gains nothing from its batches, nor does it dominate a batching one by them."""
    assert states(REFERENCE, variant("lstm", 0.01, 1100, 1200, batchable=False))["lstm"] is State.NO_BENEFIT
    solo = variant("solo", 0.02, 400, 450, batchable=False)
    assert states(REFERENCE, variant("batching", 0.01, 380, 600), solo)["solo"] is State.DOMINATED


def test_slower_and_proven_better_is_eligible() -> None:
    """A variant that is proven more accurate than the reference may be slower."""
    assert states(REFERENCE, variant("qat", -0.01, 4000, 7000, score=0.95))["qat"] is State.ELIGIBLE


def test_dominated() -> None:
    """What another variant beats in accuracy and at every batch size takes no traffic."""
    better, worse = variant("static", 0.01, 300, 500), variant("pruned", 0.02, 600, 900, score=0.8)
    assert states(REFERENCE, better, worse) == {
        "fp32": State.ELIGIBLE,
        "static": State.ELIGIBLE,
        "pruned": State.DOMINATED,
    }
    judged = {v.name: v for v in by_speed([REFERENCE, better, worse])}
    assert judged["pruned"].reason.startswith("static is at least as accurate and faster")


def test_not_dominated_by_what_is_less_accurate_slower_somewhere_or_solo() -> None:
    """Domination needs all of accuracy, every batch size, and batches where the other can batch."""
    worse = variant("pruned", 0.02, 600, 900, score=0.8)
    for other in (
        variant("static", 0.03, 300, 500),
        variant("static", 0.01, 300, 1000),
        variant("static", 0.01, 300, 500, score=0.7),
        variant("static", 0.01, 300, 500, batchable=False),
    ):
        assert states(REFERENCE, other, worse)["pruned"] is State.ELIGIBLE


def test_what_only_a_disabled_variant_dominated_is_of_use_again() -> None:
    """Taken out by an operator, a variant puts nobody in the shade; put back, it does again."""
    family = by_speed([REFERENCE, variant("good", 0.01, 100, 180), variant("close", 0.011, 200, 300)])
    assert [v.state for v in family] == [State.ELIGIBLE, State.ELIGIBLE, State.DOMINATED]
    assert [v.state for v in without(family, {"good"})] == [State.ELIGIBLE, State.DISABLED, State.ELIGIBLE]
    assert [v.state for v in without(family, ())] == [v.state for v in family]


def test_equals_do_not_dominate_each_other() -> None:
    """Of twins at least one remains."""
    one = variant("a", 0.01, 300, 500)
    assert set(states(REFERENCE, one, replace(one, name="b")).values()) == {State.ELIGIBLE}


def test_what_is_not_eligible_neither_dominates_nor_is_judged() -> None:
    """A rejected variant keeps its state and its reason, however fast or slow."""
    rejected = replace(variant("static", 0.0, 100, 100), state=State.REJECTED, reason="the gate")
    judged = {v.name: v for v in by_speed([REFERENCE, rejected, variant("pruned", 0.02, 600, 900)])}
    assert (judged["static"].state, judged["static"].reason) == (State.REJECTED, "the gate")
    assert judged["pruned"].state is State.ELIGIBLE
