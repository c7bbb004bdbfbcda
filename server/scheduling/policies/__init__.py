"""Policies by name: FitDrain, and the published ones that it is compared with, all behind the same interface.

`fixed-amp` serves everything with amp, `fixed-fastest` with whatever is fastest; `+ed` adds early drop (see `batches`)
to a published policy. `check_policy` says whether a model has what the name asks for: decisions never raise.
"""

from __future__ import annotations

from collections.abc import Callable

from server.scheduling.model_queue import ModelQueue
from server.scheduling.policies.batches import FASTEST, Baseline, Rule
from server.scheduling.policies.clipper import Clipper
from server.scheduling.policies.clockwork import Clockwork
from server.scheduling.policies.fitdrain import FitDrain
from server.scheduling.policies.fixed import Fixed
from server.scheduling.policies.infaas import Infaas
from server.scheduling.policies.maxbatch import MaxAcc, MaxBatch
from server.scheduling.policies.model_switching import ModelSwitching
from server.scheduling.policies.nexus import Nexus
from server.scheduling.policies.proteus import Proteus
from server.scheduling.policies.slackfit import SlackFit
from server.scheduling.policy import Policy
from variants.variant import State

PolicyFactory = Callable[[], Policy]

_EARLY_DROP = "+ed"
_MS = 1_000_000

_RULES: dict[str, Callable[[], Rule]] = {
    "model-switching-1s": lambda: ModelSwitching(1000 * _MS),
    "model-switching-0.1s": lambda: ModelSwitching(100 * _MS),
    "infaas": Infaas,
    "slackfit": SlackFit,
    "slackfit-q": lambda: SlackFit(to_queue=True),
    "maxbatch": MaxBatch,
    "maxacc": MaxAcc,
}
_PERIODS_MS = {"proteus-10s": 10_000, "proteus-1s": 1000}
_ONE_VARIANT: dict[str, Callable[[str], Rule]] = {"fixed": Fixed, "clipper": Clipper, "nexus": Nexus}
_OF_ONE_VARIANT = (*_ONE_VARIANT, "clockwork")
_NAMES = [
    "fitdrain",
    *(f"{kind}-<variant or fastest>" for kind in _OF_ONE_VARIANT),
    *_RULES,
    *_PERIODS_MS,
]


def policy_factory(name: str) -> PolicyFactory:
    """What makes a policy for each model. Raises ValueError that lists the names there are."""
    if name == "fitdrain":
        return FitDrain
    published, kind, variant = _parsed(name)
    early_drop = published != name
    if published in _RULES:
        return lambda: Baseline(_RULES[published](), early_drop=early_drop)
    if published in _PERIODS_MS:
        return lambda: Proteus(_PERIODS_MS[published] * _MS, early_drop=early_drop)
    if kind == "clockwork" and variant:
        return lambda: Clockwork(variant, early_drop=early_drop)
    if kind in _ONE_VARIANT and variant:
        return lambda: Baseline(_ONE_VARIANT[kind](variant), early_drop=early_drop or kind == "nexus")
    raise ValueError(
        f"there is no policy {name!r}; there are {', '.join(_NAMES)}, and all but fitdrain also with {_EARLY_DROP}"
    )


def check_policy(name: str, model: ModelQueue) -> None:
    """Check that a model can be served with a policy, whose name is one of those that there are.

    Raises ValueError, for a person, where it serves everything with one variant and the model has none of that name
    which takes traffic.
    """
    _, kind, variant = _parsed(name)
    if kind not in _OF_ONE_VARIANT or variant == FASTEST or model.states.get(variant) is State.ELIGIBLE:
        return
    serving = ", ".join(each.name for each in model.variants if model.states[each.name] is State.ELIGIBLE) or "none"
    why = f"which is {model.states[variant]}" if variant in model.states else "which is not there"
    if variant in model.unmeasured:
        why = "which cannot run here"
    raise ValueError(f"{name} needs variant {variant!r} of {model.key.name}, {why}; those that take traffic: {serving}")


def _parsed(name: str) -> tuple[str, str, str]:
    """A name without early drop, its first word, and what follows that."""
    published = name.removesuffix(_EARLY_DROP)
    kind, _, rest = published.partition("-")
    return published, kind, rest
