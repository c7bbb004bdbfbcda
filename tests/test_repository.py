"""The repository on disk: what is read, what is refused and how, and that writes are whole."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from variants.model_config import ModelConfig, VariantConfig, read_model_config
from variants.repository import ManifestEntry, ModelFolder, Repository, RepositoryError, VersionFolder, open_path
from variants.variant import Card, Evidence, Gate, Interval, Verdict

CARD_KEYS = (
    "variant", "recipe", "parameters", "artefact", "sha256", "parent", "requirements", "size_bytes",
    "compressed_bytes", "weights", "flops", "runtimes", "gate", "artefacts", "findings", "schema_version",
)  # fmt: skip


def card(
    name: str = "fp32", parent: str | None = None, sha256: str = "aa", artefact: str | None = "model.onnx"
) -> Card:
    """A card with evidence on one runtime."""
    evidence = Evidence(Interval(0.9, 0.8, 0.95), Interval(1, 1, 1), Interval(0, -0.1, 0.1), 50, (1, 8), 0.0)
    return Card(
        variant=name, recipe=name, parameters={"sparsity": 0.5}, artefact=artefact, sha256=sha256, parent=parent,
        requirements={"precision": "fp32"}, size_bytes=3, compressed_bytes=2, weights=1, flops=4,
        runtimes={"onnxruntime": evidence}, gate=Gate(Verdict.PASSED, "fine"), artefacts={"model.onnx": sha256},
    )  # fmt: skip


@pytest.fixture
def version(tmp_path: Path) -> VersionFolder:
    """Version 1 of a model with nothing in it."""
    (tmp_path / "m" / "1").mkdir(parents=True)
    return ModelFolder(tmp_path / "m").newest()


def write(version: VersionFolder, made: Card, content: bytes = b"abc", parent_sha256: str | None = None) -> None:
    """Write a variant whose artefact holds `content`."""
    origin = version.path / "made"
    origin.write_bytes(content)
    version.write_variant(made, {"model.onnx": origin}, ManifestEntry(fingerprint="f", parent_sha256=parent_sha256))
    origin.unlink()


def error_of(folder: Path, yaml: str) -> str:
    """What a person reads when `model.yaml` holds this."""
    (folder / "model.yaml").write_text(yaml)
    with pytest.raises(RepositoryError) as caught:
        read_model_config(folder / "model.yaml")
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{folder / 'model.yaml'}: ")


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("calibraton: {}", "unknown key 'calibraton'; did you mean 'calibration'?"),
        ("gate: {max_accuracy_dropp: 1}", "gate: unknown key 'max_accuracy_dropp'; did you mean 'max_accuracy_drop'?"),
        ("batching: {zzz: 1}", "batching: unknown key 'zzz'; valid: max_batch_size, max_queue_delay_ms"),
        ("gate: {max_accuracy_drop: 2}", "gate.max_accuracy_drop: Input should be less than or equal to 1"),
        ("slo: {latency_ms: .nan}", "slo.latency_ms: Input should be a finite number"),
        ("task: clasification", "task: Input should be 'classification', 'embedding', 'regression' or 'generic'"),
        ("source: {onnx: a, module: b:c}", "source: give either `onnx`, or `module` together with `weights`"),
        ("variants: [fp32, fp32]", "variants: 'fp32' is listed twice"),
        ("variants: [{recipe: amp}]", "variants.0: a variant is a name, or a mapping with `name`"),
        ("variants: [{name: fp32, recipe: amp}]", "variants: 'fp32' is the reference and cannot have another recipe"),
        ("variants: ['../up']", "variants.0.name: String should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$'"),
        ("[1, 2]", "must hold keys and values, not a list"),
        ("a: b: c", "not valid YAML in line 1: mapping values are not allowed here"),
    ],
)
def test_a_mistake_in_model_yaml_is_one_clear_line(tmp_path: Path, yaml: str, message: str) -> None:
    """A mistake names the key and what to write instead, in one line."""
    assert error_of(tmp_path, yaml) == message


def test_the_contracts_model_yaml_is_understood(tmp_path: Path) -> None:
    """The example of the contract parses, with a variant given as a mapping keeping its recipe and parameters."""
    (tmp_path / "model.yaml").write_text(
        "source: {onnx: source/model.onnx}\ntask: classification\n"
        "evaluation: {data: data/evaluation.npz, target: label, metric: top1}\n"
        "calibration: {data: data/calibration.npz, samples: 256}\n"
        "training: {data: data/training.npz, target: label, epochs: 5, learning_rate: 0.001}\n"
        "gate: {max_accuracy_drop: 0.01, min_agreement: 0.98}\n"
        "variants: [fp32, pruned, {name: pruned-50, recipe: prune-channels, sparsity: 0.5, recover: finetune}]\n"
        "batching: {max_batch_size: 32, max_queue_delay_ms: 0}\n"
        "slo: {latency_ms: 100, max_accuracy_drop: 0.02, on_infeasible: [degrade, reject]}\n"
    )
    config = read_model_config(tmp_path / "model.yaml")
    assert config.variants is not None
    assert [(v.name, v.recipe) for v in config.variants] == [
        ("fp32", "fp32"), ("pruned", "prune-channels"), ("pruned-50", "prune-channels"),
    ]  # fmt: skip
    assert config.variants[2].parameters == {"sparsity": 0.5, "recover": "finetune"}
    assert config.slo.on_infeasible == ("degrade", "reject")


def test_no_model_yaml_means_defaults(tmp_path: Path) -> None:
    """A model without model.yaml has the default configuration."""
    assert read_model_config(tmp_path / "model.yaml") == ModelConfig()
    assert VariantConfig.model_validate("pruned").recipe == "prune-channels"


def test_a_card_survives_the_disk_with_exactly_the_contracts_keys(version: VersionFolder) -> None:
    """What is written reads back equal, under the contract's keys."""
    write(version, card())
    assert version.cards() == {"fp32": card()}
    stored = json.loads((version.path / "variants/fp32/card.json").read_text())
    assert sorted(stored) == sorted(CARD_KEYS)
    assert sorted(stored["runtimes"]["onnxruntime"]) == [
        "accuracy_drop", "agreement", "batch_invariance", "batch_sizes", "fidelity", "samples", "score",
    ]  # fmt: skip
    assert stored["gate"] == {"verdict": "passed", "reason": "fine"}


@pytest.mark.parametrize("file", ["model.onnx", "card.json"])
def test_a_changed_file_is_refused_by_name(version: VersionFolder, file: str) -> None:
    """One changed byte in an artefact or a card is an error that names the file."""
    write(version, card())
    path = version.path / "variants/fp32" / file
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(RepositoryError, match=f"{file}: changed since it was built"):
        version.verify(f"variants/fp32/{file}")


def test_a_changed_card_never_reaches_a_reader(version: VersionFolder) -> None:
    """Raising a verdict by hand is noticed when cards are read."""
    write(version, card())
    path = version.path / "variants/fp32/card.json"
    path.write_text(path.read_text().replace("passed", "rejected"))
    with pytest.raises(RepositoryError, match="changed since it was built"):
        version.cards()


def test_a_file_beside_the_manifest_is_refused(version: VersionFolder) -> None:
    """A file that build did not write is not served."""
    write(version, card())
    (version.path / "variants/fp32/model.pt2").write_bytes(b"surprise")
    with pytest.raises(RepositoryError, match=r"'variants/fp32/model.pt2' is not in the manifest"):
        version.artefact("fp32", "model.pt2")


def test_an_unknown_card_schema_is_refused(version: VersionFolder) -> None:
    """A card of a later schema is an error, not a guess."""
    write(version, card())
    path = version.path / "variants/fp32/card.json"
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    manifest = version.manifest()
    files = manifest.files | {"variants/fp32/card.json": hashlib.sha256(path.read_bytes()).hexdigest()}
    version.write_manifest(manifest.model_copy(update={"files": files}))
    with pytest.raises(RepositoryError, match=r"card.json: schema_version: Input should be 1"):
        version.cards()


@pytest.mark.parametrize("relative", ["../../secret", "/etc/hostname", "link"])
def test_no_path_leads_outside_the_model(version: VersionFolder, relative: str) -> None:
    """Neither dots, nor an absolute path, nor a symbolic link reaches a file outside the model's folder."""
    secret = version.model.path.parent / "secret"
    secret.write_text("x")
    (version.path / "link").symlink_to(secret)
    with pytest.raises(RepositoryError, match="leads outside the model's folder"):
        version.resolve(relative)


def test_data_may_be_shared_by_versions_inside_the_model(version: VersionFolder) -> None:
    """A path may leave the version as long as it stays inside the model."""
    (version.model.path / "shared.npz").write_bytes(b"x")
    assert version.resolve("../shared.npz").name == "shared.npz"


def test_an_interrupted_swap_leaves_the_old_variant(version: VersionFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt at the very moment of replacement leaves the old variant whole and verified, and no litter."""
    write(version, card())
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if self.name.startswith(".new-"):
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(version, card(sha256="bb"), content=b"new")
    assert version.cards() == {"fp32": card()}
    assert version.artefact("fp32", "model.onnx").read_bytes() == b"abc"
    assert [path.name for path in (version.path / "variants").iterdir()] == ["fp32"]


def test_a_killed_swap_is_undone_by_the_next_build(version: VersionFolder) -> None:
    """A process killed between the two renames loses nothing: `recover` brings the old variant back."""
    write(version, card())
    folder = version.path / "variants"
    (folder / "fp32").rename(folder / ".old-fp32")
    (folder / ".new-x1").mkdir()
    version.recover()
    assert version.cards() == {"fp32": card()}
    assert [path.name for path in folder.iterdir()] == ["fp32"]


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_reader_needs_no_recovery(version: VersionFolder, is_replaced: bool) -> None:
    """Killed between the two renames or after them: what the manifest knows is read where it lies, and not moved."""
    write(version, card())
    folder = version.path / "variants"
    (folder / "fp32").rename(folder / ".old-fp32")
    if is_replaced:
        (folder / "fp32").mkdir()
        for file in ("card.json", "model.onnx"):
            (folder / "fp32" / file).write_bytes(b"of a build that the manifest never knew")
    assert version.is_built
    assert version.cards() == {"fp32": card()}
    assert version.artefact("fp32", "model.onnx") == folder.resolve() / ".old-fp32/model.onnx"
    assert (folder / "fp32").exists() == is_replaced


def test_rewriting_a_variant_replaces_all_its_files(version: VersionFolder) -> None:
    """No file of the predecessor stays on disk or in the manifest."""
    write(version, card())
    rejected = card(artefact=None)
    version.write_variant(rejected, {}, ManifestEntry())
    assert list(version.manifest().files) == ["variants/fp32/card.json"]
    assert [path.name for path in version.variant_dir("fp32").iterdir()] == ["card.json"]


def test_a_child_of_a_rebuilt_parent_is_stale(version: VersionFolder) -> None:
    """A variant made from an earlier fp32 disappears from the cards once fp32 is another file."""
    write(version, card(sha256="aa"))
    write(version, card("amp", parent="fp32"), parent_sha256="aa")
    assert set(version.cards()) == {"fp32", "amp"}
    write(version, card(sha256="cc"))
    assert set(version.cards()) == {"fp32"}


def test_the_highest_built_version_serves(tmp_path: Path) -> None:
    """Version 10 is newer than 9; an unbuilt newer version does not displace a built one; else a bare ONNX serves."""
    for number in (2, 9, 10):
        (tmp_path / "m" / str(number)).mkdir(parents=True)
    (tmp_path / "m" / "notes").mkdir()
    model = ModelFolder(tmp_path / "m")
    assert [version.number for version in model.versions()] == [2, 9, 10]
    with pytest.raises(RepositoryError, match="no version is built"):
        model.serving()
    (tmp_path / "m/9/model.onnx").write_bytes(b"x")
    assert (model.serving().number, model.newest().number) == (9, 10)
    write(model.versions()[0], card())
    assert model.serving().number == 2


def test_a_path_is_a_model_or_a_repository(tmp_path: Path) -> None:
    """`open_path` takes both, and says so when it is neither."""
    (tmp_path / "r/b/1").mkdir(parents=True)
    (tmp_path / "r/a/1").mkdir(parents=True)
    (tmp_path / "r/.git").mkdir()
    assert [model.name for model in open_path(tmp_path / "r")] == ["a", "b"]
    assert [model.name for model in open_path(tmp_path / "r/b")] == ["b"]
    assert [model.name for model in Repository(tmp_path / "r").models()] == ["a", "b"]
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "missing"):
        with pytest.raises(RepositoryError, match=str(path)):
            open_path(path)


def test_a_bad_model_name_is_refused(tmp_path: Path) -> None:
    """A folder whose name would not be a safe label is no model."""
    (tmp_path / "a b" / "1").mkdir(parents=True)
    with pytest.raises(RepositoryError, match="a model's name must match"):
        _ = ModelFolder(tmp_path / "a b").name


def test_reading_a_repository_imports_neither_torch_nor_onnx() -> None:
    """The server reads repositories without loading what only the factory needs."""
    script = "import sys, variants.repository; print([m for m in ('torch', 'onnx', 'onnxruntime') if m in sys.modules])"
    top = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=top)
    assert done.stdout.strip() == "[]"


def test_a_write_that_the_manifest_does_not_know_is_undone(
    version: VersionFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk or a kill after the swap and before the manifest leaves, or brings back, the old variant."""
    write(version, card())

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(VersionFolder, "write_manifest", full)
        with pytest.raises(OSError, match="no space left"):
            write(version, card(sha256="bb"), content=b"new")
        assert version.artefact("fp32", "model.onnx").read_bytes() == b"abc"
        patch.setattr(VersionFolder, "recover", lambda _: None)  # a kill runs no clean-up
        with pytest.raises(OSError, match="no space left"):
            write(version, card(sha256="bb"), content=b"new")
    assert (version.path / "variants/fp32/model.onnx").read_bytes() == b"new"
    version.recover()
    assert version.cards() == {"fp32": card()}
    assert [path.name for path in (version.path / "variants").iterdir()] == ["fp32"]


def test_evidence_of_other_data_than_the_references_is_stale(version: VersionFolder) -> None:
    """A variant measured before the evaluation data changed is left out until it is measured again."""
    origin = version.path / "made"
    origin.write_bytes(b"abc")
    for name, parent, data in (("fp32", None, "new"), ("amp", "fp32", "old"), ("pruned", "fp32", "new")):
        entry = ManifestEntry(parent_sha256="aa", evaluation_sha256=data)
        version.write_variant(card(name, parent), {"model.onnx": origin}, entry)
    assert set(version.cards()) == {"fp32", "pruned"}


def test_one_damaged_card_leaves_the_others_readable(version: VersionFolder) -> None:
    """`card` reads one card and its parent's, so a neighbour's damage is its own."""
    write(version, card())
    write(version, card("amp", "fp32"), parent_sha256="aa")
    write(version, card("pruned", "fp32"), parent_sha256="aa")
    (version.path / "variants/amp/card.json").write_text("{}")
    assert version.card("pruned") == card("pruned", "fp32")
    with pytest.raises(RepositoryError, match="changed since it was built"):
        version.card("amp")
