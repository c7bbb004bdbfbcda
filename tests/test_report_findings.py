"""What the report shows of a recipe's findings: a picture for a known form, a table for any other."""

from __future__ import annotations

import pytest
from report_fixtures import FINDINGS, Reader, card

from variants.report.findings import findings


@pytest.mark.parametrize("name", FINDINGS)
def test_a_known_finding_is_drawn_and_an_unknown_one_tabulated(name: str) -> None:
    """Every recipe's finding appears under a heading with the figures it holds."""
    (drawn,) = findings(card("x", findings={name: FINDINGS[name]}), 0.02)
    seen = Reader(drawn)
    assert seen.tags.count("h4") == 1
    assert ("svg" in seen.tags) == (name != "novelty")


ODD: list[object] = [
    None, True, 3, -1.5, "text", [], {}, [1, "a"], [{}], [{"a": 1}, {"b": [2, {"c": 3}]}], {"a": {"b": {"c": {}}}},
    [{"layer": "l", "damage": None}], [{"layer": "l", "damage": "inf"}], [{"method": "m", "damage": 1e308}],
    [{"kept": 1, "drop": 1e-320, "passes": 1}], [{"sparsity": True, "drop": 0.1}], [[1, 2], [3]], list(range(99)),
    [{"tensor": "t", "low": 1e308, "high": -1e308, "error": "?"}], [{"tensor": None}], {"a": 0.5, "b": "x"}, [1.0],
    [{"loss": 0}, {"loss": 0}], 10**400, [{"layer": "l", "damage": 10**400}], {"a": -(10**400)},
]  # fmt: skip


@pytest.mark.parametrize("name", FINDINGS)
def test_a_finding_of_any_other_form_is_shown_as_it_is(name: str) -> None:
    """The form is the recipes' to choose: none of them stops the page, and none is left out."""
    for value in ODD:
        (drawn,) = findings(card("x", findings={name: value}), 0.02)
        assert Reader(drawn).tags.count("h4") == 1
        assert "nan" not in drawn.lower().replace("nano", "")


def test_a_layer_that_left_no_finite_answers_leads_the_scan() -> None:
    """It has no figure, and is the most sensitive of all."""
    scan = [{"layer": "first", "damage": 0.5}, {"layer": "second", "damage": None}]
    (drawn,) = findings(card("x", findings={"sensitivity": scan}), 0.02)
    assert 'aria-label="damage by layer: second no finite answers; first 0.500"' in drawn


def test_a_calibration_that_had_nothing_to_try_on_is_a_table() -> None:
    """A method without figures has no bar, and is said all the same."""
    tried = [{"method": "minmax", "damage": None, "passes": None, "chosen": True}]
    (drawn,) = findings(card("x", findings={"calibration": tried}), 0.02)
    assert "minmax – – yes" in Reader(drawn).text
    assert "svg" not in Reader(drawn).tags


def test_a_second_training_is_drawn_like_the_first() -> None:
    """In a chain two steps may find something under one name; the second is numbered."""
    first, second = findings(card("x", findings={"training": [{"total": 1.0}], "training 2": [{"total": 0.5}]}), 0.02)
    assert "Training" in Reader(first).text
    assert "Training 2" in Reader(second).text
    assert Reader(first).tags.count("svg") == Reader(second).tags.count("svg") > 0


def test_figures_of_a_search_begin_with_its_knob() -> None:
    """Cards keep their keys by the alphabet; a row is still named by what was tried."""
    rows = [{"drop": 0.01, "kept": 3, "passes": True, "chosen": True}]
    (drawn,) = findings(card("x", findings={"mixed": rows}), 0.02)
    assert "kept drop passes chosen 3 0.01 yes yes" in Reader(drawn).text


def test_long_findings_are_folded() -> None:
    """Seventy input ranges do not bury the rest."""
    (drawn,) = findings(card("x", findings={"input_ranges": {f"layer {n}": [0, n] for n in range(70)}}), 0.02)
    assert "details" in Reader(drawn).tags
    assert "layer 69 0, 69" in Reader(drawn).text


def test_the_table_of_tensors_has_every_figure() -> None:
    """Scales of channels as their span, zero points, ranges and errors, the largest error first."""
    (drawn,) = findings(card("x", findings={"tensors": FINDINGS["tensors"]}), 0.02)
    assert "w weight 0.001 to 0.02 0 −1 1 0.1 x activation 0.02 12 0 5.1 –" in Reader(drawn).text
