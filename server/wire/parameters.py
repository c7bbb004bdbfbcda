"""Request parameters -> what the request asks: its SLO, its timeout, its stream options.

Rules: a known parameter is taken exactly as documented or refused by name; an unknown one is ignored, so that
tomorrow's clients work today. Durations become integer nanoseconds here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from protos import open_inference_pb2 as pb
from server.errors import InvalidRequest
from server.scheduling.slo import OnInfeasible, Slo
from server.wire.tensors import quoted

MAX_PARAMETERS = 64
MAX_NAME = 256
MAX_PRIORITY = 2**31 - 1
MAX_DURATION_NS = 2**62
"""146 years: longer waits are cut to it, so that an instant always fits 64 bits."""

RESERVED = ("shared_memory_region", "shared_memory_offset", "shared_memory_byte_size")


_NO_SLO = Slo()


@dataclass(frozen=True, slots=True)
class RequestParameters:
    """What the parameters of one request say; `timeout_ns` is None where it asks for none."""

    slo: Slo = _NO_SLO
    timeout_ns: int | None = None


class _Parameter(NamedTuple):
    field: str
    kinds: tuple[str, ...]
    read: Callable[[str, Any], Any]


_NOTHING = RequestParameters()
_CHECKED_ONLY = "checked only"
"""The field of parameters that say nothing once they are valid."""
_SLO_FIELDS = frozenset(Slo.__dataclass_fields__)


def read_parameters(parameters: Mapping[str, pb.InferParameter]) -> RequestParameters:
    """Raises InvalidRequest naming the first parameter that is wrong."""
    if not parameters:
        return _NOTHING
    check_names(parameters)
    slo: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for name, parameter in parameters.items():
        kind = str(parameter.WhichOneof("parameter_choice"))
        known = _KNOWN.get(name)
        if known is None:
            if name.startswith("triton_"):
                raise InvalidRequest(f"parameter {quoted(name)} is reserved by the protocol")
            continue
        if kind not in known.kinds:
            wanted = " or ".join(known.kinds)
            raise InvalidRequest(f"parameter {quoted(name)} must be set as {wanted}, not {kind}")
        value = known.read(name, getattr(parameter, kind))
        (slo if known.field in _SLO_FIELDS else others)[known.field] = value
    others.pop(_CHECKED_ONLY, None)
    return RequestParameters(Slo(**slo), **others)


def check_names(parameters: Mapping[str, pb.InferParameter]) -> None:
    """Refuse what no honest client sends: floods, endless names, no value, shared memory. Raises InvalidRequest."""
    if len(parameters) > MAX_PARAMETERS:
        raise InvalidRequest(f"{len(parameters)} parameters; at most {MAX_PARAMETERS} are accepted")
    for name, parameter in parameters.items():
        if len(name) > MAX_NAME:
            raise InvalidRequest(f"parameter {quoted(name)} has a name of {len(name)} characters; at most {MAX_NAME}")
        if name in RESERVED:
            raise InvalidRequest(
                f"parameter {quoted(name)}: shared memory is not offered; send the data in the message"
            )
        if parameter.WhichOneof("parameter_choice") is None:
            raise InvalidRequest(f"parameter {quoted(name)} has no value of a type this server knows")


def latency_ns(name: str, milliseconds: float) -> int:
    """A latency asked for, in nanoseconds, at least 1. Raises InvalidRequest unless positive and finite."""
    if not (math.isfinite(milliseconds) and milliseconds > 0):
        raise InvalidRequest(f"parameter {quoted(name)} must be positive and finite, got {milliseconds}")
    return max(1, int(min(milliseconds * 1_000_000, MAX_DURATION_NS)))


def fraction(name: str, value: float) -> float:
    """An accuracy or a drop of it. Raises InvalidRequest unless it is in [0, 1]."""
    if not 0.0 <= value <= 1.0:  # NaN fails every comparison
        raise InvalidRequest(f"parameter {quoted(name)} must be in [0, 1], got {value}")
    return value + 0.0  # turns -0.0 into 0.0


def hard_floor(name: str, text: str) -> bool:
    """Whether the floor is hard. Raises InvalidRequest unless the text is hard or soft."""
    if text not in ("hard", "soft"):
        raise InvalidRequest(f"parameter {quoted(name)} must be 'hard' or 'soft', got {quoted(text)}")
    return text == "hard"


def on_infeasible(name: str, choices: Iterable[str]) -> tuple[OnInfeasible, ...]:
    """What to do in this order. Raises InvalidRequest for an unknown, repeated or missing choice."""
    chosen: list[OnInfeasible] = []
    for text in choices:
        if text not in tuple(OnInfeasible) or text in chosen:
            offered = ", ".join(OnInfeasible)
            raise InvalidRequest(f"parameter {quoted(name)} lists each of {offered} at most once, got {quoted(text)}")
        chosen.append(OnInfeasible(text))
    return tuple(chosen)


def priority(name: str, value: int) -> int:
    """Raises InvalidRequest unless 0 (default) or a level from 1, the highest."""
    if not 0 <= value <= MAX_PRIORITY:
        raise InvalidRequest(f"parameter {quoted(name)} must be in 0..{MAX_PRIORITY}, got {value}")
    return value


def pinned_variant(name: str, text: str) -> str:
    """Raises InvalidRequest unless it could be a variant's name; whether it is one, the model knows."""
    if not 0 < len(text) <= MAX_NAME:
        raise InvalidRequest(f"parameter {quoted(name)} must be a variant's name, got {quoted(text)}")
    return text


def _timeout_ns(name: str, microseconds: int) -> int | None:
    if microseconds < 0:
        raise InvalidRequest(f"parameter {quoted(name)} must be at least 0 microseconds, got {microseconds}")
    return min(microseconds * 1_000, MAX_DURATION_NS) or None


def _no_sequence(name: str, value: object) -> None:
    if value:
        raise InvalidRequest(f"parameter {quoted(name)}: stateful sequences are not offered")


_KNOWN = {
    "slo_latency_ms": _Parameter("latency_ns", ("int64_param", "double_param"), latency_ns),
    "timeout": _Parameter("timeout_ns", ("int64_param",), _timeout_ns),
    "slo_min_accuracy": _Parameter("min_accuracy", ("double_param",), fraction),
    "slo_max_accuracy_drop": _Parameter("max_accuracy_drop", ("double_param",), fraction),
    "slo_floor": _Parameter("hard", ("string_param",), hard_floor),
    "slo_on_infeasible": _Parameter(
        "on_infeasible", ("string_param",), lambda name, text: on_infeasible(name, map(str.strip, text.split(",")))
    ),
    "variant": _Parameter("variant", ("string_param",), pinned_variant),
    "priority": _Parameter("priority", ("uint64_param", "int64_param"), priority),
    "triton_enable_empty_final_response": _Parameter(_CHECKED_ONLY, ("bool_param",), lambda *_: None),
    "sequence_id": _Parameter(_CHECKED_ONLY, ("int64_param", "uint64_param", "string_param"), _no_sequence),
    "sequence_start": _Parameter(_CHECKED_ONLY, ("bool_param",), _no_sequence),
    "sequence_end": _Parameter(_CHECKED_ONLY, ("bool_param",), _no_sequence),
}
