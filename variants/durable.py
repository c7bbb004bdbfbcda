"""Writes that survive a power cut: each appears whole or not at all, and is on the disk when the call returns."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def write_durably(path: Path, content: bytes) -> None:
    """Replace a file atomically: it holds the old content or the new one, after a power cut too."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def copy_durably(origin: Path, target: Path) -> None:
    """Copy a file's content, and return once it is on the disk."""
    with origin.open("rb") as reader, target.open("wb") as writer:
        shutil.copyfileobj(reader, writer)
        writer.flush()
        os.fsync(writer.fileno())


def swap_folder(staged: Path, target: Path, old: Path) -> None:
    """Rename `staged` to `target`; a predecessor steps aside to `old`, and stays there."""
    sync_folder(staged)
    if target.exists():
        target.rename(old)
    staged.rename(target)
    sync_folder(target.parent)


def sync_folder(path: Path) -> None:
    """Put a folder's entries on the disk, so that a rename in it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
