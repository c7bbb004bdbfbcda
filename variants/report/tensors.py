"""Scale, zero point, range and error of every quantised tensor, as a table to unfold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from variants.report import figures
from variants.report.markup import Content, Markup, tag
from variants.report.svg import rect
from variants.report.tables import Column, fold, number, rows_of, shown, table

_SHOWN = 400
_WIDTH, _HEIGHT = 110.0, 10.0
_KNOWN = ("kind", "scale", "zero_point", "low", "high", "error")

Row = Mapping[str, object]


def tensor_table(value: object) -> Markup | None:
    """The table, largest errors first; None for rows that are no tensors."""
    rows = rows_of(value)
    if rows is None or any("tensor" not in row for row in rows):
        return None
    rows = sorted(rows, key=lambda row: -(number(row.get("error")) or 0.0))
    keys = [key for key in dict.fromkeys((*_KNOWN, *(key for row in rows for key in row))) if key != "tensor"]
    headings = [Column(key.replace("_", " "), words=key == "kind") for key in keys]
    reach = _reach(rows)
    cells: list[list[Content]] = [
        [
            str(row["tensor"]),
            *(_several(row.get(key)) for key in keys),
            _range(row, reach.get(str(row.get("kind")), 0.0)),
        ]
        for row in rows[:_SHOWN]
    ]
    summary = f"{len(rows)} quantised tensors" + (f", the {_SHOWN} with the largest error" * (len(rows) > _SHOWN))
    note = "An error is a share of the tensor's own RMS; ranges are drawn around zero, to one measure per kind."
    columns = [Column("tensor", words=True), *headings, Column("range")]
    return fold(summary, table(f"{summary}, largest error first. {note}", columns, cells))


def _several(value: object) -> str:
    """A value, or what the values of all channels span."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        numbers = [each for each in value if isinstance(each, int | float)]
        if numbers and len(numbers) == len(value):
            return f"{shown(min(numbers))} to {shown(max(numbers))}"
    return shown(value)


def _reach(rows: Sequence[Row]) -> dict[str, float]:
    """The largest magnitude among the tensors of each kind."""
    reach: dict[str, float] = {}
    for row in rows:
        kind, ends = str(row.get("kind")), (number(row.get("low")), number(row.get("high")))
        reach[kind] = max(reach.get(kind, 0.0), *(abs(end) for end in ends if end is not None), 0.0)
    return reach


def _range(row: Row, reach: float) -> Content:
    """The tensor's range as a small bar around zero; decoration, since the numbers stand beside it."""
    low, high = number(row.get("low")), number(row.get("high"))
    if low is None or high is None or reach <= 0:
        return figures.UNKNOWN
    left, right = (_WIDTH / 2 * (1 + end / reach) for end in (low, high))
    shapes = [
        rect(0, 4, _WIDTH, 2, "track"),
        rect(left, 2, max(1.5, right - left), 6, "bar"),
        rect(_WIDTH / 2 - 0.5, 0, 1, _HEIGHT, "baseline"),
    ]
    box = f"0 0 {_WIDTH:.0f} {_HEIGHT:.0f}"
    return tag("svg", shapes, viewBox=box, width=_WIDTH, height=_HEIGHT, class_="h1 inline", aria_hidden="true")
