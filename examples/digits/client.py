"""Ask a running server for digits with three different SLOs, and print which variant answered and why.

    python examples/digits/client.py --url 127.0.0.1:8001

Nothing here but the stock Triton client: what a request needs goes in as request parameters, what became of it comes
back as response parameters. A refusal is an answer too: the server says at once what it cannot keep, and why.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

DATA = Path(__file__).parent / "repository" / "digits" / "1" / "data" / "evaluation.npz"
MODEL = "digits"
REFUSALS = {
    "StatusCode.FAILED_PRECONDITION": "no variant could meet this SLO, even on an idle server",
    "StatusCode.RESOURCE_EXHAUSTED": "possible on an idle server, but not now; try again later",
    "StatusCode.DEADLINE_EXCEEDED": "accepted, then something else took the time it needed",
}
REASONS = {
    "best": "the most accurate",
    "slack": "the better ones are too slow for this",
    "batch": "the better ones could not take all who wait",
    "drain": "the better ones would make others late",
    "overload": "too many for all: this saves the most",
    "late": "nothing could be in time any more",
}
Slo = Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """What came back for one image: the digit seen, and what the server says about how."""

    digit: int
    variant: str
    accuracy: float
    reason: str
    batch_size: int
    queue_us: int
    compute_us: int
    slo_met: bool


def main() -> int:
    """Three SLOs, a few images each; returns the exit code."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--url", default="127.0.0.1:8001", help="the server's gRPC address")
    arguments.add_argument("--data", type=Path, default=DATA, help="an .npz with the arrays `image` and `label`")
    arguments.add_argument("--images", type=int, default=5, help="how many images to send for each SLO")
    options = arguments.parse_args()
    if not options.data.is_file():
        print(f"{options.data} is not there: run `make serve` first, or name the file with --data", file=sys.stderr)
        return 1
    with np.load(options.data, allow_pickle=False) as data:
        images, labels = data["image"][: options.images], data["label"][: options.images]
    with triton.InferenceServerClient(options.url) as client:
        try:
            if not client.is_model_ready(MODEL):
                print(f"the server at {options.url} does not serve {MODEL!r}", file=sys.stderr)
                return 1
            show_three(client, images, labels)
        except InferenceServerException as error:
            print(f"no answer from {options.url}: {error.message()}", file=sys.stderr)
            return 1
    return 0


def show_three(client: triton.InferenceServerClient, images: Any, labels: Any) -> None:
    """Take as long as you like; be quick; be good and rather quick. The first SLO shows what quick means here."""
    relaxed: Slo = {"slo_latency_ms": 1000.0}
    usual_ms = show(client, "1. Within a second, as accurate as you can.", relaxed, images, labels)
    if usual_ms is None:
        return
    quick: Slo = {"slo_latency_ms": round(0.4 * usual_ms, 2)}
    show(client, "2. In two fifths of the time that this took.", quick, images, labels)
    good: Slo = {"slo_latency_ms": round(0.8 * usual_ms, 2), "slo_max_accuracy_drop": 0.01}
    show(client, "3. In four fifths of it, proven to lose at most one point of accuracy.", good, images, labels)


def show(client: triton.InferenceServerClient, title: str, slo: Slo, images: Any, labels: Any) -> float | None:
    """Send images one by one with an SLO, print what became of each; returns the median time on the server in ms."""
    print(f"\n{title}\n   {', '.join(f'{name}={value}' for name, value in slo.items())}")
    times = []
    for image, label in zip(images, labels, strict=True):
        try:
            answer = ask(client, image, slo)
        except InferenceServerException as error:
            if error.status() not in REFUSALS:
                raise
            print(f"   a {label} was refused: {REFUSALS[error.status()]}\n      the server says: {error.message()}")
            continue
        times.append((answer.queue_us + answer.compute_us) / 1000)
        print(f"   a {label} seen as {answer.digit}, {'right' if answer.digit == label else 'WRONG'}; {told(answer)}")
    return float(np.median(times)) if times else None


def told(answer: Answer) -> str:
    """The server's account of an answer in a sentence."""
    reason = REASONS.get(answer.reason, answer.reason)
    batch = "" if answer.batch_size == 1 else f" in a batch of {answer.batch_size}"
    late = "" if answer.slo_met else ", LATE"
    return (
        f"by {answer.variant} ({reason}; proven accuracy {answer.accuracy:.3f}){batch}: "
        f"queued {answer.queue_us} µs, computed {answer.compute_us} µs{late}"
    )


def ask(client: triton.InferenceServerClient, image: Any, slo: Slo) -> Answer:
    """One image, one answer. Raises InferenceServerException for a refusal or a failure."""
    tensor = triton.InferInput("image", [1, *image.shape], "FP32")
    tensor.set_data_from_numpy(image[None])
    result = client.infer(MODEL, [tensor], parameters=dict(slo))
    said = result.get_response().parameters
    return Answer(
        digit=int(result.as_numpy("output").argmax()),
        variant=said["variant"].string_param,
        accuracy=said["variant_accuracy"].double_param,
        reason=said["reason"].string_param,
        batch_size=said["batch_size"].int64_param,
        queue_us=said["queue_us"].int64_param,
        compute_us=said["compute_us"].int64_param,
        slo_met=said["slo_met"].bool_param,
    )


if __name__ == "__main__":
    sys.exit(main())
