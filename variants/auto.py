"""`variants: auto`: which techniques are worth trying on a model, and which of those that passed are worth keeping.

Rules of this file: cheap recipes come first, so that a small budget still gives something; a technique that is not
tried, and one that falls, has a reason; what is kept is the Pareto front of proven accuracy and measured latency, fp32
always on it. All of it is written down, so that nothing is tried twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from variants.durable import write_durably
from variants.hardware import Hardware, possible_precision
from variants.model_config import RepositoryError, VariantConfig, one_line
from variants.summary import Speed
from variants.variant import REFERENCE, Card, Verdict

FILE = "auto.json"
DEFAULT_BUDGET_MINUTES = 30.0
OUT_OF_BUDGET = "the budget was used up"

_PRODUCTS = {"MatMul", "Gemm"}
_RECURRENT = {"LSTM", "GRU"}
_NORMS = {"LayerNormalization", "Softmax", "Attention", "SimplifiedLayerNormalization"}
_NOISE = 1.03
"""A speed within 3 % of another is not slower: that much a busy host does to a measurement."""

SpeedUps = Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Facts:
    """What decides a plan: the graph's operators, what the person gave, and the host."""

    operators: Set[str]
    has_module: bool
    has_training: bool
    has_calibration: bool
    hardware: Hardware


Done = Mapping[str, Card]
Obstacle = Callable[[Facts, Done], str | None]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A variant to try, and what would make that pointless, given the cards of those tried before."""

    variant: VariantConfig
    obstacle: Obstacle


def candidates(facts: Facts) -> list[Candidate]:
    """Everything there is to try on this model, in the order of its cost."""
    int8 = _best_int8(facts)
    pruned = {"recipe": "prune-channels", "sparsity": "auto"}
    distilled = {"recipe": "distilled"}
    return [
        Candidate(_variant(REFERENCE), lambda _facts, _done: None),
        Candidate(_variant("amp"), _no_half_precision),
        Candidate(_variant("int8-dynamic"), _nothing_dynamic),
        Candidate(_variant("int8-static"), _nothing_static),
        Candidate(_variant("int8-mixed"), _no_partial_damage),
        Candidate(_variant("pruned", pruned), _cannot_train),
        Candidate(_variant(f"pruned-{int8}", pruned, int8), _needs("pruned", int8)),
        Candidate(_variant("distilled", distilled), _cannot_train),
        Candidate(_variant(f"distilled-{int8}", distilled, int8), _needs("distilled", int8)),
        Candidate(_variant("int8-qat"), _nothing_to_repair),
    ]


def _variant(name: str, *steps: Any) -> VariantConfig:
    return VariantConfig.model_validate({"name": name, "recipe": list(steps)} if steps else name)


def _best_int8(facts: Facts) -> str:
    """The int8 that pays after a network was made smaller: recurrent layers and attention only have the dynamic one."""
    return "int8-dynamic" if facts.operators & (_RECURRENT | _NORMS) else "int8-static"


def _no_half_precision(facts: Facts, _: Done) -> str | None:
    device = "cuda" if facts.hardware.cuda else "cpu"
    amp = possible_precision(facts.hardware, device)
    return None if amp.precision else amp.reason


def _nothing_dynamic(facts: Facts, _: Done) -> str | None:
    return None if facts.operators & (_PRODUCTS | _RECURRENT) else "there is no matrix product and no recurrent layer"


def _nothing_static(facts: Facts, _: Done) -> str | None:
    if not facts.has_calibration:
        return "there is no calibration data; add `calibration:` to model.yaml"
    return None if facts.operators & (_PRODUCTS | {"Conv"}) else "there is no convolution and no matrix product"


def _no_partial_damage(facts: Facts, done: Done) -> str | None:
    if reason := _nothing_static(facts, done):
        return reason
    if _passed("int8-static", done):
        return "int8-static passed with every layer in int8"
    return None


def _cannot_train(facts: Facts, _: Done) -> str | None:
    if not facts.has_module:
        return "it needs a torch source (module and safetensors), and this one is ONNX"
    return None if facts.has_training else "there is no training data; add `training:` to model.yaml"


def _nothing_to_repair(facts: Facts, done: Done) -> str | None:
    if _passed("int8-static", done):
        return "int8-static passed: there is no damage to train away"
    return _nothing_static(facts, done) or _cannot_train(facts, done)


def _needs(*names: str) -> Obstacle:
    """A combination is worth trying where each of its parts passed by itself."""

    def obstacle(_: Facts, done: Done) -> str | None:
        missing = next((name for name in names if not _passed(name, done)), None)
        return f"{missing} did not pass by itself" if missing else None

    return obstacle


def _passed(name: str, done: Done) -> bool:
    return name in done and done[name].gate.verdict is Verdict.PASSED


def fallen(cards: Done, speeds: Mapping[str, Speed]) -> dict[str, str]:
    """Why each variant is not worth keeping; those on the Pareto front are not mentioned.

    A variant is dominated by one whose proven drop is no larger and that is no slower at any measured batch size.
    Drop and speed are those of one runtime: the one that each variant is fastest on here.
    """
    reasons = {}
    for name, card in cards.items():
        if name == REFERENCE:
            continue
        if card.gate.verdict is not Verdict.PASSED:
            reasons[name] = f"{card.gate.verdict}: {card.gate.reason}"
        elif name not in speeds:
            reasons[name] = "passed, but no runtime here can run it fast"
    standing = {name: card for name, card in cards.items() if name not in reasons}
    if REFERENCE not in speeds:
        return {name: "fp32 could not be measured beside it" for name in cards if name != REFERENCE}
    drops = {name: _drop(card, speeds[name].runtime) for name, card in standing.items()}
    order = sorted(standing, key=lambda name: (drops[name], name != REFERENCE, -max(speeds[name].speed_ups.values())))
    front: list[str] = []
    for name in order:
        better = next((other for other in front if _no_slower(speeds[other].speed_ups, speeds[name].speed_ups)), None)
        if better is None or name == REFERENCE:
            front.append(name)
        else:
            faults = "no faster than fp32" if better == REFERENCE else f"{better} is no slower and proven as accurate"
            reasons[name] = f"passed, but {faults}"
    return reasons


def _drop(card: Card, runtime: str) -> float:
    """The upper bound of the drop that was proven on a runtime; the reference has none."""
    return 0.0 if card.variant == REFERENCE else card.runtimes[runtime].accuracy_drop.high


def _no_slower(one: SpeedUps, other: SpeedUps) -> bool:
    return all(one[batch] * _NOISE >= ratio for batch, ratio in other.items())


@dataclass(frozen=True, slots=True)
class Attempt:
    """One line of the record: a candidate, as `model.yaml` would have it, and its end. Not tried: no card."""

    entry: Mapping[str, Any]
    kept: bool
    reason: str
    card: Card | None = None
    crashed: bool = False
    fingerprint: str = ""
    seconds: float = 0.0

    @property
    def name(self) -> str:
        """The variant's name."""
        return str(self.entry["name"])


@dataclass(frozen=True, slots=True)
class Record:
    """What `auto` did on a version and a host (`Hardware.fingerprint`); `complete` unless the budget ended it."""

    host: str
    budget_minutes: float
    complete: bool
    attempts: tuple[Attempt, ...]


_RECORD = TypeAdapter(Record)


def read_record(version: Path) -> Record | None:
    """What `auto` last did, None if it never ran. Raises RepositoryError."""
    try:
        return _RECORD.validate_json((version / FILE).read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise RepositoryError(one_line(error, str(version / FILE))) from error


def write_record(version: Path, record: Record) -> None:
    """Replace the record."""
    write_durably(version / FILE, _RECORD.dump_json(record, indent=1))
