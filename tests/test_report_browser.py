"""The report's page in a real browser: it loads alone and clean, fits every screen, and can be read by everybody."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, browser
from report_fixtures import HOSTILE, add_model, add_rich, card, measured

from server.cli import main
from variants.variant import Verdict

WIDTHS = (390, 768, 1280)

UNFOLD = "[...document.querySelectorAll('details')].map(d => d.open = true).length"
OVERFLOW = "[document.documentElement.scrollWidth, innerWidth]"
PICTURES = """[...document.querySelectorAll('svg[role=img]')]
  .filter(svg => !svg.closest('[aria-hidden]') && svg.checkVisibility())
  .map(svg => {
    const box = svg.getBoundingClientRect();
    return { name: svg.getAttribute('aria-label'), width: box.width, height: box.height, right: box.right,
             scale: box.width / svg.viewBox.baseVal.width };
  })"""
MAIN = """(() => {
  const svg = [...document.querySelectorAll('figure.full > div > svg')].find(svg => svg.checkVisibility());
  const boxes = what => [...svg.querySelectorAll(what)].map(shape => {
    const box = shape.getBoundingClientRect();
    return { name: shape.textContent, left: box.left, top: box.top, right: box.right, bottom: box.bottom };
  });
  const frame = svg.getBoundingClientRect();
  return { left: frame.left, right: frame.right, labels: boxes('text.label:not(.sub)'), marks: boxes('.mark, .cut') };
})()"""
COLOURS = """[...document.querySelectorAll('p, small, td, th, dt, dd, summary, .note, .badge, .tile strong, svg text')]
  .filter(element => element.checkVisibility())
  .map(element => {
    let behind = element;
    while (getComputedStyle(behind).backgroundColor == 'rgba(0, 0, 0, 0)') behind = behind.parentElement;
    const style = getComputedStyle(element), colour = element.closest('svg') ? style.fill : style.color;
    return [colour, getComputedStyle(behind).backgroundColor, element.outerHTML.slice(0, 80)];
  })"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report on a model that has everything, and on one with hostile names and long ones."""
    root = tmp_path_factory.mktemp("models")
    add_rich(root)
    layer = f"{HOSTILE}/" + "block/" * 40
    cards = [
        card("fp32"),
        card("a" * 100, 0.3, Verdict.REJECTED, reason=layer, findings={"training": [1.0, 0.5], layer: layer}),
    ]
    add_model(root, "tricky", cards, {"fp32": measured(100, [(layer, 9)]), "a" * 100: measured(50, [(layer, 5)])})
    target = root / "report.html"
    assert main(["report", str(root / "tricky"), "-o", str(target)]) == 0
    (root / "report.html").unlink()
    assert main(["report", str(root), "-o", str(target)]) == 0
    return target


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for all tests of this file."""
    with browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


def test_the_page_loads_alone_and_without_complaint(chromium: Browser, page: Path) -> None:
    """One request, for the page itself; nothing on the console, nothing blocked, and no hostile name is a script."""
    chromium.open(page, 1280)
    asked = [request["request"]["url"] for request in chromium.happened("Network.requestWillBeSent")]
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
    assert chromium.happened("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown") == []
    assert chromium.evaluate("document.querySelectorAll('script, img').length") == 0
    assert HOSTILE in chromium.evaluate("document.body.textContent")


@pytest.mark.parametrize("width", WIDTHS)
def test_every_picture_has_a_size_that_can_be_read(chromium: Browser, page: Path, width: int) -> None:
    """No picture is empty, wider than the screen, drawn twice, or shrunk until its text is too small."""
    chromium.open(page, width)
    chromium.evaluate(UNFOLD)
    pictures = chromium.evaluate(PICTURES)
    assert len(pictures) >= 20
    for picture in pictures:
        assert picture["name"]
        assert picture["width"] > 200
        assert picture["height"] > 30
        assert picture["right"] <= width
        assert 0.8 <= picture["scale"] <= 1.2
    names = [picture["name"] for picture in pictures]
    assert len(names) - len(set(names)) <= 2  # both models count the bytes of equal artefacts


@pytest.mark.parametrize("width", (320, *WIDTHS))
def test_the_page_never_scrolls_sideways(chromium: Browser, page: Path, width: int) -> None:
    """Folded and unfolded, with the longest names: wide tables scroll inside themselves."""
    chromium.open(page, width)
    for _ in range(2):
        content, screen = chromium.evaluate(OVERFLOW)
        assert content <= screen == width
        chromium.evaluate(UNFOLD)


@pytest.mark.parametrize("width", WIDTHS)
def test_names_in_the_main_picture_cover_neither_each_other_nor_marks(
    chromium: Browser, page: Path, width: int
) -> None:
    """Ten variants, some of them near neighbours, can all be told apart in the browser's own font."""
    chromium.open(page, width)
    main_picture = chromium.evaluate(MAIN)
    labels, marks = main_picture["labels"], main_picture["marks"]
    assert len(labels) == len(marks) == 10
    for position, label in enumerate(labels):
        assert main_picture["left"] - 1 <= label["left"]
        assert label["right"] <= main_picture["right"] + 4
        for other in [*labels[position + 1 :], *marks]:
            across = min(label["right"], other["right"]) - max(label["left"], other["left"])
            down = min(label["bottom"], other["bottom"]) - max(label["top"], other["top"])
            assert min(across, down) <= 4, (label, other)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(chromium: Browser, page: Path, scheme: str) -> None:
    """The reader's scheme is followed, and every text has the contrast that WCAG 2.2 asks (4.5)."""
    chromium.open(page, 1280, scheme)
    chromium.evaluate(UNFOLD)
    colours = chromium.evaluate(COLOURS)
    assert sum(what.startswith("<text") for _, _, what in colours) > 100
    assert len(colours) > 300
    for text, background, what in colours:
        assert (luminance(background) > 0.5) == (scheme == "light"), what
        brighter, darker = sorted((luminance(text), luminance(background)), reverse=True)
        assert (brighter + 0.05) / (darker + 0.05) >= 4.5, (what, text, background)


def luminance(colour: str) -> float:
    """The relative luminance of a computed CSS colour, as WCAG defines it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_what_is_folded_opens_from_the_keyboard(chromium: Browser, page: Path) -> None:
    """Tab reaches the folds, Enter opens one."""
    chromium.open(page, 1280)
    for _ in range(40):
        chromium.press("Tab")
        if chromium.evaluate("document.activeElement.tagName") == "SUMMARY":
            break
    chromium.press("Enter")
    assert chromium.evaluate("document.activeElement.parentElement.open") is True


def test_screen_readers_hear_every_picture_and_every_table(chromium: Browser, page: Path) -> None:
    """In the accessibility tree pictures have descriptions, and tables captions and headers, on a phone too."""
    for width in (390, 1280):
        chromium.open(page, width)
        nodes = [node for node in chromium.ask("Accessibility.getFullAXTree")["nodes"] if not node.get("ignored")]
        images = [name(node) for node in nodes if role(node) == "image"]
        assert len(images) >= 12
        assert all(len(image) > 20 for image in images)
        verdicts = [node for node in nodes if role(node) == "table" and name(node).startswith("Verdicts")]
        assert len(verdicts) == 2
        assert {"rowheader", "columnheader", "cell"} <= {role(node) for node in nodes}


def role(node: dict[str, Any]) -> str:
    """A node's role."""
    return str(node["role"]["value"])


def name(node: dict[str, Any]) -> str:
    """A node's name, as a screen reader says it."""
    return str(node.get("name", {}).get("value", ""))
