"""HTML and SVG as values: text is escaped where it enters, so nothing that a repository says can become markup.

Rules of this file: `Markup` is made by `tag` and `join` alone; every other text is escaped, in attributes too.
Characters that could hide or reorder what a person reads (controls, direction overrides, lone surrogates) show as
U+FFFD.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape
from typing import TypeAlias

Content: TypeAlias = "str | Iterable[Content] | None"
Attribute: TypeAlias = "str | float | bool | None"

_DECEPTIVE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def safe(text: str) -> Markup:
    """Any text as HTML that shows it, inside an element or an attribute."""
    return text if isinstance(text, Markup) else Markup(escape(_DECEPTIVE.sub("\ufffd", text)))


def join(*content: Content) -> Markup:
    """All content one after the other; None is nothing."""
    return Markup("".join(_texts(content)))


def _texts(content: Iterable[Content]) -> Iterable[str]:
    for part in content:
        if isinstance(part, str):
            yield safe(part)
        elif part is not None:
            yield from _texts(part)


def tag(name: str, *content: Content, **attributes: Attribute) -> Markup:
    """One element.

    Attributes that are None or False are left out, True is bare; ``class_`` and ``stroke_width`` mean ``class`` and
    ``stroke-width``; numbers are coordinates and keep one decimal.
    """
    shown = (_attribute(key, value) for key, value in attributes.items() if value is not None and value is not False)
    return Markup(f"<{name}{''.join(shown)}>{join(*content)}</{name}>")


def _attribute(key: str, value: Attribute) -> str:
    name = key.rstrip("_").replace("_", "-")
    if value is True:
        return f" {name}"
    text = value if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")
    return f' {name}="{safe(text)}"'
