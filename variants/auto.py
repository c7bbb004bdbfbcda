"""`variants: auto`: which techniques are worth trying on a model, and in which order.

Rules of this file: cheap recipes come first, so that a small budget still gives something; a technique that is not
tried has a reason, and the reason is true: what was never tried has not failed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, replace
from typing import Any

from variants.attempts import Attempt, End
from variants.hardware import Hardware, possible_precision
from variants.model_config import VariantConfig
from variants.variant import REFERENCE, Verdict

DEFAULT_BUDGET_MINUTES = 30.0
OUT_OF_BUDGET = "the budget was used up"

_PRODUCTS = {"MatMul", "Gemm"}
_RECURRENT = {"LSTM", "GRU"}
_NORMS = {"LayerNormalization", "Softmax", "Attention", "SimplifiedLayerNormalization"}


@dataclass(frozen=True, slots=True)
class Facts:
    """What decides a plan: the graph's operators, what the person gave, and the host."""

    operators: Set[str]
    has_module: bool
    has_evaluation: bool
    has_training: bool
    has_calibration: bool
    hardware: Hardware


Done = Mapping[str, Attempt]
Obstacle = Callable[[Facts, Done], str | None]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A variant to try, and what would make that pointless, given the attempts before it."""

    variant: VariantConfig
    obstacle: Obstacle


def candidates(facts: Facts) -> list[Candidate]:
    """Everything there is to try on this model, in the order of its cost."""
    int8 = _best_int8(facts)
    pruned = {"recipe": "prune-channels", "sparsity": "auto"}
    distilled = {"recipe": "distilled"}
    plans = [
        Candidate(_variant(REFERENCE), lambda _facts, _done: None),
        Candidate(_variant("amp"), _no_half_precision),
        Candidate(_variant("int8-dynamic"), _nothing_dynamic),
        Candidate(_variant("int8-static"), _nothing_static),
        Candidate(_variant("int8-mixed"), _no_partial_damage),
        Candidate(_variant("pruned", pruned), _cannot_train),
        Candidate(_variant(f"pruned-{int8}", pruned, int8), _needs("pruned", int8)),
        Candidate(_variant("distilled", distilled), _cannot_train),
        Candidate(_variant(f"distilled-{int8}", distilled, int8), _needs("distilled", int8)),
        Candidate(_variant("int8-qat"), _nothing_to_train_away),
    ]
    if facts.has_evaluation:
        return plans
    return [plans[0], *(replace(each, obstacle=_nothing_to_prove) for each in plans[1:])]


def _variant(name: str, *steps: Any) -> VariantConfig:
    return VariantConfig.model_validate({"name": name, "recipe": list(steps)} if steps else name)


def _best_int8(facts: Facts) -> str:
    """The int8 that pays after a network was made smaller.

    Convolutions only have the static one, recurrent layers and attention only the dynamic one; convolutions weigh more.
    """
    is_dynamic = "Conv" not in facts.operators and facts.operators & (_RECURRENT | _NORMS)
    return "int8-dynamic" if is_dynamic else "int8-static"


def _nothing_to_prove(_facts: Facts, _done: Done) -> str | None:
    return "without evaluation data nothing can be proven, so nothing could be kept; add `evaluation:` to model.yaml"


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
    return _nothing_static(facts, done) or _nothing_to_repair(done)


def _nothing_to_repair(done: Done) -> str | None:
    """Only accuracy that int8 lost can be won back; more samples would decide what is inconclusive."""
    static = done.get("int8-static")
    if static is None or static.card is None or static.end not in (End.KEPT, End.FELL):
        return f"int8-static {_unfinished(static)}, so it is not known what int8 would lose"
    if static.passed:
        return "int8-static passed with every layer in int8"
    if static.card.gate.verdict is not Verdict.REJECTED:
        return "int8-static is not rejected but inconclusive: more evaluation samples would decide"
    return None if static.card.runtimes else "int8-static could not be made, so there is no accuracy to win back"


def _unfinished(attempt: Attempt | None) -> str:
    return "crashed" if attempt and attempt.end is End.CRASHED else "was not tried"


def _cannot_train(facts: Facts, _: Done) -> str | None:
    if not facts.has_module:
        return "it needs a torch source (module and safetensors), and this one is ONNX"
    return None if facts.has_training else "there is no training data; add `training:` to model.yaml"


def _nothing_to_train_away(facts: Facts, done: Done) -> str | None:
    return _nothing_static(facts, done) or _cannot_train(facts, done) or _nothing_to_repair(done)


def _needs(*names: str) -> Obstacle:
    """A combination is worth trying where each of its parts passed by itself."""

    def obstacle(_: Facts, done: Done) -> str | None:
        for name in names:
            part = done.get(name)
            if part is None or part.end not in (End.KEPT, End.FELL):
                return f"{name} {_unfinished(part)} by itself"
            if not part.passed:
                return f"{name} did not pass by itself"
        return None

    return obstacle
