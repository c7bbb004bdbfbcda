"""Saturated throughput through the server as a share of the bare runtime's, and the cost of small requests.

    python -m benchmarks.throughput

The compute-bound model is a ResNet-18-class CNN, and its client h2load (Debian: nghttp2-client), because a client in
Python would take from the model as much processor time as the server does. Answers and batch sizes are the server's own
counts. The loop runs in its own process: as many threads as the server has executors, the server's own session and
thread settings, the batch size the server reached on average. Server and loop are measured in turns, and the ratio is
taken round by round, because the machine's speed drifts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np

from benchmarks.load import closed_loop, percentile_ms, request
from benchmarks.models import write_cnn, write_mlp
from benchmarks.server import Serving, serving
from server.wire.inference import MODEL_INFER
from variants.hardware import detect_hardware
from variants.runtimes import available_runtimes


def main() -> None:
    """Measure both models and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--clients", type=int, default=64, help="enough that no executor ever waits for a batch")
    parser.add_argument("--loop", nargs=3, metavar=("ONNX", "BATCH", "SECONDS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loop:
        path, batch, seconds = options.loop
        print(json.dumps(loop(Path(path), int(batch), float(seconds))))
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
    message = request("cnn", "x", image, slo_latency_ms=10_000.0)
    saturate(server.grpc, message, options.clients, 2)
    shares, served, looped, batches, own_ms = [], [], [], [], []
    for _ in range(options.rounds):
        before, cpu_s, start = answered(server), server.cpu_s(), time.perf_counter()
        saturate(server.grpc, message, options.clients, options.seconds)
        elapsed_s = time.perf_counter() - start
        samples, calls = (after - then for after, then in zip(answered(server), before, strict=True))
        served.append(samples / elapsed_s)
        batches.append(samples / calls)
        own_ms.append((server.cpu_s() - cpu_s) / samples * 1e3)
        arguments = [str(model), str(round(batches[-1])), str(options.seconds)]
        command = [sys.executable, "-m", "benchmarks.throughput", "--loop", *arguments]
        looped.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        shares.append(served[-1] / looped[-1]["samples/s"])
    return {
        "cnn, clients": options.clients,
        "server, samples/s": [round(rate, 1) for rate in served],
        "mean batch size": [round(batch, 1) for batch in batches],
        "runtime in a loop, samples/s": [round(loop["samples/s"], 1) for loop in looped],
        "share, median": round(statistics.median(shares), 3),
        "share, least and most": [round(min(shares), 3), round(max(shares), 3)],
        "server, CPU ms/sample": [round(ms, 2) for ms in own_ms],
        "loop, CPU ms/sample": [round(loop["CPU ms/sample"], 2) for loop in looped],
    }


def saturate(url: str, message: bytes, clients: int, seconds: float) -> None:
    """Keep `clients` requests in flight for so many seconds, from one process of h2load."""
    with tempfile.NamedTemporaryFile() as body:
        body.write(b"\0" + struct.pack(">I", len(message)) + message)  # gRPC's framing of one message
        body.flush()
        headers = ["-H", "content-type: application/grpc", "-H", "te: trailers"]
        load = ["-D", f"{seconds:.0f}", "-c", "1", "-m", str(clients), "-d", body.name]
        subprocess.run(["h2load", *load, *headers, f"http://{url}{MODEL_INFER}"], check=True, capture_output=True)


def answered(server: Serving) -> tuple[float, float]:
    """Samples that the CNN has answered so far, and the batches they were in."""
    text = urllib.request.urlopen(f"{server.http}/metrics").read().decode()  # noqa: S310 - our own address
    lines = [line for line in text.splitlines() if 'model="cnn"' in line]
    return tuple(
        sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"gearshift_batch_size_{part}{{"))
        for part in ("sum", "count")
    )  # type: ignore[return-value]


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


def loop(path: Path, batch: int, seconds: float) -> dict[str, float]:
    """The bare runtime: one thread per core, each running batches of this size."""
    threads = detect_hardware().cores
    session = available_runtimes(threads)["onnxruntime"].load(path, precision="fp32", threads=1, device="cpu")
    inputs = {"x": np.random.default_rng(0).standard_normal((batch, 3, 64, 64)).astype(np.float32)}
    counts = [0] * threads
    start, cpu_s = time.perf_counter(), time.process_time()

    def run(thread: int) -> None:
        while time.perf_counter() - start < seconds:
            session.run(inputs)
            counts[thread] += batch

    workers = [threading.Thread(target=run, args=(thread,)) for thread in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    samples = sum(counts)
    return {
        "samples/s": samples / (time.perf_counter() - start),
        "CPU ms/sample": (time.process_time() - cpu_s) / samples * 1e3,
    }


if __name__ == "__main__":
    main()
