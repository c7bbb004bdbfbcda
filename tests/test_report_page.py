"""The report's page: what it shows of a repository, and what it says of what is missing, hostile or broken."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from factory_fixtures import Built
from report_fixtures import FINDINGS, HOSTILE, add_model, add_rich, card, measured

from server.cli import main
from variants.auto import Attempt, Record, write_record
from variants.report import pareto
from variants.report.facts import ModelFacts, Unreadable, fallen, gather
from variants.report.findings import findings
from variants.report.page import render
from variants.repository import ModelFolder, open_path
from variants.variant import Verdict

NOW = datetime(2025, 1, 2, 3, 4, tzinfo=UTC)


class Reader(HTMLParser):
    """Reads a page as a person would: its texts, and whether every element that opens is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)
        assert self.open == []
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open and "svg" not in self.open:
            self.text += data + " "


def read(path: Path) -> Reader:
    """The page of a model or repository, which must be whole."""
    return Reader(render([gather(model) for model in open_path(path)], NOW))


def facts(path: Path) -> ModelFacts:
    """One model's facts."""
    found = gather(ModelFolder(path))
    assert isinstance(found, ModelFacts)
    return found


@pytest.fixture
def rich(tmp_path: Path) -> Path:
    """A model folder that has everything."""
    return add_rich(tmp_path)


def test_a_really_built_repository_becomes_one_page(built_digits: Built, tmp_path: Path) -> None:
    """Every default variant of the trained digits is on it, with pictures and the words of its card."""
    target = tmp_path / "page.html"
    assert main(["report", str(built_digits.root), "-o", str(target)]) == 0
    page = target.read_text(encoding="utf-8")
    seen = Reader(page)
    model = facts(built_digits.root / "digits")
    assert {variant.name for variant in model.variants} >= {"fp32", "int8-dynamic", "int8-static", "pruned"}
    for variant in model.variants:
        assert f"{variant.name} " in seen.text
        assert " ".join(variant.card.gate.reason.split()) in seen.text
    assert "top-1 accuracy on 697 held-out samples" in seen.text
    for picture in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        ElementTree.fromstring(picture)  # noqa: S314 - our own
    assert len(page) < 2_000_000


def test_the_page_needs_nothing_beside_itself(rich: Path) -> None:
    """It refers to no other file or address, runs no script, and forbids both to whoever shows it."""
    page = render([gather(ModelFolder(rich))], NOW)
    assert "default-src 'none'" in page
    assert not re.search(r"https?:|//|@import|url\(|\bsrc=|<script|\bon\w+=|javascript:", page)
    assert not {"script", "img", "iframe", "object", "embed", "form"} & set(Reader(page).tags)


def test_nothing_from_a_repository_becomes_markup(tmp_path: Path) -> None:
    """Reasons, layers, tensors, parameters, findings and the host's name are text, whatever they say."""
    found = {
        "sensitivity": [{"layer": HOSTILE, "operator": HOSTILE, "damage": 0.5}],
        "tensors": [{"tensor": HOSTILE, "kind": HOSTILE, "scale": HOSTILE, "low": 0, "high": 1, HOSTILE: 1}],
        "training": [{HOSTILE: 1.0}, {HOSTILE: 0.5}],
        "zero_share_by_layer": {HOSTILE: 0.5},
        "calibration": [{"method": HOSTILE, "damage": 1.0}],
        HOSTILE: {HOSTILE: [HOSTILE]},
    }
    speeds = {"fp32": measured(100, [(HOSTILE, 1000)]), "int8-static": measured(50, [(HOSTILE, 500)])}
    cards = [card("fp32"), card("int8-static", 0.1, Verdict.REJECTED, reason=HOSTILE, findings=found)]
    seen = read(add_model(tmp_path, "hostile", cards, speeds))
    assert not {"script", "img"} & set(seen.tags)
    assert seen.text.count(HOSTILE) >= 10


def test_a_model_with_nothing_but_fp32_says_what_is_missing(tmp_path: Path) -> None:
    """Without evaluation data and measurements there is a page still, and it says how to get the pictures."""
    seen = read(add_model(tmp_path, "bare", [card("fp32", None, Verdict.UNVERIFIED)]))
    assert "no evaluation data" in seen.text
    assert "No latency was measured with this build" in seen.text
    assert "Not measured with this build." in seen.text
    assert "NaN" not in seen.text


def test_latency_is_drawn_where_nothing_is_proven(tmp_path: Path) -> None:
    """A model without evaluation data keeps its pictures of cost, and is told what accuracy needs."""
    cards = [card("fp32", None, Verdict.UNVERIFIED), card("amp", None, Verdict.UNVERIFIED)]
    seen = read(add_model(tmp_path, "unproven", cards, {"fp32": measured(100), "amp": measured(50)}))
    assert "Nothing is proven without evaluation data" in seen.text
    assert "Latency by batch size" in seen.text
    assert "Accuracy against latency" not in seen.text


def test_a_variant_that_was_never_made_is_explained(rich: Path) -> None:
    """It stands in the verdicts and among the fallen with its reason, and in no picture of size."""
    model = facts(rich)
    assert ("int8-qat", "rejected: the recipe crashed: ValueError: no such layer") in [
        (v.name, s) for v, s in fallen(model)
    ]
    page = render([model], NOW)
    sizes = re.findall(r'aria-label="(Size on disk[^"]*)"', page)
    assert len(sizes) == 1
    assert "int8-qat" not in sizes[0]
    assert "Not drawn, for lack of evidence or of a latency on this host: int8-qat." in page


def test_the_front_is_made_of_what_no_verified_variant_beats(rich: Path) -> None:
    """Rejected and inconclusive variants are not on it, however fast; neither is what is slower and no better."""
    model = facts(rich)
    assert [variant.name for variant in model.front(1)] == ["pruned-75", "int8-static", "int8-mixed"]
    drawn = pareto.points_of(model, 1)
    assert [point.variant.name for point in drawn if point.on_front] == ["pruned-75", "int8-static", "int8-mixed"]
    assert len(drawn) == 10


def test_dominated_variants_and_those_without_benefit_are_named(rich: Path) -> None:
    """A variant that passed may still be pointless, and the page says which other one makes it so."""
    reasons = {variant.name: reason for variant, reason in fallen(facts(rich))}
    assert reasons["amp"].startswith("no benefit")
    assert reasons["int8-dynamic"] == "dominated: int8-mixed is at least as accurate, and faster at every batch size"
    assert set(reasons) == {"amp", "int8-dynamic", "pruned", "pruned-90", "pruned-99", "distilled", "int8-qat"}


def test_whiskers_are_the_paired_interval_that_the_gate_judges(rich: Path) -> None:
    """A variant's accuracy is fp32's less the drop, between the drop's bounds."""
    model = facts(rich)
    pruned = next(variant for variant in model.variants if variant.name == "pruned")
    assert model.reference is not None
    found = pruned.accuracy(model.reference)
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((0.966, 0.962, 0.970))


def test_what_batch_mates_would_change_is_as_slow_as_it_is_served(rich: Path) -> None:
    """Latencies of a variant that runs sample by sample are multiples of one sample's."""
    variant = next(variant for variant in facts(rich).variants if variant.name == "int8-dynamic")
    assert variant.latencies == {1: 500_000, 8: 2_000_000, 32: 7_000_000}
    proof = replace(variant.card.runtimes["onnxruntime"], batch_invariance=0.1)
    alone = replace(variant, card=replace(variant.card, runtimes={"onnxruntime": proof}))
    assert alone.latencies == {1: 500_000, 8: 4_000_000, 32: 16_000_000}


def test_what_lies_far_below_stands_at_the_edge_with_its_value(rich: Path) -> None:
    """A variant that lost everything does not flatten the picture of the others."""
    svg = pareto.draw(facts(rich), 1, 1080, 470)
    assert "pruned-99: 36.00%" in svg
    assert svg.count('class="cut ') == 1
    assert '"tick" text-anchor="end">40%' not in svg


def test_a_gate_that_allows_everything_shades_nothing(tmp_path: Path) -> None:
    """The picture keeps to the variants."""
    folder = add_model(tmp_path, "open", [card("fp32"), card("amp", 0.01)], {"fp32": measured(9), "amp": measured(5)})
    (folder / "model.yaml").write_text("gate: {max_accuracy_drop: 1.0, min_agreement: 0.0}\ntask: classification\n")
    assert 'class="gate"' not in pareto.draw(facts(folder), 1, 1080, 470)


def test_damaged_and_stale_variants_are_said_not_shown(rich: Path) -> None:
    """A changed artefact and a variant of an older fp32 become sentences; the others stay."""
    (rich / "1/variants/amp/model.onnx").write_bytes(b"changed")
    manifest = rich / "1/manifest.json"
    old = ModelFolder(rich).newest().manifest().variants["pruned"].parent_sha256 or ""
    text = manifest.read_text()
    at = text.index('"pruned": {')
    manifest.write_text(text[:at] + text[at:].replace(old, "0" * 64, 1))
    seen = read(rich)
    assert "amp takes no traffic until it is built again, for it is damaged" in seen.text
    assert "pruned takes no traffic until it is built again, for fp32 or how it is scored has changed" in seen.text
    assert "int8-static" in seen.text


def test_a_damaged_reference_leaves_a_page(rich: Path) -> None:
    """Without fp32's card nothing can be compared, and the page says what is left."""
    (rich / "1/variants/fp32/card.json").write_text("{}")
    assert "fp32 takes no traffic until it is built again" in read(rich).text


def test_measurements_that_cannot_be_read_are_said(rich: Path) -> None:
    """The page lives without speed."""
    (rich / "1/measurements.json").write_text("{")
    seen = read(rich)
    assert "Not shown, because it cannot be read" in seen.text
    assert "No latency was measured with this build" in seen.text


def test_what_auto_tried_is_told_candidate_by_candidate(rich: Path) -> None:
    """Kept, fallen and never tried, each with its reason, though only what was kept lies in the repository."""
    fell = card("int8-mixed", 0.1, Verdict.REJECTED)
    attempts = (
        Attempt({"name": "amp"}, kept=True, reason="on the Pareto front", card=card("amp"), seconds=12.3),
        Attempt({"name": "int8-mixed"}, kept=False, reason=f"rejected: {HOSTILE}", card=fell, seconds=4.0),
        Attempt({"name": "distilled"}, kept=False, reason="the budget was used up"),
    )
    write_record(rich / "1", Record("host", budget_minutes=30.0, complete=False, attempts=attempts))
    seen = read(rich)
    assert "What variants: auto tried within 30 minutes, in this order; the budget ended it." in seen.text
    assert "amp kept ✓ passed 12.3 s on the Pareto front" in seen.text
    assert f"int8-mixed not kept ✕ rejected 4.00 s rejected: {HOSTILE}" in seen.text
    assert "distilled not tried – – the budget was used up" in seen.text
    (rich / "1/auto.json").write_text("[]")
    assert "Not shown, because it cannot be read" in read(rich).text


def test_every_model_has_a_part_and_a_broken_one_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One bad model harms no other, is named on the page and on standard error, and makes the exit code 2."""
    add_rich(tmp_path, "first")
    add_rich(tmp_path, "second")
    (tmp_path / "third/1").mkdir(parents=True)
    (tmp_path / "broken").mkdir()
    shutil.copytree(tmp_path / "first/1", tmp_path / "broken/1")
    (tmp_path / "broken/model.yaml").write_text("taks: classification\n")
    target = tmp_path / "page.html"
    assert main(["report", str(tmp_path), "-o", str(target)]) == 2
    seen = Reader(target.read_text(encoding="utf-8"))
    assert seen.text.count("How each variant was made") == 2
    assert "third Not shown: nothing is built yet; run `gearshift build` first" in seen.text
    assert "did you mean 'task'?" in seen.text
    out, err = capsys.readouterr()
    assert "2 models, 22 variants" in out
    assert [line.split(":")[0] for line in err.splitlines()] == ["broken", "third"]


@pytest.mark.parametrize("folder", ["absent", "empty", "unbuilt"])
def test_a_bad_repository_is_one_line_and_exit_2(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is written when there is nothing to show."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "unbuilt/1").mkdir(parents=True)
    assert main(["report", str(tmp_path / folder), "-o", str(tmp_path / "page.html")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "page.html").exists()


def test_a_place_that_cannot_be_written_to_is_one_line_and_exit_2(
    rich: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No trace for a folder that is not there."""
    assert main(["report", str(rich), "-o", str(rich / "absent/page.html")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_page_lands_in_the_current_folder(rich: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`report.html`, as the command's help says."""
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(rich)]) == 0
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_a_model_that_is_not_built_says_so(tmp_path: Path) -> None:
    """`gather` tells what to run."""
    (tmp_path / "new/1").mkdir(parents=True)
    assert gather(ModelFolder(tmp_path / "new")) == Unreadable(
        "new", "nothing is built yet; run `gearshift build` first"
    )


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
    [{"loss": 0}, {"loss": 0}],
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


def test_evidence_by_runtime_has_the_fields_measures(rich: Path) -> None:
    """Fidelity is on the page: cosine, divergence, and the class that loses most."""
    text = read(rich).text
    assert "mean cosine KL (nats) class that loses most" in text
    assert "0.9987 0.0123 3: 8.00% of recall, 75 samples" in text
