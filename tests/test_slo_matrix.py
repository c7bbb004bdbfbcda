"""The comparison's runs: what is asked of whom, and what is kept of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from scheduling_models import Arrival as Asked
from scheduling_models import model_of, queue_up, slo, variant

from benchmarks.slo.__main__ import main
from benchmarks.slo.ablation import choice, strict
from benchmarks.slo.family import MS, capacity_per_s, family
from benchmarks.slo.matrix import carry_out, group_of, measure, read
from benchmarks.slo.prefix import policy_named
from benchmarks.slo.scenarios import (
    APART,
    AZURE,
    BOUND,
    BY_CLASS,
    CLAIRVOYANT,
    OURS,
    PREFIX,
    RHOS,
    SYNTHETIC,
    Case,
    S,
    Scenario,
    arrivals,
    cases,
    setting,
)
from server.scheduling.model_queue import ModelQueue
from server.scheduling.policy import Choice, Moment
from server.trace import Arrival

SHORT = Scenario("main", "gamma 4", 0.6, seconds=2)


def test_capacity_counts_the_fastest_variant_in_batches_that_fit_half_of_the_slo() -> None:
    """16 in 52.8 ms per executor at 240 ms; at 60 ms only the 7 that take 27.6 ms."""
    assert capacity_per_s(240 * MS, 2) == pytest.approx(2 * 16 / 0.0528)
    assert capacity_per_s(60 * MS, 1) == pytest.approx(7 / 0.0276)


def test_every_case_is_there_once_and_its_policy_exists() -> None:
    """Ten seeds of every trace and load for what the targets are about; no case twice; no name misspelt."""
    found = cases(10, azure=True)
    assert len(set(found)) == len(found)
    ours = [case for case in found if case.scenario.section == "main" and case.policy == OURS]
    assert len(ours) == 10 * len(RHOS) * (len(SYNTHETIC) + 1)
    for policy in {case.policy for case in found} - {BOUND, CLAIRVOYANT}:
        policy_named(policy)()


def test_a_comparison_without_the_azure_file_leaves_that_trace_out() -> None:
    """Nothing else is left out with it."""
    with_it, without = cases(1, azure=True), cases(1, azure=False)
    assert [case for case in with_it if case.scenario.trace != AZURE] == without


def test_quick_is_a_taste_of_every_section() -> None:
    """Every section, never longer than 3 s."""
    quick, whole = cases(10, azure=True, quick=True), cases(10, azure=True)
    assert {case.scenario.section for case in quick} == {case.scenario.section for case in whole}
    assert max(case.scenario.seconds for case in quick) == 3


@pytest.mark.parametrize("trace", SYNTHETIC)
def test_a_trace_brings_the_load_that_its_scenario_names(trace: str) -> None:
    """Within a twentieth over six seeds, as every trace is random."""
    scenario = next(
        case.scenario for case in cases(1, azure=False) if (case.scenario.trace, case.scenario.rho) == (trace, 0.6)
    )
    counts = [len(arrivals(scenario, seed)) for seed in range(6)]
    assert sum(counts) / 6 == pytest.approx(0.6 * capacity_per_s(240 * MS, 2) * scenario.seconds, rel=0.05)


def test_arrivals_depend_on_scenario_and_seed_alone() -> None:
    """So all policies of a scenario see the same requests."""
    scenario = replace(SHORT, section="floors", floors=APART)
    assert arrivals(scenario, 3) == arrivals(scenario, 3)
    assert arrivals(scenario, 3) != arrivals(scenario, 4)


def test_the_azure_trace_needs_its_file() -> None:
    """Without one it is an error that names the flag, not an empty trace."""
    with pytest.raises(ValueError, match="--azure"):
        arrivals(replace(SHORT, trace=AZURE), 0)


def test_mixed_floors_come_in_their_shares_and_with_their_slos() -> None:
    """70, 20 and 10 %; by class each floor has one SLO, apart each has all three."""
    by_class = arrivals(Scenario("floors", "gamma 4", 0.5, floors=BY_CLASS), 0)
    apart = arrivals(Scenario("floors", "gamma 4", 0.5, floors=APART), 0)
    floors = Counter(arrival.slo.min_accuracy for arrival in by_class)
    assert [floors[floor] / len(by_class) for floor in (None, 0.90, 0.9115)] == pytest.approx([0.7, 0.2, 0.1], abs=0.02)
    assert len({(arrival.slo.min_accuracy, arrival.latency_ns) for arrival in by_class}) == 3
    assert len({(arrival.slo.min_accuracy, arrival.latency_ns) for arrival in apart}) == 9


def test_losses_kill_half_of_four_executors_for_the_middle_third() -> None:
    """Nowhere else does anything die."""
    scenario = Scenario("loss", "poisson", 0.4, seconds=30)
    losses = setting(scenario).losses
    assert [(loss.executor, loss.at_ns, loss.for_ns) for loss in losses] == [(2, 10 * S, 10 * S), (3, 10 * S, 10 * S)]
    assert not setting(SHORT).losses


@pytest.mark.parametrize(
    ("at_ms", "group"),
    [
        (9_700, "all there"),
        (9_900, "within one SLO of the loss"),
        (10_200, "within one SLO of the loss"),
        (10_240, "later, half lost"),
        (19_999, "later, half lost"),
        (20_000, "all there"),
    ],
)
def test_requests_are_counted_by_when_they_arrived_around_a_loss(at_ms: int, group: str) -> None:
    """The target is about what arrives one SLO after it, while half is lost."""
    assert group_of(Scenario("loss", "poisson", 0.4, seconds=30), Arrival(at_ms * MS)) == group


def prefix_choice(*asked: Asked) -> Choice:
    """What the obvious method would run now."""
    model: ModelQueue = model_of(*family())
    queue_up(model, *asked)
    choice = policy_named("prefix")().decide(model, Moment(0, 0)).choice
    assert choice is not None
    return choice


def floors(latency_ms: Sequence[int], *asked: float | None) -> list[Asked]:
    """Requests in order with these floors."""
    return [Asked(0, slo(ms, floor)) for ms, floor in zip(latency_ms, asked, strict=True)]


def test_prefix_runs_the_urgent_together_as_the_strictest_demands() -> None:
    """One floor of 0.9115 among the most urgent puts everybody on amp, though distilled would do for the others."""
    choice = prefix_choice(*floors([90, 120, 150, 150], None, None, 0.9115, None))
    assert (family()[choice.variant].name, choice.samples) == ("amp", 4)


def test_prefix_stops_before_the_floor_that_its_head_has_no_time_for() -> None:
    """A strict request that would make the head late splits the prefix; those behind it are not reached."""
    choice = prefix_choice(*floors([25, 300, 400, 400], None, None, 0.9115, None))
    assert (family()[choice.variant].name, choice.samples) == ("distilled", 2)


def test_prefix_serves_one_variant_models_in_order() -> None:
    """Without a choice it is a plain batcher."""
    model = model_of(variant("fp32", 0.913, 24, 16))
    queue_up(model, *(Asked(0, slo(ms)) for ms in (200, 300, 400)))
    choice = policy_named("prefix+ed")().decide(model, Moment(0, 0)).choice
    assert choice is not None
    assert [request.number for request in choice.requests] == [0, 1, 2]


@pytest.mark.parametrize("policy", [OURS, *PREFIX, "slackfit+ed"])
def test_mixed_floors_are_never_broken(policy: str) -> None:
    """Nor by the obvious method, whose fault is another; and its requests are counted by floor."""
    scenario = replace(SHORT, section="floors", floors=APART, rho=0.4)
    figures = measure(Case(scenario, 0, policy)).figures
    assert figures["floors_broken"] == 0
    assert sum(count for count, _ in figures["groups"].values()) == figures["requests"]
    in_time = sum(in_time for _, in_time in figures["groups"].values())
    assert in_time / figures["requests"] == pytest.approx(figures["attainment"])


def test_the_optimum_is_bracketed() -> None:
    """No policy and no schedule beats the upper bound, and the schedule with full knowledge beats the policy."""
    scenario = Scenario("clairvoyant", "gamma 8", 0.8, seconds=1)
    ours, schedule, bound = (
        measure(Case(scenario, 1, policy)).figures["effective_accuracy"] for policy in (OURS, CLAIRVOYANT, BOUND)
    )
    assert ours < schedule < bound


def test_results_that_are_there_are_not_measured_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Resumed, a comparison measures what is missing and what a sudden end cut off, and nothing else."""
    wanted = [Case(SHORT, seed, "maxbatch") for seed in range(3)]
    carry_out(tmp_path, wanted[:2], None, 1)
    whole = read(tmp_path)
    path = tmp_path / "runs.jsonl"
    path.write_text(path.read_text("utf-8")[:-40], "utf-8")
    assert read(tmp_path) == whole[:1]
    carry_out(tmp_path, wanted, None, 1)
    assert "1 of 3 runs are there" in capsys.readouterr().out
    assert sorted(read(tmp_path), key=lambda result: result.case.seed)[:2] == whole
    assert {result.case for result in read(tmp_path)} == set(wanted)
    before = path.read_bytes()
    carry_out(tmp_path, wanted, None, 1)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--azure", "nowhere.csv"], "--azure nowhere.csv: there is no such file"),
        (["--seeds", "0"], "--seeds"),
        (["report"], "there are no results yet"),
    ],
)
def test_wrong_usage_is_told(words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence and exit code 2, before anything runs."""
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--out", str(tmp_path), "--report", str(tmp_path / "R.md")])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_an_ablation_measures_all_three_under_the_same_load() -> None:
    """At low load nobody misses; far beyond capacity, whatever decides, about what is too much."""
    assert choice(replace(SHORT, rho=0.2), 0) == (1.0, 1.0, 1.0)
    beyond = choice(replace(SHORT, rho=3.0), 0)
    assert all(0.2 < attainment < 0.6 for attainment in beyond)
    assert len(set(beyond)) == 3


def test_an_ablation_of_the_strict_class_shows_what_the_others_cost_it() -> None:
    """Alone it has room; among many others it misses, and less so with priority."""
    as_is, everybody, first, _, alone = strict(Scenario("floors", "gamma 4", 0.8, floors=APART, seconds=3), 0)
    assert as_is < everybody < 1.0
    assert as_is < first < alone == 1.0
