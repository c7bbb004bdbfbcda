"""`variants: auto`: what is worth trying, and why the rest is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report_fixtures import card

from variants.attempts import FILE, Attempt, End, read_record
from variants.auto import Facts, candidates
from variants.hardware import Hardware
from variants.model_config import RepositoryError
from variants.variant import Verdict


def done(**verdicts: Verdict) -> dict[str, Attempt]:
    """Attempts with evidence that ended in these verdicts."""
    found = {}
    for given, verdict in verdicts.items():
        name, end = given.replace("_", "-"), End.KEPT if verdict is Verdict.PASSED else End.FELL
        found[name] = Attempt({"name": name}, end, "so it was", card(name, 0.01, verdict))
    return found


def tried(facts: Facts, attempts: dict[str, Attempt] | None = None) -> list[str]:
    """The candidates that nothing stands against."""
    return [c.variant.name for c in candidates(facts) if c.obstacle(facts, attempts or {}) is None]


def obstacle(name: str, given: Facts, attempts: dict[str, Attempt] | None = None) -> str:
    """Why a candidate is not tried."""
    found = next(c for c in candidates(given) if c.variant.name == name).obstacle(given, attempts or {})
    assert found is not None
    return found


CPU = Hardware(cores=1, cpu="test", isa=frozenset({"AVX2"}))


def facts(*operators: str, **more: Any) -> Facts:
    """A model of these operators with a module and all data, on a plain CPU."""
    given: dict[str, Any] = {
        "has_module": True, "has_evaluation": True, "has_training": True, "has_calibration": True, "hardware": CPU
    }  # fmt: skip
    return Facts(frozenset(operators), **(given | more))


def test_a_convolutional_network_gets_static_int8_and_pruning() -> None:
    """On a CPU without bf16 there is no AMP; combinations wait for their parts, and repair for damage."""
    expected = ["fp32", "int8-dynamic", "int8-static", "pruned", "distilled"]
    assert tried(facts("Conv", "Gemm")) == expected
    assert tried(facts("Conv", "Gemm"), done(int8_static=Verdict.REJECTED)) == [
        "fp32", "int8-dynamic", "int8-static", "int8-mixed", "pruned", "distilled", "int8-qat",
    ]  # fmt: skip


def test_an_onnx_source_gets_what_needs_no_training() -> None:
    """Nothing that trains is tried, and the reason says what it would take."""
    given = facts("Conv", "Gemm", has_module=False, has_training=False)
    assert tried(given) == ["fp32", "int8-dynamic", "int8-static"]
    assert obstacle("pruned", given) == "it needs a torch source (module and safetensors), and this one is ONNX"
    assert obstacle("pruned-int8-static", given) == "pruned was not tried by itself"


def test_without_evaluation_data_only_fp32_is_tried() -> None:
    """Nothing could be proven, so nothing could be kept, and the reason says what to add."""
    given = facts("Conv", "Gemm", has_evaluation=False)
    assert tried(given) == ["fp32"]
    assert obstacle("int8-static", given).endswith("add `evaluation:` to model.yaml")


def test_static_int8_that_passed_needs_no_repair() -> None:
    """Neither mixed precision nor training is tried where there is no damage."""
    names = tried(facts("Conv", "Gemm"), done(int8_static=Verdict.PASSED, pruned=Verdict.PASSED))
    assert {"int8-mixed", "int8-qat"}.isdisjoint(names)
    assert "pruned-int8-static" in names


@pytest.mark.parametrize("name", ["int8-mixed", "int8-qat"])
def test_only_accuracy_that_was_lost_is_repaired(name: str) -> None:
    """Not what is inconclusive for too few samples, could not be made, crashed, or was never tried."""
    given, lost = facts("Conv", "Gemm"), done(int8_static=Verdict.REJECTED)["int8-static"]
    assert name in tried(given, {"int8-static": lost})
    assert lost.card is not None
    for attempt, reason in (
        (done(int8_static=Verdict.INCONCLUSIVE)["int8-static"], "more evaluation samples would decide"),
        (replace(lost, card=replace(lost.card, runtimes={})), "could not be made"),
        (replace(lost, end=End.CRASHED), "crashed"),
        (replace(lost, end=End.OUT_OF_BUDGET, card=None), "was not tried"),
    ):
        assert reason in obstacle(name, given, {"int8-static": attempt})


def test_a_part_that_failed_is_told_from_one_that_was_never_tried() -> None:
    """A combination's reason is true of the part that it names."""
    given, pruned = facts("Conv", "Gemm"), done(pruned=Verdict.PASSED)
    assert obstacle("pruned-int8-static", given, pruned) == "int8-static was not tried by itself"
    lost = pruned | done(int8_static=Verdict.REJECTED)
    assert obstacle("pruned-int8-static", given, lost) == "int8-static did not pass by itself"
    crashed = pruned | {"int8-static": replace(lost["int8-static"], end=End.CRASHED)}
    assert obstacle("pruned-int8-static", given, crashed) == "int8-static crashed by itself"
    assert "pruned-int8-static" in tried(given, pruned | done(int8_static=Verdict.PASSED))


def test_a_convolutional_network_with_a_softmax_head_combines_with_static_int8() -> None:
    """Dynamic int8 leaves convolutions alone, whatever else the network has."""
    for operator in ("Softmax", "LayerNormalization"):
        assert "pruned-int8-static" in [c.variant.name for c in candidates(facts("Conv", "Gemm", operator))]


def test_recurrent_networks_and_transformers_combine_with_dynamic_int8() -> None:
    """Static int8 leaves recurrent layers and attention alone, so the combination is with the dynamic one."""
    for operator in ("LSTM", "LayerNormalization"):
        assert "pruned-int8-dynamic" in [c.variant.name for c in candidates(facts("MatMul", operator))]


def test_bf16_hardware_gets_amp() -> None:
    """A CPU with AMX computes bf16 fast."""
    amx = Hardware(cores=1, cpu="test", isa=frozenset({"AMX_BF16"}))
    assert "amp" in tried(facts("Conv", hardware=amx))


def test_what_a_crash_or_a_used_up_budget_found_stays() -> None:
    """Only what fell, or was never made, has no place in the repository."""
    made = done(x=Verdict.PASSED)["x"]
    stays = {end: replace(made, end=end).stays for end in End}
    assert stays == {
        End.KEPT: True, End.FELL: False, End.NOT_TRIED: False, End.OUT_OF_BUDGET: True, End.CRASHED: True
    }  # fmt: skip
    assert not replace(made, end=End.CRASHED, card=card("x", None, Verdict.REJECTED, made=False)).stays


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", r"auto\.json: host: Field required"),
        ('{"host": "h", "budget_minutes": 1e999, "complete": true, "attempts": []}', "budget_minutes"),
        (
            '{"host": "h", "budget_minutes": 1, "complete": true, "attempts": [{"entry": {}, "end": "kept"}]}',
            "a variant is a name",
        ),
    ],
)
def test_a_damaged_record_is_named(text: str, message: str, tmp_path: Path) -> None:
    """A record that cannot be read is an error with its path, not a crash."""
    (tmp_path / FILE).write_text(text)
    with pytest.raises(RepositoryError, match=message):
        read_record(tmp_path)


def test_a_record_that_is_a_folder_is_named(tmp_path: Path) -> None:
    """Whatever stands in its place."""
    (tmp_path / FILE).mkdir()
    with pytest.raises(RepositoryError, match=r"auto\.json: Is a directory"):
        read_record(tmp_path)
