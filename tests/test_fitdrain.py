from __future__ import annotations

import pytest
from scheduling_models import MS, SIZES, Arrival, choose, model_of, queue_up, variant

from server.scheduling.model_queue import REPLY_RESERVE_NS, ModelQueue
from server.scheduling.policies.fitdrain import FitDrain
from server.scheduling.policy import Choice, Moment
from server.scheduling.slo import Slo
from server.scheduling.turns import load_of


def within(latency_ms: float, floor: float | None = None, **facts: object) -> Arrival:
    """A request at instant 0 that must be answered within so many milliseconds."""
    return Arrival(0, Slo(latency_ns=int(latency_ms * MS), min_accuracy=floor), **facts)  # type: ignore[arg-type]


def model_with(*arrivals: Arrival) -> ModelQueue:
    """The usual five variants with these requests waiting."""
    model = model_of()
    queue_up(model, *arrivals)
    return model


def chosen(model: ModelQueue, choice: Choice) -> tuple[str, list[int], str]:
    """Variant, members and reason, for comparison."""
    return model.variants[choice.variant].name, [request.number for request in choice.requests], choice.reason


def test_an_idle_executor_and_a_loose_deadline_buy_the_most_accurate_variant() -> None:
    """With time to spare for everybody, all run together on the reference."""
    model = model_of()
    queue_up(model, *[within(500)] * 3)
    assert chosen(model, choose(model, 0, [])) == ("fp32", [0, 1, 2], "best")


@pytest.mark.parametrize(
    ("latency_ms", "name"), [(12, "fp32"), (10, "amp"), (8, "int8-static"), (6.6, "pruned"), (4, "distilled")]
)
def test_the_slack_decides_which_variants_are_left(latency_ms: float, name: str) -> None:
    """A lone request gets the most accurate variant whose predicted latency fits its deadline."""
    model = model_of()
    queue_up(model, within(latency_ms))
    name_chosen, _, reason = chosen(model, choose(model, 0, []))
    assert (name_chosen, reason) == (name, "best" if name == "fp32" else "slack")


def test_the_deadline_includes_the_reserve_for_the_reply() -> None:
    """One nanosecond less than prediction plus reserve excludes the variant; exactly that much does not."""
    model = model_of()
    needed_ns = model.latency.predict_ns(0, 1) + REPLY_RESERVE_NS
    for budget_ns, name in [(needed_ns, "fp32"), (needed_ns - 1, "amp")]:
        model = model_of()
        queue_up(model, Arrival(0, Slo(latency_ns=budget_ns)))
        assert chosen(model, choose(model, 0, []))[0] == name


def test_size_comes_before_accuracy() -> None:
    """Four requests that fit one batch of a middling variant are not split to buy the best one for two of them."""
    model = model_of()
    queue_up(model, *[within(16)] * 4)  # fp32 fits 1, amp 2, int8-static 4
    assert chosen(model, choose(model, 0, [])) == ("int8-static", [0, 1, 2, 3], "slack")


def test_those_left_behind_must_still_finish_in_time() -> None:
    """A request of another shape rules out the variants after which its own fastest run would be too late."""
    first, second = within(13, shape=(8,)), within(13.2, shape=(9,))
    alone, together = model_with(first), model_with(first, second)
    assert chosen(alone, choose(alone, 0, [])) == ("fp32", [0], "best")  # done after 11.5 ms
    assert chosen(together, choose(together, 0, [])) == ("amp", [0], "drain")  # 8.7 ms, and 3.1 ms for the other
    assert chosen(together, choose(together, 0, [0])) == ("fp32", [0], "best")  # an idle executor takes the other


def test_a_backlog_moves_the_batch_to_a_faster_variant() -> None:
    """Sixty-four requests with 100 ms cannot all have the reference: the first batch takes what lets the rest drain."""
    model = model_with(*[within(100)] * 64)
    name, numbers, reason = chosen(model, choose(model, 0, []))
    assert numbers == list(range(16))
    assert reason == "drain"
    assert name not in ("fp32", "distilled")


def test_another_executor_that_is_free_soon_counts() -> None:
    """The same backlog allows a better variant beside idle executors than beside busy ones."""
    alone, helped = model_with(*[within(100)] * 64), model_with(*[within(100)] * 64)
    busy, idle = choose(alone, 0, [10**12]), choose(helped, 0, [0, 0, 0])
    assert idle.variant < busy.variant


def test_the_forecast_alone_moves_a_batch_to_a_faster_variant() -> None:
    """With nobody else waiting, a high rate of arrivals rules out the slow variant."""
    quiet, rushing = model_of(), model_of()
    for instant_ns in range(0, 1000 * MS, MS):
        rushing.note_arrival(1, 60 * MS, instant_ns)
    arrivals = [Arrival(1000 * MS, Slo(latency_ns=60 * MS))] * 8
    for model in (quiet, rushing):
        queue_up(model, *arrivals)
    assert chosen(quiet, choose(quiet, 1000 * MS, []))[0] == "fp32"
    name, _, reason = chosen(rushing, choose(rushing, 1000 * MS, []))
    assert (name, reason) != ("fp32", "best")


def test_tight_deadlines_of_the_past_do_not_deny_a_lone_request_the_reference() -> None:
    """Seconds after a rush of tight requests, one with time to spare gets the most accurate variant again."""
    model = model_of(variant("fp32", 0.913, 60, 4), variant("distilled", 0.872, 2, 0.7))
    for instant_ns in range(0, 1000 * MS, MS):
        model.note_arrival(1, 10 * MS, instant_ns)
    queue_up(model, Arrival(3000 * MS, Slo(latency_ns=500 * MS)))
    assert chosen(model, choose(model, 3000 * MS, [])) == ("fp32", [0], "best")


def test_a_few_patient_requests_leave_the_usual_deadline_usual() -> None:
    """One in twenty that allows an hour does not make the others look as if they had time."""
    model = model_of()
    for arrival in range(1000):
        model.note_arrival(1, 3600 * 1000 * MS if arrival % 20 == 0 else 40 * MS, arrival * MS)
    assert 40 * MS < model.typical_budget_ns < 120 * MS


def test_what_is_a_usual_deadline_follows_the_traffic() -> None:
    """After a thousand tight requests, one with time to spare two seconds later counts for more than all of them."""
    model = model_of()
    for instant_ns in range(0, 1000 * MS, MS):
        model.note_arrival(1, 10 * MS, instant_ns)
    assert model.typical_budget_ns == pytest.approx(10 * MS)
    model.note_arrival(1, 500 * MS, 3000 * MS)
    assert model.typical_budget_ns > 350 * MS


def test_a_strict_request_does_not_block_those_who_may_run_on_less() -> None:
    """A request that the batch's variant does not satisfy is skipped and stays queued; the others run together."""
    model = model_with(*[within(15)] * 4, within(60, floor=0.913), *[within(16)] * 4)
    name, numbers, _ = chosen(model, choose(model, 0, []))
    assert numbers == [0, 1, 2, 3, 5, 6, 7, 8]
    assert name != "fp32"


@pytest.mark.parametrize(("strict", "is_first"), [(1, False), (8, True)])
def test_a_class_that_is_slow_starts_while_it_can_run_as_a_batch(strict: int, is_first: bool) -> None:
    """A strict request alone can wait longer than the others; eight together cannot."""
    model = model_with(*[within(80, STRICT)] * strict, *[within(60)] * 5)
    numbers = chosen(model, choose(model, 0, [0]))[1]
    assert (numbers[0] == 0) is is_first


def test_requests_may_be_upgraded_into_the_batch_of_a_strict_one() -> None:
    """On the variant that the strict request needs, everybody who fits may join."""
    model = model_with(within(40, floor=0.913), *[within(100)] * 3)
    assert chosen(model, choose(model, 0, [])) == ("fp32", [0, 1, 2, 3], "best")


def test_nobody_is_upgraded_into_a_batch_that_would_keep_another_waiting_too_long() -> None:
    """The strict one runs alone where a larger batch of its variant would make the next shape late."""
    model = model_with(within(20, floor=0.913), *[within(21)] * 2, within(25, shape=(9,)))
    assert chosen(model, choose(model, 0, []))[:2] == ("fp32", [0])


def test_who_fits_no_batch_is_not_looked_for_among_thousands() -> None:
    """Requests too large for what is left of a batch are passed over up to a bound, whatever waits behind them."""
    model = model_with(within(8), *[within(1000, samples=8)] * 400, *[within(1001)] * 8)
    assert chosen(model, choose(model, 0, []))[1] == [0]


def test_shapes_never_mix_and_the_most_urgent_shape_goes_first() -> None:
    """The anchor's shape alone fills the batch."""
    model = model_with(
        within(300, shape=(8,)), within(200, shape=(9,)), within(300, shape=(8,)), within(400, shape=(9,))
    )
    assert chosen(model, choose(model, 0, []))[1] == [1, 3]


def test_equal_deadlines_run_in_order_of_arrival() -> None:
    """Twenty identical requests: the batch is the first sixteen."""
    model = model_with(*[within(500)] * 20)
    assert chosen(model, choose(model, 0, []))[1] == list(range(16))


def test_large_requests_that_fill_no_batch_still_get_the_best_variant() -> None:
    """Two requests of ten samples cannot share a batch of sixteen; on an idle server each has the reference."""
    model = model_with(within(2000, samples=10), within(2000, samples=10))
    assert chosen(model, choose(model, 0, [])) == ("fp32", [0], "best")


def test_variants_measured_at_different_batch_sizes_are_each_kept_to_their_own() -> None:
    """A batch is never larger than its variant was measured at, though another variant could take more."""
    model = model_of(variant("fp32", 0.913, 6, 4, sizes=(1, 2, 4)), variant("amp", 0.912, 3, 2, sizes=SIZES))
    queue_up(model, *[within(10_000)] * 12)
    assert chosen(model, choose(model, 0, [])) == ("amp", list(range(12)), "batch")  # fp32 would leave eight behind
    model = model_of(variant("fp32", 0.913, 6, 4, sizes=(1, 2, 4)), variant("amp", 0.912, 3, 2, sizes=SIZES))
    queue_up(model, *[within(10_000)] * 4)
    assert chosen(model, choose(model, 0, [])) == ("fp32", [0, 1, 2, 3], "best")


def test_a_variant_that_must_not_batch_runs_one_request_at_a_time() -> None:
    """Where batch-mates would change an answer, a request runs alone, its own samples together."""
    model = model_of(variant("fp32", 0.913, 6, 4, batchable=False))
    queue_up(model, within(500, samples=3), within(500))
    choice = choose(model, 0, [])
    assert ([request.number for request in choice.requests], choice.samples) == ([0], 3)


def test_overload_takes_the_largest_batch_on_the_fastest_variant() -> None:
    """When nothing can save everybody, the most requests are saved."""
    model = model_with(*[within(20)] * 200)
    name, numbers, reason = chosen(model, choose(model, 0, []))
    assert (name, reason) == ("distilled", "overload")
    assert len(numbers) == 16


def test_overload_gives_up_on_one_for_the_many_behind_it() -> None:
    """A request with time for itself alone is passed over when a full batch would miss its deadline otherwise."""
    model = model_with(within(3.5), *[within(16.5)] * 16, *[within(17)] * 64)
    numbers = chosen(model, choose(model, 0, []))[1]
    assert 0 not in numbers
    assert len(numbers) == 16


STRICT = 0.913


def calm(*parts: tuple[int, float, float | None], per_ms: int = 0) -> tuple[str, list[int], str]:
    """What runs when so many wait who came long ago, with so many milliseconds left and such floors."""
    model = model_with(*[within(600 + left_ms, floor) for count, left_ms, floor in parts for _ in range(count)])
    for instant_ns in range(0, 600 * MS if per_ms else 0, MS):
        model.note_arrival(per_ms, 500 * MS, instant_ns)
    return chosen(model, choose(model, 600 * MS, []))


def test_a_passing_overload_does_not_give_up_on_all_whom_only_a_slow_variant_serves() -> None:
    """A strict request earns less per time than four others; they are in time behind it, and it not behind them."""
    assert calm((2, 16, STRICT), (4, 28, None)) == ("fp32", [0], "overload")


def test_a_lasting_overload_goes_by_goodput_alone() -> None:
    """The same while more arrive than any variant could serve."""
    assert calm((2, 16, STRICT), (4, 28, None), per_ms=3) == ("distilled", [2, 3, 4, 5], "overload")


def test_goodput_is_looked_for_beyond_a_full_batch_of_a_slow_variant() -> None:
    """Strict requests that fill the largest batch earn a fifth of what those behind them would."""
    assert calm((16, 85, STRICT), (40, 90, None), per_ms=3)[0] == "distilled"


def test_an_overload_by_all_models_together_is_a_lasting_one() -> None:
    """Each model alone is below capacity; what others take of it is not there either."""
    for others, name in (([], "fp32"), ([model_of(name="o")], "distilled")):
        model = model_with(*[within(616, STRICT)] * 2, *[within(628)] * 4)
        for instant_ns in range(0, 600 * MS, MS):
            for each in (model, *others):
                each.note_arrival(1, 500 * MS, instant_ns)
        moment = Moment(600 * MS, 0, (), (), others, load_of(others, 600 * MS, 1))
        choice = FitDrain().decide(model, moment).choice
        assert choice is not None
        assert chosen(model, choice)[0] == name


def test_an_overload_that_loses_many_anyhow_goes_by_goodput_too() -> None:
    """Where most are lost whatever runs, one strict request more is not worth the time."""
    assert calm((8, 14, STRICT), (8, 28, None))[0] == "distilled"


def test_a_passing_overload_may_give_up_on_the_most_urgent() -> None:
    """Neither the most urgent nor the largest batch goes first where both would lose more than a strict request."""
    assert calm((1, 20, STRICT), (2, 8, None), (16, 28, None)) == ("fp32", [0], "overload")


def test_of_batches_that_lose_as_few_the_one_with_more_goodput_goes_first() -> None:
    """Whoever goes first, two are lost; the faster run leaves more time."""
    assert calm((2, 13, STRICT), (1, 14, None)) == ("distilled", [2], "overload")


def test_overload_weighs_priority() -> None:
    """A request that is given up for many of its own priority is served when it is worth more than they are."""

    def batch(priority: int) -> list[int]:
        urgent = Arrival(0, Slo(latency_ns=int(3.5 * MS), priority=priority))
        others = [Arrival(0, Slo(latency_ns=int(5.3 * MS), priority=8))] * 40
        model = model_with(urgent, *others)
        return chosen(model, choose(model, 0, []))[1]

    assert 0 in batch(1)
    assert 0 not in batch(8)


def test_nobody_in_a_batch_is_predicted_past_their_deadline() -> None:
    """Also in overload, mates who would be late in this batch are left for another."""
    model = model_with(*[within(3.6 + 0.2 * place) for place in range(60)])
    choice = choose(model, 0, [])
    assert choice.predicted_ns + REPLY_RESERVE_NS <= min(request.deadline_ns for request in choice.requests)


def test_a_higher_priority_is_nearer_the_front() -> None:
    """At equal deadlines the batch holds those of the highest priority; the rest wait."""
    urgent, default = Slo(latency_ns=500 * MS, priority=1), Slo(latency_ns=500 * MS)
    model = model_with(*[Arrival(0, default)] * 10, *[Arrival(0, urgent)] * 16)
    numbers = chosen(model, choose(model, 0, []))[1]
    assert len(set(numbers) & set(range(10, 26))) >= 15  # the anchor, first of the least laxity, is in any batch


def test_equally_accurate_variants_are_told_apart_by_proof_and_then_by_name() -> None:
    """The ranking is total: least proven drop, then greatest proven accuracy, the reference, the name."""
    ranked = model_of(
        variant("b", 0.9, 1, 1, reference_accuracy=0.9),
        variant("fp32", 0.9, 4, 4),
        variant("a", 0.9, 1, 1, reference_accuracy=0.9),
        variant("c", 0.95, 1, 1, reference_accuracy=0.9),
        variant("d", 0.8, 1, 1, reference_accuracy=0.9),
    )
    assert [v.name for v in ranked.variants] == ["c", "fp32", "a", "b", "d"]
