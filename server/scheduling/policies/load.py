"""The load as the published policies measure it: arrivals counted in windows of fixed length."""

from __future__ import annotations

_FIRST = 0.1  # of a window has to pass before its rate stands for a first one


class WindowedLoad:
    """Samples per second, measured window by window; `rate` is that of the last full window.

    Until one is full, it is that of the first window so far.
    """

    def __init__(self, window_ns: int) -> None:
        self._window_ns = window_ns
        self._start_ns: int | None = None
        self._count = 0
        self._full = False
        self.rate = 0.0

    def arrived(self, samples: int, now_ns: int) -> bool:
        """Count an arrival; True when it closed a window, and `rate` is new."""
        if self._start_ns is None:
            self._start_ns = now_ns
        windows = (now_ns - self._start_ns) // self._window_ns
        if windows:
            self.rate = self._count * 1e9 / self._window_ns if windows == 1 else 0.0
            self._start_ns += windows * self._window_ns
            self._count, self._full = 0, True
        self._count += samples
        if not self._full:
            elapsed_ns = max(now_ns - self._start_ns, _FIRST * self._window_ns)
            self.rate = self._count * 1e9 / elapsed_ns
        return windows > 0
