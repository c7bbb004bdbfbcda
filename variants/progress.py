"""What a person sees while variants are built: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

Advance = Callable[[str, float], None]
"""Called with what is being done and how much of it, a share in [0, 1]."""

_PLAIN_WIDTH = 200  # a pipe or a log file has no width of its own, and wrapped lines cannot be searched


class Reporter:
    """Writes to a console; on a terminal with a bar for the step in progress, else one line per finished step."""

    def __init__(self, console: Console | None = None, errors: Console | None = None) -> None:
        self._console = console or _console(sys.stdout.isatty())
        self._errors = errors or Console(stderr=True, soft_wrap=True, highlight=False)

    def line(self, text: str) -> None:
        """One plain line."""
        self._console.print(escape(text), soft_wrap=True)

    def error(self, text: str) -> None:
        """One line about what went wrong, on standard error."""
        self._errors.print(escape(text), soft_wrap=True)

    def table(self, table: Table) -> None:
        """The last table."""
        self._console.print(table)

    @contextmanager
    def step(self, name: str) -> Iterator[Advance]:
        """A step with a bar, which disappears when the step ends."""
        if not self._console.is_terminal:
            yield lambda _what, _share: None
            return
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._console, transient=True) as progress:
            task = progress.add_task(escape(name), total=1.0)
            yield lambda what, share: progress.update(task, description=escape(f"{name}: {what}"), completed=share)


def _console(terminal: bool) -> Console:
    return Console(highlight=False) if terminal else Console(width=_PLAIN_WIDTH, highlight=False, color_system=None)
