"""The serving threads: who takes calls, who decides, who runs a batch.

How they share the work (leader and followers):

- Every executor has a thread. An idle executor's own thread takes new calls, has them handled and decides, so a request
  at an idle server changes threads only once, from the transport. Only one thread, the *leader*, does that at a time;
  when it has a batch to run it lets the next idle executor lead.
- While every executor is busy, the *keeper* thread leads: what comes in is admitted, refused, expired and cancelled,
  until an executor is idle.
- What is decided and run is none of this file's business; a bug in it never costs a thread, which would hang everybody.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol, TypeVar

from server.scheduling.scheduler import Run
from server.transport.transport import Taken, Transport

log = logging.getLogger(__name__)

Result = TypeVar("Result")

_NICENESS = 10
_PAUSE_AFTER_BUG_S = 0.1


class Work(Protocol):
    """What the threads do; `decide` and `handle` are only ever called by one thread at a time, `execute` by many."""

    def decide(self, executor: int | None) -> tuple[Run | None, int | None]:
        """The executor's next batch, or how many ns to wait for calls before asking again; None is for ever.

        Without an executor nothing can run; time passes all the same for what waits.
        """
        ...

    def handle(self, taken: Taken) -> None:
        """See to what the transport took in."""
        ...

    def execute(self, run: Run) -> None:
        """Run a batch and answer it."""
        ...


class Executors:
    """As many executor threads as asked for, and the keeper."""

    def __init__(self, count: int, work: Work, transport: Transport) -> None:
        self._work = work
        self._transport = transport
        self._lead = threading.Lock()
        self._lock = threading.Lock()
        self._idle = count
        self._keeper_leads = False
        self._all_busy = threading.Event()
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._execute_for_ever, args=(executor,), name=f"executor-{executor}", daemon=True)
            for executor in range(count)
        ]
        self._threads.append(threading.Thread(target=self._keep_for_ever, name="keeper", daemon=True))

    def start(self) -> None:
        """Start taking calls."""
        for thread in self._threads:
            thread.start()

    def stop(self, seconds: float) -> None:
        """Stop; a thread that is in a runtime for longer than `seconds` is left there."""
        self._stopped.set()
        self._all_busy.set()
        end_s = time.monotonic() + seconds
        for thread in self._threads:
            self._transport.wake()
            thread.join(max(0.0, end_s - time.monotonic()))

    def _execute_for_ever(self, executor: int) -> None:
        _step_back()
        while not self._stopped.is_set():
            run = self._survive(self._next_run, executor)
            if run is None:
                continue
            self._survive(self._work.execute, run)
            del run  # or an idle executor would hold the arrays of its last batch
            with self._lock:
                self._idle += 1
                keeper_leads = self._keeper_leads
            if keeper_leads:
                self._transport.wake()

    def _next_run(self, executor: int) -> Run | None:
        with self._lead:
            while not self._stopped.is_set():
                run, timeout_ns = self._work.decide(executor)
                if run is not None:
                    with self._lock:
                        self._idle -= 1
                        if self._idle == 0:
                            self._all_busy.set()
                    return run
                self._work.handle(self._transport.take(timeout_ns))
        self._transport.wake()
        return None

    def _keep_for_ever(self) -> None:
        while not self._stopped.is_set():
            self._all_busy.wait()
            self._survive(self._keep)

    def _keep(self) -> None:
        with self._lead:
            while not self._stopped.is_set() and self._keeps():
                _, timeout_ns = self._work.decide(None)
                self._work.handle(self._transport.take(timeout_ns))

    def _keeps(self) -> bool:
        """Whether the keeper is still needed; steps back where an executor is idle."""
        with self._lock:
            self._keeper_leads = self._idle == 0
            if not self._keeper_leads:
                self._all_busy.clear()
            return self._keeper_leads

    def _survive(self, work: Callable[..., Result], *arguments: object) -> Result | None:
        """Do a piece of work and come back, whatever happens in it."""
        try:
            return work(*arguments)
        except Exception:
            log.exception("%s survived a bug", threading.current_thread().name)
            self._stopped.wait(_PAUSE_AFTER_BUG_S)
            return None


def _step_back() -> None:
    """Let this thread compute in what the others leave.

    A batch can wait; calls that nobody takes in are invisible to the scheduler, which then decides as if idle.
    """
    if sys.platform == "linux":  # where a thread has a niceness of its own
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
