"""The Prometheus view of the event records.

Rules of this file: the registry is a parameter; names carry base units; every label set of a model exists from the
moment the model is added, so a rate never starts from nothing; label values come from added models only - a request
for anything else counts under ``model="unknown"``, so outcomes still sum to the requests received. Children are
looked up once per variant, not per request: an event costs one dictionary look-up and a few additions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, disable_created_metrics

from server.events import BatchRan, Decided, Event, RequestEnded
from server.gauges import EXECUTORS, LOADS, ExecutorHealth, ExecutorSource, Gauges, GaugeSource, ModelLoad
from server.scheduling.slo import Outcome
from variants.variant import State, Variant

__all__ = ["ANSWERED", "ExecutorHealth", "Metrics", "ModelLoad"]

NONE = "none"
"""The variant of a request for which none was chosen."""
UNKNOWN = "unknown"
"""The model and version of a request for something that is not loaded."""

MODEL = ("model", "version")
VARIANT = (*MODEL, "variant")
ANSWERED = frozenset({Outcome.OK, Outcome.LATE, Outcome.DEGRADED})
QUEUED = ANSWERED | {Outcome.EXPIRED, Outcome.CANCELLED, Outcome.FAILED}


def geometric(low: float, high: float, factor: float, digits: int = 3) -> list[float]:
    """Bucket edges from `low` to at least `high`, each `factor` times the one before, rounded to significant digits."""
    edges = [low]
    while edges[-1] < high:
        edges.append(float(f"{low * factor ** len(edges):.{digits - 1}e}"))
    return edges


DURATIONS = geometric(0.0005, 10, 10 ** (1 / 3), digits=1)  # 0.5 ms, 1, 2, 5 … 10 s
DECISIONS = geometric(1e-6, 0.01, 10 ** (1 / 3), digits=1)
BATCH_SIZES = geometric(1, 1024, 2, digits=4)
RATIOS = geometric(0.25, 4, 2 ** (1 / 4))  # with an edge at exactly 1


class _Families:
    """Every metric family, declared once. Counters gain `_total` and the info `_info` when exposed."""

    def __init__(self, registry: CollectorRegistry, slo_thresholds_s: Iterable[float]) -> None:
        counter = partial(Counter, namespace="gearshift", registry=registry)
        gauge = partial(Gauge, namespace="gearshift", registry=registry)
        histogram = partial(Histogram, namespace="gearshift", registry=registry)
        with_slos = sorted({*DURATIONS, *slo_thresholds_s})

        self.requests = counter("requests", "Requests ended, each with its one outcome.", (*VARIANT, "outcome"))
        self.slo = counter(
            "slo_requests",
            "Requests judged against their latency SLO; one without an answer missed it.",
            (*VARIANT, "result"),
        )
        self.request = histogram(
            "request_duration_seconds", "From a request's arrival to its end.", VARIANT, buckets=with_slos
        )
        self.queue = histogram(
            "queue_duration_seconds", "What an admitted request waited for its batch.", VARIANT, buckets=DURATIONS
        )
        self.compute = histogram(
            "compute_duration_seconds", "The runtime's time for an answered request.", VARIANT, buckets=DURATIONS
        )
        self.samples = counter("variant_samples", "Samples in answered requests.", VARIANT)
        self.accuracy_sum = counter(
            "served_accuracy_sum", "Sum over answered requests of the answering variant's measured accuracy.", MODEL
        )
        self.accuracy_count = counter(
            "served_accuracy_count", "Answered requests whose variant has a measured accuracy.", MODEL
        )
        self.batch_size = histogram("batch_size", "Samples in one batch that ran.", VARIANT, buckets=BATCH_SIZES)
        self.decisions = counter(
            "routing_decisions",
            "Batches dispatched to a variant, by the short code of the reason.",
            (*VARIANT, "reason"),
        )
        self.prediction = histogram(
            "latency_prediction_error_ratio",
            "Actual over predicted latency of a batch; 1 is a perfect prediction.",
            VARIANT,
            buckets=RATIOS,
        )
        self.predictions = counter(
            "latency_predictions",
            "Batches whose predicted latency was kept or exceeded; the margin promises to keep all but 1 %.",
            (*VARIANT, "result"),
        )
        self.decision = histogram(
            "decision_duration_seconds", "The time of one scheduling decision.", buckets=DECISIONS
        )
        self.busy = counter("executor_busy_seconds", "Time an executor spent in a runtime.", ("executor",))

        self.accuracy = gauge(
            "variant_accuracy", "Measured score on held-out data with its 95 % interval.", (*VARIANT, "bound")
        )
        self.capacity = gauge(
            "variant_capacity_samples_per_second",
            "Profiled throughput of one executor here, by batch size.",
            (*VARIANT, "batch_size"),
        )
        self.state = gauge("variant_state", "1 for the state a variant is in, 0 for all others.", (*VARIANT, "state"))
        self.info = gauge(
            "variant_info", "Always 1; what a variant runs as.", (*VARIANT, "precision", "runtime", "device")
        )
        self.load_duration = gauge("model_load_duration_seconds", "What loading and profiling the model took.", MODEL)
        self.hardware = Info("hardware", "What this host computes with.", namespace="gearshift", registry=registry)

    def per_model(self) -> Iterator[Counter | Gauge | Histogram]:
        """The families whose series belong to a model."""
        for family in vars(self).values():
            if isinstance(family, Counter | Gauge | Histogram) and family not in (self.decision, self.busy):
                yield family

    def per_variant(self) -> Iterator[Counter | Gauge | Histogram]:
        """The families whose series belong to a variant of a model."""
        whole = (self.accuracy_sum, self.accuracy_count, self.load_duration)
        return (family for family in self.per_model() if family not in whole)


class _VariantSeries:
    """The series of one variant, or of a model's requests that got none, looked up once."""

    __slots__ = (
        "batch_size",
        "compute",
        "decisions",
        "exceeded",
        "kept",
        "met",
        "missed",
        "outcomes",
        "prediction",
        "queue",
        "request",
        "samples",
    )

    def __init__(self, families: _Families, labels: tuple[str, str, str]) -> None:
        self.outcomes = {outcome: families.requests.labels(*labels, outcome.value) for outcome in Outcome}
        self.met = families.slo.labels(*labels, "met")
        self.missed = families.slo.labels(*labels, "missed")
        self.request = families.request.labels(*labels)
        self.queue = families.queue.labels(*labels)
        self.compute = families.compute.labels(*labels)
        self.samples = families.samples.labels(*labels)
        self.batch_size = families.batch_size.labels(*labels)
        self.prediction = families.prediction.labels(*labels)
        self.kept = families.predictions.labels(*labels, "kept")
        self.exceeded = families.predictions.labels(*labels, "exceeded")
        self.decisions: dict[str, Counter] = {}


class Metrics:
    """Listens to event records and keeps the registry's series; safe to call from any thread."""

    def __init__(
        self, registry: CollectorRegistry, slo_thresholds_ns: Iterable[int] = (), reasons: Sequence[str] = ()
    ) -> None:
        """Declare every family.

        Args:
            registry: where the series live.
            slo_thresholds_ns: each becomes an edge of the request histogram, for all models alike so that they add up.
            reasons: the routing reasons whose series exist from the start.
        """
        disable_created_metrics()  # a `_created` gauge per series would double them
        self._registry = registry
        self._families = families = _Families(registry, {threshold / 1e9 for threshold in slo_thresholds_ns})
        self._reasons = tuple(reasons)
        self._variants: dict[tuple[str, str, str], _VariantSeries] = {}
        self._accuracies: dict[tuple[str, str], tuple[Counter, Counter]] = {}
        self._busy: dict[int, Counter] = {}
        self._unknown = {
            outcome: families.requests.labels(UNKNOWN, UNKNOWN, NONE, outcome.value) for outcome in Outcome
        }

    def __call__(self, event: Event) -> None:
        """Count one event; a model or variant that was never added is not an error."""
        match event:
            case RequestEnded():
                self._request_ended(event)
            case BatchRan():
                self._batch_ran(event)
            case Decided():
                self._families.decision.observe(event.duration_ns / 1e9)

    def add_model(self, name: str, version: str, variants: Sequence[Variant], load_ns: int = 0) -> None:
        """Create every label set of a loaded model, `variant="none"` included."""
        families = self._families
        self._accuracies[name, version] = (
            families.accuracy_sum.labels(name, version),
            families.accuracy_count.labels(name, version),
        )
        families.load_duration.labels(name, version).set(load_ns / 1e9)
        self._variants[name, version, NONE] = _VariantSeries(families, (name, version, NONE))
        for variant in variants:
            key = (name, version, variant.name)
            self._variants[key] = series = _VariantSeries(families, key)
            series.decisions |= {reason: families.decisions.labels(*key, reason) for reason in self._reasons}
            self.set_variant(name, version, variant)

    def remove_model(self, name: str, version: str) -> None:
        """Drop every series of an unloaded model: what it says would no longer be true."""
        self._accuracies.pop((name, version), None)
        for key in [key for key in self._variants if key[:2] == (name, version)]:
            del self._variants[key]
        for family in self._families.per_model():
            family.remove_by_labels({"model": name, "version": version})

    def remove_variants(self, name: str, version: str, variants: Iterable[str]) -> None:
        """Drop the series of variants that a version no longer has since it was loaded again."""
        for variant in variants:
            self._variants.pop((name, version, variant), None)
            for family in self._families.per_variant():
                family.remove_by_labels({"model": name, "version": version, "variant": variant})

    def set_variant(self, name: str, version: str, variant: Variant) -> None:
        """Show a variant's state, evidence and profile as they are now."""
        families, labels = self._families, (name, version, variant.name)
        for state in State:
            families.state.labels(*labels, state.value).set(state is variant.state)
        for family in (families.info, families.accuracy, families.capacity):  # loaded again, it may be another one
            family.remove_by_labels(dict(zip(VARIANT, labels, strict=True)))
        families.info.labels(*labels, variant.precision, variant.runtime, variant.device).set(1)
        if score := variant.score:
            families.accuracy.labels(*labels, "point").set(score.value)
            families.accuracy.labels(*labels, "low").set(score.low)
            families.accuracy.labels(*labels, "high").set(score.high)
        if profile := variant.profile:
            for size, latency_ns in zip(profile.batch_sizes, profile.latencies_ns, strict=True):
                families.capacity.labels(*labels, str(size)).set(size * 1e9 / latency_ns)

    def add_executors(self, count: int) -> None:
        """Create the busy-time counters of executors 0 to `count` - 1."""
        self._busy = {executor: self._families.busy.labels(str(executor)) for executor in range(count)}

    def set_hardware(self, facts: Mapping[str, str]) -> None:
        """Show what this host is, as the labels of `gearshift_hardware_info`."""
        self._families.hardware.info(dict(facts))

    def watch(self, source: GaugeSource) -> None:
        """Read the load gauges from this source at every scrape."""
        self._registry.register(Gauges("model", LOADS, source))

    def watch_executors(self, source: ExecutorSource) -> None:
        """Read the executors' gauges from this source at every scrape."""
        self._registry.register(
            Gauges("executor", EXECUTORS, lambda: {str(number): each for number, each in enumerate(source())})
        )

    def _request_ended(self, event: RequestEnded) -> None:
        model = (event.model, event.version)
        series = self._variants.get((*model, event.variant)) or self._variants.get((*model, NONE))
        if series is None:
            self._unknown[event.outcome].inc()
            return
        series.outcomes[event.outcome].inc()
        series.request.observe(event.total_ns / 1e9, _exemplar(event))
        if event.slo_met is not None:
            (series.met if event.slo_met else series.missed).inc()
        if event.outcome in QUEUED:
            series.queue.observe(event.queue_ns / 1e9)
        if event.outcome in ANSWERED:
            series.compute.observe(event.compute_ns / 1e9)
            series.samples.inc(event.samples)
            accuracies = self._accuracies.get(model)
            if accuracies and event.accuracy is not None:
                accuracies[0].inc(event.accuracy)
                accuracies[1].inc()

    def _batch_ran(self, event: BatchRan) -> None:
        if busy := self._busy.get(event.executor):
            busy.inc(event.compute_ns / 1e9)
        labels = (event.model, event.version, event.variant)
        series = self._variants.get(labels)
        if series is None:
            return
        decided = series.decisions.get(event.reason)
        if decided is None:
            decided = series.decisions[event.reason] = self._families.decisions.labels(*labels, event.reason)
        decided.inc()
        if not event.failed:
            series.batch_size.observe(event.samples)
            if event.predicted_ns > 0:
                series.prediction.observe(event.compute_ns / event.predicted_ns)
                (series.kept if event.compute_ns <= event.predicted_ns else series.exceeded).inc()


def _exemplar(event: RequestEnded) -> dict[str, str] | None:
    """What leads from a bucket to one request in it: the id that the client gave it, if that can be shown."""
    shown = event.request_id[:64]
    return {"request_id": shown} if shown and shown.isprintable() else None
