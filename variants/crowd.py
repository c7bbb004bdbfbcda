"""Company for a session that is measured: other threads that run it too, as a server's other executors would.

Cores share caches and memory bandwidth, so a batch takes longer beside others than alone: how much depends on the model
and the host, and is measured rather than assumed.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event, Semaphore

from variants.measure import Company, Inputs, alone
from variants.runtimes.runtime import Session
from variants.variant import LatencyProfile


def crowd(others: int) -> Company:
    """`others` threads that run the session on the same inputs over and over, from before the context until its end.

    Leaving the context waits for the runs in progress, and raises what a thread's run raised.
    """
    if others < 1:
        return alone

    @contextmanager
    def beside(session: Session, inputs: Inputs) -> Iterator[None]:
        over, present = Event(), Semaphore(0)

        def run_on() -> None:
            present.release()
            while not over.is_set():
                session.run(inputs)

        with ThreadPoolExecutor(others) as pool:
            running = [pool.submit(run_on) for _ in range(others)]
            try:
                for _ in running:
                    present.acquire()
                yield
            finally:
                over.set()
        for each in running:
            each.result()

    return beside


def at_least(profile: LatencyProfile, other: LatencyProfile) -> LatencyProfile:
    """The profile, nowhere below the other: where company measured as a help, it was noise. Both cover its sizes."""
    pairs = zip(profile.batch_sizes, profile.latencies_ns, strict=True)
    return LatencyProfile(profile.batch_sizes, tuple(max(ns, other.latency_ns(size)) for size, ns in pairs))
