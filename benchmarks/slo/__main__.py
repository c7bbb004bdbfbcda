"""The comparison in one command: `python -m benchmarks.slo --out FOLDER [--azure FILE]` runs it and writes the report.

`python -m benchmarks.slo report --out FOLDER` only writes the report again, from the results that are there.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.slo.analysis import Runs
from benchmarks.slo.matrix import carry_out, read
from benchmarks.slo.pictures import draw
from benchmarks.slo.report import write
from benchmarks.slo.scenarios import cases

_SECTIONS = ("main", "slo", "noise", "floors", "loss", "clairvoyant")


def main(words: list[str]) -> int:
    """Run and report; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.slo", description=__doc__)
    parser.add_argument("what", nargs="?", choices=["all", "run", "report"], default="all")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the results are kept")
    parser.add_argument("--azure", type=Path, metavar="FILE", help="arrival offsets of the Azure LLM trace of 2023")
    parser.add_argument("--only", nargs="+", choices=_SECTIONS, help="these sections")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--report", type=Path, default=Path(__file__).parents[1] / "RESULTS.md", metavar="FILE",
        help="whose section on this is replaced; pictures go beside it",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="a taste of everything in short runs; proves nothing")
    chosen = parser.parse_args(words)
    if chosen.azure is not None and not chosen.azure.is_file():
        parser.error(f"--azure {chosen.azure}: there is no such file")
    if min(chosen.seeds, chosen.processes) < 1:
        parser.error("--seeds and --processes must be at least 1")
    if chosen.what != "report":
        wanted = cases(chosen.seeds, chosen.azure is not None, chosen.quick)
        sections = chosen.only or _SECTIONS
        selected = [case for case in wanted if case.scenario.section in sections]
        carry_out(chosen.out, selected, chosen.azure, chosen.processes)
    if chosen.what != "run":
        runs = Runs(read(chosen.out))
        if not len(runs):
            parser.error(f"--out {chosen.out}: there are no results yet; leave out `report` to measure them")
        write(runs, chosen.report, draw(runs, chosen.report.parent / "pictures"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
