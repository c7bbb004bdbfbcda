"""`gearshift report`: one HTML page that needs nothing beside itself, written in one go.

Rules of this file: no script, no outside resource, and a content security policy that forbids both, so that the page is
safe to open and to pass on. Exit codes are those of a build: 0 written, 2 a bad repository or a place that cannot be
written to.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from string import Template

from variants.durable import write_durably
from variants.model_config import RepositoryError
from variants.progress import Reporter
from variants.report.facts import ModelFacts, Unreadable, gather
from variants.report.markup import Markup, join, tag
from variants.report.sections import section
from variants.repository import open_path

_PAGE = Template(files("variants.report").joinpath("page.html").read_text(encoding="utf-8"))


def write_report(path: Path, target: Path, *, reporter: Reporter | None = None) -> int:
    """Write the report on a model or a repository at `path` to the file `target`; returns the exit code."""
    reporter = reporter or Reporter()
    try:
        models = [gather(model) for model in open_path(path)]
    except RepositoryError as error:
        reporter.error(str(error))
        return 2
    shown = [model for model in models if isinstance(model, ModelFacts)]
    for model in models:
        if isinstance(model, Unreadable):
            reporter.error(f"{model.name}: {model.reason}")
    if not shown:
        return 2
    try:
        write_durably(target, render(models, datetime.now(UTC)).encode("utf-8"))
    except OSError as error:
        reporter.error(f"{target}: cannot be written: {error.strerror or error}")
        return 2
    count = sum(len(model.variants) for model in shown)
    reporter.line(f"{target}: {len(shown)} model{'s' * (len(shown) > 1)}, {count} variant{'s' * (count > 1)}")
    return 0 if len(shown) == len(models) else 2


def render(models: Sequence[ModelFacts | Unreadable], now: datetime) -> str:
    """The whole page."""
    names = ", ".join(model.name for model in models)
    anchors = [f"model-{number}" for number in range(1, len(models) + 1)]
    links = [tag("a", m.name, href=f"#{anchor}") for m, anchor in zip(models, anchors, strict=True)]
    body = join(
        tag("nav", links, aria_label="Models") if len(models) > 1 else None,
        [_part(model, anchor) for model, anchor in zip(models, anchors, strict=True)],
        _footer(models, now),
    )
    return _PAGE.substitute(title=join(f"Gearshift report: {names}"), body=body)


def _part(model: ModelFacts | Unreadable, anchor: str) -> Markup:
    if isinstance(model, ModelFacts):
        return section(model, anchor)
    return tag(
        "section",
        tag("h2", model.name, id=anchor),
        tag("p", f"Not shown: {model.reason}", class_="absent"),
        class_="model",
    )


def _footer(models: Sequence[ModelFacts | Unreadable], now: datetime) -> Markup:
    tools = {tool: version for m in models if isinstance(m, ModelFacts) for tool, version in m.tools.items()}
    built = ", ".join(f"{tool} {version}" for tool, version in sorted(tools.items()))
    return tag(
        "footer",
        tag("p", f"Written {now:%Y-%m-%d %H:%M} UTC by gearshift report. Built with {built or 'unknown tools'}."),
    )
