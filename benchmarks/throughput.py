"""Saturated throughput through the server as a share of the bare runtime's, and the cost of small requests.

    python -m benchmarks.throughput

The compute-bound model is a ResNet-18-class CNN. The loop runs in its own process: as many threads as the server has
executors, the server's own session and thread settings, the batch size the server reached on average. Server and loop
are measured in turns, and the ratio is taken round by round, because the machine's speed drifts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from benchmarks.load import closed_loop, percentile_ms, request
from benchmarks.models import write_cnn, write_mlp
from benchmarks.server import Serving, serving
from variants.hardware import detect_hardware
from variants.runtimes import available_runtimes


def main() -> None:
    """Measure both models and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--loop", nargs=3, metavar=("ONNX", "BATCH", "SECONDS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loop:
        path, batch, seconds = options.loop
        print(loop(Path(path), int(batch), float(seconds)))
        return
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder)
        write_cnn(repository)
        write_mlp(repository)
        with serving(repository) as server:
            print(json.dumps(compute_bound(server, repository / "cnn/1/model.onnx", options), indent=2))
            print(json.dumps(protocol_bound(server, options), indent=2))


def compute_bound(server: Serving, model: Path, options: argparse.Namespace) -> dict[str, object]:
    """The CNN: server and loop in turns."""
    image = np.random.default_rng(0).standard_normal((1, 3, 64, 64)).astype(np.float32)
    messages = [request("cnn", "x", image, slo_latency_ms=10_000.0)]
    asyncio.run(closed_loop(server.grpc, messages, options.clients, 2))
    shares, served, looped, batches = [], [], [], []
    for _ in range(options.rounds):
        answers = asyncio.run(closed_loop(server.grpc, messages, options.clients, options.seconds))
        answers = [answer for answer in answers if answer.code == "OK"]
        batch = statistics.mean(float(str(answer.parameters["batch_size"])) for answer in answers)
        served.append(len(answers) / options.seconds)
        batches.append(batch)
        arguments = [str(model), str(round(batch)), str(options.seconds)]
        command = [sys.executable, "-m", "benchmarks.throughput", "--loop", *arguments]
        looped.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        shares.append(served[-1] / looped[-1])
    return {
        "cnn, clients": options.clients,
        "server, samples/s": [round(rate, 1) for rate in served],
        "mean batch size": [round(batch, 1) for batch in batches],
        "runtime in a loop, samples/s": [round(rate, 1) for rate in looped],
        "share, median": round(statistics.median(shares), 3),
        "share, least and most": [round(min(shares), 3), round(max(shares), 3)],
    }


def protocol_bound(server: Serving, options: argparse.Namespace) -> dict[str, object]:
    """The MLP: rate, latency and the server's CPU time per request at several numbers of clients."""
    row = np.random.default_rng(0).standard_normal((1, 64)).astype(np.float32)
    messages = [request("mlp", "x", row)]
    result: dict[str, object] = {}
    for clients in (1, 8, 32):
        asyncio.run(closed_loop(server.grpc, messages, clients, 1))
        before = server.cpu_s()
        answers = asyncio.run(closed_loop(server.grpc, messages, clients, options.seconds))
        result[f"mlp, {clients} clients"] = {
            "requests/s": round(len(answers) / options.seconds),
            "p50 ms": round(percentile_ms(answers, 50), 3),
            "p99 ms": round(percentile_ms(answers, 99), 3),
            "server CPU ms/request": round((server.cpu_s() - before) / len(answers) * 1e3, 3),
        }
    return result


def loop(path: Path, batch: int, seconds: float) -> float:
    """Samples per second of the bare runtime: one thread per core, each running batches of this size."""
    threads = detect_hardware().cores
    session = available_runtimes(threads)["onnxruntime"].load(path, precision="fp32", threads=1, device="cpu")
    inputs = {"x": np.random.default_rng(0).standard_normal((batch, 3, 64, 64)).astype(np.float32)}
    counts = [0] * threads
    start = time.perf_counter()

    def run(thread: int) -> None:
        while time.perf_counter() - start < seconds:
            session.run(inputs)
            counts[thread] += batch

    workers = [threading.Thread(target=run, args=(thread,)) for thread in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(counts) / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
