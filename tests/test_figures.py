"""Where figures are written: asked before anything runs, a file that can be written is not touched by the question."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from server.figures import check_writable, write_figures
from server.settings import SettingsError


def test_figures_can_go_into_a_pipe() -> None:
    """`--json /dev/stdout | ...` names a pipe through a link whose end has no name of its own."""
    reading, writing = os.pipe()
    try:
        path = Path(f"/dev/fd/{writing}")
        check_writable(path)
        write_figures(path, {"runs": 3})
        assert json.loads(os.read(reading, 1000)) == {"runs": 3}
    finally:
        os.close(reading)
        os.close(writing)


def test_asking_leaves_everything_as_it_was(tmp_path: Path) -> None:
    """A file keeps what it holds, a new one does not stay, and a link goes on leading to what is not there yet."""
    old, new, link = tmp_path / "old", tmp_path / "new", tmp_path / "link"
    old.write_text("{}")
    link.symlink_to("new")
    for path in (old, new, link):
        check_writable(path)
    assert old.read_text() == "{}"
    assert not new.exists()
    assert link.is_symlink()


def test_what_cannot_be_written_is_told_under_the_name_it_was_given(tmp_path: Path) -> None:
    """A folder, a file in a folder that is not there, a link to one, and a link to itself."""
    link, circle = tmp_path / "link", tmp_path / "circle"
    link.symlink_to("nowhere/file")
    circle.symlink_to("circle")
    for path in (tmp_path, tmp_path / "nowhere" / "file", link, circle):
        with pytest.raises(SettingsError, match=f"^--json {path}: "):
            check_writable(path)
