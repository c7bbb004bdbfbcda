"""What every technique gives on four families of network: accuracy drop, speed-up and size, as Markdown tables.

    python -m benchmarks.techniques --out FOLDER [--family cnn,mlp,lstm,transformer] [--untrained] [--rounds N]

Each family is trained on real digits (once: FOLDER keeps it) and built as `benchmarks/families/<family>.yaml` says, so
drop and verdict are those of `gearshift build`. Speed is measured anew, longer than a build does: on one thread, all
variants on all their runtimes in turns, of each the least of the rounds. `--clock cpu` counts processor time, for a
host that other work shares; that leaves out what a runtime waits for threads of its own. `--untrained` is about speed
alone: larger architectures with random weights, which have no accuracy to lose.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin double the time on a busy host

import numpy as np
import torch

from benchmarks.families import digits, networks
from variants.build import build
from variants.hardware import Hardware, detect_hardware
from variants.measure import Example, find_failures, measure_profiles
from variants.measurements import Measured, Measurements
from variants.repository import VersionFolder, open_path
from variants.runtimes import available_runtimes
from variants.runtimes.runtime import RuntimeUnavailable, Session
from variants.summary import Speed, sound_cards, speeds
from variants.variant import REFERENCE, Card, LatencyProfile, Verdict

HERE = Path(__file__).parent / "families"
BATCH_SIZES = (1, 8, 32)
SECONDS_PER_SESSION = 1.0
CLOCKS: Mapping[str, Callable[[], int]] = {"wall": time.perf_counter_ns, "cpu": time.process_time_ns}

Key = tuple[str, str]
"""A variant and a runtime."""


@dataclass(frozen=True, slots=True)
class Family:
    """How a family is trained, and how many times faster than fp32 its best verified variant is to be."""

    epochs: int
    rate: float
    goal: float


FAMILIES = {
    "cnn": Family(10, 0.003, 4.0),
    "mlp": Family(40, 0.002, 4.0),
    "lstm": Family(32, 0.008, 3.0),
    "transformer": Family(16, 0.001, 3.0),
}
UNTRAINED = {"resnet": (3, 64, 64), "encoder": (128, 384), "recurrent": (64, 64)}
"""The shape of one sample of each architecture in `benchmarks/families/untrained.py`."""


def main() -> None:
    """Train what is not there yet, build, measure, and print a table for each family."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the repository to train and build in")
    parser.add_argument("--family", default=",".join(FAMILIES), help="which of them, separated by commas")
    parser.add_argument("--untrained", action="store_true", help="the larger untrained architectures instead")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    options = parser.parse_args()
    torch.set_num_threads(detect_hardware().cores)  # by default it takes the whole node's, whatever our quota
    if options.untrained:
        for name, shape in UNTRAINED.items():
            report(write_untrained(options.out / name, shape), options.rounds, CLOCKS[options.clock], None)
    for name in () if options.untrained else options.family.split(","):
        report(trained(options.out / name), options.rounds, CLOCKS[options.clock], FAMILIES[name].goal)


def trained(folder: Path) -> Path:
    """The folder of a family, trained unless it is there, configured as its model.yaml is now."""
    family, config = FAMILIES[folder.name], HERE / f"{folder.name}.yaml"
    if (folder / "1/source/model.safetensors").exists():
        shutil.copyfile(config, folder / "model.yaml")
        return folder
    started, sets = time.monotonic(), digits.read_sets(32)
    torch.manual_seed(0)
    network = getattr(networks, folder.name)()
    digits.train(network, sets["training"], epochs=family.epochs, rate=family.rate)
    score, seconds = digits.accuracy(network, sets["evaluation"]), time.monotonic() - started
    print(f"{folder.name}: {score:.2%} of {len(sets['evaluation'].label)} held-out digits, trained in {seconds:.0f} s")
    digits.write_model(folder, network, sets, config.read_text())
    return folder


def write_untrained(folder: Path, shape: tuple[int, ...]) -> Path:
    """A repository with noise to calibrate on and nothing to evaluate with: whatever is built stays unverified."""
    from safetensors.torch import save_model

    from benchmarks.families import untrained

    (folder / "1/source").mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    save_model(getattr(untrained, folder.name)(), str(folder / "1/source/model.safetensors"))
    noise = np.random.default_rng(0).standard_normal((16, *shape)).astype(np.float32)
    np.savez(folder / "1/calibration.npz", input=noise)
    (folder / "model.yaml").write_text((HERE / "untrained.yaml").read_text().format(network=folder.name))
    return folder


def report(folder: Path, rounds: int, clock: Callable[[], int], goal: float | None) -> None:
    """Build a model and print its table, and how its best verified variant compares with the goal."""
    if build(folder) != 0:
        raise SystemExit(f"{folder}: the build failed")
    version = open_path(folder)[0].newest()
    cards, _ = sound_cards(version)
    measured = measure(version, cards, rounds, clock)
    found = speeds(measured, cards, version.model.config.gate)
    fp32 = measured.variants[REFERENCE]["onnxruntime"].profile
    times = ", ".join(f"{fp32.latency_ns(size) / 1e6:.2f} ms at b={size}" for size in fp32.batch_sizes)
    print(f"\n### {folder.name}\n\nfp32 on onnxruntime: {times}\n")
    print("\n".join(table(cards, found)))
    if goal is not None:
        print(f"\n{best(cards, found, goal)}\n", flush=True)


def measure(version: VersionFolder, cards: Mapping[str, Card], rounds: int, clock: Callable[[], int]) -> Measurements:
    """Every variant on every runtime it has evidence for; without evidence, on all that take it."""
    hardware = detect_hardware()
    sessions = dict(_sessions(version, cards, hardware))
    example = _example(version)
    failures = find_failures(sessions, example, BATCH_SIZES)
    sessions = {key: session for key, session in sessions.items() if key not in failures}
    budget_s = SECONDS_PER_SESSION * len(sessions)
    found = [measure_profiles(sessions, example, BATCH_SIZES, budget_s=budget_s, clock=clock) for _ in range(rounds)]
    variants: dict[str, dict[str, Measured]] = {}
    for name, runtime in sessions:
        rows = zip(*(profiles[name, runtime].latencies_ns for profiles in found), strict=True)
        variants.setdefault(name, {})[runtime] = Measured(LatencyProfile(BATCH_SIZES, tuple(map(min, rows))))
    return Measurements(hardware.cpu, hardware.fingerprint, variants)


def _sessions(version: VersionFolder, cards: Mapping[str, Card], hardware: Hardware) -> Iterator[tuple[Key, Session]]:
    for name, card in cards.items():
        precision = str(card.requirements.get("precision", ""))
        for runtime in available_runtimes().values():
            files = [version.artefact(name, file) for file in card.artefacts]
            fitting = [file for file in files if runtime.why_not(file, precision, hardware) is None]
            if fitting and (not card.runtimes or runtime.name in card.runtimes):
                try:
                    yield (name, runtime.name), runtime.load(fitting[0], precision=precision, threads=1, device="cpu")
                except RuntimeUnavailable as error:
                    print(f"{name}: not measured on {runtime.name}: {error}")


def _example(version: VersionFolder) -> Example:
    """One real sample, or one of noise for an untrained model."""
    config = version.model.config
    section = config.evaluation or config.calibration
    assert section is not None
    with np.load(version.resolve(section.data), allow_pickle=False) as arrays:
        return {name: arrays[name][:1] for name in arrays.files if name != "label"}


def table(cards: Mapping[str, Card], found: Mapping[str, Speed]) -> Iterator[str]:
    """A row for each variant, fp32 first, then in the order of their speed-up at the largest batch."""
    yield (
        "| technique | accuracy drop, points | verdict | "
        + " | ".join(f"b={b}" for b in BATCH_SIZES)
        + (" | on | size, MB | compressed, MB |")
    )
    yield "|---|---|---|" + "---|" * (len(BATCH_SIZES) + 3)
    for name in sorted(cards, key=lambda each: (each != REFERENCE, -_at_largest(found.get(each)), each)):
        card, speed = cards[name], found.get(name)
        ratios = [f"{speed.speed_ups[size]:.1f}×" if speed else "–" for size in BATCH_SIZES]
        sizes = [f"{count / 1e6:.2f}" if card.artefact else "–" for count in (card.size_bytes, card.compressed_bytes)]
        verdict = f"{card.gate.verdict}, no benefit" if speed and speed.no_benefit else str(card.gate.verdict)
        cells = [f"{name}", _drop(card, speed), verdict, *ratios, speed.runtime if speed else "–", *sizes]
        yield f"| {' | '.join(cells)} |"


def _at_largest(speed: Speed | None) -> float:
    """The speed-up at the largest batch; what was not measured is slower than anything."""
    return speed.speed_ups[BATCH_SIZES[-1]] if speed else 0.0


def _drop(card: Card, speed: Speed | None) -> str:
    """On the runtime whose speed is shown; on any where none was measured."""
    proof = card.runtimes.get(speed.runtime if speed else "") or next(iter(card.runtimes.values()), None)
    if proof is None:
        return "–" if card.gate.verdict is Verdict.REJECTED else "not measured (random weights)"
    drop = proof.accuracy_drop
    return f"{100 * drop.value:+.1f} [{100 * drop.low:+.1f}, {100 * drop.high:+.1f}]".replace("-", "−")


def best(cards: Mapping[str, Card], found: Mapping[str, Speed], goal: float) -> str:
    """The verified variant of benefit whose least speed-up over the batch sizes is the largest, against the goal."""
    passed = [name for name in found if cards[name].gate.verdict is Verdict.PASSED and name != REFERENCE]
    verified = [name for name in passed if not found[name].no_benefit]
    if not verified:
        return f"No variant passed the gate and is of benefit; the goal is {goal:g}×."
    name = max(verified, key=lambda each: min(found[each].speed_ups.values()))
    ratios = ", ".join(f"{ratio:.1f}× at b={size}" for size, ratio in found[name].speed_ups.items())
    said = "reached at every batch size" if min(found[name].speed_ups.values()) >= goal else "missed somewhere"
    return f"Best verified: {name}, {ratios}; the goal of {goal:g}× is {said}."


if __name__ == "__main__":
    main()
