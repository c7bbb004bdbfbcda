"""Where the time of one small request goes inside the server: each step alone, in-process, microseconds.

    python -m benchmarks.overhead

The steps are the engine's own calls in their order, on a tiny model, one request per batch; the transport is not in it
(see `benchmarks.throughput` for the whole, from the outside).
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from prometheus_client import CollectorRegistry

from benchmarks.load import request
from benchmarks.models import write_mlp
from server.endings import answer_record, batch_record
from server.inference import Inference, Part, gather, scatter
from server.loading import Host, load_model
from server.metrics import Metrics
from server.scheduling.admission import make_request
from server.scheduling.scheduler import Scheduler
from server.scheduling.slo import Outcome
from server.statistics import Statistics
from server.status import Recent
from server.transport.transport import Call
from server.wire.inference import MODEL_INFER, parse_infer, read_request
from variants.hardware import detect_hardware
from variants.measure import ProfileCache
from variants.repository import ModelFolder
from variants.runtimes import available_runtimes

REPETITIONS = 5000


class Steps:
    """Total time by step."""

    def __init__(self) -> None:
        self.total_ns: dict[str, int] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time one step."""
        start = time.perf_counter_ns()
        yield
        self.total_ns[name] = self.total_ns.get(name, 0) + time.perf_counter_ns() - start


def main() -> None:
    """Run the steps many times and print the mean of each, less the timer's own cost."""
    with tempfile.TemporaryDirectory() as folder:
        write_mlp(Path(folder))
        hardware = detect_hardware()
        host = Host(hardware, "cpu", 1, 1, available_runtimes(), ProfileCache(None), 1_000_000_000, False, False)
        model = load_model(ModelFolder(Path(folder) / "mlp"), host)
    scheduler = Scheduler(1, max_requests=1000, max_bytes=1 << 30)
    scheduler.add_model(model.queue)
    metrics, statistics = Metrics(CollectorRegistry()), Statistics()
    metrics.add_model(model.name, model.version, model.variants)
    statistics.add_model(model.name, model.version)
    recent = Recent(time.monotonic_ns)
    message = request("mlp", "x", np.zeros((1, 64), np.float32))
    steps = Steps()
    for number in range(REPETITIONS):
        now = time.monotonic_ns()
        call = Call(MODEL_INFER, message, now, None, (), "")
        with steps("1 decode and check the request"):
            decoded = read_request(parse_infer(message), model.signature)
        with steps("2 admit"):
            inference = Inference(call, decoded, model)
            inference.requests = [
                make_request(
                    model.queue,
                    decoded.slo,
                    model.defaults,
                    number=number,
                    samples=part.samples,
                    size_bytes=decoded.payload_bytes,
                    shape=decoded.shape_key,
                    arrival_ns=now,
                    payload=part,
                )
                for part in inference.parts()
            ]
            scheduler.arrived(inference.requests[0], now)
        with steps("3 decide"):
            scheduler.tick(now)
            run, _ = scheduler.decide(0, now)
        assert run is not None
        parts: list[Part] = [entry.payload for entry in run.requests]  # type: ignore[misc]
        with steps("4 gather and scatter"):
            inputs = gather(parts)
        with steps("5 the runtime"):
            outputs = model.sessions["fp32"].run(inputs)
        with steps("4 gather and scatter"):
            shares = scatter(parts, outputs, batched=True)
        with steps("6 account"):
            scheduler.finished(run, now + 20_000, 20_000)
        for part, share in zip(parts, shares, strict=True):
            part.outputs = share
        with steps("7 encode the answer"):
            inference.answer(Outcome.OK)
        ended = answer_record(inference, Outcome.OK, now + 10**6)
        ran = batch_record(run, 10**5, failed=False)
        with steps("8 metrics, statistics, status page"):
            for listener in (metrics, statistics, recent):
                listener(ended)
                listener(ran)
    timer_us = timer_cost_us()
    print(
        json.dumps({k: round(v / REPETITIONS / 1e3 - timer_us, 1) for k, v in sorted(steps.total_ns.items())}, indent=2)
    )


def timer_cost_us() -> float:
    """What timing one step costs by itself, in microseconds."""
    empty = Steps()
    for _ in range(REPETITIONS):
        with empty("nothing"):
            pass
    return empty.total_ns["nothing"] / REPETITIONS / 1e3


if __name__ == "__main__":
    main()
