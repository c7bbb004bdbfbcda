"""The protocol every runtime keeps: load an artefact once, run batches from any thread.

A session's `run` takes and returns arrays in the order and with the names of its specs. Datatypes follow
`variants.datatypes`: BF16 is `ml_dtypes.bfloat16`, BYTES is an object array of `str`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from variants.hardware import Hardware
from variants.variant import TensorSpec

Array = npt.NDArray[Any]

TENSORRT_SUFFIX = ".tensorrt.onnx"
"""How an artefact's name ends that is for TensorRT alone."""


class RuntimeUnavailable(Exception):
    """This runtime cannot run this artefact on this host; the message says why, for a person."""


class Session(Protocol):
    """A loaded artefact. `run` is thread-safe and releases the GIL while it computes."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batch_axis: bool
    """Whether dim 0 is the batch: variable in every input and output, under one symbol where it is named."""

    def run(self, inputs: Mapping[str, Array]) -> list[np.ndarray[Any, Any]]:
        """One batch: every input by name, every output in the order of `outputs`."""
        ...


class Runtime(Protocol):
    """A way to execute artefacts: files with the ending `suffix`."""

    name: str
    suffix: str

    def why_not(self, artefact: Path, precision: str, hardware: Hardware) -> str | None:
        """The reason this runtime cannot run the artefact in this precision here, or None if it can try."""
        ...

    def load(self, artefact: Path, *, precision: str, threads: int, device: str) -> Session:
        """Load an artefact for calls with `threads` intra-op threads. Raises RuntimeUnavailable with a reason."""
        ...
