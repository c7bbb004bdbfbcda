"""Every technique on really trained networks of four families: what passes, what is refused, and why."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from family_fixtures import SMALL, Families
from sklearn.datasets import load_digits

from benchmarks.families import digits, networks
from variants.evaluate import INVARIANT
from variants.variant import Verdict

RUNTIME = "onnxruntime"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Families:
    """All four families, each trained and made once it is asked for."""
    return Families(tmp_path_factory.mktemp("families"))


def test_evaluation_digits_are_other_hands() -> None:
    """Sheets from the ninth on are evaluated and are in no other set; the eighth alone is tuned on."""
    sets = digits.read_sets(8)
    known = np.concatenate([sets[name].image for name in ("training", "calibration", "tuning")])
    originals = (load_digits().images / 16).astype(np.float32)[:, None]
    assert np.array_equal(sets["evaluation"].image, originals[digits.FIRST_HELD_OUT :])
    assert np.array_equal(sets["tuning"].image, originals[digits.TUNING_SHEET : digits.FIRST_HELD_OUT])
    assert sorted(map(bytes, known)) == sorted(map(bytes, originals[: digits.FIRST_HELD_OUT]))


@pytest.mark.parametrize("family", SMALL)
def test_no_recipe_crashes(families: Families, family: str) -> None:
    """Each recipe either makes a variant of a family or says why it does not."""
    assert families.made(family).is_dir()
    assert not families.crashed[family]


@pytest.mark.parametrize("family", SMALL)
def test_the_networks_learnt_something(families: Families, family: str) -> None:
    """fp32 recognises digits of hands it never saw: all that follows is about real accuracy."""
    proof = families.cards(family)["fp32"].runtimes[RUNTIME]
    assert proof.samples == 768
    assert proof.score.low > 0.9


@pytest.mark.parametrize("family", ["mlp", "lstm", "transformer"])
def test_dynamic_int8_passes(families: Families, family: str) -> None:
    """int8-dynamic keeps the accuracy, is smaller, and answers a sample alike whoever shares its batch."""
    cards = families.cards(family)
    dynamic = cards["int8-dynamic"]
    assert dynamic.gate.verdict is Verdict.PASSED, dynamic.gate.reason
    assert dynamic.size_bytes < 0.6 * cards["fp32"].size_bytes
    assert dynamic.runtimes[RUNTIME].batch_invariance <= INVARIANT


@pytest.mark.parametrize("family", ["cnn", "mlp", "transformer"])
def test_static_int8_passes(families: Families, family: str) -> None:
    """Constant scales survive on convolutions, on plain layers and on a transformer, in a third of the bytes."""
    cards = families.cards(family)
    static = cards["int8-static"]
    assert static.gate.verdict is Verdict.PASSED, static.gate.reason
    assert static.size_bytes < 0.35 * cards["fp32"].size_bytes
    assert static.runtimes[RUNTIME].batch_invariance <= INVARIANT


def test_static_int8_does_nothing_for_an_lstm(families: Families) -> None:
    """Recurrent layers have no kernels with constant scales: they stay as they are, and so does the file's size."""
    cards = families.cards("lstm")
    operators = [node.op_type for node in onnx.load(families.artefact("lstm", "int8-static")).graph.node]
    assert operators.count("LSTM") == 2
    assert cards["int8-static"].size_bytes > 0.95 * cards["fp32"].size_bytes


def test_an_lstm_cannot_be_trained_for_static_int8(families: Families) -> None:
    """Quantisation-aware training would have hardly anything to train; the card says so, and what there is instead."""
    card = families.cards("lstm")["int8-qat"]
    assert card.gate.verdict is Verdict.REJECTED
    assert card.artefact is None
    assert "recurrent" in card.gate.reason
    assert "int8-dynamic" in card.gate.reason


def test_what_was_trained_for_int8_passes(families: Families) -> None:
    """Quantisation-aware training is judged by what is served, in int8, and passes."""
    card = families.cards("mlp")["int8-qat"]
    assert card.gate.verdict is Verdict.PASSED, card.gate.reason
    assert card.parameters["trained_layers"] == 3


@pytest.mark.parametrize("family", ["cnn", "lstm", "transformer"])
def test_pruning_saves_operations_and_keeps_accuracy(families: Families, family: str) -> None:
    """A third of the channels go, with their operations, and what is left recovers to within the gate."""
    cards = families.cards(family)
    pruned, fp32 = cards["pruned"], cards["fp32"]
    assert pruned.gate.verdict is Verdict.PASSED, pruned.gate.reason
    assert pruned.weights < 0.8 * fp32.weights
    assert pruned.flops < 0.85 * fp32.flops


@pytest.mark.parametrize(("family", "int8"), [("cnn", "static"), ("lstm", "dynamic"), ("transformer", "dynamic")])
def test_a_chain_saves_what_both_of_its_steps_save(families: Families, family: str, int8: str) -> None:
    """Pruned and then quantised, a network passes and is half as large as pruned alone."""
    cards = families.cards(family)
    chain = cards["pruned-then-int8"]
    assert chain.gate.verdict is Verdict.PASSED, chain.gate.reason
    assert chain.recipe == f"prune-channels + int8-{int8}"
    assert chain.size_bytes < cards["pruned"].size_bytes / 2
    assert chain.weights == pytest.approx(cards["pruned"].weights, rel=0.1)


def test_zeros_compress_and_save_nothing_else(families: Families) -> None:
    """Unstructured pruning leaves size and operations as they are; only compressed is the file smaller."""
    zeros, fp32 = (families.cards("mlp")[name] for name in ("zeros", "fp32"))
    assert zeros.gate.verdict is Verdict.PASSED, zeros.gate.reason
    assert zeros.flops == fp32.flops
    assert zeros.size_bytes == pytest.approx(fp32.size_bytes, rel=0.05)
    assert zeros.compressed_bytes < 0.8 * fp32.compressed_bytes


def test_a_pruned_transformer_still_batches(families: Families) -> None:
    """Its heads are narrower than they were, and each answer of a batch is the one it has alone."""
    artefact = families.artefact("transformer", "pruned")
    matrices = [tuple(t.dims) for t in onnx.load(artefact).graph.initializer if len(t.dims) == 2]
    assert matrices
    assert (128, 128) not in matrices
    session, images = onnxruntime.InferenceSession(artefact), digits.read_sets(16)["evaluation"].image[:5]
    alone = [session.run(None, {"image": image[None]})[0] for image in images]
    assert np.allclose(session.run(None, {"image": images})[0], np.concatenate(alone), atol=1e-4)


@pytest.mark.parametrize("factory", SMALL)
def test_the_large_networks_take_the_same_images(factory: str) -> None:
    """What the benchmark trains has the small ones' form: 32x32 grey pixels to ten logits."""
    network = getattr(networks, factory)().eval()
    with torch.inference_mode():
        assert network(torch.zeros(3, 1, 32, 32)).shape == (3, networks.CLASSES)
