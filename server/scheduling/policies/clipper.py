"""Clipper (NSDI'17) on one variant: the batch size is found by AIMD.

The paper adds to the batch size until a batch takes longer than the latency objective, then backs off by 10 %. (Its
published code explores in another way, with a regression of latency on batch size.) What cannot be in time any more is
dropped when it is dequeued.

Adapted: the objective is the shortest deadline that a request of the batch had on arrival; the size grows by one
sample, and only after a batch that was as large as it allowed. As in the paper a batch may be predicted to miss its
requests' deadlines: only its duration counts, not how long they had waited.
"""

from __future__ import annotations

from server.scheduling.model_queue import ModelQueue
from server.scheduling.policies.fixed import Fixed
from server.scheduling.policy import Run

_STEP = 1.0
_BACK_OFF = 0.9


class Clipper(Fixed):
    """Batches up to the size that AIMD stands at."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._size = 1.0

    def finished(self, model: ModelQueue, run: Run, compute_ns: int) -> None:
        """Back off after a batch that took longer than the objective; grow after a full one that did not."""
        objective_ns = min(request.deadline_ns - request.arrival_ns for request in run.requests)
        if compute_ns > objective_ns:
            self._size = max(1.0, self._size * _BACK_OFF)
        elif run.samples >= int(self._size):
            self._size = min(self._size + _STEP, model.latency.max_batch_size(run.place))

    def size(self, _fits: int, _planned: int, /) -> tuple[int, int]:
        """Where AIMD stands."""
        return int(self._size), int(self._size)
