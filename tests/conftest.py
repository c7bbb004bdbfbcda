"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import models
import pytest
import torch
import trustme
from factory_fixtures import built_digits, digits, onnx_digits, trained_digits  # noqa: F401
from hypothesis import settings
from loading_host import this_host
from serving import Serving, serving

from server.loading import Host

# A change is judged by the same examples each time; `make explore` looks for new ones.
settings.register_profile("same", derandomize=True)
settings.register_profile("new", derandomize=False)
settings.load_profile("same")

torch.set_num_threads(1)  # networks this small train several times faster on one thread than on two, and much steadier


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The authority `ca.pem`, who signed `server` and `client`, and a `stranger` of another one: NAME.pem, NAME.key."""
    folder = tmp_path_factory.mktemp("certificates")
    trusted, other = trustme.CA(), trustme.CA()
    trusted.cert_pem.write_to_path(folder / "ca.pem")
    for name, authority in (("server", trusted), ("client", trusted), ("stranger", other)):
        issued = authority.issue_cert("localhost", "127.0.0.1")
        issued.private_key_pem.write_to_path(folder / f"{name}.key")
        issued.cert_chain_pems[0].write_to_path(folder / f"{name}.pem")
    return folder


@pytest.fixture
def ladder(tmp_path: Path) -> Iterator[Serving]:
    """A server with --admin, one executor and one model of two variants."""
    models.add_ladder(tmp_path)
    with serving(tmp_path, admin=True, executors=1) as running:
        yield running


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """This machine without memory of earlier profiles, trusting nothing."""
    return this_host(tmp_path / "profiles")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """An empty repository."""
    folder = tmp_path / "repository"
    folder.mkdir()
    return folder
