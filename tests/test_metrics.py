"""Metrics: the exact names of the reference, complete label sets from the start, and counters that add up."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from server.events import BatchRan, Decided, RequestEnded
from server.metrics import DURATIONS, ExecutorHealth, Metrics, ModelLoad, geometric
from server.scheduling.slo import Outcome
from variants.variant import Interval, LatencyProfile, State, Variant

DIGITS = ("digits", "3")
FP32 = Variant(
    "fp32", State.ELIGIBLE, "", "fp32", "onnxruntime", "cpu",
    score=Interval(0.98, 0.96, 0.99), profile=LatencyProfile((1, 8), (2_000_000, 8_000_000)),
)  # fmt: skip
INT8 = Variant("int8-dynamic", State.UNVERIFIED, "no evaluation data", "int8", "openvino", "cpu")

REFERENCE = {
    "requests_total": ("counter", {"model", "version", "variant", "outcome"}),
    "request_duration_seconds": ("histogram", {"model", "version", "variant"}),
    "queue_duration_seconds": ("histogram", {"model", "version", "variant"}),
    "compute_duration_seconds": ("histogram", {"model", "version", "variant"}),
    "batch_size": ("histogram", {"model", "version", "variant"}),
    "slo_requests_total": ("counter", {"model", "version", "variant", "result"}),
    "routing_decisions_total": ("counter", {"model", "version", "variant", "reason"}),
    "variant_accuracy": ("gauge", {"model", "version", "variant", "bound"}),
    "variant_capacity_samples_per_second": ("gauge", {"model", "version", "variant", "batch_size"}),
    "variant_samples_total": ("counter", {"model", "version", "variant"}),
    "variant_state": ("gauge", {"model", "version", "variant", "state"}),
    "variant_info": ("gauge", {"model", "version", "variant", "precision", "runtime", "device"}),
    "served_accuracy_sum_total": ("counter", {"model", "version"}),
    "served_accuracy_count_total": ("counter", {"model", "version"}),
    "queue_depth": ("gauge", {"model"}),
    "queue_bytes": ("gauge", {"model"}),
    "inflight_requests": ("gauge", {"model"}),
    "saturation_ratio": ("gauge", {"model"}),
    "latency_prediction_error_ratio": ("histogram", {"model", "version", "variant"}),
    "latency_predictions_total": ("counter", {"model", "version", "variant", "result"}),
    "executor_slowdown_ratio": ("gauge", {"executor"}),
    "executor_lost": ("gauge", {"executor"}),
    "decision_duration_seconds": ("histogram", set()),
    "executor_busy_seconds_total": ("counter", {"executor"}),
    "hardware_info": ("gauge", {"isa"}),
    "model_load_duration_seconds": ("gauge", {"model", "version"}),
}


def ended(outcome: Outcome = Outcome.OK, variant: str = "fp32", **changes: object) -> RequestEnded:
    """A request of the digits model that ended like this."""
    facts: dict[str, object] = {
        "model": "digits", "version": "3", "variant": variant, "outcome": outcome, "reason": "fit", "samples": 2,
        "slo": None, "budget_ns": None, "slo_met": True, "arrival_ns": 0, "total_ns": 3_000_000, "queue_ns": 1_000_000,
        "compute_ns": 2_000_000, "accuracy": 0.98,
    }  # fmt: skip
    return RequestEnded(**(facts | changes))  # type: ignore[arg-type]


def ran(**changes: object) -> BatchRan:
    """A batch of eight samples that took a quarter longer than predicted."""
    facts: dict[str, object] = {
        "model": "digits", "version": "3", "variant": "fp32", "executor": 1, "requests": 4, "samples": 8,
        "reason": "fit", "compute_ns": 10_000_000, "predicted_ns": 8_000_000, "failed": False,
    }  # fmt: skip
    return BatchRan(**(facts | changes))  # type: ignore[arg-type]


@pytest.fixture
def registry() -> CollectorRegistry:
    """A registry of this test's own."""
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> Metrics:
    """Metrics of a server with the digits model in two variants, two executors and a load source."""
    metrics = Metrics(registry, slo_thresholds_ns=[30_000_000], reasons=["fit"])
    metrics.add_model(*DIGITS, [FP32, INT8], load_ns=1_500_000_000)
    metrics.add_executors(2)
    metrics.set_hardware({"isa": "avx512_vnni"})
    metrics.watch(lambda: {"digits": ModelLoad(5, 1024, 7, 0.25)})
    metrics.watch_executors(lambda: [ExecutorHealth(1.0, False), ExecutorHealth(1.75, True)])
    return metrics


def value(registry: CollectorRegistry, name: str, labels: Mapping[str, str] | None = None, **more: str) -> float | None:
    """One sample of the digits model's fp32 variant unless told otherwise."""
    return registry.get_sample_value(f"gearshift_{name}", dict(labels or {}) | more)


def of(variant: str = "fp32", **more: str) -> dict[str, str]:
    """The labels of a variant of the digits model."""
    return {"model": "digits", "version": "3", "variant": variant} | more


def test_names_types_and_labels_are_those_of_the_reference(metrics: Metrics, registry: CollectorRegistry) -> None:
    """Every family exists under its exact exposed name, with its type and labels, before any event; no other does."""
    text = generate_latest(registry).decode()
    types = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    assert types == {f"gearshift_{name}": kind for name, (kind, _) in REFERENCE.items()}
    for name, (kind, labels) in REFERENCE.items():
        sample = f"gearshift_{name}" + ("_count" if kind == "histogram" else "")
        found = re.findall(rf"^{sample}(?:{{(.*)}})? ", text, re.MULTILINE)
        assert found, f"{sample} has no series"
        assert {frozenset(re.findall(r'(\w+)="', series)) for series in found} == {frozenset(labels)}
    assert dict(re.findall(r"^# HELP (\S+) (.+)$", text, re.MULTILINE)).keys() == types.keys()


def test_openmetrics_is_well_formed(metrics: Metrics, registry: CollectorRegistry) -> None:
    """The strict OpenMetrics parser takes what is exposed."""
    metrics(ended())
    metrics(ran())
    exposed = openmetrics(registry).decode()
    families = list(text_string_to_metric_families(exposed))
    assert len(families) == len(REFERENCE)


def test_every_label_set_exists_before_the_first_request(metrics: Metrics, registry: CollectorRegistry) -> None:
    """Every outcome of every variant, and of no variant, starts at zero."""
    for variant in ("fp32", "int8-dynamic", "none"):
        for outcome in Outcome:
            assert value(registry, "requests_total", of(variant), outcome=outcome) == 0
        for result in ("met", "missed"):
            assert value(registry, "slo_requests_total", of(variant), result=result) == 0
        for result in ("kept", "exceeded"):
            assert value(registry, "latency_predictions_total", of(variant), result=result) == 0
        assert value(registry, "request_duration_seconds_count", of(variant)) == 0
    assert value(registry, "routing_decisions_total", of("int8-dynamic"), reason="fit") == 0
    assert value(registry, "executor_busy_seconds_total", executor="0") == 0


def test_events_create_no_series(metrics: Metrics, registry: CollectorRegistry) -> None:
    """Whatever clients ask for, the number of series stays what it was."""
    before = sum(len(family.samples) for family in registry.collect())
    for n in range(50):
        metrics(ended(Outcome.INVALID, "none", model=f"m{n}"))
        metrics(ended(Outcome.INVALID, "none", version=f"{n}"))
        metrics(ended(Outcome.INVALID, f"v{n}"))
        metrics(ran(model=f"m{n}"))
    for outcome in Outcome:
        metrics(ended(outcome))
    metrics(ran())
    metrics(Decided("digits", 1000))
    assert sum(len(family.samples) for family in registry.collect()) == before


def test_outcomes_sum_to_the_requests_sent(metrics: Metrics, registry: CollectorRegistry) -> None:
    """Known, unknown and mispinned requests each count exactly once."""
    sent = [
        *(ended(outcome, variant) for outcome in Outcome for variant in ("fp32", "int8-dynamic", "none")),
        ended(Outcome.INVALID, "none", model="no-such-model"),
        ended(Outcome.INVALID, "none", version="99"),
        ended(Outcome.INVALID, "no-such-variant"),
    ]
    for event in sent:
        metrics(event)
    samples = [s for f in registry.collect() for s in f.samples if s.name == "gearshift_requests_total"]
    assert sum(sample.value for sample in samples) == len(sent)
    unknown = {"model": "unknown", "version": "unknown", "variant": "none", "outcome": "invalid"}
    assert value(registry, "requests_total", unknown) == 2
    assert value(registry, "requests_total", of("none"), outcome="invalid") == 2


def test_an_answered_request_is_counted_in_every_way(metrics: Metrics, registry: CollectorRegistry) -> None:
    """Durations in seconds, samples, SLO and served accuracy all take note of one answer."""
    metrics(ended(Outcome.LATE, slo_met=False))
    assert value(registry, "requests_total", of(), outcome="late") == 1
    assert value(registry, "request_duration_seconds_sum", of()) == pytest.approx(0.003)
    assert value(registry, "queue_duration_seconds_sum", of()) == pytest.approx(0.001)
    assert value(registry, "compute_duration_seconds_sum", of()) == pytest.approx(0.002)
    assert value(registry, "variant_samples_total", of()) == 2
    assert value(registry, "slo_requests_total", of(), result="missed") == 1
    assert value(registry, "slo_requests_total", of(), result="met") == 0
    assert value(registry, "served_accuracy_sum_total", model="digits", version="3") == pytest.approx(0.98)
    assert value(registry, "served_accuracy_count_total", model="digits", version="3") == 1


def test_a_refused_request_adds_no_samples_queue_or_compute_time(metrics: Metrics, registry: CollectorRegistry) -> None:
    """Zeros of requests that never queued or ran would flatter the histograms."""
    metrics(ended(Outcome.REJECTED, "none", slo_met=False, queue_ns=0, compute_ns=0, accuracy=None))
    assert value(registry, "request_duration_seconds_count", of("none")) == 1
    assert value(registry, "queue_duration_seconds_count", of("none")) == 0
    assert value(registry, "compute_duration_seconds_count", of("none")) == 0
    assert value(registry, "variant_samples_total", of("none")) == 0
    assert value(registry, "served_accuracy_count_total", model="digits", version="3") == 0
    assert value(registry, "slo_requests_total", of("none"), result="missed") == 1


def test_an_unjudged_request_is_neither_met_nor_missed(metrics: Metrics, registry: CollectorRegistry) -> None:
    """An invalid request says nothing about the SLO."""
    metrics(ended(Outcome.INVALID, "none", slo_met=None))
    assert value(registry, "slo_requests_total", of("none"), result="met") == 0
    assert value(registry, "slo_requests_total", of("none"), result="missed") == 0


def test_an_expired_request_shows_how_long_it_waited(metrics: Metrics, registry: CollectorRegistry) -> None:
    """Waiting in vain is waiting."""
    metrics(ended(Outcome.EXPIRED, "none", slo_met=False, queue_ns=40_000_000))
    assert value(registry, "queue_duration_seconds_sum", of("none")) == pytest.approx(0.04)


def test_a_batch_is_counted_with_its_size_reason_and_prediction(metrics: Metrics, registry: CollectorRegistry) -> None:
    """The prediction ratio is actual over predicted; the executor's time is its own series."""
    metrics(ran(reason="drain"))
    assert value(registry, "batch_size_sum", of()) == 8
    assert value(registry, "routing_decisions_total", of(), reason="drain") == 1
    assert value(registry, "latency_prediction_error_ratio_sum", of()) == pytest.approx(1.25)
    assert value(registry, "executor_busy_seconds_total", executor="1") == pytest.approx(0.01)
    assert value(registry, "executor_busy_seconds_total", executor="0") == 0


def test_a_prediction_is_kept_or_exceeded(metrics: Metrics, registry: CollectorRegistry) -> None:
    """A batch that takes exactly as long as predicted keeps it; one that failed says nothing."""
    for taken_ns, failed in ((8_000_000, False), (7_999_999, False), (8_000_001, False), (9_000_000, True)):
        metrics(ran(compute_ns=taken_ns, failed=failed))
    counts = {r: value(registry, "latency_predictions_total", of(), result=r) for r in ("kept", "exceeded")}
    assert counts == {"kept": 2, "exceeded": 1}


def test_executors_show_how_slow_they_are_and_whether_they_are_lost(
    metrics: Metrics, registry: CollectorRegistry
) -> None:
    """One gauge each by the executor's number, read at the scrape."""
    assert [value(registry, "executor_slowdown_ratio", executor=n) for n in "01"] == [1.0, 1.75]
    assert [value(registry, "executor_lost", executor=n) for n in "01"] == [0, 1]


def test_a_failed_batch_occupied_its_executor_and_nothing_else(metrics: Metrics, registry: CollectorRegistry) -> None:
    """How long a failure took says nothing about the model's latency."""
    metrics(ran(failed=True))
    assert value(registry, "executor_busy_seconds_total", executor="1") == pytest.approx(0.01)
    assert value(registry, "routing_decisions_total", of(), reason="fit") == 1
    assert value(registry, "batch_size_count", of()) == 0
    assert value(registry, "latency_prediction_error_ratio_count", of()) == 0


def test_decisions_are_timed_in_microseconds(metrics: Metrics, registry: CollectorRegistry) -> None:
    """A decision of 15 µs falls below the 20 µs edge and above the 10 µs one."""
    metrics(Decided("digits", 15_000))
    assert value(registry, "decision_duration_seconds_bucket", le="2e-05") == 1
    assert value(registry, "decision_duration_seconds_bucket", le="1e-05") == 0


def test_variant_gauges_show_evidence_profile_and_one_state(metrics: Metrics, registry: CollectorRegistry) -> None:
    """Accuracy with its interval, throughput by batch size, and exactly one state that is 1."""
    assert [value(registry, "variant_accuracy", of(), bound=b) for b in ("low", "point", "high")] == [0.96, 0.98, 0.99]
    assert value(registry, "variant_accuracy", of("int8-dynamic"), bound="point") is None
    assert value(registry, "variant_capacity_samples_per_second", of(), batch_size="8") == pytest.approx(1000)
    assert {state: value(registry, "variant_state", of("int8-dynamic"), state=state) for state in State} == {
        state: float(state is State.UNVERIFIED) for state in State
    }


def test_set_variant_replaces_what_was_shown(metrics: Metrics, registry: CollectorRegistry) -> None:
    """A variant that was switched off and moved to another runtime is in one state on one runtime."""
    metrics.set_variant(*DIGITS, Variant("fp32", State.DISABLED, "by hand", "fp32", "openvino", "cpu"))
    assert value(registry, "variant_state", of(), state="eligible") == 0
    assert value(registry, "variant_state", of(), state="disabled") == 1
    assert value(registry, "variant_info", of(), precision="fp32", runtime="onnxruntime", device="cpu") is None
    assert value(registry, "variant_info", of(), precision="fp32", runtime="openvino", device="cpu") == 1


def test_removing_a_model_removes_its_series_only(metrics: Metrics, registry: CollectorRegistry) -> None:
    """An unloaded model says nothing any more, a late event for it counts as unknown, its neighbour stays."""
    metrics.add_model("other", "1", [FP32])
    metrics.remove_model(*DIGITS)
    metrics(ended())
    left = [s for f in registry.collect() for s in f.samples if s.labels.get("version")]
    assert {(sample.labels["model"], sample.labels["version"]) for sample in left} == {
        ("other", "1"), ("unknown", "unknown"),
    }  # fmt: skip
    unknown = {"model": "unknown", "version": "unknown", "variant": "none", "outcome": "ok"}
    assert value(registry, "requests_total", unknown) == 1


def test_load_gauges_are_read_at_the_scrape(registry: CollectorRegistry) -> None:
    """The source is asked when someone looks, not before."""
    loads: dict[str, ModelLoad] = {}
    Metrics(registry).watch(lambda: loads)
    assert value(registry, "queue_depth", model="digits") is None
    loads["digits"] = ModelLoad(5, 1024, 7, 0.25)
    names = ("queue_depth", "queue_bytes", "inflight_requests", "saturation_ratio")
    assert [value(registry, name, model="digits") for name in names] == [5, 1024, 7, 0.25]


def test_slo_thresholds_are_exact_bucket_edges(metrics: Metrics, registry: CollectorRegistry) -> None:
    """A request exactly at a 30 ms SLO falls into the bucket of that edge."""
    metrics(ended(total_ns=30_000_000))
    assert value(registry, "request_duration_seconds_bucket", of(), le="0.03") == 1
    assert value(registry, "request_duration_seconds_bucket", of(), le="0.02") == 0


def test_buckets_are_geometric() -> None:
    """Half a millisecond to ten seconds in fourteen round steps."""
    assert DURATIONS == [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]
    assert geometric(1, 8, 2) == [1, 2, 4, 8]
