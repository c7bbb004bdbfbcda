"""The variants of a model as a running server describes them: what `gearshift variants --json` wrote, read back.

Rules: a file from elsewhere is checked, and what is wrong with it is one sentence. Only variants with a measured
latency can be simulated; their states are kept, so a variant that takes no traffic there takes none here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from server.scheduling.admission import Defaults
from server.scheduling.slo import OnInfeasible
from variants.variant import Interval, LatencyProfile, State, Variant


class ProfilesError(ValueError):
    """A file that describes no variants; the text is for a person."""


_Milliseconds = Annotated[float, Field(gt=0, le=86_400_000)]  # a day, as for the settings of a server


class _Finite(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)


class _Interval(_Finite):
    value: float = Field(ge=0, le=1)
    low: float = Field(ge=-1, le=1)
    high: float = Field(ge=-1, le=1)


class _Drop(_Interval):
    value: float = Field(ge=-1, le=1)


class _AtLength(_Finite):
    elements: int = Field(ge=1)
    latency_ms: dict[int, _Milliseconds]


class _Described(_Finite):
    variant: str
    state: State
    reason: str = ""
    precision: str = ""
    runtime: str = ""
    device: str = ""
    accuracy: _Interval | None = None
    accuracy_drop: _Drop | None = None
    latency_ms: dict[int, _Milliseconds] = {}
    crowded_latency_ms: dict[int, _Milliseconds] = {}
    lengths: list[_AtLength] = []
    batchable: bool = True


class _Slo(_Finite):
    latency_ms: _Milliseconds = 1000.0
    max_accuracy_drop: float | None = Field(None, ge=0, le=1)
    on_infeasible: list[OnInfeasible] | None = None


class _Model(_Finite):
    model: str
    version: str = ""
    variants: list[_Described] | None = None
    executors: int = Field(1, ge=1)
    slo: _Slo = _Slo()


@dataclass(frozen=True, slots=True)
class Profiled:
    """A model as a server described it: its measured variants, the server's executors, what requests get by default."""

    model: str
    variants: tuple[Variant, ...]
    executors: int
    defaults: Defaults


def read_profiles(path: Path, model: str | None = None) -> Profiled:
    """What a file says of a model, of the only one if none is named.

    Raises ProfilesError for a file that is none, for several models where none is named, and for a model without
    measured variants.
    """
    try:
        text = path.read_text("utf-8")
        documents = json.loads(text)
        models = [_Model.model_validate(each) for each in (documents if isinstance(documents, list) else [documents])]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ProfilesError(f"{path}: cannot be read: {error}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ProfilesError(f"{path}: not what `gearshift variants --json` writes: {where}: {first['msg']}") from None
    served = {each.model: each for each in models if each.variants}
    if model is None and len(served) != 1:
        raise ProfilesError(f"{path}: holds the models {', '.join(served) or 'none'}: name one with --model")
    chosen = served.get(model) if model is not None else next(iter(served.values()))
    if chosen is None:
        raise ProfilesError(f"{path}: holds no model {model}; it holds {', '.join(served) or 'none'}")
    measured = [_variant(each) for each in chosen.variants or () if each.latency_ms]
    if not measured:
        raise ProfilesError(f"{path}: no variant of {chosen.model} has a measured latency")
    return Profiled(chosen.model, tuple(measured), chosen.executors, _defaults(chosen.slo))


def _variant(described: _Described) -> Variant:
    try:
        return Variant(
            name=described.variant,
            state=described.state,
            reason=described.reason,
            precision=described.precision,
            runtime=described.runtime,
            device=described.device,
            score=_interval(described.accuracy),
            drop=_interval(described.accuracy_drop),
            profile=_profile(described.latency_ms),
            crowded=_profile(described.crowded_latency_ms) if described.crowded_latency_ms else None,
            batchable=described.batchable,
            lengths=tuple((each.elements, _profile(each.latency_ms)) for each in described.lengths),
        )
    except ValueError as error:
        raise ProfilesError(f"variant {described.variant}: {error}") from None


def _defaults(slo: _Slo) -> Defaults:
    on_infeasible = None if slo.on_infeasible is None else tuple(slo.on_infeasible)
    return Defaults(int(slo.latency_ms * 1e6), slo.max_accuracy_drop, on_infeasible)


def _interval(found: _Interval | None) -> Interval | None:
    return None if found is None else Interval(found.value, found.low, found.high)


def _profile(latency_ms: Mapping[int, float]) -> LatencyProfile:
    points = sorted(latency_ms.items())
    return LatencyProfile(
        tuple(size for size, _ in points), tuple(max(1, round(milliseconds * 1e6)) for _, milliseconds in points)
    )
