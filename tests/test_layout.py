"""How the cores are shared where nobody says: which layouts there are, which wins, and what measuring them costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import models
import pytest
from serving import serving

from server import layout
from server.candidates import Host
from server.layout import Figure, Layout, best_layout, choose_layout, possible_layouts
from variants.repository import ModelFolder
from variants.runtimes.onnxruntime_runtime import OnnxRuntime, OnnxRuntimeSession

MS = 1_000_000
MANY, FEW = Layout(2, 1), Layout(1, 2)


@pytest.mark.parametrize(
    ("cores", "threads"),
    [(1, [1]), (2, [1, 2]), (6, [1, 2, 3, 6]), (7, [1, 7]), (12, [1, 3, 4, 12]), (64, [1, 4, 16, 64])],
)
def test_layouts_leave_no_core_over(cores: int, threads: list[int]) -> None:
    """There are at most four, from one thread each to all for one, and each uses every core."""
    found = possible_layouts(cores)
    assert [each.threads for each in found] == threads
    assert all(each.executors * each.threads == cores for each in found)


def figures(**rates: tuple[float, float]) -> dict[str, dict[Layout, Figure]]:
    """Each model's samples per second in both layouts; a negative rate is one that breaks the SLO."""
    return {
        model: {each: Figure(abs(rate), rate > 0) for each, rate in zip((MANY, FEW), pair, strict=True)}
        for model, pair in rates.items()
    }


@pytest.mark.parametrize(
    ("found", "best"),
    [
        (figures(m=(100, 90)), MANY),
        (figures(m=(90, 100)), FEW),
        (figures(fast=(10_000, 9_000), slow=(10, 15)), FEW),
        (figures(m=(-100, 90)), FEW),
        (figures(m=(-100, -90)), MANY),
        (figures(m=(-100, -90), n=(-100, 90)), FEW),
        ({}, MANY),
    ],
)
def test_the_best_layout(found: dict[str, dict[Layout, Figure]], best: Layout) -> None:
    """Throughput decides, every model's alike however fast it is; first, how many models stay within their SLO."""
    assert best_layout([MANY, FEW], found) == best


class Timed:
    """Stands for a model's reference: `one_ns` for a sample in each layout, and so much less per sample in a batch."""

    def __init__(self, hosts: Sequence[Host], *ones_ns: int, gain: float = 1.0) -> None:
        self.hosts, self.asked = hosts, list[int]()
        self._ones_ns, self._gain = ones_ns, gain

    def latencies_ns(self, size: int, _budget_s: float) -> list[int]:
        """The latency of a batch in each layout."""
        self.asked.append(size)
        return [int(one_ns * size / (self._gain if size > 1 else 1)) for one_ns in self._ones_ns]


@pytest.mark.parametrize(
    ("ones_ms", "slo_ms", "gain", "asked", "rates"),
    [
        ((10, 5), 100, 2.0, [1, 4], (400, 400)),  # half of the SLO allows 5 samples in the slower layout
        ((10, 5), 100, 0.5, [1, 4], (200, 200)),  # a batch that is no gain is not needed
        ((10, 5), 15, 2.0, [1], (200, 200)),  # a single sample takes more than half of the SLO
        ((200, 5), 100, 2.0, [1, 8], (20, 400)),  # a layout that is out does not shrink the others' batch
        ((1, 1), 100_000, 2.0, [1, 32], (4000, 2000)),
        ((100, 100), 100_000, 2.0, [1, 2], (40, 20)),  # what there is time for bounds the batch
    ],
)
def test_a_models_figures(
    host: Host,
    ones_ms: tuple[int, int],
    slo_ms: int,
    gain: float,
    asked: list[int],
    rates: tuple[int, int],
) -> None:
    """Throughput counts all executors, at the batch that half of the SLO allows; one sample must be within the SLO."""
    hosts = [replace(host, executors=2, threads=1), replace(host, executors=1, threads=2)]
    reference = Timed(hosts, *(ms * MS for ms in ones_ms), gain=gain)
    found = layout._figures(reference, (1, 2, 4, 8, 16, 32), slo_ms * MS)  # type: ignore[arg-type]
    assert reference.asked == asked
    assert [round(figure.samples_per_s) for figure in found] == list(rates)
    assert [figure.in_time for figure in found] == [ms <= slo_ms for ms in ones_ms]


def folders(repository: Path, *names: str) -> list[ModelFolder]:
    """Small models of these names."""
    return [ModelFolder(models.add(repository, name, models.mlp())) for name in names]


def two_cores(host: Host) -> Host:
    """A host with two cores, one thread for each executor."""
    return replace(host, executors=2, threads=1)


def test_a_model_that_cannot_be_measured_stops_nothing(
    repository: Path, host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    """It is named with its reason, the others decide, and the log gives the figures."""
    caplog.set_level("INFO")

    def measure(folder: ModelFolder, _hosts: Sequence[Host]) -> list[Figure]:
        if folder.name == "bad":
            raise RuntimeError("no such kernel")
        return [Figure(100, False), Figure(50, True)]

    chosen = choose_layout(two_cores(host), folders(repository, "bad", "good"), measure)
    assert (chosen.executors, chosen.threads) == (1, 2)
    assert "model bad is not measured: no such kernel" in caplog.text
    assert "2 x 1: 100.0 samples/s of fp32, geometric mean over 1 models; fp32 breaks the SLO of good" in caplog.text
    assert "1 x 2 (chosen): 50.0 samples/s" in caplog.text


def test_many_slow_models_do_not_hold_up_the_start(
    repository: Path, host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    """After a minute the models measured so far decide."""
    measured: list[str] = []

    def measure(folder: ModelFolder, _hosts: Sequence[Host]) -> list[Figure]:
        measured.append(folder.name)
        return [Figure(1, True), Figure(2, True)]

    chosen = choose_layout(
        two_cores(host), folders(repository, "a", "b", "c"), measure, lambda: len(measured) * 31 * 1000 * MS
    )
    assert (measured, chosen.executors) == (["a", "b"], 1)
    assert "model c and those after it are not measured" in caplog.text


def test_where_there_is_no_choice_nothing_is_measured(repository: Path, host: Host) -> None:
    """One core, or no model: one thread for each executor."""

    def measure(_folder: ModelFolder, _hosts: Sequence[Host]) -> list[Figure]:
        raise AssertionError("measured")

    assert choose_layout(host, folders(repository, "m"), measure).executors == 1
    assert choose_layout(two_cores(host), [], measure).executors == 2


class CountingRuntime(OnnxRuntime):
    """ONNX Runtime that notes with how many threads it loaded something."""

    def __init__(self, threads: list[int]) -> None:
        self.threads = threads

    def load(self, artefact: Path, *, precision: str, threads: int, device: str) -> OnnxRuntimeSession:
        """Note and load."""
        self.threads.append(threads)
        return super().load(artefact, precision=precision, threads=threads, device=device)


def test_figures_are_remembered(
    repository: Path, host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Real sessions are loaded once per layout, a bare and a built model's; the next start loads none and agrees."""
    caplog.set_level("INFO")
    loaded: list[int] = []
    monkeypatch.setattr(layout, "available_runtimes", lambda _: {"onnxruntime": CountingRuntime(loaded)})
    models.add_ladder(repository)
    names = [*folders(repository, "m"), ModelFolder(repository / "ladder")]
    here = replace(two_cores(host), runtimes={"onnxruntime": CountingRuntime(loaded)})
    first = choose_layout(here, names)
    assert loaded == [1, 2, 1, 2]
    told = caplog.messages[:]
    assert all("geometric mean over 2 models" in message for message in told)
    caplog.clear()
    again = choose_layout(here, names)
    assert (again.executors, again.threads) == (first.executors, first.threads)
    assert loaded == [1, 2, 1, 2]
    assert caplog.messages == told


def test_the_operators_word_is_not_measured(
    repository: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--executors N` is taken as it is; without it the server has what was chosen."""
    monkeypatch.setattr("server.app.choose_layout", lambda host, _: replace(host, executors=1, threads=7))
    models.add(repository, "m", models.mlp())
    with serving(repository, executors=3, threads=6) as running:
        assert (running.server.host.executors, running.server.host.threads) == (3, 2)
    with serving(repository) as running:
        assert (running.server.executors, running.server.host.threads) == (1, 7)
