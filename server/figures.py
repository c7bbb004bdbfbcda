"""Where `--json FILE` of a load leaves its figures, real or simulated.

Rules of this file: whether a file can be written is told before anything runs, and asking leaves none behind.
"""

from __future__ import annotations

import json
from pathlib import Path

from server.settings import SettingsError


def check_writable(path: Path) -> None:
    """A file made to see whether one can be made does not stay: the run may still fail. Raises SettingsError."""
    try:
        if path.exists():  # as it was named: what stands behind /dev/stdout may have no name of its own
            path.open("a").close()
            return
        file = path.resolve()  # where a link leads nowhere, the file that it names
        file.open("a").close()
        file.unlink()
    except RuntimeError:  # as Python 3.11 and 3.12 tell it
        raise SettingsError(f"--json {path}: links in a circle") from None
    except OSError as error:
        raise SettingsError(f"--json {path}: {error.strerror}") from None


def write_figures(path: Path, facts: object) -> None:
    """Replace the file by these facts. Raises SettingsError if it cannot be written."""
    try:
        path.write_text(json.dumps(facts, indent=2) + "\n")
    except OSError as error:
        raise SettingsError(f"--json {path}: {error.strerror}") from None
