"""Peak memory of a variant: a process of its own loads it, runs the largest batch once, and says what that took.

Rules of this file: only a fresh process can tell, since memory that was used before is used again; what its libraries
hold after they are imported is not the variant's and not counted. Linux only; whatever goes wrong means "not measured",
never a wrong number. The inputs travel as an `.npz` without pickles.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from variants import datatypes
from variants.data import Array
from variants.runtimes import available_runtimes

SECONDS = 60.0
"""How long the process may take: a library to import, a graph to compile and one batch to run."""

_PROCESS = Path("/proc/self")
_RESET_PEAK = "5"  # see proc(5) on clear_refs


def measure_peak_memory(
    artefact: Path, runtime: str, precision: str, inputs: Mapping[str, Array], *, seconds: float = SECONDS
) -> int | None:
    """The bytes that loading an artefact and running `inputs` once, on one thread, take at most; None if unknown.

    It counts from after the runtime's import to the process's largest resident size.
    """
    if not (_PROCESS / "clear_refs").exists():
        return None
    top = str(Path(__file__).parents[1])
    paths = os.pathsep.join(filter(None, (top, os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory(prefix="gearshift-memory-") as folder:
        np.savez(f"{folder}/inputs.npz", *(_storable(inputs[name]) for name in sorted(inputs)))
        # -P: a stranger's `onnx.py` in the current folder is no module of ours
        command = [sys.executable, "-P", "-m", __name__, str(artefact), runtime, precision, f"{folder}/inputs.npz"]
        try:
            done = subprocess.run(  # noqa: S603 - our own module
                command,
                env=os.environ | {"PYTHONPATH": paths},
                capture_output=True,
                text=True,
                timeout=seconds,
                check=True,
            )
            return int(done.stdout)
        except (OSError, subprocess.SubprocessError, ValueError):
            return None


def _storable(array: Array) -> Array:
    """Without Python objects, and without types of which an `.npz` keeps only the bytes."""
    if array.dtype == object:
        return array.astype(np.str_)
    return array.view(np.uint16) if array.dtype == datatypes.DATATYPES["BF16"].numpy else array


def _restored(array: Array, datatype: str) -> Array:
    dtype = datatypes.DATATYPES[datatype].numpy
    return array.view(dtype) if datatype == "BF16" else array.astype(dtype, copy=False)


def _main(artefact: Path, runtime: str, precision: str, inputs: Path) -> None:
    """What the process does."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type] # as its runtime has it
    importlib.import_module(runtime)
    with np.load(inputs, allow_pickle=False) as file:
        arrays = [file[name] for name in file.files]
    (_PROCESS / "clear_refs").write_text(_RESET_PEAK)
    before = _status("VmRSS")
    session = available_runtimes()[runtime].load(artefact, precision=precision, threads=1, device="cpu")
    specs = sorted(session.inputs, key=lambda spec: spec.name)
    session.run({spec.name: _restored(array, spec.datatype) for spec, array in zip(specs, arrays, strict=True)})
    print(_status("VmHWM") - before)  # noqa: T201 - read by the process that asked


def _status(name: str) -> int:
    """A line of this process's status, in bytes."""
    found = re.search(rf"^{name}:\s*(\d+) kB$", (_PROCESS / "status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"the kernel does not say {name}")
    return int(found[1]) * 1024


if __name__ == "__main__":
    _main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]))
