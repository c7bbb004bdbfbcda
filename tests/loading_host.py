"""A host that tests load models onto."""

from __future__ import annotations

from pathlib import Path

from server.loading import Host
from variants.hardware import detect_hardware
from variants.measure import ProfileCache
from variants.runtimes import available_runtimes

HARDWARE = detect_hardware()


def this_host(profiles: Path) -> Host:
    """This machine's CPU, one thread, nothing trusted; latency profiles are remembered in the folder `profiles`."""
    return Host(
        hardware=HARDWARE,
        device="cpu",
        threads=1,
        executors=1,
        runtimes=available_runtimes(1),
        profiles=ProfileCache(profiles),
        default_latency_ns=1_000_000_000,
        allow_unverified=False,
        trust_torch_archives=False,
    )
