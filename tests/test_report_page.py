"""The report's page: what it shows of a repository, and what it says of what is missing, hostile or broken."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from factory_fixtures import Built
from report_fixtures import HOSTILE, Reader, add_model, add_rich, card, evidence, measured

from server.cli import main
from variants.attempts import Attempt, End, Record, write_record
from variants.report import curves, pareto
from variants.report.facts import ModelFacts, Unreadable, gather
from variants.report.page import render
from variants.repository import ModelFolder, open_path
from variants.variant import Interval, Verdict

NOW = datetime(2025, 1, 2, 3, 4, tzinfo=UTC)


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
        assert " ".join(variant.card.gate.reason.split()) in seen.text.replace("−", "-")
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
    assert model.fallen["int8-qat"] == "rejected: the recipe crashed: ValueError: no such layer"
    page = render([model], NOW)
    sizes = re.findall(r'aria-label="(Size on disk[^"]*)"', page)
    assert len(sizes) == 1
    assert "int8-qat" not in sizes[0]
    assert "Not drawn, for lack of evidence or of a latency on this host: int8-qat." in page


def test_the_front_is_made_of_what_no_verified_variant_beats(rich: Path) -> None:
    """Rejected and inconclusive variants are not on it, however fast; neither is what is slower and no better.

    fp32, whose drop is none, is.
    """
    model = facts(rich)
    front = ["pruned-75", "int8-static", "int8-mixed", "fp32"]
    assert [variant.name for variant in model.front(1)] == front
    drawn = pareto.points_of(model, 1)
    assert [point.variant.name for point in drawn if point.on_front] == front
    assert len(drawn) == 10


def test_dominated_variants_and_those_without_benefit_are_named(rich: Path) -> None:
    """A variant that passed may still be pointless, and the page says which other one makes it so."""
    reasons = facts(rich).fallen
    assert reasons["amp"].startswith(
        "passed, but of no benefit here: nowhere faster than fp32 on onnxruntime (0.98x at"
    )
    assert reasons["int8-dynamic"] == "passed, but int8-mixed is no slower and proven as accurate"
    assert set(reasons) == {"amp", "int8-dynamic", "pruned", "pruned-90", "pruned-99", "distilled", "int8-qat"}


def test_the_front_is_that_of_the_proven_bound(tmp_path: Path) -> None:
    """What measured better and is proven less beats nobody, and what is slower by noise alone is beaten."""
    cards = [card("fp32"), card("sure", 0.002), card("late", 0.003), card("vague", 0.001)]
    wide = replace(cards[3].runtimes["onnxruntime"], accuracy_drop=Interval(0.001, -0.015, 0.017))
    cards[3] = replace(cards[3], runtimes={"onnxruntime": wide})
    speeds = {"fp32": measured(800), "sure": measured(204), "late": measured(200), "vague": measured(150)}
    model = facts(add_model(tmp_path, "bounds", cards, speeds))
    assert [variant.name for variant in model.front(1)] == ["vague", "sure", "fp32"]
    assert model.fallen == {"late": "passed, but sure is no slower and proven as accurate"}


def test_what_passed_and_runs_fast_nowhere_or_in_vain_is_no_figure_to_remember(tmp_path: Path) -> None:
    """It is listed under what fell; tiles speak of those that pay."""
    cards = [card("fp32"), card("amp", size=9_000), card("homeless", size=1_000), card("int8-static", size=250_000)]
    speeds = {"fp32": measured(800), "amp": measured(900), "int8-static": measured(200)}
    folder = add_model(tmp_path, "vain", cards, speeds)
    seen = read(folder)
    assert "homeless passed, but no runtime that it passed on is fast here" in seen.text
    assert "3 of 3 variants passed the gate" in seen.text
    assert "4.00× smaller, the smallest verified int8-static: 250 kB" in seen.text
    slow = {"fp32": measured(800), "amp": measured(900), "int8-static": measured(810)}
    assert "the fastest verified" not in read(add_model(tmp_path, "slow", cards, slow)).text
    assert "1,000× smaller, the smallest verified homeless" in read(add_model(tmp_path, "unknown", cards)).text


def test_drops_are_counted_from_fp32_on_onnx_runtime(tmp_path: Path) -> None:
    """fp32 may be faster elsewhere, where it answers differently: the others' scores do not sink with it."""
    fp32, other = card("fp32"), evidence(0.01)
    fp32 = replace(fp32, runtimes={**fp32.runtimes, "openvino": other})
    speeds = {"fp32": measured(900) | measured(300, runtime="openvino"), "int8-static": measured(200)}
    model = facts(add_model(tmp_path, "two", [fp32, card("int8-static", 0.005)], speeds))
    reference, variant = model.variants
    assert reference.runtime == "openvino"
    found = [each.accuracy(reference) for each in (reference, variant)]
    assert [each.value for each in found if each] == pytest.approx([0.96, 0.965])
    assert "97.00% fp32's top-1 accuracy" in read(tmp_path / "two").text


def test_peak_memory_is_compared_on_one_runtime_and_names_it(tmp_path: Path) -> None:
    """On ONNX Runtime where it was measured there, although another is faster."""
    both = {"onnxruntime": evidence(0.0), "openvino": evidence(0.0)}
    cards = [card("fp32"), *(replace(card(name), runtimes=both) for name in ("a", "b"))]
    elsewhere = measured(300, runtime="openvino")
    speeds = {"fp32": measured(900), "a": measured(500) | elsewhere, "b": elsewhere}
    page = render([gather(ModelFolder(add_model(tmp_path, "memory", cards, speeds)))], NOW)
    said = "Peak memory: fp32 90.0 MB · onnxruntime; a 50.0 MB · onnxruntime; b 30.0 MB · openvino"
    assert f'aria-label="{said}"' in page


def test_many_variants_are_drawn_without_covering_each_other(tmp_path: Path) -> None:
    """The names at the ends of thirty lines all have room, and a crowd of marks is named in part, which is said."""
    cards = [card("fp32"), *(card(f"variant-{number}", 0.001 * (number % 7)) for number in range(30))]
    speeds = {each.variant: measured(800 - 20 * number) for number, each in enumerate(cards)}
    model = facts(add_model(tmp_path, "many", cards, speeds))
    lines = [curves.Curve(v.name, v.hue, sorted(v.latencies.items())) for v in model.variants]
    picture = ElementTree.fromstring(curves.latencies(lines, 540, 360))  # noqa: S314 - our own
    heights = sorted(float(text.attrib["y"]) for text in picture.iter("text") if text.get("class") == "label")
    assert len(heights) == 31
    assert min(b - a for a, b in pairwise(heights)) >= 14
    assert heights[-1] <= float(picture.attrib["height"])
    points = pareto.points_of(model, 1)
    named = pareto.named_points(points, 1080)
    assert {point.variant.name for point in points if point.on_front} | {"fp32"} <= {p.variant.name for p in named}
    assert len(named) == 10 + len([p for p in points if p.on_front or p.variant.name == "fp32"]) < len(points)
    assert len(pareto.named_points(points, 350)) < len(named)
    assert "only some marks off the front are named" in read(tmp_path / "many").text


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
        Attempt({"name": "amp"}, End.KEPT, "on the Pareto front", card("amp"), seconds=12.3),
        Attempt({"name": "int8-mixed"}, End.FELL, f"rejected: {HOSTILE}", fell, seconds=4.0),
        Attempt({"name": "int8-static"}, End.CRASHED, "the recipe crashed: ValueError: boom"),
        Attempt({"name": "pruned"}, End.NOT_TRIED, "there is no training data"),
        Attempt({"name": "distilled"}, End.OUT_OF_BUDGET, "the budget was used up"),
    )
    write_record(rich / "1", Record("host", budget_minutes=30.0, complete=True, attempts=attempts))
    seen = read(rich)
    assert "What variants: auto tried within 30 minutes, in this order; the budget ended it." in seen.text
    assert "amp kept ✓ passed 12.3 s on the Pareto front" in seen.text
    assert f"int8-mixed not kept ✕ rejected 4.00 s rejected: {HOSTILE}" in seen.text
    assert "int8-static crashed – – the recipe crashed: ValueError: boom" in seen.text
    assert "pruned not tried – – there is no training data" in seen.text
    assert "distilled out of budget – – the budget was used up" in seen.text
    write_record(rich / "1", Record("host", budget_minutes=30.0, complete=False, attempts=attempts[:2]))
    assert "it was interrupted, and the next build goes on" in read(rich).text


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("profile", "latencies_ns"), [10**400] * 3),
        (("profile", "batch_sizes"), [1, 8, 10**400]),
        (("peak_memory_bytes",), 10**400),
        (("peak_memory_bytes",), -1),
        (("layers",), [{"name": "a", "operator": "b", "time_ns": 10**400}]),
        (("layers",), [{"name": "a", "operator": "b", "time_ns": -1}]),
    ],
)
def test_measurements_beyond_all_bounds_are_damage(path: tuple[str, ...], value: object, rich: Path) -> None:
    """A number that nothing could have measured costs the speeds, never the page."""
    file = rich / "1/measurements.json"
    found = json.loads(file.read_text())
    place = found["variants"]["int8-static"]["onnxruntime"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    file.write_text(json.dumps(found))
    seen = read(rich)
    assert "Not shown, because it cannot be read" in seen.text
    assert "int8-static" in seen.text


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"host":"h","budget_minutes":1,"complete":true,"attempts":[{"entry":{}}]}']
)
def test_a_damaged_record_is_said_and_the_rest_stays(content: str, rich: Path) -> None:
    """An entry without a name, too."""
    (rich / "1/auto.json").write_text(content)
    seen = read(rich)
    assert "Not shown, because it cannot be read" in seen.text
    assert "Accuracy against latency" in seen.text


def test_a_folder_in_a_files_place_is_said(rich: Path) -> None:
    """Neither measurements nor record stop the page."""
    (rich / "1/measurements.json").unlink()
    for name in ("measurements.json", "auto.json"):
        (rich / "1" / name).mkdir()
    assert read(rich).text.count("Is a directory") == 2


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


def test_evidence_by_runtime_has_the_fields_measures(rich: Path) -> None:
    """Fidelity is on the page: cosine, divergence, and the class that loses most."""
    text = read(rich).text
    assert "mean cosine KL (nats) class that loses most" in text
    assert "0.9987 0.0123 3: 8.00% of recall, 75 samples" in text
