"""Loading, loading again and unloading while the server answers, and who may not."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import models
import numpy as np
from serving import WAIT_S, Answer, Gate, Serving, failure, request_for, serving, wait_until

from protos import gearshift_pb2 as gs
from protos import open_inference_pb2 as pb

Code = grpc.StatusCode
ROW = np.ones((1, 256), np.float32)


def test_administration(ladder: Serving, tmp_path: Path) -> None:
    """With --admin a model that appears in the repository can be loaded, loaded anew and unloaded."""

    def load(name: str) -> None:
        ladder.v2.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name=name), timeout=WAIT_S)

    models.add(tmp_path, "late", models.mlp(256))
    assert failure(lambda: ladder.infer(request_for("late", x=ROW))).code() is Code.NOT_FOUND
    load("late")
    before = ladder.infer(request_for("late", x=ROW))
    models.add(tmp_path, "late", models.mlp(256, seed=1), version=2)
    load("late")
    after = ladder.infer(request_for("late", x=ROW))
    assert (before.response.model_version, after.response.model_version) == ("1", "2")
    assert not np.array_equal(before.array(), after.array())
    (tmp_path / "late" / "3").mkdir()
    (tmp_path / "late" / "3" / "model.onnx").write_bytes(b"nonsense")
    error = failure(lambda: load("late"))
    assert error.code() is Code.FAILED_PRECONDITION
    assert str(tmp_path) not in error.details()
    assert ladder.infer(request_for("late", x=ROW)).response.model_version == "2", "what served goes on"
    ladder.v2.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="late"), timeout=WAIT_S)
    index = {entry.name: entry for entry in ladder.v2.RepositoryIndex(pb.RepositoryIndexRequest()).models}
    assert (index["late"].state, index["late"].reason) == ("UNAVAILABLE", "unloaded")
    ready = [entry.name for entry in ladder.v2.RepositoryIndex(pb.RepositoryIndexRequest(ready=True)).models]
    assert ready == ["ladder"]
    for name in ("nope", "../late", "", "/etc"):
        assert failure(load, name).code() is Code.NOT_FOUND


def test_a_version_that_is_loaded_again_leaves_no_gap(ladder: Serving) -> None:
    """While the old load still runs a batch, the new one takes requests; all are answered and counted."""
    old = ladder.model("ladder")
    gate = Gate(old)
    before = ladder.v2.ModelInfer.future(request_for("ladder", x=ROW))
    assert gate.entered.wait(WAIT_S)
    load = ladder.v2.RepositoryModelLoad.future(pb.RepositoryModelLoadRequest(model_name="ladder"))
    wait_until(lambda: ladder.model("ladder") is not old)
    after = ladder.v2.ModelInfer.future(request_for("ladder", x=ROW))
    wait_until(lambda: ladder.server.engine.inflight() == {"ladder": 2})
    assert ladder.server.loads()["ladder"].queue_depth == 1, "of both loads"
    assert not load.done()
    gate.opened.set()
    load.result(WAIT_S)
    assert np.array_equal(Answer(before.result(WAIT_S)).array(), Answer(after.result(WAIT_S)).array())
    assert ladder.outcomes() == {"ok": 2}


def test_loading_again_and_again_under_traffic_refuses_nobody(ladder: Serving) -> None:
    """Clients that never pause see nothing of a reload."""
    ended = threading.Event()

    def send() -> int:
        sent = 0
        while not ended.is_set():
            ladder.infer(request_for("ladder", x=ROW))
            sent += 1
        return sent

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(send) for _ in range(4)]
        for _ in range(5):
            ladder.v2.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="ladder"), timeout=WAIT_S)
        ended.set()
        sent = sum(client.result(WAIT_S) for client in clients)
    assert ladder.outcomes() == {"ok": sent}


def test_a_variant_that_a_reload_lost_leaves_the_metrics(ladder: Serving, tmp_path: Path) -> None:
    """What is no longer there is not shown as eligible, and what stayed keeps its counts."""

    def shown() -> set[str]:
        return {sample.labels["variant"] for sample in ladder.samples("gearshift_variant_state")}

    ladder.infer(request_for("ladder", x=ROW))
    assert shown() == {"fp32", "int8-static"}
    shutil.rmtree(tmp_path / "ladder")
    models.add_variant(tmp_path, "ladder", "fp32", models.mlp(256, 24), score=0.99)
    ladder.v2.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="ladder"), timeout=WAIT_S)
    assert shown() == {"fp32"}
    assert ladder.outcomes() == {"ok": 1}


def test_a_variant_that_a_reload_changed_shows_nothing_of_what_it_was(ladder: Serving, tmp_path: Path) -> None:
    """Accuracy and capacity of the load before are gone where the new one has none."""
    shutil.rmtree(tmp_path / "ladder")
    models.add(tmp_path, "ladder", models.mlp(256), version=1)
    assert ladder.values("gearshift_variant_accuracy", "variant")["fp32"]
    ladder.v2.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="ladder"), timeout=WAIT_S)
    assert ladder.values("gearshift_variant_accuracy", "variant") == {}
    assert ladder.values("gearshift_variant_capacity_samples_per_second", "variant").keys() == {"fp32"}


def test_unloading_means_the_model_that_serves_when_its_turn_comes(ladder: Serving) -> None:
    """An unload that waits behind a load takes away what that loaded, and nothing is left of either."""
    old = ladder.model("ladder")
    gate = Gate(old)
    call = ladder.v2.ModelInfer.future(request_for("ladder", x=ROW))
    assert gate.entered.wait(WAIT_S)
    load = ladder.v2.RepositoryModelLoad.future(pb.RepositoryModelLoadRequest(model_name="ladder"))
    wait_until(lambda: ladder.model("ladder") is not old)
    unload = ladder.v2.RepositoryModelUnload.future(pb.RepositoryModelUnloadRequest(model_name="ladder"))
    again = ladder.v2.RepositoryModelUnload.future(pb.RepositoryModelUnloadRequest(model_name="ladder"))
    gate.opened.set()
    assert [each.code() for each in (call, load)] == [Code.OK] * 2
    assert {unload.code(), again.code()} == {Code.OK, Code.UNAVAILABLE}  # whichever of the two came first
    assert not ladder.server.models.served()
    assert not ladder.server.scheduler.models


def test_unloading_answers_what_was_admitted(ladder: Serving) -> None:
    """Unload waits for the requests that run and wait, and refuses newcomers at once."""
    gate = Gate(ladder.model("ladder"))
    calls = [ladder.v2.ModelInfer.future(request_for("ladder", x=ROW))]
    assert gate.entered.wait(WAIT_S)
    calls += [ladder.v2.ModelInfer.future(request_for("ladder", x=ROW)) for _ in range(5)]
    wait_until(lambda: ladder.server.engine.inflight() == {"ladder": 6})
    unload = ladder.v2.RepositoryModelUnload.future(pb.RepositoryModelUnloadRequest(model_name="ladder"))
    wait_until(lambda: failure(lambda: ladder.infer(request_for("ladder", x=ROW))).code() is Code.UNAVAILABLE)
    assert not unload.done()
    gate.opened.set()
    unload.result(WAIT_S)
    assert [call.code() for call in calls] == [Code.OK] * 6


def test_unloading_waits_for_a_batch_without_clients(ladder: Serving) -> None:
    """A model is not taken away under a batch whose clients have all gone."""
    gate = Gate(ladder.model("ladder"))
    call = ladder.v2.ModelInfer.future(request_for("ladder", x=ROW))
    assert gate.entered.wait(WAIT_S)
    call.cancel()
    wait_until(lambda: ladder.server.engine.inflight() == {})
    unload = ladder.v2.RepositoryModelUnload.future(pb.RepositoryModelUnloadRequest(model_name="ladder"))
    wait_until(lambda: not ladder.server.models.served())
    assert not unload.done()
    gate.opened.set()
    unload.result(WAIT_S)


def test_without_admin_nothing_can_be_changed(tmp_path: Path) -> None:
    """Load, unload and SetVariantState are UNIMPLEMENTED, and say how the operator can switch them on."""
    models.add_ladder(tmp_path)
    with serving(tmp_path) as running:
        states = gs.SetVariantStateRequest
        for call in (
            lambda: running.v2.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="ladder")),
            lambda: running.v2.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="ladder")),
            lambda: running.variants.SetVariantState(states(model="ladder", variant="fp32", state=states.DISABLED)),
        ):
            error = failure(call)
            assert error.code() is Code.UNIMPLEMENTED
            assert "--admin" in error.details()
