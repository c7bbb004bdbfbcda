"""Profiles of a session beside others that run it too, as a server's other executors do."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
from test_measure import MS, ONE_SAMPLE, Clock, Sleeper

from server.candidates import Host
from server.loading import load_model
from server.models import ServedModel
from variants.crowd import at_least, crowd
from variants.measure import Inputs, alone, find_failures, measure_profiles
from variants.repository import ModelFolder
from variants.runtimes.onnxruntime_runtime import OnnxRuntime, OnnxRuntimeSession
from variants.runtimes.runtime import Array, Session
from variants.variant import LatencyProfile, State, TensorSpec

WAIT_S = 10


class Meeting:
    """A session whose first runs end only once as many threads as expected are in it."""

    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    batch_axis = True

    def __init__(self, expected: int) -> None:
        self._barrier, self._met = threading.Barrier(expected, timeout=WAIT_S), threading.Event()

    def run(self, _inputs: Mapping[str, Array]) -> list[np.ndarray[Any, Any]]:
        """Wait for the others."""
        if not self._met.is_set():
            self._barrier.wait()
            self._met.set()
        return []


def test_the_others_run_until_the_end_and_no_longer() -> None:
    """Two others are in the session while it is measured, and their threads are gone afterwards."""
    before = threading.active_count()
    session = Meeting(3)
    with crowd(2)(session, {}):
        session.run({})
    assert threading.active_count() == before


def test_nobody_else_is_no_company() -> None:
    """One executor has no others."""
    assert crowd(0) is alone


class Failing(Meeting):
    """A session that only the main thread can run."""

    def run(self, inputs: Mapping[str, Array]) -> list[np.ndarray[Any, Any]]:
        """Raise in any other thread."""
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("no room\nfor two")
        return []


def test_what_fails_beside_others_is_found() -> None:
    """A run that raises in another thread is the session's failure, in its own words."""
    found = find_failures({"m": Failing(1)}, ONE_SAMPLE, (1,), company=crowd(1))
    assert found == {"m": "it fails at batch size 1: no room for two"}
    assert find_failures({"m": Failing(1)}, ONE_SAMPLE, (1,)) == {}


@pytest.mark.parametrize("budget_s", [0.0, 1.0])
def test_every_run_that_counts_has_company(budget_s: float) -> None:
    """A latency is the one beside others, whether there was time for rounds or for an estimate only."""
    clock, present = Clock(), list[Session]()
    session = Sleeper(clock, lambda size, _: size * MS * (3 if present else 1))

    @contextmanager
    def company(measured: Session, inputs: Inputs) -> Iterator[None]:
        assert inputs["x"].shape == (len(inputs["x"]), 2)
        present.append(measured)
        yield
        present.pop()

    found = measure_profiles({"m": session}, ONE_SAMPLE, (1, 4), budget_s=budget_s, company=company, clock=clock)
    assert found["m"] == LatencyProfile((1, 4), (3 * MS, 12 * MS))


def test_others_never_help() -> None:
    """Where a batch measured faster beside others it counts as fast as alone, between the other's sizes too."""
    beside = LatencyProfile((1, 2, 4), (10, 15, 60))
    assert at_least(beside, LatencyProfile((1, 4), (12, 36))).latencies_ns == (12, 20, 60)


def load(repository: Path, host: Host, executors: int = 2, name: str = "ladder") -> ServedModel:
    """A model on a host with so many executors."""
    return load_model(ModelFolder(repository / name), replace(host, executors=executors))


def test_variants_have_a_crowded_profile_where_there_are_others(repository: Path, host: Host) -> None:
    """It covers the same batch sizes and is nowhere below the profile alone; one executor has none."""
    models.add_ladder(repository)
    for variant in load(repository, host).variants:
        assert variant.profile is not None
        assert variant.crowded is not None
        assert variant.crowded.batch_sizes == variant.profile.batch_sizes
        pairs = zip(variant.crowded.latencies_ns, variant.profile.latencies_ns, strict=True)
        assert all(beside >= by_itself for beside, by_itself in pairs)
    assert [variant.crowded for variant in load(repository, host, 1).variants] == [None, None]


def test_crowded_profiles_are_remembered(repository: Path, host: Host, caplog: pytest.LogCaptureFixture) -> None:
    """The second load measures nothing and has the very same; what an older release wrote is measured again."""
    caplog.set_level("INFO")
    models.add(repository, "m", models.mlp())
    first = load(repository, host, name="m").variants
    assert "measuring beside 1 more fp32 on onnxruntime" in caplog.text
    caplog.clear()
    again = load(repository, host, name="m").variants
    assert "measuring" not in caplog.text
    assert [v.crowded for v in again] == [v.crowded for v in first]
    for path in (repository.parent / "profiles").iterdir():
        entry = json.loads(path.read_text())
        path.write_text(json.dumps({"key": entry["key"], **entry["alone"]}))
    assert load(repository, host, name="m").variants[0].crowded is not None
    assert "measuring fp32 on onnxruntime" in caplog.text


class OneAtATime(OnnxRuntime):
    """ONNX Runtime whose sessions with a small graph fail in any thread but the main one."""

    def load(self, artefact: Path, *, precision: str, threads: int, device: str) -> OnnxRuntimeSession:
        """Load, and let what is not the reference fail beside others."""
        session = super().load(artefact, precision=precision, threads=threads, device=device)
        if artefact.parent.name == "int8-static":
            run = session.run

            def alone_only(inputs: Mapping[str, Array]) -> list[np.ndarray[Any, Any]]:
                Failing(1).run(inputs)
                return run(inputs)

            session.run = alone_only  # type: ignore[method-assign]
        return session


def test_a_variant_that_fails_beside_others_harms_none(repository: Path, host: Host) -> None:
    """It would fail in service: it is set aside with the reason, and the reference serves."""
    models.add_ladder(repository)
    model = load(repository, replace(host, runtimes={"onnxruntime": OneAtATime()}))
    assert {v.name: v.state for v in model.variants} == {"fp32": State.ELIGIBLE, "int8-static": State.UNSUPPORTED}
    reason = next(v.reason for v in model.variants if v.name == "int8-static")
    assert reason == "on onnxruntime, run 2 at a time, it fails at batch size 32: no room for two"
    assert set(model.sessions) == {"fp32"}
