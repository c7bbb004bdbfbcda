"""`gearshift simulate` as a person calls it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from server.cli import main

VARIANTS = [
    {
        "variant": name,
        "state": "eligible",
        "accuracy": {"value": accuracy, "low": accuracy, "high": accuracy},
        "accuracy_drop": None if name == "fp32" else {"value": drop, "low": drop, "high": drop},
        "latency_ms": {"1": one, "16": sixteen},
        "crowded_latency_ms": {"1": one, "16": sixteen},
    }
    for name, accuracy, drop, one, sixteen in [("fp32", 0.91, 0.0, 10.0, 70.0), ("int8-static", 0.9, 0.01, 4.0, 20.0)]
]
VARIANTS.append({"variant": "amp", "state": "rejected", "latency_ms": {"1": 5.0, "16": 30.0}})


@pytest.fixture
def profiles(tmp_path: Path) -> Path:
    """What `gearshift variants --json` writes, of one model on four executors."""
    path = tmp_path / "profiles.json"
    path.write_text(json.dumps([{"model": "m", "version": "1", "executors": 4, "variants": VARIANTS}]))
    return path


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Three hundred arrivals, ten milliseconds apart."""
    path = tmp_path / "offsets.csv"
    path.write_text("".join(f"{place / 100}\n" for place in range(300)))
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, output and complaints."""
    try:
        code = main(["simulate", *map(str, arguments)])
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_policies_are_compared_with_the_bound(
    profiles: Path, trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One row for each policy and one for what none could exceed; the file holds the same."""
    out_file = tmp_path / "out.json"
    code, out, err = run(
        capsys, "--profiles", profiles, "--trace", trace, "--policy", "fitdrain,fixed-int8-static+ed",
        "--latency-ms", 60, "--json", out_file,
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "m: 300 requests in 3.0 s on 1 x 4 executors" in out
    assert [word in out for word in ("fitdrain", "fixed-int8-static+ed", "upper bound")] == [True] * 3
    facts: dict[str, Any] = json.loads(out_file.read_text())
    assert facts["policies"]["fitdrain"]["attainment"] == 1.0
    assert facts["policies"]["fitdrain"]["mean_accuracy"] > facts["policies"]["fixed-int8-static+ed"]["mean_accuracy"]
    assert facts["upper_bound"]["effective_accuracy"] <= 0.91 + 1e-9


def attainment(capsys: pytest.CaptureFixture[str], tmp_path: Path, *arguments: object) -> float:
    """FitDrain's, under what the flags say."""
    out_file = tmp_path / "what-if.json"
    code, _, err = run(capsys, *arguments, "--no-bound", "--json", out_file)
    assert (code, err) == (0, "")
    return float(json.loads(out_file.read_text())["policies"]["fitdrain"]["attainment"])


def test_what_if_there_were_more_executors_or_replicas(
    profiles: Path, trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What one executor cannot carry, four can, in one server or in four."""
    load = "--profiles", profiles, "--trace", trace, "--rate", 1500, "--latency-ms", 30
    one = attainment(capsys, tmp_path, *load, "--executors", 1)
    assert one < 0.9
    assert attainment(capsys, tmp_path, *load, "--executors", 4) > one + 0.1
    assert attainment(capsys, tmp_path, *load, "--executors", 1, "--replicas", 4) > one + 0.1


def test_what_if_there_were_fewer_variants_or_another_slo(
    profiles: Path, trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the reference alone, or less time, fewer requests are in time."""
    load = "--profiles", profiles, "--trace", trace, "--rate", 700, "--executors", 2
    both = attainment(capsys, tmp_path, *load, "--latency-ms", 60)
    assert attainment(capsys, tmp_path, *load, "--latency-ms", 60, "--variants", "fp32") < both - 0.1
    assert attainment(capsys, tmp_path, *load, "--latency-ms", 8) < both - 0.1


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--policy", "fastest-first"), "no policy 'fastest-first'"),
        (("--policy", "fixed-int4"), "needs variant 'int4' of m, which is not there"),
        (("--policy", "fitdrain,fixed-amp+ed"), "needs variant 'amp' of m, which is rejected"),
        (("--variants", "fp32", "--policy", "fixed-int8-static"), "those that take traffic: fp32"),
        (("--json", "/nope/x"), "--json /nope/x: No such file"),
        (("--noise", "1000"), "--noise must be at least 0 and at most 3"),
        (("--pause-ms", "1e305"), "--pause-ms must be at least 0 and at most 86400000"),
        (("--variants", "int4"), "there is no variant int4; there are fp32, int8-static, amp"),
        (("--executors", "0"), "--executors must be at least 1"),
        (("--replicas", "0"), "--replicas must be at least 1"),
        (("--model", "n"), "holds no model n; it holds m"),
        (("--noise", "-1"), "--noise must be at least 0"),
        (("--pause-rate", "1.5"), "--pause-rate is a share"),
        (("--wake-ms", "nan"), "--wake-ms must be at least 0"),
        (("--rate", "-5"), "--rate must be above 0"),
        (("--latency-ms", "0"), "latency-ms"),
    ],
)
def test_wrong_words_are_told_in_one_line(
    flags: tuple[str, str], told: str, profiles: Path, trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 2, one line, no stack trace, nothing run."""
    code, out, err = run(capsys, "--profiles", profiles, "--trace", trace, *flags)
    assert (code, out) == (2, "")
    assert told in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("not json", "cannot be read"),
        ('[{"model": "m"}]', "holds the models none"),
        ('[{"model": "m", "variants": [{"variant": "fp32", "state": "great"}]}]', "variants.0.state"),
        ('[{"model": "m", "variants": [{"variant": "fp32", "state": "eligible"}]}]', "no variant of m has a measured"),
        ('[{"model": "m", "variants": [{"variant": "fp32", "state": "eligible", "latency_ms": {"0": 1}}]}]', "fp32"),
        (
            '{"model": "m", "variants": [{"variant": "a", "state": "eligible", "latency_ms": {"1": 1e400}}]}',
            "latency_ms",
        ),
        ('[{"model": "m", "slo": {"latency_ms": 1e400}}]', "slo.latency_ms"),
    ],
)
def test_a_file_of_profiles_that_is_none_is_told(
    text: str, told: str, trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is wrong with the file is one sentence."""
    path = tmp_path / "wrong.json"
    path.write_text(text)
    code, _, err = run(capsys, "--profiles", path, "--trace", trace)
    assert code == 2
    assert told in err
    assert err.count("\n") == 1


def test_a_model_of_no_known_accuracy_is_simulated(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its attainment has a bound, its scores are zero; and a name that looks like markup is shown as it is."""
    path = tmp_path / "unscored.json"
    variants = [{"variant": "fp32[/i]", "state": "eligible", "latency_ms": {"1": 2.0}}]
    path.write_text(json.dumps({"model": "m[/b]", "variants": variants}))
    code, out, err = run(capsys, "--profiles", path, "--trace", trace, "--policy", "fitdrain,fixed-fp32[/i]")
    assert (code, err) == (0, "")
    assert "m[/b]: 300 requests" in out
    assert "fp32[/i] 100%" in out
    assert "upper bound" in out


def test_scores_and_proven_accuracies_are_told_apart(
    profiles: Path, trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table says that its columns are scores; the file has the proven accuracy too."""
    out_file = tmp_path / "out.json"
    _, out, _ = run(capsys, "--profiles", profiles, "--trace", trace, "--no-bound", "--json", out_file)
    assert "mean score" in out
    assert "effective score" in out
    assert "accuracy" not in out
    assert "mean_proven_accuracy" in json.loads(out_file.read_text())["policies"]["fitdrain"]


def test_contention_that_was_not_measured_is_told(
    profiles: Path, trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """More executors than were profiled, or several without a crowded profile, are one line on stderr."""
    load = "--trace", trace, "--no-bound", "--profiles"
    _, _, err = run(capsys, *load, profiles, "--executors", 5)
    assert err.count("\n") == 1
    assert "5 executors are simulated without contention between them beyond that of the 4" in err
    alone = tmp_path / "alone.json"
    alone.write_text(profiles.read_text().replace("crowded_latency_ms", "other"))
    _, _, err = run(capsys, *load, alone)
    assert err.count("\n") == 1
    assert "4 executors are simulated without contention between them: " in err
    assert run(capsys, *load, alone, "--executors", 1)[2] == ""


def test_an_interrupted_simulation_leaves_no_file(
    profiles: Path, trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C before there are figures: no empty file stays, and those of an earlier simulation do."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("server.simulation.command.simulate", interrupted)
    (tmp_path / "old").write_text("{}")
    for name in ("old", "new"):
        assert run(capsys, "--profiles", profiles, "--trace", trace, "--json", tmp_path / name)[0] == 130
    assert (tmp_path / "old").read_text() == "{}"
    assert not (tmp_path / "new").exists()
