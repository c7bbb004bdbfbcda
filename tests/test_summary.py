"""The last words of a build: which runtime counts, what pays, and what a person is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from report_fixtures import card, evidence
from rich.console import Console

from benchmarks import techniques
from variants.measurements import EAGER, Measured, Measurements
from variants.model_config import GateConfig
from variants.summary import Speed, not_worth_keeping, proven_drop, sentences, speeds, table
from variants.variant import REFERENCE, Card, LatencyProfile, Verdict

GATE = GateConfig(max_accuracy_drop=0.02, min_agreement=0.95)


def latencies(*us: int) -> Measured:
    """Measured at batch sizes 1, 8 and 32, or the first of them."""
    return Measured(LatencyProfile((1, 8, 32)[: len(us)], tuple(each * 1000 for each in us)))


def measured(**variants: Mapping[str, Measured]) -> Measurements:
    """Measurements of variants by runtime, beside fp32 with 100, 400 and 1200 µs."""
    return Measurements("a CPU", "a host", {REFERENCE: {"onnxruntime": latencies(100, 400, 1200)}, **variants})


def with_runtimes(name: str, **drops: float) -> Card:
    """A card with a drop by runtime."""
    return replace(card(name), runtimes={runtime: evidence(drop) for runtime, drop in drops.items()})


FP32 = card(REFERENCE)


def test_speed_ups_are_over_fp32_on_onnx_runtime() -> None:
    """By batch size, on the runtime with the least time per sample; fp32 itself may be faster elsewhere."""
    found = speeds(
        measured(
            int8={"onnxruntime": latencies(50, 100, 600), "openvino": latencies(200, 100, 100)},
            fp32={"onnxruntime": latencies(100, 400, 1200), "openvino": latencies(80, 200, 600)},
        ),
        {"fp32": with_runtimes("fp32", onnxruntime=0, openvino=0), "int8": card("int8")},
    )
    assert found["int8"] == Speed("onnxruntime", {1: 2.0, 8: 4.0, 32: 2.0})
    assert found["fp32"] == Speed("openvino", {1: 1.25, 8: 2.0, 32: 2.0})


def test_a_runtime_that_fails_the_gate_does_not_count() -> None:
    """The faster one loses too much: the speed is that of the one that passes; without a gate it would count."""
    values = measured(v={"onnxruntime": latencies(90, 300, 900), "openvino": latencies(10, 30, 90)})
    cards = {"fp32": FP32, "v": with_runtimes("v", onnxruntime=0.01, openvino=0.3)}
    assert speeds(values, cards, GATE)["v"].runtime == "onnxruntime"
    assert speeds(values, cards)["v"].runtime == "openvino"
    rejected = replace(cards["v"], gate=replace(cards["v"].gate, verdict=Verdict.REJECTED))
    assert speeds(values, {**cards, "v": rejected}, GATE)["v"].runtime == "openvino", "none passes: all are shown"


def test_the_module_itself_is_nobodys_speed() -> None:
    """However fast torch runs the source's module, fp32 is not served that way."""
    values = measured(fp32={"onnxruntime": latencies(100, 400, 1200), EAGER: latencies(1, 4, 12)})
    assert speeds(values, {"fp32": FP32})["fp32"] == Speed("onnxruntime", {1: 1.0, 8: 1.0, 32: 1.0})


def test_what_runs_alone_gains_nothing_from_batches() -> None:
    """Eight samples take eight runs where batch-mates would change an answer: proven so, or said by the recipe."""
    values = measured(v={"onnxruntime": latencies(50, 60, 70)})
    alone = replace(card("v"), runtimes={"onnxruntime": replace(evidence(0), batch_invariance=0.1)})
    said = replace(card("v"), runtimes={}, requirements={"solo": True})
    for each in (alone, said):
        assert speeds(values, {"fp32": FP32, "v": each})["v"].speed_ups == {1: 2.0, 8: 1.0, 32: 0.75}


@pytest.mark.parametrize(
    ("us", "no_benefit"),
    [((400, 900, 2000), True), ((98, 399, 1190), True), ((96, 900, 2000), False), ((400, 900, 1100), False)],
)
def test_nowhere_faster_is_no_benefit(us: tuple[int, int, int], no_benefit: bool) -> None:
    """One batch size where it is faster by more than noise is a benefit."""
    values = measured(v={"onnxruntime": latencies(*us)})
    assert speeds(values, {"fp32": FP32, "v": card("v")})["v"].no_benefit is no_benefit


def test_benefit_is_over_fp32_as_it_is_served() -> None:
    """Faster than fp32 on ONNX Runtime and slower than fp32 on OpenVINO, which a server would take: no benefit."""
    fp32 = {"onnxruntime": latencies(100, 400, 1200), "openvino": latencies(20, 80, 240)}
    cards = {"fp32": with_runtimes("fp32", onnxruntime=0, openvino=0), "v": card("v")}
    found = speeds(measured(fp32=fp32, v={"onnxruntime": latencies(50, 200, 600)}), cards)
    assert found["v"] == Speed("onnxruntime", {1: 2.0, 8: 2.0, 32: 2.0}, no_benefit=True)
    assert "v passed, but of no benefit here: nowhere faster than fp32 on openvino (0.40x at batch 1, " in " ".join(
        sentences(cards, found)
    )


def test_slower_and_proven_better_is_of_benefit() -> None:
    """A variant that is more accurate than fp32 for sure may be slower: a request may ask for it."""
    values = measured(v={"onnxruntime": latencies(200, 800, 2400)})
    assert not speeds(values, {"fp32": FP32, "v": card("v", drop=-0.01)})["v"].no_benefit
    assert speeds(values, {"fp32": FP32, "v": card("v", drop=-0.001)})["v"].no_benefit, "not for sure"


def test_without_fp32_nothing_is_compared() -> None:
    """A damaged reference leaves no speeds, and a variant that was not measured has none."""
    values = measured(v={"onnxruntime": latencies(50, 200, 600)})
    assert speeds(values, {"v": card("v")}) == {}
    assert set(speeds(values, {"fp32": FP32, "w": card("w")})) == {"fp32"}


CARDS = {
    "fp32": FP32,
    "fast": card("fast"),
    "mixed": card("mixed", drop=0.008),
    "slow": card("slow"),
    "lost": card("lost", 0.3, Verdict.REJECTED),
    "unmade": card("unmade", None, Verdict.REJECTED, made=False),
}
FOUND = {
    "fp32": Speed("onnxruntime", {1: 1.0, 32: 1.0}),
    "fast": Speed("openvino", {1: 3.0, 32: 4.0}),
    "mixed": Speed("onnxruntime", {1: 0.5, 32: 5.0}),
    "slow": Speed("onnxruntime", {1: 0.25, 32: 0.9}, no_benefit=True),
}


def test_the_table_says_what_pays() -> None:
    """One row per variant, fp32 first: verdict, no benefit where there is none, speed-ups and the runtime."""
    console = Console(width=200, color_system=None)
    with console.capture() as capture:
        console.print(table(CARDS, FOUND, "digits version 1"))
    lines = [line.split() for line in capture.get().splitlines()]
    assert capture.get().startswith("digits version 1")
    rows = {line[0]: " ".join(line) for line in lines[2:]}
    assert list(rows) == ["fp32", "fast", "lost", "mixed", "slow", "unmade"]
    assert rows["slow"].startswith("slow passed, no benefit 0.9700")
    assert rows["slow"].endswith("0.25x 0.90x onnxruntime")
    assert rows["fast"].startswith("fast passed 0.9700")
    assert rows["fast"].endswith("3.00x 4.00x openvino")
    assert rows["unmade"] == "unmade rejected - - - - - -"


def test_sentences_tell_what_did_not_pay_and_what_it_cost() -> None:
    """Only what harms is told: no benefit, slower at some batch size, and a proven loss of accuracy."""
    ratios = "0.25x at batch 1, 0.90x at batch 32"
    assert sentences(CARDS, FOUND) == [
        f"slow passed, but of no benefit here: nowhere faster than fp32 on onnxruntime ({ratios}).",
        "mixed is at some batch sizes slower than fp32 on onnxruntime (0.50x at batch 1).",
        "lost is measurably less accurate than fp32: it loses 30.00% on onnxruntime.",
        "mixed is measurably less accurate than fp32: it loses 0.80% on onnxruntime.",
    ]
    assert sentences(CARDS, {}) == sentences(CARDS, FOUND)[2:], "nothing was measured: nothing is said of speed"


def proven(name: str, drop: float, verdict: Verdict = Verdict.PASSED, **elsewhere: float) -> Card:
    """A card whose drop is proven to be at most `drop` on ONNX Runtime, and at most others on other runtimes."""
    drops = {"onnxruntime": drop, **elsewhere}
    return replace(card(name, 0.0, verdict), runtimes={on: evidence(at, 0.0) for on, at in drops.items()})


def test_what_is_worth_keeping_is_the_pareto_front() -> None:
    """A variant falls where another is proven as accurate and no slower at any batch size; a failed one says why."""
    given = {
        "fp32": proven("fp32", 0.0),
        "fast": proven("fast", 0.01),
        "worse": proven("worse", 0.02),
        "fastest": proven("fastest", 0.02),
        "slow": proven("slow", 0.005),
        "bad": proven("bad", 0.5, Verdict.REJECTED),
        "homeless": proven("homeless", 0.001),
    }
    found = {
        "fp32": Speed("onnxruntime", {1: 1.0, 32: 1.0}),
        "fast": Speed("onnxruntime", {1: 3.0, 32: 3.0}),
        "worse": Speed("onnxruntime", {1: 2.0, 32: 3.08}),
        "fastest": Speed("onnxruntime", {1: 2.0, 32: 9.0}),
        "slow": Speed("onnxruntime", {1: 0.5, 32: 1.01}, no_benefit=True),
        "bad": Speed("onnxruntime", {1: 9.0, 32: 9.0}),
    }
    assert not_worth_keeping(given, found) == {
        "worse": "passed, but fast is no slower and proven as accurate",
        "slow": "passed, but of no benefit here: nowhere faster than fp32 on onnxruntime "
        "(0.50x at batch 1, 1.01x at batch 32)",
        "bad": "rejected: it loses too much",
        "homeless": "passed, but no runtime that it passed on is fast here",
    }


def test_the_bound_decides_not_the_value() -> None:
    """One that measured better but is proven less does not push out the other."""
    wide = replace(card("wide"), runtimes={"onnxruntime": evidence(0.0, width=0.02)})
    narrow = replace(card("narrow"), runtimes={"onnxruntime": evidence(0.001, width=0.004)})
    found = {name: Speed("onnxruntime", {1: speed}) for name, speed in (("fp32", 1.0), ("wide", 4.0), ("narrow", 3.0))}
    assert not_worth_keeping({"fp32": FP32, "wide": wide, "narrow": narrow}, found) == {}
    assert proven_drop(wide, "onnxruntime") > proven_drop(narrow, "onnxruntime")


def test_drop_and_speed_are_one_runtimes() -> None:
    """A variant that is fast where it is worse does not push out one that is better there."""
    given = {name: proven(name, drop) for name, drop in (("fp32", 0.0), ("honest", 0.005))}
    given["two-faced"] = proven("two-faced", 0.001, openvino=0.02)
    found = {
        "fp32": Speed("onnxruntime", {1: 1.0}),
        "two-faced": Speed("openvino", {1: 4.0}),
        "honest": Speed("onnxruntime", {1: 4.0}),
    }
    assert set(not_worth_keeping(given, found)) == {"two-faced"}


def test_without_a_speed_of_fp32_only_verdicts_are_reasons() -> None:
    """A rejection keeps its own reason, and what passed has nothing against it."""
    given = {"fp32": FP32, "bad": card("bad", 0.5, Verdict.REJECTED), "good": card("good")}
    assert not_worth_keeping(given, {}) == {"bad": "rejected: it loses too much"}


def test_the_benchmarks_table_is_ordered_by_speed_and_its_best_is_of_benefit() -> None:
    """At the largest batch; what gains nothing over fp32 as it is served is no technique to name."""
    given = {name: card(name) for name in ("fp32", "a-slow", "b-fast", "unmeasured")}
    found = {
        "fp32": Speed("openvino", {1: 6.0, 8: 6.0, 32: 6.0}),
        "a-slow": Speed("onnxruntime", {1: 4.5, 8: 4.5, 32: 1.1}, no_benefit=True),
        "b-fast": Speed("onnxruntime", {1: 2.0, 8: 3.0, 32: 7.0}),
    }
    rows = [row.split()[1] for row in list(techniques.table(given, found))[2:]]
    assert rows == ["fp32", "b-fast", "a-slow", "unmeasured"]
    assert "−0.4" in "".join(techniques.table(given, found))
    assert techniques.best(given, found, 4.0).startswith("Best verified: b-fast, ")
    assert techniques.best(given, {"a-slow": found["a-slow"]}, 4.0).startswith(
        "No variant passed the gate and is of benefit"
    )


def test_of_equal_proofs_the_faster_one_counts() -> None:
    """Noise at one batch size does not save a variant that another outruns."""
    values = measured(slow={"onnxruntime": latencies(100, 200, 400)}, fast={"onnxruntime": latencies(50, 100, 405)})
    cards = {"fp32": FP32, "slow": card("slow"), "fast": card("fast")}
    assert list(not_worth_keeping(cards, speeds(values, cards))) == ["slow"]
