"""What came back, in figures: from planned requests and raw answers to one JSON-able document.

Rules of this file: pure functions. A request *met* its SLO when it was answered within the latency it asked, by the
client's clock and from the instant it was due; where it asked for none, the server's own word (`slo_met`) counts.
Every request sent is in the denominator, so a refusal is a miss. Accuracy is the variant's proven bound unless it is
called measured. None stands where nothing is known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from protos import open_inference_pb2 as pb
from server.bench.load import UNANSWERED, Answer
from server.bench.requests import Planned
from variants.datatypes import DATATYPES

ADMITTED = frozenset({"OK", "DEADLINE_EXCEEDED", "CANCELLED", "INTERNAL", UNANSWERED})
"""Codes of requests that the server took on; every other is a refusal at the door."""
PERMILLES = (500, 950, 990, 999)

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Ended:
    """One request with its answer read. `right` says of each of its samples whether the answer fits the label."""

    answer: Answer
    met: bool
    parameters: Mapping[str, Any]
    right: Array | None = None

    @property
    def variant(self) -> str | None:
        """Who answered; None for who did not."""
        return self.parameters.get("variant") if self.answer.code == "OK" else None

    @property
    def accuracy(self) -> float:
        """The proven accuracy of the variant that answered, 0 where the server says nothing."""
        return float(self.parameters.get("variant_accuracy", 0.0))


def read(planned: Planned, answer: Answer) -> Ended:
    """Decode one answer and judge it."""
    if answer.code != "OK":
        return Ended(answer, met=False, parameters={})
    response = pb.ModelInferResponse.FromString(answer.reply)
    parameters = parameters_of(response)
    if planned.latency_ns is None:
        met = bool(parameters.get("slo_met", True))
    else:
        met = answer.latency_ns <= planned.latency_ns
    return Ended(answer, met, parameters, None if planned.labels is None else _right(response, planned.labels))


def parameters_of(response: pb.ModelInferResponse) -> dict[str, Any]:
    """The response parameters as plain values."""
    return {
        name: getattr(value, str(value.WhichOneof("parameter_choice"))) for name, value in response.parameters.items()
    }


def span_s(answers: Sequence[Answer]) -> float | None:
    """How long the load was by when its requests were due, in seconds: each counts with the mean gap after it.

    None where all were due at once. When they were answered, if ever, says nothing about how many were offered.
    """
    span_ns = answers[-1].due_ns - answers[0].due_ns
    return span_ns * len(answers) / (len(answers) - 1) / 1e9 if span_ns else None


def summary(ended: Sequence[Ended], seconds: float | None) -> dict[str, Any]:
    """All figures of a load of so many seconds, None for all at once, of which at least one request was sent."""
    total = len(ended)
    answered = [each for each in ended if each.answer.code == "OK"]
    met = [each for each in ended if each.met]
    admitted = [each for each in ended if each.answer.code in ADMITTED]
    latencies = [each.answer.latency_ns for each in answered]
    return {
        "requests": total,
        "seconds": seconds,
        "offered_per_s": total / seconds if seconds else None,
        "slo_attainment": len(met) / total,
        "slo_attainment_admitted": len(met) / len(admitted) if admitted else None,
        "admitted": len(admitted),
        "goodput_per_s": len(met) / seconds if seconds else None,
        "mean_accuracy": _mean(each.accuracy for each in met),
        "effective_accuracy": sum(each.accuracy for each in met) / total,
        "measured_accuracy": _measured(answered),
        "latency_ms": _percentiles_ms(latencies),
        "send_lag_ms": _percentiles_ms([each.answer.sent_ns - each.answer.due_ns for each in ended]),
        "batch_size_mean": _mean(each.parameters["batch_size"] for each in answered if "batch_size" in each.parameters),
        "codes": _counts(each.answer.code for each in ended),
        "outcomes": _outcomes(ended),
        "reasons": _counts(str(each.parameters.get("reason", "none")) for each in answered),
        "errors": {each.answer.code: each.answer.detail for each in reversed(ended) if each.answer.detail},
        "variants": _variants(answered, total),
    }


def _variants(answered: Sequence[Ended], total: int) -> dict[str, Any]:
    """By the name of the variant, the most used first."""
    found = {}
    for name in _counts(each.variant or "none" for each in answered):
        own = [each for each in answered if (each.variant or "none") == name]
        found[name] = {
            "answers": len(own),
            "share": len(own) / len(answered),
            "share_of_requests": len(own) / total,
            "slo_met": sum(each.met for each in own),
            "accuracy": own[0].accuracy,
            "measured_accuracy": _measured(own),
            "batch_size_mean": _mean(each.parameters["batch_size"] for each in own if "batch_size" in each.parameters),
            "latency_ms": _percentiles_ms([each.answer.latency_ns for each in own]),
        }
    return found


def _outcomes(ended: Iterable[Ended]) -> list[dict[str, Any]]:
    """How many requests ended in each combination of status code and the server's own judgement."""
    keys = Counter(
        (each.answer.code, each.parameters.get("slo_met"), each.parameters.get("floor_met")) for each in ended
    )
    return [
        {"code": code, "slo_met": slo_met, "floor_met": floor_met, "requests": count}
        for (code, slo_met, floor_met), count in keys.most_common()
    ]


def _counts(names: Iterable[str]) -> dict[str, int]:
    return dict(Counter(names).most_common())


def _mean(values: Iterable[float]) -> float | None:
    known = list(values)
    return sum(known) / len(known) if known else None


def _measured(ended: Iterable[Ended]) -> float | None:
    """The share of samples answered right, among those with a label that can be compared."""
    right = [each.right for each in ended if each.right is not None]
    return float(np.concatenate(right).mean()) if right else None


def _percentiles_ms(values_ns: Sequence[int]) -> dict[str, float] | None:
    """Percentiles by nearest rank, so that each is a value that occurred."""
    if not values_ns:
        return None
    rising = sorted(values_ns)
    ranks = {f"p{permille / 10:g}": -(-len(rising) * permille // 1000) for permille in PERMILLES}
    return {name: rising[rank - 1] / 1e6 for name, rank in ranks.items()} | {"max": rising[-1] / 1e6}


def _right(response: pb.ModelInferResponse, labels: Array) -> Array | None:
    """Which samples are right: the first output that holds a score per class, or the class itself, beside the labels.

    None where no output does, as for a regression, or the labels are no class numbers. A single score per sample is
    no choice between classes.
    """
    if labels.dtype.kind not in "iu":
        return None
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=False):
        if output.datatype == "BYTES":
            continue
        scores = np.frombuffer(raw, DATATYPES[output.datatype].numpy).reshape(tuple(output.shape))
        if scores.ndim == labels.ndim + 1 and scores.shape[:-1] == labels.shape and scores.shape[-1] > 1:
            return np.atleast_1d(scores.argmax(axis=-1) == labels)
        if scores.shape == labels.shape and scores.dtype.kind in "iu":
            return np.atleast_1d(scores == labels)
    return None
