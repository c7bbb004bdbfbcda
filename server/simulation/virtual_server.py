"""The live scheduler under a virtual clock: what the engine and its threads do, done by a list of events.

Rules: nothing here decides. It makes an arrival known, lets the scheduler `tick` and `decide` for every idle executor,
ends each batch when the service model says so, and comes back when the scheduler asked to be. Whoever needs to know
what happens overrides the hooks at the end. Equal inputs give equal runs: ties are handled in the order of planning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from heapq import heappop, heappush
from typing import Self

from server.scheduling.policy import Run
from server.scheduling.scheduler import End, Scheduler
from server.scheduling.slo import Request

_SETTLES_AT_MOST = 100
"""At one instant: what starts makes others slower, so that more is hopeless at once, but not for ever."""

Service = Callable[[Run, int], int]
"""How long a batch really takes, in ns: the run and what its profile says in."""
Fails = Callable[[Run], bool]


def exact(_run: Run, profiled_ns: int) -> int:
    """Every batch takes what its profile says."""
    return profiled_ns


def _nothing() -> None:
    """What happens when the scheduler merely asked to be asked again."""


def at_once() -> int:
    """Nobody needs time to wake up."""
    return 0


class VirtualServer:
    """A scheduler, its executors and a virtual clock.

    `wake_ns` draws the time that passes between an event and the decision it leads to, as a thread must wake up.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        service: Service = exact,
        wake_ns: Callable[[], int] = at_once,
        fails: Fails = lambda _: False,
    ) -> None:
        self.scheduler = scheduler
        self.now_ns = 0
        self.idle = set(range(len(scheduler.pool)))
        self._service, self._wake_ns, self._fails = service, wake_ns, fails
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._planned = 0
        self._asked_ns: int | None = None
        self._settled_again = 0
        self._current: dict[int, Run] = {}
        self._back_ns: dict[int, int] = {}

    def at(self, instant_ns: int, action: Callable[[], None]) -> None:
        """Plan an action; ties run in the order in which they were planned."""
        heappush(self._events, (instant_ns, self._planned, action))
        self._planned += 1

    def submit(self, request: Request) -> None:
        """A request arrives now."""
        self.on_ended(self.scheduler.arrived(request, self.now_ns))

    def lose(self, executor: int, for_ns: int) -> None:
        """An executor dies now, with what it runs, and comes back after a while."""
        self._current.pop(executor, None)
        self.idle.discard(executor)
        self.on_ended(self.scheduler.lost(executor, self.now_ns, "the executor died"))
        self._back_ns[executor] = max(self._back_ns.get(executor, 0), self.now_ns + for_ns)
        self.at(self.now_ns + for_ns, lambda: self._regained(executor))

    def run(self, until_ns: int | None = None) -> Self:
        """Let time pass, to the end of everything or to an instant; returns itself."""
        while self._events and (until_ns is None or self._events[0][0] <= until_ns):
            self.now_ns = self._events[0][0]
            while self._events and self._events[0][0] == self.now_ns:
                heappop(self._events)[2]()
            delay_ns = 0 if self._asked_ns == self.now_ns or not self.idle else self._wake_ns()
            if delay_ns:
                self._ask_at(self.now_ns + delay_ns)
            else:
                self._settle()
        return self

    def _settle(self) -> None:
        self._asked_ns = None
        self.on_ended(self.scheduler.tick(self.now_ns))
        for executor in sorted(self.idle):
            run, given_up = self.scheduler.decide(executor, self.now_ns)
            self.on_ended(given_up)
            if run is not None:
                self._start(run)
        self.on_settled()
        wake_ns = self.scheduler.next_event_ns(self.now_ns)
        if wake_ns is None:
            return
        self._settled_again = self._settled_again + 1 if wake_ns <= self.now_ns else 0
        if self._settled_again > _SETTLES_AT_MOST:
            raise AssertionError(f"at {self.now_ns} the scheduler asks again for ever. This is a bug.")
        self._ask_at(wake_ns)

    def _ask_at(self, instant_ns: int) -> None:
        """Settle again at an instant, unless that is going to happen sooner anyway."""
        if self._asked_ns is None or instant_ns < self._asked_ns:
            self._asked_ns = instant_ns
            self.at(instant_ns, _nothing)

    def _start(self, run: Run) -> None:
        self.idle.remove(run.executor)
        self._current[run.executor] = run
        self.on_started(run)
        latency = self.scheduler.models[run.model].latency
        profiled_ns = latency.profiled_ns(run.place, run.samples, run.requests[0].step, run.busy)
        taken_ns = self._service(run, profiled_ns)
        self.at(self.now_ns + taken_ns, lambda: self._completed(run, taken_ns))

    def _completed(self, run: Run, taken_ns: int) -> None:
        if self._current.get(run.executor) is not run:
            return  # it died with its executor
        del self._current[run.executor]
        self.idle.add(run.executor)
        if self._fails(run):
            self.on_ended(self.scheduler.failed(run, self.now_ns, "incident"))
        else:
            self.on_answered(run, self.scheduler.finished(run, self.now_ns, taken_ns))

    def _regained(self, executor: int) -> None:
        if self.now_ns >= self._back_ns[executor]:  # else it was lost again meanwhile, for longer
            self.idle.add(executor)
            self.scheduler.regained(executor)

    def on_started(self, run: Run) -> None:
        """A batch starts now."""

    def on_answered(self, run: Run, requests: Sequence[Request]) -> None:
        """A batch is done now and these of its requests are answered."""

    def on_ended(self, ends: Iterable[End]) -> None:
        """These requests end now without an answer."""

    def on_settled(self) -> None:
        """Everything that could start at this instant has started."""
