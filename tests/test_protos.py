"""The protocol files and their stubs: fresh, compatible, loadable."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from descriptors import dump

from protos import gearshift_pb2, open_inference_pb2

ROOT = Path(__file__).resolve().parent.parent

DUMP = """
import json
from descriptors import dump
from tritonclient.grpc import model_config_pb2, service_pb2
print(json.dumps(dump(service_pb2.DESCRIPTOR) | dump(model_config_pb2.DESCRIPTOR)))
"""


def test_stubs_are_fresh(tmp_path: Path) -> None:
    """The committed stubs are exactly what the generator makes of the committed protocol files."""
    subprocess.run([sys.executable, "-W", "ignore", "-m", "protos", str(tmp_path)], cwd=ROOT, check=True)
    made = {path.name: path.read_bytes() for path in (tmp_path / "protos").iterdir()}
    assert set(made) == {
        f"{name}_{end}" for name in ("gearshift", "open_inference") for end in ("pb2.py", "pb2.pyi", "pb2_grpc.py")
    }
    for name, content in made.items():
        assert content == (ROOT / "protos" / name).read_bytes(), f"{name} is stale: run `make stubs`"


def test_declarations_are_those_of_a_stock_client() -> None:
    """What we declare has the number, type, label and oneof that tritonclient's own stubs give it."""
    pytest.importorskip("tritonclient")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", DUMP],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    theirs = json.loads(done.stdout)
    ours = dump(open_inference_pb2.DESCRIPTOR)
    assert len(ours) > 150
    assert {name: theirs.get(name) for name in ours} == ours


def test_gearshift_names_are_strings() -> None:
    """Wherever `model`, `version` and `variant` occur in our own protocol they are strings."""
    fields = [field for m in gearshift_pb2.DESCRIPTOR.message_types_by_name.values() for field in m.fields]
    named = [field for field in fields if field.name in ("model", "version", "variant")]
    assert len(named) > 10
    assert all(field.type == field.TYPE_STRING for field in named)


def test_gearshift_loads_beside_a_stock_client() -> None:
    """Our own protocol imports into a process that has tritonclient loaded."""
    pytest.importorskip("tritonclient")
    script = "import tritonclient.grpc; from protos import gearshift_pb2, gearshift_pb2_grpc"
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=ROOT, check=True)
