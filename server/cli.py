"""The command line `gearshift`: words in, one function per command, an exit code out.

Rules of this file: wrong usage or configuration is one line on standard error and exit 2, never a trace; a server that
does not answer is one line and exit 1. Commands import what they need when they run, so `--help` is instant.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from server import settings
from server.settings import SettingsError

DEFAULT_URL = "127.0.0.1:8001"


class _Parser(argparse.ArgumentParser):
    """Tells what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Exit 2 with the line."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code, or raises SystemExit for `--help` and wrong usage."""
    chosen = _parser().parse_args(arguments)
    try:
        return int(chosen.run(chosen))
    except SettingsError as error:
        sys.stderr.write(f"gearshift {chosen.command}: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130


def _build(chosen: argparse.Namespace) -> int:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read as torch loads: waiting threads spin otherwise

    from variants.build import build
    from variants.factory import Options

    return build(chosen.path, only=chosen.variants, options=Options(chosen.force, chosen.quick, chosen.budget_minutes))


def _report(chosen: argparse.Namespace) -> int:
    from variants.report.page import write_report

    return write_report(chosen.path, chosen.output)


def _serve(chosen: argparse.Namespace) -> int:
    made = settings.load(vars(chosen))
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # read at its import; its own lines on stderr would break our log

    from server.process import serve

    return serve(made)


def _variants(chosen: argparse.Namespace) -> int:
    from server.remote import show_variants

    return show_variants(chosen)


def _explain(chosen: argparse.Namespace) -> int:
    from server.remote import show_route

    return show_route(chosen)


def _bench(chosen: argparse.Namespace) -> int:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")

    from server.bench.command import bench

    return bench(chosen)


def _simulate(chosen: argparse.Namespace) -> int:
    from server.simulation.command import run

    return run(chosen)


def _names(text: str) -> list[str]:
    """Names between commas; an empty one is a mistake, and no name at all must not mean all of them."""
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name in it")
    return names


def _priority(text: str) -> int:
    """A whole number that the wire can carry; which of them mean something is the server's to say."""
    if not text.isdecimal() or int(text) >= 1 << 32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def _minutes(text: str) -> float:
    """A positive number of minutes."""
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of minutes")
    return minutes


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="gearshift", description="Serve a model's verified variants.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    build = commands.add_parser("build", help="build, evaluate and gate every variant", allow_abbrev=False)
    build.add_argument("path", type=Path, metavar="PATH", help="a model's folder, or a repository of them")
    build.add_argument("--variants", type=_names, metavar="A,B", help="only these")
    build.add_argument("--force", action="store_true", help="build again what is up to date")
    build.add_argument("--quick", action="store_true", help="shorter training and smaller samples; for a first look")
    build.add_argument(
        "--budget-minutes", type=_minutes, default=30.0, metavar="N", help="how long `variants: auto` may try (30)"
    )
    build.set_defaults(run=_build)

    report = commands.add_parser("report", help="one page with pictures of what was built", allow_abbrev=False)
    report.add_argument("path", type=Path, metavar="PATH", help="a model's folder, or a repository of them")
    report.add_argument(
        "-o", "--output", type=Path, default=Path("report.html"), metavar="FILE", help="where to (report.html)"
    )
    report.set_defaults(run=_report)

    serve = commands.add_parser("serve", help="serve every model of a repository", allow_abbrev=False)
    settings.add_flags(serve)
    serve.set_defaults(run=_serve)

    variants = commands.add_parser("variants", help="a running server's variants", allow_abbrev=False)
    variants.add_argument("model", nargs="?", metavar="MODEL", help="only this model")
    _add_connection(variants)
    variants.set_defaults(run=_variants)

    explain = commands.add_parser("explain", help="which variant a request would get, and why", allow_abbrev=False)
    explain.add_argument("model", metavar="MODEL")
    explain.add_argument("--latency-ms", type=float, metavar="X", help="answer wanted within this time")
    explain.add_argument("--min-accuracy", type=float, metavar="A", help="floor on the proven score, 0 to 1")
    explain.add_argument("--max-accuracy-drop", type=float, metavar="D", help="ceiling on the proven drop, 0 to 1")
    explain.add_argument("--floor", choices=("hard", "soft"), help="whether the floor may be broken (hard: never)")
    explain.add_argument("--on-infeasible", type=_names, metavar="A,B", help="in this order: degrade, late, reject")
    explain.add_argument("--variant", metavar="V", help="pin this one")
    explain.add_argument("--priority", type=_priority, metavar="N", help="1 is the highest, 0 the default")
    _add_connection(explain)
    explain.set_defaults(run=_explain)

    _add_bench(
        commands.add_parser(
            "bench", help="open-loop load and what comes of it", allow_abbrev=False, conflict_handler="resolve"
        )
    )
    _add_simulate(commands.add_parser("simulate", help="a trace, a policy: what if", allow_abbrev=False))
    return parser


def _add_bench(bench: argparse.ArgumentParser) -> None:
    """The flags of `bench`; `--json` takes a file here, which resolves the conflict."""
    _add_connection(bench)
    bench.add_argument("--json", type=Path, metavar="FILE", help="write every figure to this file too")
    bench.add_argument("--model", required=True, metavar="M")
    _add_workload(bench)
    bench.add_argument("--data", type=Path, metavar="FILE", help=".npz of inputs and labels; else made-up inputs")
    bench.add_argument("--connections", type=int, default=1, metavar="N", help="over how many connections (1)")
    bench.set_defaults(run=_bench)


def _add_simulate(simulate: argparse.ArgumentParser) -> None:
    """The flags of `simulate`."""
    simulate.add_argument(
        "--profiles", type=Path, required=True, metavar="FILE", help="what `gearshift variants --json` wrote"
    )
    simulate.add_argument("--model", metavar="M", help="which of its models, if there are several")
    simulate.add_argument(
        "--policy", type=_names, default=["fitdrain"], metavar="P,P", help="policies to compare (fitdrain)"
    )
    _add_workload(simulate)
    simulate.add_argument("--variants", type=_names, metavar="A,B", help="as if there were only these")
    simulate.add_argument("--executors", type=int, metavar="N", help="as if there were so many (as profiled)")
    simulate.add_argument("--replicas", type=int, default=1, metavar="N", help="so many servers, in turn (1)")
    simulate.add_argument(
        "--noise", type=float, default=0.05, metavar="D", help="deviation of log latency around the profile (0.05)"
    )
    simulate.add_argument("--pause-rate", type=float, default=0.0, metavar="P", help="share of batches held up (0)")
    simulate.add_argument("--pause-ms", type=float, default=20.0, metavar="X", help="for so long on average (20)")
    simulate.add_argument("--wake-ms", type=float, default=0.1, metavar="X", help="mean time to wake up (0.1)")
    simulate.add_argument(
        "--reply-ms", type=float, default=0.2, metavar="X", help="from a batch's end to clients (0.2)"
    )
    simulate.add_argument("--no-bound", action="store_true", help="leave out the upper bound, which takes a while")
    simulate.add_argument("--json", type=Path, metavar="FILE", help="write every figure to this file too")
    simulate.set_defaults(run=_simulate)


def _add_workload(parser: argparse.ArgumentParser) -> None:
    """The flags that say when requests come and what they ask."""
    parser.add_argument("--trace", type=Path, metavar="FILE", help="replay this: a recording, or offsets in seconds")
    parser.add_argument("--rate", type=float, metavar="R", help="requests per second; of a trace: its new mean")
    parser.add_argument("--cv2", type=float, metavar="C", help="burstiness of made arrivals: 1 is Poisson (1)")
    parser.add_argument("--seconds", type=float, metavar="S", help="length of the load (10, or the whole trace)")
    parser.add_argument("--samples", type=int, metavar="N", help="samples in each request (1, or as traced)")
    parser.add_argument("--latency-ms", type=float, metavar="X", help="answer wanted within this time")
    parser.add_argument("--min-accuracy", type=float, metavar="A", help="floor on the proven score, 0 to 1")
    parser.add_argument("--max-accuracy-drop", type=float, metavar="D", help="ceiling on the proven drop, 0 to 1")
    parser.add_argument("--on-infeasible", metavar="A,B", help="in this order: degrade, late, reject")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of whatever is random (0)")


def _add_connection(parser: argparse.ArgumentParser) -> None:
    """The flags of commands that ask a running server."""
    parser.add_argument("--url", default=DEFAULT_URL, metavar="HOST:PORT", help=f"its gRPC port ({DEFAULT_URL})")
    parser.add_argument("--tls-ca", type=Path, metavar="FILE", help="speak TLS and trust this PEM bundle")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="file that holds the token to send")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
