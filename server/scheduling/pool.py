"""The executors as the scheduler knows them: who runs what, until when as predicted, how fast, and who is lost.

Rules: plain arithmetic on instants. An executor that is overdue is expected to need half as long again as it is
overdue, and one that is far overdue is *lost*: it no longer counts as capacity until it comes back.
"""

from __future__ import annotations

from server.scheduling.latency import UNIT, Spot
from server.scheduling.policy import Run
from server.scheduling.slowdown import Slowdown

_LOST_FACTOR = 10
_LOST_NS = 250_000_000
_STALE_NS = 100_000_000  # how long what relaxes with time may be reckoned with as it was


class Pool:
    """A fixed number of executors, addressed by number."""

    def __init__(self, executors: int) -> None:
        self.running: list[Run | None] = [None] * executors
        self.lost = [False] * executors
        self._end_ns = [0] * executors
        self._slowdowns = [Slowdown() for _ in range(executors)]
        self._spots: tuple[Spot, Spot] | None = None
        self._spots_ns = 0

    def __len__(self) -> int:
        return len(self.running)

    @property
    def busy(self) -> int:
        """Executors that run a batch, as far as they are not lost."""
        return sum(run is not None and not lost for run, lost in zip(self.running, self.lost, strict=True))

    @property
    def working(self) -> int:
        """Executors that are not lost; at least one, so that times stay finite when all are."""
        return max(1, len(self.lost) - sum(self.lost))

    @property
    def idle(self) -> bool:
        """Whether an executor waits for work."""
        return any(run is None and not lost for run, lost in zip(self.running, self.lost, strict=True))

    def start(self, run: Run) -> None:
        """An executor begins a batch."""
        self._spots = None
        self.running[run.executor] = run
        self._end_ns[run.executor] = run.started_ns + run.predicted_ns

    def end(self, run: Run, now_ns: int) -> bool:
        """An executor is done with a batch; False where it had been given up on, and is now back."""
        self._spots = None
        was_expected = self.running[run.executor] is run
        self.running[run.executor] = None
        self.lost[run.executor] = False
        self._end_ns[run.executor] = now_ns
        return was_expected

    def lose(self, executor: int) -> Run | None:
        """Count an executor out until `end` or `regain`; returns the batch that it took along."""
        self._spots = None
        run, self.running[executor], self.lost[executor] = self.running[executor], None, True
        return run

    def regain(self, executor: int) -> None:
        """Count a lost executor in again."""
        self._spots = None
        self.lost[executor] = False

    def overdue(self, now_ns: int) -> list[int]:
        """Executors whose batch has taken so much longer than predicted that they must be taken for lost."""
        return [run.executor for run in self.running if run is not None and now_ns > _lost_ns(run)]

    def soonest_loss_ns(self) -> int | None:
        """The instant after which the first busy executor will be taken for lost."""
        return min((_lost_ns(run) for run in self.running if run is not None), default=None)

    def observe(self, run: Run, ratio: float, now_ns: int) -> None:
        """Learn an executor's speed from its batch's actual over expected latency."""
        self._spots = None
        self._slowdowns[run.executor].observe(ratio, now_ns)

    def slowdown(self, executor: int, now_ns: int) -> float:
        """How much slower than profiled this executor runs now."""
        return self._slowdowns[executor].factor(now_ns)

    def spot(self, executor: int, now_ns: int) -> Spot:
        """Where this executor's next batch would run."""
        others = self.busy - (self.running[executor] is not None)
        return Spot(others, self._slow(executor, now_ns))

    def spots(self, now_ns: int) -> tuple[Spot, Spot]:
        """The fastest executor beside those that are busy now, and an average one with all others busy.

        The first is the best that can be hoped for a request, the second how a backlog drains.
        """
        if self._spots is None or now_ns - self._spots_ns > _STALE_NS:
            factors = [self._slow(executor, now_ns) for executor in self._working()] or [UNIT]
            best = Spot(min(self.busy, self.working - 1), min(factors))
            self._spots, self._spots_ns = (best, Spot(self.working - 1, sum(factors) // len(factors))), now_ns
        return self._spots

    def free_ns(self, now_ns: int, but: int | None = None) -> list[int]:
        """When each working executor is expected to be free, from now on; `but` one of them."""
        return [self._expected_ns(executor, now_ns) for executor in self._working() if executor != but]

    def all_free_ns(self, now_ns: int) -> list[int]:
        """The same for all of them; where all are lost, one is hoped to be back soon."""
        return self.free_ns(now_ns) or [now_ns + _LOST_NS]

    def _working(self) -> list[int]:
        return [executor for executor, lost in enumerate(self.lost) if not lost]

    def _expected_ns(self, executor: int, now_ns: int) -> int:
        if self.running[executor] is None:
            return now_ns
        overdue_ns = now_ns - self._end_ns[executor]
        return now_ns + overdue_ns // 2 if overdue_ns > 0 else self._end_ns[executor]

    def _slow(self, executor: int, now_ns: int) -> int:
        return int(self._slowdowns[executor].factor(now_ns) * UNIT)


def _lost_ns(run: Run) -> int:
    return run.started_ns + max(_LOST_FACTOR * run.predicted_ns, _LOST_NS)
