"""A server whose policy needs a variant that a model has not: the model is reported, the others are served."""

from __future__ import annotations

from pathlib import Path

import models
import numpy as np
import pytest
from serving import failure, request_for, serving

from protos import open_inference_pb2 as pb
from server.app import StartError
from variants.variant import Verdict

ROW = np.ones((1, 256), np.float32)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """One model with a variant that takes traffic and one that was rejected, and one with the reference alone."""
    models.add_ladder(tmp_path)
    models.add_variant(tmp_path, "ladder", "int8-dynamic", models.mlp(256, 1), verdict=Verdict.REJECTED, score=0.9)
    models.add(tmp_path, "mlp", models.mlp(256))
    return tmp_path


def test_a_model_that_the_policy_cannot_serve_is_reported(repository: Path) -> None:
    """It has failed to load, with the reason; a model that has the variant answers with it."""
    with serving(repository, policy="fixed-int8-static") as server:
        assert server.infer(request_for("ladder", x=ROW)).parameters["variant"] == "int8-static"
        (failed,) = server.server.models.not_served()
        assert failed.name == "mlp"
        assert failed.reason.startswith("--policy fixed-int8-static needs variant 'int8-static' of mlp")
        index = {entry.name: entry for entry in server.v2.RepositoryIndex(pb.RepositoryIndexRequest()).models}
        assert (index["mlp"].state, index["mlp"].reason) == ("UNAVAILABLE", failed.reason)
        assert failure(lambda: server.infer(request_for("mlp", x=ROW))).details()


@pytest.mark.parametrize(("policy", "why"), [("fixed-nope", "is not there"), ("clockwork-int8-dynamic", "is rejected")])
def test_a_strict_server_does_not_start_with_a_policy_it_cannot_serve(repository: Path, policy: str, why: str) -> None:
    """--strict tells the same reason and starts nothing."""
    with (
        pytest.raises(StartError, match=f"model ladder cannot load: --policy {policy} needs .* {why}"),
        serving(repository, policy=policy, strict=True),
    ):
        pass
