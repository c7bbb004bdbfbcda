"""A second `build`: what it leaves alone, makes again and judges anew."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from build_runs import cards, ending, run, stamps, with_recipe
from factory_fixtures import Built

from variants.factory import Options
from variants.recipes.recipe import Ingredients, Product
from variants.repository import ModelFolder
from variants.variant import Verdict


def test_building_again_does_nothing(built_digits: Built) -> None:
    """The second build writes no file and says that nothing changed."""
    model = built_digits.root / "digits"
    before = stamps(model)
    code, out, _ = run(built_digits.root)
    assert code == 0
    assert out == "digits: nothing changed, all 5 variants are up to date\n"
    assert stamps(model) == before


def test_only_what_changed_is_built_again(onnx_digits: Path) -> None:
    """A new recipe parameter rebuilds that variant; a removed variant goes; a tampered one is made anew."""
    assert run(onnx_digits)[0] == 0
    before = stamps(onnx_digits)
    yaml = onnx_digits / "model.yaml"
    sparser = "{name: pruned-unstructured, sparsity: 0.9}"
    yaml.write_text(yaml.read_text().replace("int8-dynamic, pruned-unstructured", sparser))
    code, out, _ = run(onnx_digits)
    assert code == 0
    assert "int8-dynamic: removed" in out
    after = stamps(onnx_digits)
    changed = {Path(file).parent.name for file in after if after[file] != before.get(file)}
    assert changed == {"pruned-unstructured"}
    assert set(cards(onnx_digits)) == {"fp32", "pruned-unstructured"}

    artefact = onnx_digits / "1/variants/pruned-unstructured/model.onnx"
    artefact.write_bytes(artefact.read_bytes() + b"x")
    assert run(onnx_digits)[0] == 0
    assert cards(onnx_digits)["pruned-unstructured"].sha256
    ModelFolder(onnx_digits).newest().artefact("pruned-unstructured", "model.onnx")


def test_a_new_gate_judges_what_is_there(onnx_digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another gate changes the verdicts; no recipe runs, and every artefact stays to the byte."""
    assert run(onnx_digits)[0] == 0
    before = cards(onnx_digits)
    yaml = onnx_digits / "model.yaml"
    yaml.write_text(yaml.read_text().replace("max_accuracy_drop: 0.03", "max_accuracy_drop: 0.0"))

    def must_not_run(*_: object) -> Product:
        raise AssertionError("a recipe ran")

    monkeypatch.setattr("variants.factory.run_chain", must_not_run)
    assert run(onnx_digits)[0] == 0
    after = cards(onnx_digits)
    assert {name: card.sha256 for name, card in after.items()} == {name: card.sha256 for name, card in before.items()}
    assert before["int8-dynamic"].gate.verdict is Verdict.PASSED
    assert after["int8-dynamic"].gate.verdict is not Verdict.PASSED


def test_new_evaluation_data_is_new_evidence(onnx_digits: Path) -> None:
    """Fewer evaluation samples mean new cards, wider intervals, and a gate that may no longer be provable."""
    run(onnx_digits)
    wide = cards(onnx_digits)["int8-dynamic"]
    assert wide.gate.verdict is Verdict.PASSED
    path = onnx_digits / "1/data/evaluation.npz"
    with np.load(path) as data:
        np.savez(path, **{name: data[name][:50] for name in data.files})
    assert run(onnx_digits)[0] == 0
    few = cards(onnx_digits)["int8-dynamic"]
    assert few.runtimes["onnxruntime"].samples == 50
    assert few.gate.verdict is Verdict.INCONCLUSIVE
    assert "would suffice" in few.gate.reason


def test_a_remade_reference_has_its_children_made_again(onnx_digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lost fp32 that comes out with other bytes leaves no variant behind that descends from the lost one."""
    assert run(onnx_digits)[0] == 0

    def renamed(ingredients: Ingredients, _: object) -> Product:
        graph = onnx.load(ingredients.source.graph)
        graph.graph.name = "another"
        onnx.save(graph, ingredients.work / "another.onnx")
        return Product({"model.onnx": ingredients.work / "another.onnx"})

    with_recipe(monkeypatch, "fp32", renamed)
    (onnx_digits / "1/variants/fp32/model.onnx").unlink()
    assert run(onnx_digits)[0] == 0
    assert set(cards(onnx_digits)) == {"fp32", "int8-dynamic", "pruned-unstructured"}


def test_evidence_in_another_metric_is_stale(onnx_digits: Path) -> None:
    """After a change of metric, what was not scored in it is left out, and the person is told."""
    assert run(onnx_digits)[0] == 0
    yaml = onnx_digits / "model.yaml"
    yaml.write_text(yaml.read_text().replace("top1", "macro_f1"))
    code, out, _ = run(onnx_digits, only=["int8-dynamic"])
    assert code == 0
    assert set(cards(onnx_digits)) == {"fp32", "int8-dynamic"}
    assert "pruned-unstructured takes no traffic until it is built again, for fp32 or how it is scored has" in out


def test_only_and_force_choose_what_is_built(onnx_digits: Path) -> None:
    """`only` builds the named variant and the reference; `force` builds what is current; a typo is exit code 2."""
    assert run(onnx_digits, only=["int8-dynamic"])[0] == 0
    assert set(cards(onnx_digits)) == {"fp32", "int8-dynamic"}
    before = stamps(onnx_digits)
    assert run(onnx_digits, only=["int8-dynamic"])[0] == 0
    assert stamps(onnx_digits) == before
    assert run(onnx_digits, only=["int8-dynamic"], options=Options(force=True))[0] == 0
    assert all(after != before[file] for file, after in stamps(onnx_digits).items())
    code, _, err = run(onnx_digits, only=["int8-dinamic"])
    assert code == 2
    assert "no variant 'int8-dinamic' is configured; did you mean 'int8-dynamic'?" in err


def test_a_partial_build_does_not_vouch_for_the_rest(onnx_digits: Path) -> None:
    """After new evaluation data, what was not measured on them is stale until it is built too."""
    assert run(onnx_digits)[0] == 0
    path = onnx_digits / "1/data/evaluation.npz"
    with np.load(path) as data:
        np.savez(path, **{name: data[name][:600] for name in data.files})
    assert run(onnx_digits, only=["pruned-unstructured"])[0] == 0
    assert set(cards(onnx_digits)) == {"fp32", "pruned-unstructured"}
    assert run(onnx_digits)[0] == 0
    assert set(cards(onnx_digits)) == {"fp32", "int8-dynamic", "pruned-unstructured"}


def test_after_a_crash_nothing_else_answers_under_a_name(onnx_digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was made before stays if it is what is asked for and sound; not with other parameters, and not damaged."""
    yaml = (onnx_digits / "model.yaml").read_text().split("variants:")[0]
    named = "variants: [fp32, {{name: mine, recipe: prune-unstructured, sparsity: {sparsity}}}]"

    def ask(sparsity: float) -> None:
        (onnx_digits / "model.yaml").write_text(yaml + named.format(sparsity=sparsity))

    ask(0.5)
    assert run(onnx_digits)[0] == 0
    ending(monkeypatch, ValueError("boom"), "prune-unstructured")
    assert run(onnx_digits, options=Options(force=True))[0] == 1
    assert cards(onnx_digits)["mine"].artefact == "model.onnx"
    artefact = onnx_digits / "1/variants/mine/model.onnx"
    artefact.write_bytes(artefact.read_bytes()[:-1])
    assert run(onnx_digits, options=Options(force=True))[0] == 1
    assert cards(onnx_digits)["mine"].artefact is None, "it was damaged"
    monkeypatch.undo()
    assert run(onnx_digits)[0] == 0
    ending(monkeypatch, ValueError("boom"), "prune-unstructured")
    ask(0.7)
    assert run(onnx_digits)[0] == 1
    assert cards(onnx_digits)["mine"].artefact is None, "it had other parameters"
