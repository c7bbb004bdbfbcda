"""Tables that scroll inside themselves on a small screen, and any JSON value as something a person can read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from variants.report import figures
from variants.report.markup import Content, Markup, tag

_LONGEST_LIST = 8
_DEEPEST = 3
_LARGEST, _SMALLEST = 1e30, 1e-30
"""Beyond these no figure of a model means anything, and drawing it would overflow."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column's heading; `words` for text that is aligned left and may wrap."""

    heading: str
    words: bool = False


def table(
    caption: str,
    columns: Sequence[Column],
    rows: Sequence[Sequence[Content]],
    notes: Sequence[Content] | None = None,
    class_: str | None = None,
) -> Markup:
    """A table whose first cells name their rows; every row has a cell for each column, and its note below it."""
    head = tag("tr", [tag("th", column.heading, scope="col", class_=_class(column)) for column in columns])
    body = []
    for position, row in enumerate(rows):
        body.append(tag("tr", [_cell(number, *pair) for number, pair in enumerate(zip(columns, row, strict=True))]))
        if notes is not None:
            body.append(tag("tr", tag("td", notes[position], colspan=len(columns), class_="words"), class_="note"))
    whole = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", body), class_=class_)
    return tag("div", whole, class_="scroll", tabindex="0", role="region", aria_label=caption)


def _cell(number: int, column: Column, content: Content) -> Markup:
    if number == 0:
        return tag("th", content, scope="row", class_=_class(column))
    return tag("td", tag("span", content), class_=_class(column), data_label=column.heading)


def _class(column: Column) -> str | None:
    return "words" if column.words else None


def fold(summary: Content, *content: Content, is_open: bool = False) -> Markup:
    """What is shown on demand."""
    return tag("details", tag("summary", summary), content, open=is_open)


def number(value: object) -> float | None:
    """A number that can be drawn, None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
        return None
    return 0.0 if abs(value) < _SMALLEST else float(value)


def rows_of(value: object) -> list[Mapping[str, object]] | None:
    """A list of mappings, None if the value is anything else."""
    if (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and value
        and all(isinstance(v, Mapping) for v in value)
    ):
        return [{str(key): content for key, content in entry.items()} for entry in value]
    return None


def value_table(caption: str, value: object, lead: str = "") -> Markup:
    """Any JSON value: a list of mappings as a table, a mapping as its pairs, all else as text.

    A table's first column is `lead` if there is one, then come texts, then the rest in the order of their appearance.
    """
    if (rows := rows_of(value)) is not None:
        keys = list(dict.fromkeys(key for row in rows for key in row))
        texts = {key for key in keys if any(isinstance(row.get(key), str | Sequence | Mapping) for row in rows)}
        keys.sort(key=lambda key: (key != lead, key not in texts))
        columns = [Column(key.replace("_", " "), words=key in texts) for key in keys]
        cells = [[shown(row[key]) if key in row else figures.UNKNOWN for key in keys] for row in rows]
        return table(caption, columns, cells)
    if isinstance(value, Mapping) and value:
        return pairs({str(key): content for key, content in value.items()})
    return tag("p", f"{caption}: {shown(value)}")


def pairs(values: Mapping[str, object]) -> Markup:
    """Names with their values."""
    return tag(
        "dl",
        [tag("div", tag("dt", name.replace("_", " ")), tag("dd", shown(value))) for name, value in values.items()],
        class_="pairs",
    )


def shown(value: object, depth: int = 0) -> str:
    """A JSON value in a line; long lists and deep ones are cut."""
    if isinstance(value, Mapping):
        inner = [f"{str(key).replace('_', ' ')} {shown(content, depth + 1)}" for key, content in value.items()]
    elif isinstance(value, Sequence) and not isinstance(value, str):
        inner = [shown(content, depth + 1) for content in value[:_LONGEST_LIST]]
        inner += [f"… {len(value) - _LONGEST_LIST} more"] if len(value) > _LONGEST_LIST else []
    else:
        return _single(value)
    return "…" if depth >= _DEEPEST else ", ".join(inner) or "none"


def _single(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and abs(value) > _LARGEST:
        return "a number beyond all bounds"
    if isinstance(value, int):
        return (f"{value:,}" if abs(value) >= 10_000 else str(value)).replace("-", "−")
    if isinstance(value, float):
        return figures.plain(figures.significant(value, 4))
    return figures.UNKNOWN if value is None else str(value)
