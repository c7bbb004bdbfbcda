"""The report's parts below its pages: escaping, numbers, scales, and where labels go."""

from __future__ import annotations

import math
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from report_fixtures import HOSTILE

from variants.report import bars, curves, figures
from variants.report.labels import Anchor, Box, place, spread, text_width
from variants.report.markup import join, safe, tag
from variants.report.scales import linear_ticks, log_ticks, spanning
from variants.report.svg import symbol
from variants.report.tables import shown
from variants.variant import Verdict


@settings(deadline=None, max_examples=50)
@given(st.text())
@example("\r\n0")
def test_any_text_comes_back_from_an_element_and_an_attribute(text: str) -> None:
    """What a person reads is the text itself, and never markup; only what would deceive or not encode is replaced."""
    element = ElementTree.fromstring(tag("a", text, title=text).encode())  # noqa: S314 - our own
    assert len(element) == 0
    assert all(a in (b, "\ufffd") for a, b in zip(element.text or "", text, strict=True))
    assert len(element.attrib["title"]) == len(text)


def test_what_is_markup_already_is_not_escaped_again() -> None:
    """Elements nest, and texts between them are escaped once."""
    assert join("a<b", tag("i", "x&y", hidden=True, title=None), [["c"], None]) == "a&lt;b<i hidden>x&amp;y</i>c"


def test_direction_overrides_are_shown_as_what_they_are() -> None:
    """A name cannot make the words after it read backwards."""
    assert safe("abc\u202egnp\x00") == "abc\ufffdgnp\ufffd"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (figures.duration(12_345), "12.3 µs"),
        (figures.duration(999_999), "1.00 ms"),
        (figures.duration(72_000_000_000), "72.0 s"),
        (figures.size(26_459_974), "26.5 MB"),
        (figures.size(999), "999 B"),
        (figures.flops(88_685_568), "88.7 MFLOP"),
        (figures.flops(0), "0 FLOP"),
        (figures.ratio(15.94), "15.9×"),
        (figures.ratio(0.8512), "0.851×"),
        (figures.percent(-0.00123), "−0.12%"),
        (figures.percent(-1e-5), "0.00%"),
        (figures.typeset("int8-2: -0.5% [-1, 2]"), "int8-2: −0.5% [−1, 2]"),
        (figures.score(-1e-5, "r2"), "0.0000"),
        (figures.score(0.99087, "top1"), "99.09%"),
        (figures.score(0.99087, "cosine"), "0.9909"),
        (figures.significant(0.00001234), "1.23e−5"),
        (figures.significant(999.9), "1,000"),
        (figures.significant(float("inf")), "∞"),
        (figures.plain("1.00 ms"), "1 ms"),
        (figures.plain("97.50%"), "97.5%"),
        (figures.plain("100 µs"), "100 µs"),
        (figures.shortened("a" * 30 + "b" * 30, 9), "aaaa…bbbb"),
        (shown([1, 2.5, None, True, {"a_b": []}]), "1, 2.5, –, yes, a b none"),
    ],
)
def test_numbers_read_as_people_write_them(text: str, wanted: str) -> None:
    """Three digits, the unit that keeps them short, and a real minus sign."""
    assert text == wanted


@settings(deadline=None, max_examples=50)
@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 9))
def test_linear_ticks_are_round_inside_and_neither_few_nor_many(low: float, span: float, about: int) -> None:
    """Ticks lie within the scale at even distances that are 1, 2, 2.5 or 5 times a power of ten."""
    ticks = linear_ticks(low, low + span, about)
    assert all(low - span * 1e-6 <= tick <= low + span * (1 + 1e-6) for tick in ticks)
    assert about // 3 <= len(ticks) <= about + 2
    steps = [b - a for a, b in pairwise(ticks)]
    for step in steps:
        mantissa = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-3)
        assert min(abs(mantissa - nice) for nice in (1, 2, 2.5, 5)) < 0.01 * max(1, abs(low) / span)
        assert step == pytest.approx(steps[0], rel=1e-3, abs=abs(low) * 1e-12)


@settings(deadline=None, max_examples=50)
@given(st.floats(-6, 9), st.floats(0.01, 12), st.integers(3, 9))
def test_logarithmic_ticks_rise_inside_the_scale(power: float, decades: float, about: int) -> None:
    """There are always at least two ticks or nearly, never too many to read, and all lie within the scale."""
    low, high = 10**power, 10 ** (power + decades)
    ticks = log_ticks(low, high, about)
    assert ticks == sorted(set(ticks))
    assert 1 <= len(ticks) <= about + 3
    assert all(low * 0.999 <= tick <= high * 1.001 for tick in ticks)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(1e-3, 1e9), min_size=1, max_size=20))
def test_a_scale_holds_all_its_values_in_order(values: list[float]) -> None:
    """Every value has a place between the ends, larger ones farther along, whether the scale is logarithmic or not."""
    scale = spanning(values, 50, 450)
    places = [scale(value) for value in sorted(values)]
    assert places == sorted(places)
    assert all(50 <= place <= 450 for place in places)
    assert scale.log == (max(values) > 8 * min(values))


def test_one_value_alone_lies_within_its_scale() -> None:
    """Equal values, zero among them, make a scale too."""
    assert 0 < spanning([0.0], 0, 100)(0.0) < 100
    assert 0 < spanning([5.0, 5.0], 0, 100)(5.0) < 100


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0, 300), max_size=12))
def test_labels_in_a_column_keep_their_distance_and_their_order(wanted: list[float]) -> None:
    """Names at the ends of lines never overlap while there is room, and stand in the order of the lines."""
    heights = spread(wanted, 14, 0, 300)
    order = sorted(range(len(wanted)), key=lambda number: wanted[number])
    placed = [heights[number] for number in order]
    assert all(b - a >= 14 - 1e-6 for a, b in pairwise(placed))
    assert all(-1e-6 <= height <= 300 + 1e-6 for height in placed)


def test_labels_far_apart_stay_where_they_are_wanted() -> None:
    """Nothing is moved without need."""
    assert spread([10, 100, 200], 14, 0, 300) == [10, 100, 200]


def _anchors(points: list[tuple[float, float]]) -> list[Anchor]:
    return [Anchor(x, y, text_width("pruned-unstructured", 12), 28) for x, y in points]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.floats(450, 600), st.floats(60, 120)), min_size=1, max_size=9))
def test_labels_of_a_cluster_overlap_neither_each_other_nor_any_mark(points: list[tuple[float, float]]) -> None:
    """However close the points lie, every name can be read."""
    anchors = _anchors(points)
    placed = place(anchors, [], Box(0, 0, 1080, 470))
    assert all(Box(0, 0, 1080, 470).holds(box) for box in placed)
    for position, box in enumerate(placed):
        assert all(box.overlap(other) < 1 for other in placed[position + 1 :])
        assert all(box.overlap(Box(a.x - 6, a.y - 6, 12, 12)) < 1 for a in anchors)


def test_a_lonely_label_stands_right_beside_its_point() -> None:
    """The preferred place is taken when it is free."""
    box = place(_anchors([(100, 100)]), [], Box(0, 0, 500, 300))[0]
    assert 100 < box.x < 115
    assert box.y < 100 < box.y + box.height


def test_a_label_wider_than_the_picture_is_placed_all_the_same() -> None:
    """A name too long for any place does not stop the page."""
    assert len(place([Anchor(10, 10, 900, 15)], [], Box(0, 0, 300, 200))) == 1


def test_each_verdict_has_a_shape_of_its_own() -> None:
    """Marks differ without any colour."""
    drawn = {symbol(verdict, 0, 0, 1).replace(verdict, "") for verdict in Verdict}
    assert len(drawn) == len(Verdict)
    assert symbol(Verdict.PASSED, 0, 0, 0) != symbol(Verdict.PASSED, 0, 0, 1)


def test_a_bar_is_as_long_as_its_share_of_the_longest() -> None:
    """Bars begin at zero and are to scale, the darker part too."""
    svg = bars.draw([bars.Bar("a", 0, 200, "200"), bars.Bar("b", 1, 50, "50", inner=25)], "sizes", 340)
    picture = ElementTree.fromstring(svg)  # noqa: S314 - our own
    widths = [float(rect.attrib["width"]) for rect in picture.iter("rect") if "bar" in rect.attrib["class"]]
    assert widths == [340, 85, 42.5]


def test_lines_end_at_their_names_and_speak_to_screen_readers() -> None:
    """A hostile name is text in the picture, in its tooltip and in its description."""
    svg = curves.latencies([curves.Curve(HOSTILE, 1, [(1, 1000), (32, 9000)])], 540, 360)
    picture = ElementTree.fromstring(svg)  # noqa: S314 - our own
    assert HOSTILE in picture.attrib["aria-label"]
    assert not list(picture.iter("script"))
    assert any(HOSTILE in (title.text or "") for title in picture.iter("title"))
