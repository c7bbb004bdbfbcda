"""Regenerates the committed stubs: `python -m protos [DIRECTORY]`, run from the repository's root.

The stubs are compared byte for byte by a test, so they come from exactly one generator version; see the
development dependencies. protoc runs above the package, which makes the stubs import each other as
`from protos import …`.
"""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ("protos/gearshift.proto", "protos/open_inference.proto")


def generate(directory: Path) -> None:
    """Write every stub below `directory`, at `protos/`. Raises RuntimeError when protoc refuses a file."""
    status = protoc.main(
        [
            "protoc",
            f"-I{ROOT}",
            f"-I{files('grpc_tools') / '_proto'}",
            f"--python_out={directory}",
            f"--pyi_out={directory}",
            f"--grpc_python_out={directory}",
            *PROTOS,
        ]
    )
    if status:
        raise RuntimeError(f"protoc failed with status {status}")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
