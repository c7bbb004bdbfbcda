"""Numbers as a person reads them: three significant digits and the unit that keeps them short."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from variants.model_config import Metric
from variants.variant import Interval

UNKNOWN = "–"

_ZEROS = re.compile(r"(\.\d*?)0+(?!\d)")

_MINUS = re.compile(r"(?<!\w)-(?=\d)")

_DURATIONS = ((1e9, "s"), (1e6, "ms"), (1e3, "µs"), (1, "ns"))
_SIZES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B"))
_FLOPS = ((1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1e3, "kFLOP"), (1, "FLOP"))
_SHARES: tuple[Metric, ...] = ("top1", "macro_f1", "agreement")
_METRICS: dict[Metric, str] = {
    "top1": "top-1 accuracy",
    "macro_f1": "macro F1",
    "cosine": "cosine similarity",
    "r2": "R²",
    "agreement": "agreement",
}


def significant(value: float, digits: int = 3) -> str:
    """A number to so many significant digits, never in powers of ten between 0.0001 and a million."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "−∞" if value < 0 else "∞"
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    if not -5 < size < 6:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa}e{int(exponent)}".replace("-", "−")
    return f"{value:,.{max(0, digits - 1 - size)}f}".replace("-", "−")


def _scaled(value: float, units: Sequence[tuple[float, str]]) -> str:
    """In the largest unit of which there is at least one after rounding."""
    rounded = float(f"{value:.2e}")
    scale, unit = next(((scale, unit) for scale, unit in units if rounded >= scale), units[-1])
    return f"{significant(value / scale)} {unit}"


def duration(nanoseconds: float) -> str:
    """A duration: 12.3 µs, 1.23 ms."""
    return _scaled(nanoseconds, _DURATIONS)


def size(count: float) -> str:
    """Bytes, in powers of ten as files are sold: 26.5 MB."""
    return _scaled(count, _SIZES)


def flops(count: float) -> str:
    """Floating-point operations: 88.7 MFLOP."""
    return _scaled(count, _FLOPS)


def ratio(value: float) -> str:
    """A speed-up: 15.9×."""
    return f"{significant(value)}×"


def percent(value: float, decimals: int = 2) -> str:
    """A share: 99.09%."""
    return _signed(f"{value:.{decimals}%}")


def _signed(text: str) -> str:
    """With a real minus sign, and none before what rounds to zero."""
    return text.replace("-", "−" if any(digit in text for digit in "123456789") else "")


def typeset(words: str) -> str:
    """A sentence of a card with real minus signs before its numbers."""
    return _MINUS.sub("−", words)


def whole(value: float) -> str:
    """A count, empty between two counts: an axis of counts has no ticks there."""
    return f"{value:.0f}" if value == round(value) else ""


def metric_name(metric: Metric) -> str:
    """What an axis calls the score."""
    return _METRICS[metric]


def score(value: float, metric: Metric) -> str:
    """A score in its metric's usual form: a percentage where it counts samples, else four decimals."""
    return percent(value) if metric in _SHARES else _signed(f"{value:.4f}")


def bounds(interval: Interval, metric: Metric) -> str:
    """A 95 % interval without its value."""
    return f"[{score(interval.low, metric)}, {score(interval.high, metric)}]"


def plain(text: str) -> str:
    """A figure for an axis: without the zeros that only say how exact it is."""
    return _ZEROS.sub(lambda found: found[1].removesuffix("."), text)


def shortened(text: str, most: int) -> str:
    """A long name with its middle left out: ends tell layers apart."""
    if len(text) <= most:
        return text
    kept = most - 1
    return f"{text[: kept - kept // 2]}…{text[len(text) - kept // 2 :]}"
