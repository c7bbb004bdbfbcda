"""Request parameters: what is accepted, what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from wire_requests import read, refuse, with_parameters

from server.scheduling.slo import OnInfeasible, Slo
from server.wire.parameters import MAX_DURATION_NS, MAX_PARAMETERS


def test_every_slo_parameter_is_read() -> None:
    """All parameters together become one SLO and one timeout, in nanoseconds."""
    got = read(
        with_parameters(
            slo_latency_ms={"double_param": 20.5},
            timeout={"int64_param": 15_000},
            slo_min_accuracy={"double_param": 0.9},
            slo_max_accuracy_drop={"double_param": 0.0},
            slo_floor={"string_param": "soft"},
            slo_on_infeasible={"string_param": "late, degrade"},
            variant={"string_param": "int8-dynamic"},
            priority={"uint64_param": 1},
            triton_enable_empty_final_response={"bool_param": True},
            anything_else={"uint64_param": 3},
        )
    )
    assert got.slo == Slo(
        latency_ns=20_500_000,
        min_accuracy=0.9,
        max_accuracy_drop=0.0,
        hard=False,
        on_infeasible=(OnInfeasible.LATE, OnInfeasible.DEGRADE),
        variant="int8-dynamic",
        priority=1,
    )
    assert got.timeout_ns == 15_000_000


@pytest.mark.parametrize(
    ("name", "value", "field", "expected"),
    [
        ("slo_latency_ms", {"int64_param": 20}, "latency_ns", 20_000_000),
        ("slo_latency_ms", {"double_param": 1e-12}, "latency_ns", 1),
        ("slo_latency_ms", {"double_param": 1e300}, "latency_ns", MAX_DURATION_NS),
        ("slo_latency_ms", {"double_param": 1e305}, "latency_ns", MAX_DURATION_NS),  # infinite in nanoseconds
        ("slo_min_accuracy", {"double_param": -0.0}, "min_accuracy", 0.0),
        ("priority", {"int64_param": 2}, "priority", 2),
        ("slo_floor", {"string_param": "hard"}, "hard", True),
    ],
)
def test_accepted_forms(name: str, value: dict[str, Any], field: str, expected: object) -> None:
    """Each type and each edge that the contract allows."""
    assert getattr(read(with_parameters(**{name: value})).slo, field) == expected


@pytest.mark.parametrize(("microseconds", "expected"), [(0, None), (1, 1000), (2**63 - 1, MAX_DURATION_NS)])
def test_timeout(microseconds: int, expected: int | None) -> None:
    """The timeout is microseconds, 0 is none, and the longest one still fits 64 bits."""
    assert read(with_parameters(timeout={"int64_param": microseconds})).timeout_ns == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("slo_latency_ms", {"int64_param": 0}),
        ("slo_latency_ms", {"int64_param": -1}),
        ("slo_latency_ms", {"double_param": float("nan")}),
        ("slo_latency_ms", {"double_param": float("inf")}),
        ("slo_latency_ms", {"string_param": "20"}),
        ("slo_latency_ms", {"bool_param": True}),
        ("slo_latency_ms", {}),
        ("timeout", {"int64_param": -1}),
        ("timeout", {"string_param": "5"}),
        ("timeout", {"double_param": 5.0}),
        ("slo_min_accuracy", {"double_param": 1.0001}),
        ("slo_min_accuracy", {"double_param": -0.1}),
        ("slo_min_accuracy", {"double_param": float("nan")}),
        ("slo_min_accuracy", {"string_param": "0.9"}),
        ("slo_max_accuracy_drop", {"double_param": float("inf")}),
        ("slo_floor", {"string_param": "firm"}),
        ("slo_on_infeasible", {"string_param": ""}),
        ("slo_on_infeasible", {"string_param": "degrade,degrade"}),
        ("slo_on_infeasible", {"string_param": "degrade,panic"}),
        ("variant", {"string_param": ""}),
        ("variant", {"int64_param": 8}),
        ("priority", {"int64_param": -1}),
        ("priority", {"uint64_param": 2**64 - 1}),
        ("slo_latency_ms", {"uint64_param": 20}),
        ("priority", {"double_param": 1.0}),
        ("triton_x", {"bool_param": True}),
        ("sequence_id", {"int64_param": 5}),
        ("sequence_id", {"string_param": "s"}),
        ("sequence_start", {"bool_param": True}),
        ("shared_memory_region", {"string_param": "r"}),
        ("unknown", {}),
        ("x" * 300, {"bool_param": True}),
    ],
)
def test_wrong_parameters(name: str, value: dict[str, Any]) -> None:
    """A wrong type, value or choice, and a value of no known type, is refused naming the parameter."""
    refuse(with_parameters(**{name: value}), f"parameter '{name[:64]}'")


def test_absent_sequences_are_no_sequences() -> None:
    """What a stock client sends when it wants no sequence is accepted."""
    read(
        with_parameters(
            sequence_id={"int64_param": 0}, sequence_start={"bool_param": False}, sequence_end={"bool_param": False}
        )
    )


def test_too_many_parameters() -> None:
    """A flood of parameters is refused."""
    refuse(with_parameters(**{f"p{n}": {"bool_param": True} for n in range(MAX_PARAMETERS + 1)}), "parameters; at most")
