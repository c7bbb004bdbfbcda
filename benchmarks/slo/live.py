"""Does the simulator tell the truth? The same arrivals against a real server through gRPC, and simulated.

    python -m benchmarks.slo.live REPOSITORY --model M [--latency-ms 60] [--rates 50,100,200] [--cv2 1,4]

The server is a process of its own; its profiles are what `gearshift variants --json` tells, the load is `gearshift
bench`, the simulation `gearshift simulate`, called as a person would. The client shares the machine with the server,
which the simulator knows nothing of: its CPU time and its own delays are part of what differs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.server import serving
from server.cli import main as gearshift


@dataclass(frozen=True, slots=True)
class Compared:
    """One load, live and simulated; attainments are shares of all requests, `lag_ms` is the client's own p99.

    None where nothing was answered, or nothing in time.
    """

    rate: float
    cv2: float
    live: float
    simulated: float
    live_accuracy: float | None
    simulated_accuracy: float
    live_p99_ms: float | None
    simulated_p99_ms: float
    lag_ms: float


def main() -> None:
    """Run every load live, simulate each, and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--latency-ms", default="60")
    parser.add_argument("--rates", default="50,100,200")
    parser.add_argument("--cv2", default="1,4")
    parser.add_argument("--seconds", default="20")
    parser.add_argument("--samples", default="1", help="in each request: several make the model weigh more than Python")
    parser.add_argument("--seed", default="0")
    parser.add_argument("--executors", default="auto")
    chosen = parser.parse_args()
    rows = []
    flags = ["--executors", chosen.executors]
    with serving(chosen.repository, flags) as server, tempfile.TemporaryDirectory() as folder:
        profiles = Path(folder) / "profiles.json"
        profiles.write_text(_said("variants", chosen.model, "--url", server.grpc, "--json"))
        for rate, cv2 in loads(chosen.rates, chosen.cv2):
            load = ["--model", chosen.model, "--rate", rate, "--cv2", cv2, "--seconds", chosen.seconds]
            load += ["--samples", chosen.samples, "--latency-ms", chosen.latency_ms, "--seed", chosen.seed]
            live = _figures(Path(folder), "bench", "--url", server.grpc, *load)
            made = _figures(Path(folder), "simulate", "--profiles", str(profiles), "--no-bound", *load)
            rows.append(compared(float(rate), float(cv2), live, made["policies"]["fitdrain"]))
            show(rows[-1:], header=len(rows) == 1)


def loads(rates: str, cv2: str) -> Iterator[tuple[str, str]]:
    """Every rate with every burstiness."""
    for each in rates.split(","):
        for burstiness in cv2.split(","):
            yield each, burstiness


def compared(rate: float, cv2: float, live: dict[str, Any], simulated: dict[str, Any]) -> Compared:
    """What `bench` and `simulate` wrote, side by side; mean accuracies are those proven, over answers in time."""
    return Compared(
        rate=rate,
        cv2=cv2,
        live=live["slo_attainment"],
        simulated=simulated["attainment"],
        live_accuracy=live["mean_accuracy"],
        simulated_accuracy=simulated["mean_proven_accuracy"],
        live_p99_ms=live["latency_ms"] and live["latency_ms"]["p99"],
        simulated_p99_ms=simulated["p99_ms"],
        lag_ms=live["send_lag_ms"]["p99"],
    )


def show(rows: Sequence[Compared], *, header: bool) -> None:
    """Print rows of a Markdown table."""
    if header:
        print(
            "| rate/s | CV² | attainment live | simulated | points apart | accuracy live | simulated | p99 ms live |",
            end="",
        )
        print(" simulated | client lag p99 ms |\n|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row.rate:g} | {row.cv2:g} | {row.live:.4f} | {row.simulated:.4f} "
            f"| {100 * abs(row.live - row.simulated):.2f} | {_plain(row.live_accuracy, 4)} "
            f"| {row.simulated_accuracy:.4f} | {_plain(row.live_p99_ms, 1)} "
            f"| {row.simulated_p99_ms:.1f} | {row.lag_ms:.1f} |",
            flush=True,
        )


def _plain(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _figures(folder: Path, *arguments: str) -> dict[str, Any]:
    """What a command writes with `--json`."""
    path = folder / "figures.json"
    _said(*arguments, "--json", str(path))
    figures: dict[str, Any] = json.loads(path.read_text())
    return figures


def _said(*arguments: str) -> str:
    """What a command prints; SystemExit if it fails."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = gearshift(arguments)
    if code:
        raise SystemExit(code)
    return said.getvalue()


if __name__ == "__main__":
    main()
