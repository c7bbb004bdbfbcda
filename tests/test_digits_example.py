"""The digits example: honest sets of real digits, a network that learns them, a repository that can be built."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from serving import serving
from sklearn.datasets import load_digits

from variants.repository import open_path
from variants.source import importable, open_source

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "digits"
SETS = ("training", "calibration", "evaluation")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository from a short training."""
    out = tmp_path_factory.mktemp("repository")
    command = [sys.executable, str(EXAMPLE / "train.py"), "--out", str(out), "--epochs", "4"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    answer = subprocess.run(command, capture_output=True, text=True, timeout=280, check=True, env=environment)
    assert "held-out digits" in answer.stdout
    return out


@pytest.fixture(scope="module")
def sets(repository: Path) -> dict[str, dict[str, Any]]:
    """The arrays of the three sets."""
    found = {}
    for name in SETS:
        with np.load(repository / "digits" / "1" / "data" / f"{name}.npz", allow_pickle=False) as data:
            found[name] = {"image": data["image"], "label": data["label"]}
    return found


def numbers_of(images: Any) -> list[int]:
    """Which of scikit-learn's digits each image shows once the enlargement is undone; -1 if none."""
    originals = {image.astype(np.int8).tobytes(): number for number, image in enumerate(load_digits().images)}
    undo = np.linalg.pinv(enlargement())
    small = np.rint(undo @ images[:, 0].astype(np.float64) @ undo.T * 16).astype(np.int8)
    return [originals.get(image.tobytes(), -1) for image in small]


def enlargement() -> Any:
    """The matrix [32, 8] of a bilinear enlargement by four with half-pixel centres."""
    matrix = np.zeros((32, 8))
    for row in range(32):
        position = min(max((row + 0.5) / 4 - 0.5, 0), 7)
        left = min(int(position), 6)
        matrix[row, left] += 1 - (position - left)
        matrix[row, left + 1] += position - left
    return matrix


@pytest.mark.slow
def test_sets_are_disjoint_and_real(sets: dict[str, dict[str, Any]]) -> None:
    """Every one of scikit-learn's digits is in exactly one set, with its own label."""
    numbers = {name: numbers_of(found["image"]) for name, found in sets.items()}
    assert sorted(n for found in numbers.values() for n in found) == list(range(1797))
    for name, found in numbers.items():
        assert sets[name]["label"].tolist() == load_digits().target[found].tolist()
    assert {name: len(found) for name, found in numbers.items()} == {
        "training": 898,
        "calibration": 131,
        "evaluation": 768,
    }


@pytest.mark.slow
def test_evaluation_is_other_peoples_handwriting(sets: dict[str, dict[str, Any]]) -> None:
    """No sheet gives digits to evaluation and to another set, so no handwriting is tested that was learnt."""
    assert min(numbers_of(sets["evaluation"]["image"])) == 1029
    assert max(numbers_of(sets["training"]["image"])) < 1029
    assert max(numbers_of(sets["calibration"]["image"])) < 1029
    assert load_digits().target[1029:1059].tolist() == [*range(10)] * 3  # how every sheet begins


@pytest.mark.slow
def test_every_digit_is_well_represented(sets: dict[str, dict[str, Any]]) -> None:
    """Each set has every digit in a share between 8 and 12 %."""
    for name, found in sets.items():
        shares = np.bincount(found["label"], minlength=10) / len(found["label"])
        assert shares.min() > 0.08, name
        assert shares.max() < 0.12, name


@pytest.mark.slow
def test_the_repository_can_be_built(repository: Path, sets: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """The source opens as a build opens it, and the exported network recognises over 90 % of the held-out digits."""
    [model] = open_path(repository)
    version = model.newest()
    assert [variant.name for variant in model.config.variants or ()][:2] == ["fp32", "amp"]
    with importable(model.path):
        source = open_source(version, {"image": sets["evaluation"]["image"][:9]}, tmp_path)
    assert [(spec.name, spec.datatype, spec.shape) for spec in source.signature.inputs] == [
        ("image", "FP32", (-1, 1, 32, 32))
    ]
    session = onnxruntime.InferenceSession(source.graph)
    [logits] = session.run(None, {"image": sets["evaluation"]["image"]})
    assert np.mean(logits.argmax(axis=1) == sets["evaluation"]["label"]) > 0.9


@pytest.mark.slow
def test_only_the_documented_files(repository: Path) -> None:
    """Training writes what a build reads and nothing else."""
    folder = repository / "digits"
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    data = [f"1/data/{name}.npz" for name in sorted(SETS)]
    assert files == [*data, "1/source/model.safetensors", "model.py", "model.yaml"]


def run_client(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The example's client in its own process."""
    command = [sys.executable, str(EXAMPLE / "client.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_the_client_shows_answers_and_refusals(
    repository: Path, sets: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """A relaxed SLO is answered by fp32; one that nothing can meet is shown as a refusal with the server's words."""
    [model] = open_path(repository)
    with importable(model.path):
        source = open_source(model.newest(), {"image": sets["evaluation"]["image"][:9]}, tmp_path)
    bare = tmp_path / "models" / "digits" / "1"
    bare.mkdir(parents=True)
    shutil.copyfile(source.graph, bare / "model.onnx")
    data = str(repository / "digits" / "1" / "data" / "evaluation.npz")
    with serving(tmp_path / "models") as server:
        three = run_client("--url", server.address, "--data", data, "--images", "3")
        code = (
            f"import client, numpy; data = numpy.load({data!r});"
            f"server = client.triton.InferenceServerClient({server.address!r});"
            "client.show(server, '', {'slo_latency_ms': 0.05}, data['image'][:2], data['label'][:2])"
        )
        command = [sys.executable, "-c", code]
        refused = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, cwd=EXAMPLE)
    assert three.returncode == 0, three.stderr
    relaxed, quick, good = three.stdout.strip().split("\n\n")
    assert relaxed.count("by fp32 (the most accurate") == 3
    assert relaxed.count("right") >= 2
    for tight in (quick, good):  # how many of these fit depends on how busy this machine is
        assert tight.count("was refused") + tight.count(" seen as ") == 3
    assert "slo_max_accuracy_drop=0.01" in good
    assert refused.stdout.count("was refused: no variant could meet this SLO, even on an idle server") == 2
    assert refused.stdout.count("the server says: ") == 2


def test_the_client_says_what_is_missing(tmp_path: Path) -> None:
    """Without data, and without a server, one line says what to do, and no traceback."""
    answer = run_client("--data", str(tmp_path / "nothing.npz"))
    assert answer.returncode == 1
    assert "make serve" in answer.stderr
    np.savez(tmp_path / "data.npz", image=np.zeros((1, 1, 32, 32), np.float32), label=np.zeros(1, np.int64))
    answer = run_client("--url", "127.0.0.1:1", "--data", str(tmp_path / "data.npz"))
    assert answer.returncode == 1
    assert answer.stderr.startswith("no answer from 127.0.0.1:1: ")
    assert answer.stderr.count("\n") == 1
