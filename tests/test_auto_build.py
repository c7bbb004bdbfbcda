"""`variants: auto` from end to end: what a build tries, keeps and remembers, and what an interrupt or a crash costs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build_runs import cards, ending, run, stamps
from factory_fixtures import MODEL_YAML, Built, build_in_process

from variants.attempts import FILE, Attempt, End, Record, read_record, write_record
from variants.auto import OUT_OF_BUDGET
from variants.factory import Options
from variants.repository import ModelFolder
from variants.summary import not_worth_keeping
from variants.variant import Verdict

SHORT, LONG = Options(quick=True, budget_minutes=1e-6), Options(quick=True, budget_minutes=9)


@pytest.fixture(scope="module", autouse=True)
def _judged_by_verdict() -> Iterator[None]:
    """What is kept must not hang on how fast this host runs so small a model: no speed is known."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("variants.build.not_worth_keeping", lambda given, _: not_worth_keeping(given, {}))
        yield


@pytest.fixture(scope="module")
def settled(built_digits: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained digits as an ONNX source, for which `auto` has tried all it has. Not to be changed."""
    origin, folder = built_digits.root / "digits/1", tmp_path_factory.mktemp("auto") / "plain"
    shutil.copytree(origin / "data", folder / "1/data")
    shutil.copy(origin / "variants/fp32/model.onnx", folder / "1/model.onnx")
    kept = [line for line in MODEL_YAML.splitlines() if not line.startswith(("source", "training"))]
    (folder / "model.yaml").write_text("\n".join([*kept, "variants: auto"]))
    code, _, err = run(folder, options=LONG)
    assert (code, err) == (0, "")
    return folder


@pytest.fixture
def model(settled: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(settled, tmp_path / "plain"))


def record(model: Path) -> Record:
    """What the build wrote down."""
    found = read_record(model / "1")
    assert found is not None
    return found


def attempt(model: Path, name: str) -> Attempt:
    """One line of it."""
    return next(each for each in record(model).attempts if each.name == name)


def variants(model: Path) -> set[str]:
    """The folders on the disk, of which each is whole."""
    assert set(cards(model)) == {path.name for path in (model / "1/variants").iterdir()}
    return set(cards(model))


def test_auto_says_what_it_tried_and_keeps_what_stood(settled: Path) -> None:
    """What was kept is on the disk, whole, and nothing else is; what trains is not tried without a module."""
    found = record(settled)
    assert found.complete
    assert not found.out_of_budget
    ends = {each.name: each.end for each in found.attempts}
    assert variants(settled) == {name for name, end in ends.items() if end is End.KEPT} >= {"fp32"}
    assert ends["int8-static"] in (End.KEPT, End.FELL)
    assert attempt(settled, "int8-static").card is not None
    assert ends["pruned"] is End.NOT_TRIED
    assert attempt(settled, "pruned-int8-static").reason == "pruned was not tried by itself"


def test_auto_tries_nothing_twice(model: Path) -> None:
    """A second run with the same budget says what is kept and touches nothing."""
    before = stamps(model)
    code, out, _ = run(model, options=LONG)
    assert (code, "nothing changed; of 10 techniques it keeps fp32" in out) == (0, True)
    assert stamps(model) == before


def test_a_used_up_budget_ends_it_and_more_time_tries_again(model: Path) -> None:
    """Without time only the reference is made, the same budget again does nothing, and a larger one goes on."""
    shutil.rmtree(model / "1/variants")
    for file in ("manifest.json", FILE):
        (model / "1" / file).unlink()
    assert run(model, options=SHORT)[0] == 0
    assert (record(model).out_of_budget, variants(model)) == (True, {"fp32"})
    assert (attempt(model, "int8-static").end, attempt(model, "int8-static").reason) == (
        End.OUT_OF_BUDGET,
        OUT_OF_BUDGET,
    )
    assert "nothing changed" in run(model, options=SHORT)[1]
    assert run(model, options=LONG)[0] == 0
    assert not record(model).out_of_budget
    assert attempt(model, "int8-static").card is not None


def test_what_is_proven_and_current_survives_a_short_budget_without_a_record(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands on the disk costs no time: no recipe runs, and nothing is taken away."""
    before = variants(model)
    assert len(before) > 1
    (model / "1" / FILE).unlink()
    ending(monkeypatch, AssertionError("a recipe ran"))
    assert run(model, options=SHORT)[0] == 0
    assert variants(model) == before
    assert {each.name for each in record(model).attempts if each.end is End.KEPT} == before


def test_an_interrupt_costs_one_attempt(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record holds what was tried before; a short run keeps that, and a long one makes only what is missing."""
    version = ModelFolder(model).newest()
    for name in variants(model) - {"fp32"}:
        version.remove_variant(name)
    (model / "1" / FILE).unlink()
    with monkeypatch.context() as patch:
        ending(patch, KeyboardInterrupt(), "int8-static")
        assert run(model, options=LONG)[0] == 130
    assert not record(model).complete
    assert [each.name for each in record(model).attempts] == ["fp32", "amp", "int8-dynamic"]
    dynamic = attempt(model, "int8-dynamic")
    there = variants(model)
    assert "nothing changed" not in run(model, options=SHORT)[1]
    assert attempt(model, "int8-dynamic").seconds == dynamic.seconds, "it was not made again"
    assert variants(model) == there
    ending(monkeypatch, AssertionError("made again"), "int8-dynamic")
    assert run(model, options=LONG)[0] == 0
    assert attempt(model, "int8-static").card is not None


def test_an_interrupt_forgets_nothing_of_those_to_come(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known of later candidates stays in the record that an interrupted run leaves."""
    names = [each.name for each in record(model).attempts]
    others = [each for each in record(model).attempts if each.name != "int8-dynamic"]
    write_record(model / "1", replace(record(model), complete=False, attempts=tuple(others)))
    if "int8-dynamic" in variants(model):
        ModelFolder(model).newest().remove_variant("int8-dynamic")
    ending(monkeypatch, KeyboardInterrupt(), "int8-dynamic")
    assert run(model, options=LONG)[0] == 130
    assert {each.name for each in record(model).attempts} == {*names} - {"int8-dynamic"}


def test_a_crash_is_its_own_reason_and_takes_nothing_away(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was made before stays, through a run without time too, and the recipe gets another chance."""
    kept = next(iter(sorted(variants(model) - {"fp32"})))
    with monkeypatch.context() as patch:
        ending(patch, ValueError("boom"), kept)
        assert run(model, options=Options(quick=True, force=True, budget_minutes=9))[0] == 1
    crashed = attempt(model, kept)
    assert crashed.end is End.CRASHED
    assert crashed.reason == "the recipe crashed: ValueError: boom; what was made before stays"
    assert kept in variants(model)
    assert run(model, options=SHORT)[0] == 0
    assert kept in variants(model)
    assert run(model, options=LONG)[0] == 0
    assert attempt(model, kept).end is End.KEPT


def test_a_crash_after_a_change_takes_nothing_away(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New calibration data ask for another variant; until it is made, what was proven goes on."""
    calibration = model / "1/data/calibration.npz"
    with np.load(calibration) as arrays:
        fewer = {name: array[1:] for name, array in arrays.items()}
    np.savez(calibration, **fewer)
    ending(monkeypatch, ValueError("boom"), "int8-static")
    assert "int8-static" in variants(model)
    assert run(model, options=LONG)[0] == 1
    assert "int8-static" in variants(model)


def test_what_is_not_worth_keeping_goes_for_good(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason stands in the record, the folder is gone, and the next build does not make it again."""
    (model / "1" / FILE).unlink()
    monkeypatch.setattr("variants.build.not_worth_keeping", lambda *_: {"int8-static": "passed, but late"})
    assert run(model, options=LONG)[0] == 0
    fallen = attempt(model, "int8-static")
    assert (fallen.end, fallen.reason) == (End.FELL, "passed, but late")
    assert "int8-static" not in variants(model)
    ending(monkeypatch, AssertionError("made again"))
    assert "nothing changed" in run(model, options=LONG)[1]


def test_a_crash_with_nothing_before_it_leaves_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The repository has no folder of it, the record says why, and what builds on it is not blamed."""
    for name in ("int8-static", "int8-mixed"):
        ModelFolder(model).newest().remove_variant(name)
    (model / "1" / FILE).unlink()
    ending(monkeypatch, ValueError("boom"), "int8-static")
    assert run(model, options=LONG)[0] == 1
    crashed = attempt(model, "int8-static")
    assert (crashed.end, crashed.reason) == (End.CRASHED, "the recipe crashed: ValueError: boom")
    assert "int8-static" not in variants(model)
    assert attempt(model, "int8-mixed").reason == "int8-static crashed, so it is not known what int8 would lose"


def damaged(model: Path, **values: Any) -> None:
    """Change the record, or its last attempt's entry."""
    found = json.loads((model / "1" / FILE).read_text())
    if "entry" in values:
        found["attempts"][-1]["entry"] = values.pop("entry")
    (model / "1" / FILE).write_text(json.dumps(found | values))


@pytest.mark.parametrize(
    "values",
    [{"host": "another"}, {"entry": {}}, {"entry": {"name": "novel"}}, {"attempts": 3}, {"budget_minutes": 1e999}],
)
def test_a_record_that_does_not_fit_is_as_good_as_none(model: Path, values: dict[str, Any]) -> None:
    """Another host's, one with an entry that names nothing or nothing known, or a broken one."""
    before = variants(model)
    damaged(model, **values)
    code, out, err = run(model, options=SHORT)
    assert (code, err) == (0, "")
    assert "nothing changed" not in out
    assert variants(model) == before


@pytest.mark.slow
def test_auto_with_everything_given_has_a_line_for_every_technique(trained_digits: Path, tmp_path: Path) -> None:
    """In a process of its own, with a module and all data: every end is said, and no variant is unproven."""
    root = Path(shutil.copytree(trained_digits, tmp_path / "models"))
    yaml = root / "digits/model.yaml"
    yaml.write_text(yaml.read_text() + "variants: auto\n")
    done = build_in_process(root, "options=Options(quick=True, budget_minutes=0.3)")
    assert done.code == 0, done.err
    model = root / "digits"
    for each in record(model).attempts:
        assert f"digits {each.name}: {each.end}: {each.reason}" in done.out
    assert all(card.gate.verdict is Verdict.PASSED for card in cards(model).values())
