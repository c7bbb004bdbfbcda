"""`variants: auto`: what is worth trying, what is worth keeping, and what is remembered."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from factory_fixtures import Built, build_in_process

from variants import auto
from variants.auto import OUT_OF_BUDGET, Facts, candidates, fallen, read_record
from variants.hardware import Hardware
from variants.repository import ModelFolder, RepositoryError
from variants.summary import Speed
from variants.variant import Card, Evidence, Gate, Interval, Verdict


def card(name: str, drop: float, verdict: Verdict = Verdict.PASSED) -> Card:
    """A card whose drop is proven to be at most `drop`."""
    exactly = Interval(drop, drop, drop)
    proof = Evidence(exactly, exactly, exactly, samples=100, batch_sizes=(1,), batch_invariance=0.0)
    facts: dict[str, Any] = {"size_bytes": 1, "compressed_bytes": 1, "weights": 1, "flops": 1, "requirements": {}}
    gate = Gate(verdict, "so it was")
    return Card(name, name, {}, "model.onnx", "aa", None, runtimes={"onnxruntime": proof}, gate=gate, **facts)


def tried(facts: Facts, done: dict[str, Card] | None = None) -> list[str]:
    """The candidates that nothing stands against."""
    return [c.variant.name for c in candidates(facts) if c.obstacle(facts, done or {}) is None]


CPU = Hardware(cores=1, cpu="test", isa=frozenset({"AVX2"}))


def facts(*operators: str, **more: Any) -> Facts:
    """A model of these operators with a module and all data, on a plain CPU."""
    given: dict[str, Any] = {"has_module": True, "has_training": True, "has_calibration": True, "hardware": CPU}
    return Facts(frozenset(operators), **(given | more))


def test_a_convolutional_network_gets_static_int8_and_pruning() -> None:
    """On a CPU without bf16 there is no AMP; combinations wait for their parts."""
    expected = ["fp32", "int8-dynamic", "int8-static", "int8-mixed", "pruned", "distilled", "int8-qat"]
    assert tried(facts("Conv", "Gemm")) == expected


def test_an_onnx_source_gets_what_needs_no_training() -> None:
    """Nothing that trains is tried, and the reason says what it would take."""
    given = facts("Conv", "Gemm", has_module=False, has_training=False)
    assert tried(given) == ["fp32", "int8-dynamic", "int8-static", "int8-mixed"]
    pruned = next(c for c in candidates(given) if c.variant.name == "pruned")
    assert pruned.obstacle(given, {}) == "it needs a torch source (module and safetensors), and this one is ONNX"


def test_static_int8_that_passed_needs_no_repair() -> None:
    """Neither mixed precision nor training is tried where there is no damage."""
    done = {"int8-static": card("int8-static", 0.001), "pruned": card("pruned", 0.01)}
    names = tried(facts("Conv", "Gemm"), done)
    assert {"int8-mixed", "int8-qat"}.isdisjoint(names)
    assert "pruned-int8-static" in names


def test_recurrent_networks_and_transformers_combine_with_dynamic_int8() -> None:
    """Static int8 leaves recurrent layers and attention alone, so the combination is with the dynamic one."""
    for operator in ("LSTM", "LayerNormalization"):
        assert "pruned-int8-dynamic" in [c.variant.name for c in candidates(facts("MatMul", operator))]


def test_bf16_hardware_gets_amp() -> None:
    """A CPU with AMX computes bf16 fast."""
    amx = Hardware(cores=1, cpu="test", isa=frozenset({"AMX_BF16"}))
    assert "amp" in tried(facts("Conv", hardware=amx))


def test_what_is_kept_is_the_pareto_front() -> None:
    """A variant falls where another is proven as accurate and no slower at any batch size; a failed one says why."""
    cards = {
        "fp32": card("fp32", 0.0),
        "fast": card("fast", 0.01),
        "worse": card("worse", 0.02),
        "fastest": card("fastest", 0.02),
        "slow": card("slow", 0.005),
        "bad": card("bad", 0.5, Verdict.REJECTED),
        "homeless": card("homeless", 0.001),
    }
    ratios = {
        "fp32": {1: 1.0, 32: 1.0},
        "fast": {1: 3.0, 32: 3.0},
        "worse": {1: 2.0, 32: 3.0},
        "fastest": {1: 2.0, 32: 9.0},
        "slow": {1: 0.5, 32: 1.01},
        "bad": {1: 9.0, 32: 9.0},
    }
    reasons = fallen(cards, {name: Speed("onnxruntime", own) for name, own in ratios.items()})
    assert reasons == {
        "worse": "passed, but fast is no slower and proven as accurate",
        "slow": "passed, but no faster than fp32",
        "bad": "rejected: so it was",
        "homeless": "passed, but no runtime here can run it fast",
    }


def test_drop_and_speed_are_one_runtimes() -> None:
    """A variant that is fast where it is worse does not push out one that is better there."""
    two_faced = card("two-faced", 0.001)
    worse = Interval(0.02, 0.02, 0.02)
    elsewhere = replace(two_faced.runtimes["onnxruntime"], accuracy_drop=worse)
    two_faced = replace(two_faced, runtimes={**two_faced.runtimes, "openvino": elsewhere})
    cards = {"fp32": card("fp32", 0.0), "two-faced": two_faced, "honest": card("honest", 0.005)}
    speeds = {
        "fp32": Speed("onnxruntime", {1: 1.0}),
        "two-faced": Speed("openvino", {1: 4.0}),
        "honest": Speed("onnxruntime", {1: 4.0}),
    }
    assert set(fallen(cards, speeds)) == {"two-faced"}


@pytest.fixture(scope="module")
def settled(trained_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The trained digits built by `auto` with a small budget and little effort."""
    root = Path(shutil.copytree(trained_digits, tmp_path_factory.mktemp("auto") / "models"))
    yaml = root / "digits/model.yaml"
    yaml.write_text(yaml.read_text() + "variants: auto\n")
    return build_in_process(root, "options=Options(quick=True, budget_minutes=0.3)")


@pytest.mark.slow
def test_auto_says_what_it_tried_and_keeps_what_stood(settled: Built) -> None:
    """Every technique has a line; what was kept is on the disk, whole, and nothing else is."""
    assert settled.code == 0, settled.err
    version = ModelFolder(settled.root / "digits").newest()
    record = read_record(version.path)
    assert record is not None
    kept = {attempt.name for attempt in record.attempts if attempt.kept}
    assert set(version.cards()) == kept
    assert "fp32" in kept
    for attempt in record.attempts:
        assert f"digits {attempt.name}: {'kept' if attempt.kept else 'not kept'}: {attempt.reason}" in settled.out
    amp = next(attempt for attempt in record.attempts if attempt.name == "amp")
    assert amp.kept or amp.reason


@pytest.mark.slow
def test_auto_tries_nothing_twice(settled: Built) -> None:
    """A second run with the same budget says what is kept and touches nothing."""
    before = {file: file.stat().st_mtime_ns for file in settled.root.rglob("*") if file.is_file()}
    again = build_in_process(settled.root, "options=Options(quick=True, budget_minutes=0.3)")
    assert again.code == 0
    assert again.out.startswith("digits: nothing changed; of 10 techniques it keeps fp32")
    assert {file: file.stat().st_mtime_ns for file in settled.root.rglob("*") if file.is_file()} == before


@pytest.mark.slow
def test_a_used_up_budget_is_a_reason(trained_digits: Path, tmp_path: Path) -> None:
    """Without time only the reference is made, every other technique says so, and more time tries again."""
    root = Path(shutil.copytree(trained_digits, tmp_path / "models"))
    yaml = root / "digits/model.yaml"
    yaml.write_text(yaml.read_text() + "variants: auto\n")
    assert build_in_process(root, "options=Options(quick=True, budget_minutes=1e-6)").code == 0
    record = read_record(root / "digits/1")
    assert record is not None
    assert not record.complete
    assert [attempt.name for attempt in record.attempts if attempt.kept] == ["fp32"]
    assert OUT_OF_BUDGET in next(a.reason for a in record.attempts if a.name == "int8-static")
    again = build_in_process(root, "options=Options(quick=True, budget_minutes=2e-6)")
    assert "nothing changed" not in again.out


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    """A record that cannot be read is an error with its path, not a crash."""
    (tmp_path / auto.FILE).write_text("{}")
    with pytest.raises(RepositoryError, match=r"auto\.json: host: Field required"):
        read_record(tmp_path)
