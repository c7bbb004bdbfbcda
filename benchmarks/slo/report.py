"""Writes the comparison's section of the results: targets first, then tables and pictures.

Rules of this file: only the lines between the two marks are replaced; every number comes from the results given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from benchmarks.slo.analysis import ATTAINMENT, EFFECTIVE, MEAN_ACCURACY, Runs
from benchmarks.slo.family import FP32_ALONE_NS, MAX_BATCH, MS, capacity_per_s, family
from benchmarks.slo.scenarios import AZURE, BOUND, CLAIRVOYANT, FASTEST, FLOORS, OURS, SLO_MS, Scenario, setting
from benchmarks.slo.targets import name, points, verdicts

_BEGIN, _END = "<!-- python -m benchmarks.slo: begin -->", "<!-- python -m benchmarks.slo: end -->"
_RIVALS = ("slackfit+ed", "maxbatch+ed", FASTEST)


def write(runs: Runs, path: Path, pictures: Sequence[tuple[str, str]]) -> None:
    """Put the section into a file, between its marks or at the end; `pictures` are (what they show, file beside it)."""
    section = "\n".join([_BEGIN, *_section(runs, pictures), _END])
    text = path.read_text("utf-8") if path.exists() else ""
    before, begin, rest = text.partition(_BEGIN)
    after = rest.partition(_END)[2] if begin else "\n"
    path.write_text((before if begin else text.rstrip("\n") + "\n\n") + section + after, "utf-8")


def _section(runs: Runs, pictures: Sequence[tuple[str, str]]) -> Iterator[str]:
    yield from _opening(runs)
    yield from _targets(runs)
    yield from ("", *(f"![{shows}](pictures/{file})" for shows, file in pictures), "")
    yield from _floors(runs)
    yield from _loss(runs)
    yield from _side(runs)
    yield from _clairvoyant(runs)
    yield from _main(runs)
    yield from _differences(runs)


def _opening(runs: Runs) -> Iterator[str]:
    main = runs.scenarios("main")
    seeds = {len(runs.seeds(cell, policy)) for cell in main for policy in runs.policies(cell)}
    yield "## Schedulers compared\n"
    yield (
        f"`python -m benchmarks.slo --out FOLDER --azure FILE`: {len(runs)} runs of the live scheduler under a virtual "
        f"clock, {_range(cell.seconds for cell in main)} s of arrivals each, {_range(seeds)} seeds per cell. One model "
        f"with made-up variants ({_variants()}) on two executors, four where executors are lost; an SLO of "
        f"{SLO_MS} ms, which is {SLO_MS * MS / FP32_ALONE_NS:g} fp32 service times; the load ρ is the share of the "
        f"fastest variant's {capacity_per_s(SLO_MS * MS, 2):.0f} requests/s on two. {_noise()} Seeds share arrivals "
        "and luck between policies. `+ed` is early drop. Proteus, Model-Switching, INFaaS and the others are our own "
        "small versions, written from the papers.\n"
    )
    yield (
        "**What this is not**: measured on a machine. Accuracies are the profiled ones, service noise is a model, "
        "there is one node; SlackFit was made for hundreds of variants and has five here."
    )
    if not runs.scenarios("main", lambda cell: cell.trace == AZURE):
        yield "\nThe Azure trace was left out: its file was not given (`--azure`)."
    if len(runs.codes) > 1:
        yield f"\nThe runs come from {len(runs.codes)} states of the code: {', '.join(sorted(runs.codes))}."


def _variants() -> str:
    said = []
    for variant in family():
        if variant.score is not None and variant.profile is not None:
            alone, full = (variant.profile.latency_ns(size) / MS for size in (1, MAX_BATCH))
            said.append(
                f"{variant.name}: accuracy {variant.score.value:g}, {alone:g} ms for 1, {full:g} for {MAX_BATCH}"
            )
    return "; ".join(said)


def _noise() -> str:
    noise = setting(Scenario("main", "poisson", 0.0)).noise
    return (
        f"Latencies vary by {100 * noise.deviation:g} % (log-normal) around their profiles, decisions come an "
        f"exponential {noise.wake_ns / MS:g} ms late, replies cost {noise.reply_ns / MS:g} ms."
    )


def _range(numbers: Iterable[int]) -> str:
    ordered = sorted(set(numbers))
    return " to ".join(map(str, [*ordered[:1], *ordered[1:][-1:]]))


def _chapter(title: str, text: str) -> Iterator[str]:
    yield from ("", f"### {title}", "", text, "")


def _targets(runs: Runs) -> Iterator[str]:
    yield from ("", "### Targets", "")
    yield from _table(
        ("target", "met", "figure", "also short of it"),
        (
            (each.target, {True: "yes", False: "**no**", None: "–"}[each.met], each.figure, each.short)
            for each in verdicts(runs)
        ),
    )


def _floors(runs: Runs) -> Iterator[str]:
    cells = runs.scenarios("floors")
    if not cells:
        return
    yield from _chapter(
        "Mixed accuracy floors",
        f"{_kinds()}; all floors hard, the SLOs by class or drawn apart from the class. *prefix* is the obvious "
        "method: the most urgent requests together, on a variant that the strictest of them allows. Every policy has "
        "the queue in the order of latest starts. Attainment of all / of the strict class, in %; mean accuracy.",
    )
    yield from _by_policy(
        runs,
        cells,
        lambda cell, policy: _with_strict(runs, cell, policy),
    )


def _kinds() -> str:
    floors = [f"a floor of {kind.floor:g}" if kind.floor else "no floor" for kind in FLOORS]
    return ", ".join(
        f"{100 * kind.share:g} % of the requests ({kind.name}) with {floor} and an SLO of {kind.slo_ms} ms"
        for kind, floor in zip(FLOORS, floors, strict=True)
    )


def _with_strict(runs: Runs, cell: Scenario, policy: str) -> str:
    attainment = f"{100 * runs.mean(cell, policy, ATTAINMENT):.2f}"
    if policy == BOUND:
        return attainment
    return (
        f"{attainment} / {100 * runs.share(cell, policy, 'strict'):.2f}; {runs.mean(cell, policy, MEAN_ACCURACY):.4f}"
    )


def _loss(runs: Runs) -> Iterator[str]:
    cells = runs.scenarios("loss")
    if not cells:
        return
    groups = ("all there", "within one SLO of the loss", "later, half lost")
    yield from _chapter(
        "Half of the executors lost",
        "Four executors at ρ 0.4; two die after a third of the run, for a third of it. Attainment, in %, of what "
        "arrives while all are there / less than one SLO before or after the loss / later, while half is lost.",
    )
    yield from _by_policy(
        runs, cells, lambda cell, policy: " / ".join(f"{100 * runs.share(cell, policy, group):.3f}" for group in groups)
    )


def _side(runs: Runs) -> Iterator[str]:
    for section, title in (
        ("slo", "Tighter and looser SLOs: 3 and 10 fp32 service times"),
        ("noise", "Three times the noise: 15 %, and 1 % of the batches held up by an exponential pause of mean 40 ms"),
    ):
        cells = runs.scenarios(section)
        if cells:
            yield from (
                "",
                f"### {title}",
                "",
                "Attainment in % / mean accuracy (of the bound: effective accuracy).",
                "",
            )
            yield from _by_policy(runs, cells, lambda cell, policy: _figures(runs, cell, policy))


def _clairvoyant(runs: Runs) -> Iterator[str]:
    cells = runs.scenarios("clairvoyant")
    if not cells:
        return
    yield from _chapter(
        "Between two bounds",
        f"Effective accuracy on {cells[0].seconds} s of gamma arrivals without noise: the optimum lies between the "
        "schedule found with full knowledge and the upper bound.",
    )
    yield from _by_policy(runs, cells, lambda cell, policy: f"{runs.mean(cell, policy, EFFECTIVE):.4f}")


def _main(runs: Runs) -> Iterator[str]:
    yield from _chapter(
        "Every trace",
        "Attainment in % / mean accuracy by ρ (of the bound: attainment / effective accuracy); † fewer seeds.",
    )
    for trace in dict.fromkeys(cell.trace for cell in runs.scenarios("main")):
        cells = runs.scenarios("main", lambda cell, trace=trace: cell.trace == trace)  # type: ignore[misc]
        yield from ("<details><summary>" + trace + "</summary>", "")
        yield from _by_policy(
            runs, cells, lambda cell, policy: _figures(runs, cell, policy), lambda cell: f"ρ {cell.rho:g}"
        )
        yield from ("", "</details>")


def _differences(runs: Runs) -> Iterator[str]:
    yield from _chapter(
        "Differences with their intervals",
        "fitdrain minus the other, in points, with 95 % intervals of a paired bootstrap over seeds: attainment, mean "
        "accuracy, effective accuracy.",
    )
    for other in _RIVALS:
        cells = [cell for cell in runs.scenarios("main") if runs.seeds(cell, other) and runs.seeds(cell, OURS)]
        yield from (f"<details><summary>{other}</summary>", "")
        yield from _table(
            ("cell", "attainment", "mean accuracy", "effective accuracy"),
            (
                [
                    name(cell),
                    *(points(runs.paired(cell, OURS, other, of)) for of in (ATTAINMENT, MEAN_ACCURACY, EFFECTIVE)),
                ]
                for cell in cells
            ),
        )
        yield from ("", "</details>")


def _figures(runs: Runs, cell: Scenario, policy: str) -> str:
    accuracy = EFFECTIVE if policy in (BOUND, CLAIRVOYANT) else MEAN_ACCURACY
    fewer = "†" if len(runs.seeds(cell, policy)) < len(runs.seeds(cell, OURS)) else ""
    return f"{100 * runs.mean(cell, policy, ATTAINMENT):.2f} / {runs.mean(cell, policy, accuracy):.4f}{fewer}"


def _by_policy(
    runs: Runs,
    cells: Sequence[Scenario],
    words: Callable[[Scenario, str], str],
    heading: Callable[[Scenario], str] = name,
) -> Iterator[str]:
    """A row for each policy, a column for each cell."""
    policies = dict.fromkeys(policy for cell in cells for policy in runs.policies(cell))
    ordered = sorted(policies, key=lambda policy: (policy != OURS, policy in (BOUND, CLAIRVOYANT), policy))
    yield from _table(
        ("policy", *map(heading, cells)),
        ([policy, *(words(cell, policy) if runs.seeds(cell, policy) else "" for cell in cells)] for policy in ordered),
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield f"| {' | '.join(row)} |"
