"""`build` from end to end on really trained models: what it makes, survives and says."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build_runs import cards, run, with_recipe
from factory_fixtures import Built, build_in_process

from variants.factory import Options
from variants.repository import ModelFolder, VersionFolder, file_sha256, open_path
from variants.runtimes.onnx_signature import read_signature
from variants.variant import Verdict


def test_the_default_variants_of_a_trained_model_are_built_and_proven(built_digits: Built) -> None:
    """A torch source gets all five default variants with evidence, intervals and verdicts, and exit code 0."""
    assert (built_digits.code, built_digits.err) == (0, "")
    found = cards(built_digits.root / "digits")
    assert sorted(found) == ["amp", "fp32", "int8-dynamic", "int8-static", "pruned"]
    assert found["fp32"].gate.verdict is Verdict.PASSED
    assert found["fp32"].runtimes["onnxruntime"].accuracy_drop.high == 0
    assert found["fp32"].runtimes["onnxruntime"].score.value > 0.93
    assert set(found["amp"].artefacts) == {"model.onnx", "model.pt2"}
    assert found["amp"].runtimes["torch"].samples == 697
    assert found["int8-dynamic"].runtimes["onnxruntime"].batch_invariance == 0
    assert found["int8-dynamic"].size_bytes < found["fp32"].size_bytes / 2
    assert found["pruned"].parameters["weights_after"] < found["pruned"].parameters["weights_before"] / 2  # type: ignore[operator]
    for card in found.values():
        for proof in card.runtimes.values():
            assert proof.score.low < proof.score.value < proof.score.high


def test_the_person_sees_a_table_and_no_library_noise(built_digits: Built) -> None:
    """Plain lines without escape codes, one table row per variant, and no warning of torch or onnx."""
    assert "\x1b" not in built_digits.out
    assert "arning" not in built_digits.out
    table = built_digits.out[built_digits.out.index("digits version 1") :]
    assert all(f"\n{name} " in table for name in cards(built_digits.root / "digits"))
    assert "b=16 vs fp32" in table


def test_verdicts_follow_from_the_cards_numbers(built_digits: Built) -> None:
    """Each verdict can be recomputed by hand from the card and the gate of model.yaml (3 % and 95 %)."""
    for name, card in cards(built_digits.root / "digits").items():
        passing = [p for p in card.runtimes.values() if p.accuracy_drop.high <= 0.03 and p.agreement.low >= 0.95]
        assert (card.gate.verdict is Verdict.PASSED) == bool(passing), name


def test_evidence_is_measured_on_the_artefact(built_digits: Built) -> None:
    """The score on the card is what ONNX Runtime really answers on the evaluation data."""
    import onnxruntime

    folder = built_digits.root / "digits/1"
    with np.load(folder / "data/evaluation.npz") as data:
        images, labels = data["input"], data["label"]
    for name in ("fp32", "int8-static", "pruned"):
        session = onnxruntime.InferenceSession(folder / f"variants/{name}/model.onnx")
        right = session.run(None, {"input": images})[0].argmax(1) == labels
        card = cards(folder.parent)[name]
        assert card.runtimes["onnxruntime"].score.value == pytest.approx(right.mean(), abs=1.5 / len(labels))


def test_a_bare_onnx_gets_unverified_variants(built_digits: Built, tmp_path: Path) -> None:
    """No yaml and no data: fp32 serves, what can be made is unverified, what cannot is rejected with the reason."""
    (tmp_path / "m/1").mkdir(parents=True)
    shutil.copy(built_digits.root / "digits/1/variants/fp32/model.onnx", tmp_path / "m/1/model.onnx")
    assert run(tmp_path / "m")[0] == 0
    found = cards(tmp_path / "m")
    assert {name: card.gate.verdict.value for name, card in found.items()} == {
        "fp32": "passed",
        "amp": "unverified",
        "int8-dynamic": "unverified",
        "int8-static": "rejected",
        "pruned": "rejected",
        "pruned-unstructured": "unverified",
    }
    assert "unstructured" in found["pruned"].gate.reason
    assert (found["pruned"].artefact, found["pruned"].artefacts) == (None, {})
    assert not (tmp_path / "m/1/variants/pruned/model.onnx").exists()


def test_a_crash_stops_no_other_variant_and_is_tried_again(onnx_digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe that raises gives exit code 1 and a rejected card; the rest is built; the next build tries again."""

    def crash(*_: object) -> None:
        raise ValueError("a bug\nin two lines")

    with monkeypatch.context() as patch:
        with_recipe(patch, "int8-dynamic", crash)
        code, out, _ = run(onnx_digits)
    assert code == 1
    found = cards(onnx_digits)
    assert found["int8-dynamic"].gate.verdict is Verdict.REJECTED
    assert "int8-dynamic: rejected: the recipe crashed: ValueError: a bug in two lines" in out
    assert found["pruned-unstructured"].artefact == "model.onnx"
    assert run(onnx_digits)[0] == 0
    assert cards(onnx_digits)["int8-dynamic"].gate.verdict is Verdict.PASSED


def test_an_interrupt_keeps_what_is_finished(onnx_digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the second recipe: exit code 130, one line, the first variant whole, nothing half written."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with_recipe(monkeypatch, "int8-dynamic", interrupted)
    code, _, err = run(onnx_digits)
    assert (code, err) == (130, "interrupted; finished variants are kept, nothing is half written\n")
    assert set(cards(onnx_digits)) == {"fp32"}
    assert [path.name for path in (onnx_digits / "1/variants").iterdir()] == ["fp32"]
    version = ModelFolder(onnx_digits).newest()
    whole = version.manifest()
    assert "data/evaluation.npz" in whole.files
    assert "onnxruntime" in whole.tools
    files = {file: sha for file, sha in whole.files.items() if file.startswith("variants/")}
    version.write_manifest(whole.model_copy(update={"files": files, "tools": {}}))
    assert "nothing changed" in run(onnx_digits, only=["fp32"])[1]
    assert version.manifest() == whole, "what an earlier build left out is made up for"


@pytest.mark.parametrize("file", ["model.onnx", "card.json"])
def test_a_damaged_neighbour_is_named_and_harms_nothing(onnx_digits: Path, file: str) -> None:
    """Building one variant beside a damaged one succeeds, with the table, and says which one is damaged."""
    assert run(onnx_digits)[0] == 0
    damaged = onnx_digits / "1/variants/pruned-unstructured" / file
    damaged.write_bytes(damaged.read_bytes() + b" ")
    code, out, err = run(onnx_digits, only=["int8-dynamic"], options=Options(force=True))
    assert (code, err) == (0, "")
    assert "plain version 1" in out
    assert "pruned-unstructured takes no traffic until it is built again, for it is damaged: " in out
    assert f"{file}: changed since it was built" in out


def test_overlapping_data_is_a_bad_repository(onnx_digits: Path) -> None:
    """Calibrating on evaluation samples is refused with counts, exit code 2, and nothing is written."""
    shutil.copy(onnx_digits / "1/data/evaluation.npz", onnx_digits / "1/data/calibration.npz")
    code, _, err = run(onnx_digits)
    assert code == 2
    assert "697 of 697 evaluation samples are also among the 697 calibration samples" in err
    assert not (onnx_digits / "1/manifest.json").exists()


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        (
            "variants: [{name: pruned, sparsty: 0.3}]",
            "variants: pruned: unknown key 'sparsty'; did you mean 'sparsity'?",
        ),
        ("variants: [int8-dinamic]", "unknown recipe 'int8-dinamic'; did you mean 'int8-dynamic'?"),
        (
            "variants: [{name: pruned, sparsity: 1.5}]",
            "variants: pruned: sparsity: a share of the channels between 0 and 1, or auto, not 1.5",
        ),
        ("evaluation: {data: ../../../evaluation.npz}", "leads outside the model's folder"),
        ("evaluation: {data: data/missing.npz}", "'data/missing.npz' is not there"),
    ],
)
def test_a_bad_configuration_is_exit_code_2_and_one_line(onnx_digits: Path, yaml: str, message: str) -> None:
    """What is wrong in model.yaml is said in one line before any work begins."""
    (onnx_digits / "model.yaml").write_text(yaml)
    code, out, err = run(onnx_digits)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_bad_model_does_not_stop_the_next(onnx_digits: Path) -> None:
    """In a repository every model gets its turn; one bad configuration makes the whole exit code 2."""
    bad = onnx_digits.parent / "bad"
    (bad / "1").mkdir(parents=True)
    (bad / "model.yaml").write_text("nonsense: 1")
    code, _, err = run(onnx_digits.parent)
    assert code == 2
    assert "unknown key 'nonsense'" in err
    assert set(cards(onnx_digits)) == {"fp32", "int8-dynamic", "pruned-unstructured"}


def test_a_full_disk_stops_one_model_only(onnx_digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the system is one line and exit code 1, and the next model gets its turn."""
    shutil.copytree(onnx_digits, onnx_digits.parent / "full")
    write = VersionFolder.write_variant

    def full(self: VersionFolder, *arguments: Any) -> None:
        if self.model.name == "full":
            raise OSError("no space left on device")
        write(self, *arguments)

    monkeypatch.setattr(VersionFolder, "write_variant", full)
    code, _, err = run(onnx_digits.parent)
    assert (code, err.count("\n")) == (1, 1)
    assert "full: OSError: no space left on device" in err
    assert set(cards(onnx_digits)) == {"fp32", "int8-dynamic", "pruned-unstructured"}


def test_two_builds_of_one_model_do_not_mix(onnx_digits: Path) -> None:
    """While another process holds the model, a build refuses instead of overwriting its manifest."""
    folder = os.open(onnx_digits, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    code, _, err = run(onnx_digits)
    os.close(folder)
    assert (code, "another build is at work here" in err) == (2, True)
    assert run(onnx_digits)[0] == 0


def test_every_variant_takes_and_gives_the_same_tensors(built_digits: Built) -> None:
    """A client cannot tell variants apart by names, types or shapes, and all of them batch."""
    folder = built_digits.root / "digits/1/variants"
    reference = read_signature(folder / "fp32/model.onnx")
    assert reference.batch_axis
    for artefact in folder.glob("*/model.onnx"):
        assert read_signature(artefact) == reference, artefact


def test_no_repository_is_exit_code_2(tmp_path: Path) -> None:
    """A path with nothing at it is said so."""
    code, _, err = run(tmp_path / "nowhere")
    assert code == 2
    assert "no such folder" in err


def test_the_manifest_vouches_for_all_that_a_server_loads(built_digits: Built) -> None:
    """Every artefact, every card and the evaluation data stand in the manifest with tools and parents."""
    version = open_path(built_digits.root)[0].newest()
    manifest = json.loads((version.path / "manifest.json").read_text())
    on_disk = {str(p.relative_to(version.path)) for p in (version.path / "variants").rglob("*") if p.is_file()}
    assert set(manifest["files"]) == on_disk | {"data/evaluation.npz"}
    for file in manifest["files"]:
        version.verify(file)
    assert {"torch", "onnx", "onnxruntime", "python"} <= set(manifest["tools"])
    weights = version.path / "source/model.safetensors"
    assert manifest["variants"]["fp32"]["parent_sha256"] == file_sha256(weights)
    parent = version.cards()["fp32"].sha256
    assert {manifest["variants"][name]["parent_sha256"] for name in ("amp", "pruned", "int8-static")} == {parent}


@pytest.mark.slow
def test_quick_takes_fewer_samples_and_epochs(digits: Path) -> None:
    """`quick` measures 256 samples and fine-tunes for one epoch."""
    done = build_in_process(digits, "options=Options(quick=True), only=['pruned']")
    assert done.code == 0
    found = cards(digits / "digits")["pruned"]
    assert found.runtimes["onnxruntime"].samples == 256
    assert found.parameters["epochs"] == 1
