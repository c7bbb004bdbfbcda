"""What was aimed at, one by one, with what was reached and where it fell short.

Rules of this file: a target's limits stand in its function and nowhere else; a cell is a scenario, its figures are
means over seeds; what falls short is named, the worst first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.slo.analysis import ATTAINMENT, EFFECTIVE, MEAN_ACCURACY, Difference, Runs
from benchmarks.slo.scenarios import BOUND, CV2_8, FASTEST, OURS, PLANNERS, PREFIX, SLACKFIT, TIME_VARYING, Scenario

_SHOWN = 6  # failing cells by name; the rest as a number


@dataclass(frozen=True, slots=True)
class Verdict:
    """A target, whether it was met (None: no data), the figure with the worst cell, and the other cells short of it."""

    target: str
    met: bool | None
    figure: str
    short: str = ""


@dataclass(frozen=True, slots=True)
class _Cell:
    """How far a scenario is above its limit (below 0: short of it), and the figure in words."""

    scenario: Scenario
    above: float
    words: str


def verdicts(runs: Runs) -> Iterator[Verdict]:
    """Every target in turn."""
    yield from _bound(runs)
    yield from _slackfit(runs)
    yield from _planners(runs)
    yield _overload(runs)
    yield from _floors(runs)
    yield from _honesty(runs)
    yield _loss(runs)


def _bound(runs: Runs) -> Iterator[Verdict]:
    easy, hard, beyond, effective = (list[_Cell]() for _ in range(4))
    for cell in _both(runs, "main", BOUND):
        ours, most = runs.mean(cell, OURS, ATTAINMENT), runs.mean(cell, BOUND, ATTAINMENT)
        words = f"{percent(ours)}, bound {percent(most)}"
        if most >= 0.9995 and cell.rho <= 0.8:
            easy.append(_Cell(cell, ours - 0.999, words))
        else:
            (hard if cell.rho <= 0.8 else beyond).append(_Cell(cell, ours - most + 0.003, words))
        ours, most = runs.mean(cell, OURS, EFFECTIVE), runs.mean(cell, BOUND, EFFECTIVE)
        effective.append(_Cell(cell, ours - most + 0.01, f"{ours:.4f}, bound {most:.4f}"))
    yield _verdict("attainment at least 99.9 % where ρ ≤ 0.8 and the bound is at least 99.95 %", easy)
    yield _verdict("attainment within 0.3 points of the bound elsewhere at ρ ≤ 0.8", hard)
    yield _verdict("the same at ρ 0.95 and 1.2", beyond)
    yield _verdict("effective accuracy within 1.0 point of the bound in 90 % of the cells", effective, share=0.9)


def _slackfit(runs: Runs) -> Iterator[Verdict]:
    for other in SLACKFIT:
        cells = _both(runs, "main", other)
        bursts = [cell for cell in cells if cell.trace in CV2_8 and cell.rho >= 0.6]
        gains = [(cell, runs.paired(cell, OURS, other, ATTAINMENT)) for cell in bursts]
        yield _verdict(
            f"attainment at least 3 points above {other} at ρ ≥ 0.6 and CV² 8",
            [_Cell(cell, gain.mean - 0.03, points(gain)) for cell, gain in gains],
        )
        equal = [cell for cell in cells if abs(runs.paired(cell, OURS, other, ATTAINMENT).mean) < 0.001]
        accuracy = [(cell, runs.paired(cell, OURS, other, MEAN_ACCURACY)) for cell in equal]
        yield _verdict(
            f"mean accuracy at most 0.1 points below {other} where attainments differ by less than 0.1 points",
            [_Cell(cell, gain.mean + 0.001, points(gain)) for cell, gain in accuracy],
        )


def _planners(runs: Runs) -> Iterator[Verdict]:
    for kind in ("proteus", "model-switching"):
        periods = [policy for policy in PLANNERS if policy.startswith(kind)]
        fewer, mean, effective = (list[_Cell]() for _ in range(3))
        beyond = 0
        for cell in runs.scenarios("main", lambda cell: cell.trace in TIME_VARYING):
            there = [policy for policy in periods if runs.seeds(cell, policy)]
            if not there or not runs.seeds(cell, OURS):
                continue
            best = max(there, key=lambda policy: runs.mean(cell, policy, ATTAINMENT))
            ours, theirs = (1 - runs.mean(cell, policy, ATTAINMENT) for policy in (OURS, best))
            saved = 1 - ours / theirs if theirs else float(ours == 0)
            words = f"{percent(ours)} missed, {best} {percent(theirs)}"
            if runs.seeds(cell, BOUND):
                least = 1 - runs.mean(cell, BOUND, ATTAINMENT)
                beyond += least > 0.4 * theirs
                words += f", any schedule at least {percent(least)}"
            fewer.append(_Cell(cell, saved - 0.6, words))
            for of, cells in ((MEAN_ACCURACY, mean), (EFFECTIVE, effective)):
                gain = runs.paired(cell, OURS, best, of)
                cells.append(_Cell(cell, gain.mean, f"{points(gain)} against {best}"))
        reach = f" (out of any reach in {beyond} of the cells)" if beyond else ""
        yield _verdict(f"60 % fewer misses than the best {kind} with early drop on time-varying traces{reach}", fewer)
        yield _verdict(f"at an accuracy no lower than that {kind}'s, over the answers in time", mean)
        yield _verdict(f"at an accuracy no lower than that {kind}'s, over all requests", effective)


def _overload(runs: Runs) -> Verdict:
    cells = [cell for cell in _both(runs, "main", FASTEST) if cell.rho >= 0.95]
    gains = [(cell, runs.paired(cell, OURS, FASTEST, ATTAINMENT)) for cell in cells]
    return _verdict(
        f"attainment within 0.5 points of {FASTEST} at ρ 0.95 and 1.2",
        [_Cell(cell, gain.mean + 0.005, points(gain)) for cell, gain in gains],
    )


def _floors(runs: Runs) -> Iterator[Verdict]:
    cells = []
    for cell in runs.scenarios("floors"):
        others = {policy: runs.share(cell, policy, "strict") for policy in PREFIX if runs.seeds(cell, policy)}
        if runs.seeds(cell, OURS) and others and min(others.values()) < 0.6:
            ours = runs.share(cell, OURS, "strict")
            said = ", ".join(f"{policy} {percent(share)}" for policy, share in others.items())
            cells.append(_Cell(cell, ours - 0.97, f"{percent(ours)}, {said}"))
    yield _verdict("mixed floors: strict class at least 97 % where the obvious method falls under 60 %", cells)
    broken = [
        sum(figures["floors_broken"] for figures in runs.seeds(cell, policy).values())
        for section in ("main", "slo", "noise", "floors", "loss", "clairvoyant")
        for cell in runs.scenarios(section)
        for policy in runs.policies(cell)
        if not policy.startswith((BOUND, "clairvoyant"))
    ]
    yield Verdict("no hard floor is ever broken", sum(broken) == 0 if broken else None, f"{sum(broken)} broken")


def _honesty(runs: Runs) -> Iterator[Verdict]:
    cells = [cell for cell in runs.scenarios("main") if runs.seeds(cell, OURS)]
    mixed = [cell for cell in runs.scenarios("floors") if runs.seeds(cell, OURS)]
    for target, where in (
        ("admitted, then failed: under 0.1 % of the requests", cells),
        ("the same where floors differ", mixed),
    ):
        failed = [(cell, runs.mean(cell, OURS, "admitted_then_failed")) for cell in where]
        yield _verdict(target, [_Cell(cell, 0.001 - share, f"{percent(share, 3)}") for cell, share in failed])
    counts = [(cell, *runs.told_early(cell, OURS)) for cell in cells]
    missed, told = sum(missed for _, missed, _ in counts), sum(told for *_, told in counts)
    shares = [_Cell(c, t / m - 0.99, f"{percent(t / m, 1)} of {m:.0f}") for c, m, t in counts if m]
    per_cell = _verdict("", shares)
    yield Verdict(
        "at least 99 % of the requests that miss are told within a tenth of their SLO",
        told >= 0.99 * missed if counts else None,
        f"{percent(told / missed)} of {missed:.0f}; {per_cell.figure}" if missed else "none missed",
        per_cell.short,
    )


def _loss(runs: Runs) -> Verdict:
    cells = []
    for cell in runs.scenarios("loss"):
        if runs.seeds(cell, OURS):
            share = runs.share(cell, OURS, "later, half lost")
            cells.append(_Cell(cell, share - 0.999, f"{percent(share, 3)}"))
    return _verdict("half of the executors lost: 99.9 % again for what arrives one SLO later", cells)


def _both(runs: Runs, section: str, other: str) -> list[Scenario]:
    return [cell for cell in runs.scenarios(section) if runs.seeds(cell, OURS) and runs.seeds(cell, other)]


def _verdict(target: str, cells: Sequence[_Cell], share: float = 1.0) -> Verdict:
    if not cells:
        return Verdict(target, None, "no cells")
    short = sorted((cell for cell in cells if cell.above < 0), key=lambda cell: cell.above)
    met = len(cells) - len(short)
    worst = min(cells, key=lambda cell: cell.above)
    figure = f"{met} of {len(cells)} cells; worst {name(worst.scenario)}: {worst.words}"
    return Verdict(target, met >= share * len(cells), figure, _names(short[1:]))


def _names(cells: Iterable[_Cell]) -> str:
    said = [f"{name(cell.scenario)}: {cell.words}" for cell in cells]
    more = [f"and {len(said) - _SHOWN} more"] if len(said) > _SHOWN else []
    return "; ".join([*said[:_SHOWN], *more])


def name(scenario: Scenario) -> str:
    """A cell in words."""
    slo = f"{scenario.slo_ms} ms" if scenario.section == "slo" else scenario.floors
    return f"{scenario.trace} ρ {scenario.rho:g}{', ' if slo else ''}{slo}"


def percent(share: float, digits: int = 2) -> str:
    """A share in words."""
    return f"{100 * share:.{digits}f} %"


def points(difference: Difference) -> str:
    """A difference in points with its interval."""
    return f"{100 * difference.mean:+.2f} [{100 * difference.low:+.2f}, {100 * difference.high:+.2f}]"
