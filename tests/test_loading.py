"""From a model's folder to what serves: what is verified, refused, measured and remembered."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import models
import numpy as np
import onnx
import pytest
from factory_fixtures import build_in_process
from serving import asking, request_for, serving

from server import candidates
from server.loading import Host, load_model
from server.models import ServedModel
from variants.hardware import Hardware
from variants.repository import ModelFolder, RepositoryError, VersionFolder, file_sha256
from variants.runtimes.onnxruntime_runtime import OnnxRuntime
from variants.variant import State, Verdict


def states(model: ServedModel) -> dict[str, State]:
    """Every variant's state."""
    return {variant.name: variant.state for variant in model.variants}


def reason(model: ServedModel, variant: str) -> str:
    """Why a variant is in its state."""
    return next(each.reason for each in model.variants if each.name == variant)


def test_a_bare_onnx_file_serves_as_fp32(repository: Path, host: Host) -> None:
    """`m/1/model.onnx` and nothing else: one eligible reference, measured up to the default maximum batch."""
    model = load_model(ModelFolder(models.add(repository, "m", models.mlp())), host)
    assert states(model) == {"fp32": State.ELIGIBLE}
    assert (model.name, model.version, model.signature.max_batch_size) == ("m", "1", 32)
    assert model.variants[0].profile is not None
    assert model.variants[0].profile.batch_sizes == (1, 2, 4, 8, 16, 32)
    assert model.variants[0].score is None


def test_the_highest_version_with_something_to_serve_wins(repository: Path, host: Host) -> None:
    """Version 10 is above 9, and a version without a source is passed over; a built version beats a bare one."""
    for version in (9, 10):
        models.add(repository, "m", models.mlp(), version=version)
    (repository / "m" / "11").mkdir()
    assert load_model(ModelFolder(repository / "m"), host).version == "10"
    models.add_ladder(repository)
    models.add(repository, "ladder", models.mlp(), version=2)
    assert load_model(ModelFolder(repository / "ladder"), host).version == "1"


@pytest.mark.parametrize(
    ("name", "model", "yaml", "most"),
    [
        ("matrix", models.matrix(), "", 0),
        ("scalar", models.identity("FP32", ()), "", 0),
        ("strings", models.identity("BYTES", (3,)), "", 0),
        ("turns", models.turns(), "", 0),
        ("tokens", models.tokens(), "", 32),
        ("limited", models.mlp(), "batching: {max_batch_size: 5}", 5),
        ("switched-off", models.mlp(), "batching: {max_batch_size: 0}", 0),
        ("other-symbols", models.identity("FP32", ("n", 3)), "", 32),
    ],
)
def test_batch_dimension(repository: Path, host: Host, name: str, model: onnx.ModelProto, yaml: str, most: int) -> None:
    """A batch dimension is used where the model has one and the configuration wants it."""
    loaded = load_model(ModelFolder(models.add(repository, name, model, yaml=yaml)), host)
    assert loaded.signature.max_batch_size == most
    assert loaded.variants[0].profile is not None
    assert loaded.variants[0].profile.max_batch_size == max(most, 1)


def test_built_variants_are_served_with_their_evidence(repository: Path, host: Host) -> None:
    """Scores, drops and verdicts come from the cards, speeds from here."""
    models.add_ladder(repository)
    model = load_model(ModelFolder(repository / "ladder"), host)
    assert states(model) == {"fp32": State.ELIGIBLE, "int8-static": State.ELIGIBLE}
    fp32, int8 = model.variants
    assert (fp32.proven_accuracy, int8.proven_accuracy, int8.proven_drop) == (0.99, 0.95, 0.009)
    assert fp32.profile is not None
    assert int8.profile is not None
    assert int8.profile.latency_ns(32) < fp32.profile.latency_ns(32)
    assert set(model.sessions) == {"fp32", "int8-static"}


@pytest.mark.parametrize(
    ("verdict", "allow", "state"),
    [
        (Verdict.UNVERIFIED, False, State.UNVERIFIED),
        (Verdict.UNVERIFIED, True, State.ELIGIBLE),
        (Verdict.REJECTED, False, State.REJECTED),
        (Verdict.INCONCLUSIVE, True, State.INCONCLUSIVE),
    ],
)
def test_verdicts(repository: Path, host: Host, verdict: Verdict, allow: bool, state: State) -> None:
    """Only --allow-unverified lets something in that did not pass, and only what was never judged."""
    models.add_ladder(repository)
    models.add_variant(repository, "ladder", "int8-dynamic", models.mlp(256, 1), verdict=verdict, score=0.9)
    model = load_model(ModelFolder(repository / "ladder"), replace(host, allow_unverified=allow))
    assert states(model)["int8-dynamic"] is state


def test_a_variant_whose_answers_depend_on_the_batch_runs_alone(repository: Path, host: Host) -> None:
    """Batch invariance above the bound on the card makes the variant solo."""
    models.add_ladder(repository)
    models.add_variant(repository, "ladder", "int8-dynamic", models.mlp(256, 1), batch_invariance=0.5)
    model = load_model(ModelFolder(repository / "ladder"), host)
    assert {v.name: v.batchable for v in model.variants} == {"fp32": True, "int8-static": True, "int8-dynamic": False}


def test_what_this_host_cannot_run_says_why(repository: Path, host: Host) -> None:
    """A precision without hardware, or evidence only for another runtime, is unsupported and harms nobody."""
    models.add_ladder(repository)
    needs_gpu = {"precision": "fp16"}
    models.add_variant(repository, "ladder", "amp", models.mlp(256, 1), requirements=needs_gpu)
    without_cuda = replace(host, hardware=replace(host.hardware, cuda=()))
    model = load_model(ModelFolder(repository / "ladder"), without_cuda)
    assert states(model)["amp"] is State.UNSUPPORTED
    assert "fp16 needs a CUDA device" in reason(model, "amp")
    amp = next(variant for variant in model.variants if variant.name == "amp")
    assert amp.score == next(iter(model.cards["amp"].runtimes.values())).score, "what is proven about it elsewhere"
    assert states(model)["fp32"] is State.ELIGIBLE


def _append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def _link_out(path: Path) -> None:
    outside = path.parents[5] / "outside.onnx"
    path.rename(outside)
    path.symlink_to(outside)


def _link_to_passwd(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/passwd")


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (_append, "its sha256 is not the manifest's"),
        (_link_out, "outside the model's folder"),
        (_link_to_passwd, "outside the model's folder"),
        (Path.unlink, "is not there"),
    ],
)
def test_an_artefact_that_is_not_the_manifests_is_never_loaded(
    repository: Path, host: Host, damage: Callable[[Path], object], why: str
) -> None:
    """Changed, linked elsewhere or gone: a variant is set aside, a reference takes the model with it."""
    models.add_ladder(repository)
    variants = repository / "ladder" / "1" / "variants"
    damage(variants / "int8-static" / "model.onnx")
    model = load_model(ModelFolder(repository / "ladder"), host)
    assert states(model) == {"fp32": State.ELIGIBLE, "int8-static": State.UNSUPPORTED}
    assert why in reason(model, "int8-static")
    assert str(repository) not in reason(model, "int8-static"), "clients see it"
    assert "int8-static" not in model.sessions
    (variants / "int8-static" / "model.onnx").unlink(missing_ok=True)
    damage(variants / "fp32" / "model.onnx")
    with pytest.raises(RepositoryError, match=why):
        load_model(ModelFolder(repository / "ladder"), host)


def test_a_card_that_was_changed_is_not_believed(repository: Path, host: Host) -> None:
    """Raising a variant's score by hand sets that variant aside with the reason; the reference's takes the model."""
    models.add_ladder(repository)
    variants = repository / "ladder" / "1" / "variants"
    for variant, score in (("int8-static", "0.95"), ("fp32", "0.99")):
        card = variants / variant / "card.json"
        card.write_text(card.read_text().replace(score, "0.999"))
        if variant == "int8-static":
            model = load_model(ModelFolder(repository / "ladder"), host)
            assert states(model) == {"fp32": State.ELIGIBLE, "int8-static": State.UNSUPPORTED}
            assert "changed since it was built" in reason(model, "int8-static")
            assert model.cards["int8-static"].gate.verdict is Verdict.UNVERIFIED
    with pytest.raises(RepositoryError, match="changed since it was built"):
        load_model(ModelFolder(repository / "ladder"), host)


def test_what_a_killed_build_left_is_served_as_it_was(repository: Path, host: Host) -> None:
    """A reference that had stepped aside for its successor serves from there, in a repository nobody may write to."""
    version = models.add_ladder(repository)
    variants = version.path / "variants"
    (variants / "fp32").rename(variants / ".old-fp32")
    model = load_model(ModelFolder(repository / "ladder"), host)
    assert states(model) == {"fp32": State.ELIGIBLE, "int8-static": State.ELIGIBLE}
    assert model.variants[0].proven_accuracy == 0.99
    assert sorted(path.name for path in variants.iterdir()) == [".old-fp32", "int8-static"]


def test_names_cannot_lead_out_of_the_repository(repository: Path, host: Host) -> None:
    """Dots in a card's artefact, in the manifest or in model.yaml open nothing outside the model's folder."""
    models.add(repository, "elsewhere", models.mlp())
    models.add(repository, "m", models.mlp(), yaml="source: {onnx: ../../elsewhere/1/model.onnx}")
    with pytest.raises(RepositoryError):
        load_model(ModelFolder(repository / "m"), host)
    version = models.add_ladder(repository)
    _rewrite_manifest(version, "variants/int8-static/", "variants/../../../elsewhere/")
    model = load_model(ModelFolder(repository / "ladder"), host)
    assert states(model) == {"fp32": State.ELIGIBLE, "int8-static": State.UNSUPPORTED}


def _rewrite_manifest(version: VersionFolder, old: str, new: str) -> None:
    path = version.path / "manifest.json"
    path.write_text(path.read_text().replace(old, new))


def test_a_torch_archive_needs_the_operators_word(repository: Path, host: Host) -> None:
    """A .pt2 is refused before anything opens it; with --trust-torch-archives it is at least tried."""
    version = models.add_ladder(repository)
    folder = version.path / "variants" / "int8-static"
    card = json.loads((folder / "card.json").read_text())
    (folder / "model.onnx").rename(folder / "model.pt2")
    card |= {"artefact": "model.pt2", "artefacts": {"model.pt2": card["sha256"]}}
    card["runtimes"] = {"torch": card["runtimes"]["onnxruntime"]}
    (folder / "card.json").write_text(json.dumps(card))
    version = ModelFolder(repository / "ladder").newest()
    files = version.manifest().files | {
        "variants/int8-static/model.pt2": card["sha256"],
        "variants/int8-static/card.json": file_sha256(folder / "card.json"),
    }
    version.write_manifest(version.manifest().model_copy(update={"files": files}))
    model = load_model(ModelFolder(repository / "ladder"), host)
    assert states(model)["int8-static"] is State.UNSUPPORTED
    assert "--trust-torch-archives" in reason(model, "int8-static")
    trusted = load_model(ModelFolder(repository / "ladder"), replace(host, trust_torch_archives=True))
    assert states(trusted)["int8-static"] is State.UNSUPPORTED
    assert "--trust-torch-archives" not in reason(trusted, "int8-static"), "this one is no archive at all"


def test_a_variant_that_fails_when_it_runs_harms_no_other(repository: Path, host: Host) -> None:
    """It loads, raises on real inputs and is set aside with the runtime's words; the rest serves."""
    models.add_ladder(repository)
    models.add_variant(repository, "ladder", "int8-dynamic", models.picky(7))
    model = load_model(ModelFolder(repository / "ladder"), host)
    assert states(model)["int8-dynamic"] is State.UNSUPPORTED
    assert "on onnxruntime it fails at batch size 1" in reason(model, "int8-dynamic")
    assert set(model.sessions) == {"fp32", "int8-static"}


def test_what_says_that_batch_mates_matter_runs_alone_without_evidence_too(repository: Path, host: Host) -> None:
    """A card that says `solo` counts where nothing was measured."""
    models.add_ladder(repository)
    said: dict[str, object] = {"precision": "fp32", "solo": True}
    models.add_variant(repository, "ladder", "lstm", models.mlp(256, 1), verdict=Verdict.UNVERIFIED, requirements=said)
    model = load_model(ModelFolder(repository / "ladder"), replace(host, allow_unverified=True))
    assert {v.name: v.batchable for v in model.variants} == {"fp32": True, "int8-static": True, "lstm": False}


def test_eight_bit_weights_need_a_cpu_like_the_one_they_were_proven_on(repository: Path, host: Host) -> None:
    """Proven with VNNI, unsupported without: the sums would saturate."""
    models.add_ladder(repository)
    needs: dict[str, object] = {"precision": "int8", "exact_int8_sums": True}
    models.add_variant(repository, "ladder", "int8-dynamic", models.mlp(256, 1), requirements=needs)
    for isa, state in (({"AVX2"}, State.UNSUPPORTED), ({"AVX2", "AVX512_VNNI"}, State.ELIGIBLE)):
        here = replace(host, hardware=replace(host.hardware, isa=frozenset(isa)))
        model = load_model(ModelFolder(repository / "ladder"), here)
        assert states(model)["int8-dynamic"] is state
    assert "VNNI" not in reason(model, "int8-dynamic")


def test_evidence_from_a_cpu_proves_nothing_on_cuda(repository: Path, host: Host) -> None:
    """A pruned fp32 graph that passed on a CPU is refused on a GPU before anything is loaded."""
    models.add_ladder(repository)
    version = models.add_variant(repository, "ladder", "pruned", models.mlp(256, 1))
    card = version.card("pruned")
    assert card is not None
    gpu = replace(host, device="cuda", runtimes={"onnxruntime": host.runtimes["onnxruntime"]})
    found, why = candidates.find_candidates(version, card, gpu)
    assert (found, "measured on a CPU and proves nothing about cuda" in why) == ([], True)


class Emulator(OnnxRuntime):
    """Another runtime, which runs what ONNX Runtime does not."""

    name = "torch"

    def why_not(self, artefact: Path, precision: str, hardware: Hardware) -> str | None:
        """It runs everything."""
        return None


def test_the_unverified_may_run_on_any_runtime_that_loads_it(repository: Path, host: Host) -> None:
    """A bf16 variant, which ONNX Runtime cannot run, takes traffic on another runtime once the operator allows it."""
    models.add_ladder(repository)
    models.add_variant(
        repository, "ladder", "amp", models.mlp(256, 1), verdict=Verdict.UNVERIFIED, requirements={"precision": "bf16"}
    )
    here = replace(host, allow_unverified=True, runtimes={"onnxruntime": OnnxRuntime(), "torch": Emulator()})
    model = load_model(ModelFolder(repository / "ladder"), here)
    assert {v.name: v.runtime for v in model.variants if v.state is State.ELIGIBLE}["amp"] == "torch"


@pytest.mark.parametrize(
    ("content", "yaml", "why"),
    [
        (b"", "", "holds no ONNX graph"),
        (b"\x80\x04cos\nsystem\n", "", "not a readable ONNX file"),
        (None, "batchings: {}", "batching"),
        (None, "slo: {latency_ms: -1}", "latency_ms"),
        (None, "- a list", "keys and values"),
    ],
)
def test_a_model_that_cannot_load_says_why(
    repository: Path, host: Host, content: bytes | None, yaml: str, why: str
) -> None:
    """Damaged files and wrong configuration are one line each, naming what is wrong."""
    folder = models.add(repository, "m", models.mlp(), yaml=yaml)
    if content is not None:
        (folder / "1" / "model.onnx").write_bytes(content)
    with pytest.raises(RepositoryError, match=why):
        load_model(ModelFolder(folder), host)


def test_the_models_own_slo(repository: Path, host: Host) -> None:
    """`slo:` in model.yaml becomes the defaults of requests that name nothing; else the server's latency holds."""
    yaml = "slo: {latency_ms: 7.5, max_accuracy_drop: 0.02, on_infeasible: [degrade, reject]}"
    defaults = load_model(ModelFolder(models.add(repository, "m", models.mlp(), yaml=yaml)), host).defaults
    assert (defaults.latency_ns, defaults.max_accuracy_drop) == (7_500_000, 0.02)
    assert defaults.on_infeasible == ("degrade", "reject")
    plain = load_model(ModelFolder(models.add(repository, "n", models.mlp())), host).defaults
    assert (plain.latency_ns, plain.max_accuracy_drop, plain.on_infeasible) == (1_000_000_000, None, None)


@pytest.mark.slow
def test_built_without_data_nothing_takes_traffic(repository: Path, host: Host) -> None:
    """`build` on a bare ONNX makes unverified variants; a request reaches one only by --allow-unverified or a pin."""
    models.add(repository, "m", models.mlp(64, 3), yaml="variants: [fp32, int8-dynamic]")
    built = build_in_process(repository)
    assert built.code == 0, built.err
    closed = load_model(ModelFolder(repository / "m"), host)
    assert states(closed) == {"fp32": State.ELIGIBLE, "int8-dynamic": State.UNVERIFIED}
    opened = load_model(ModelFolder(repository / "m"), replace(host, allow_unverified=True))
    assert states(opened)["int8-dynamic"] in {State.ELIGIBLE, State.NO_BENEFIT}
    with serving(repository) as running:
        row = request_for("m", x=np.ones((1, 64), np.float32))
        answer = running.infer(row)
        assert answer.parameters["variant"] == "fp32"
        pinned = running.infer(asking(row, variant="int8-dynamic"))
        assert (pinned.parameters["variant"], pinned.parameters["variant_accuracy"]) == ("int8-dynamic", 0.0)
        np.testing.assert_allclose(pinned.array(), answer.array(), atol=0.1)
        zeros = request_for("m", x=np.zeros((1, 64), np.float32))
        assert np.isfinite(running.infer(asking(zeros, variant="int8-dynamic")).array()).all()
