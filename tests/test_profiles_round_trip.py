"""What a server says of its variants, written by `gearshift variants --json`, is read back as the same variants."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import models
import pytest
from serving import serving

from protos import gearshift_pb2 as gs
from server.cli import main
from server.remote import listing_facts
from server.scheduling.admission import Defaults
from server.scheduling.slo import OnInfeasible
from server.simulation.profiles import Profiled, read_profiles
from server.wire.variants import Described, encode_variants
from variants.variant import Interval, LatencyProfile, State, Variant

FULL = Variant(
    "int8-dynamic", State.DOMINATED, "slower than amp", "int8", "onnxruntime", "cpu",
    score=Interval(0.97, 0.95, 0.98), drop=Interval(-0.001, -0.01, 0.008),
    profile=LatencyProfile((1, 3, 8), (1_234_567, 2_000_001, 4_999_999)), batchable=False, size_bytes=123_456,
    crowded=LatencyProfile((1, 3, 8), (1_500_000, 2_000_001, 7_654_321)),
    lengths=((16, LatencyProfile((1, 8), (400_003, 900_007))), (64, LatencyProfile((1, 8), (1_234_567, 4_999_999)))),
)  # fmt: skip


def seen(variant: Variant) -> Variant:
    """A variant as a simulation needs it: how large its file is plays no part."""
    return replace(variant, size_bytes=0)


def round_trip(path: Path, *variants: Variant, executors: int = 0, defaults: Defaults | None = None) -> Profiled:
    """These variants over the wire into JSON and back."""
    described = [Described(variant, variant.name, "passed") for variant in variants]
    message = encode_variants("m", "3", described, executors, defaults)
    path.write_text(json.dumps([listing_facts(gs.ListVariantsResponse.FromString(message))]), encoding="utf-8")
    return read_profiles(path)


def test_everything_a_simulation_needs_survives(tmp_path: Path) -> None:
    """To the nanosecond: profiles alone, crowded and by length, intervals, state, and whether it may share a batch."""
    plain = Variant(
        "fp32", State.ELIGIBLE, "", "fp32", "onnxruntime", "cpu", profile=LatencyProfile((1,), (7_000_003,))
    )
    absent = Variant("amp", State.UNSUPPORTED, "no bf16 here", "bf16", "openvino", "cpu")
    assert round_trip(tmp_path / "v.json", plain, FULL, absent).variants == (plain, seen(FULL))


@pytest.mark.parametrize(
    "defaults",
    [
        Defaults(50_000_000, 0.02, (OnInfeasible.DEGRADE, OnInfeasible.REJECT)),
        Defaults(1_500_000, 0.0, None),
        Defaults(1_000_000_000),
    ],
)
def test_executors_and_the_default_slo_survive(tmp_path: Path, defaults: Defaults) -> None:
    """A floor of 0, the reference only, is not mistaken for none."""
    found = round_trip(tmp_path / "v.json", FULL, executors=3, defaults=defaults)
    assert (found.executors, found.defaults) == (3, defaults)


def test_a_listing_of_a_server_that_tells_less_is_read(tmp_path: Path) -> None:
    """Without executors, an SLO or a word on sharing batches there is one executor, and batches are shared."""
    info = gs.VariantInfo(variant="fp32", state="eligible", latency=[gs.BatchLatency(batch_size=1, latency_us=5)])
    listing = gs.ListVariantsResponse(model="m", version="1", variants=[info])
    (tmp_path / "v.json").write_text(json.dumps(listing_facts(listing)), encoding="utf-8")
    found = read_profiles(tmp_path / "v.json")
    assert (found.executors, found.variants[0].batchable, found.defaults.latency_ns) == (1, True, 1_000_000_000)


def test_a_real_servers_variants_are_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """ListVariants, the command line and the simulator agree on what was measured, crowded and by length included."""
    models.add(tmp_path, "words", models.tokens())
    with serving(tmp_path, executors=2, threads=2) as running:
        assert main(["variants", "--url", running.address, "--json"]) == 0
        served = running.model("words").current_variants()
    (tmp_path / "v.json").write_text(capsys.readouterr().out, encoding="utf-8")
    found = read_profiles(tmp_path / "v.json", "words")
    assert found.variants == tuple(seen(variant) for variant in served if variant.profile)
    assert found.variants[0].crowded is not None
    assert len(found.variants[0].lengths) > 1
