"""Policies by name: FitDrain, and the published ones that it is compared with, all behind the same interface.

`fixed-amp` serves everything with amp, `fixed-fastest` with whatever is fastest; `+ed` adds early drop (see `batches`)
to a published policy.
"""

from __future__ import annotations

from collections.abc import Callable

from server.scheduling.policies.batches import Baseline, Rule
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
_NAMES = [
    "fitdrain",
    *(f"{kind}-<variant or fastest>" for kind in (*_ONE_VARIANT, "clockwork")),
    *_RULES,
    *_PERIODS_MS,
]


def policy_factory(name: str) -> PolicyFactory:
    """What makes a policy for each model. Raises ValueError that lists the names there are."""
    if name == "fitdrain":
        return FitDrain
    published = name.removesuffix(_EARLY_DROP)
    early_drop = published != name
    kind, _, variant = published.partition("-")
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
