"""Hand-written built models for the report's tests: every kind of evidence, measurement and finding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path

from variants.measurements import LayerTime, Measured, Measurements, write_measurements
from variants.repository import ManifestEntry, ModelFolder, file_sha256
from variants.variant import REFERENCE, Card, Evidence, Fidelity, Gate, Interval, LatencyProfile, Verdict, WorstClass

HOSTILE = """<script>alert("a")</script>'><img src=x onerror=b>"""
GATE = "gate: {max_accuracy_drop: 0.02, min_agreement: 0.95}\ntask: classification\n"
REASONS = {
    Verdict.PASSED: "it keeps the gate",
    Verdict.REJECTED: "it loses too much",
    Verdict.INCONCLUSIVE: "about 4000 samples would suffice",
    Verdict.UNVERIFIED: "there is no evaluation data",
}


class Reader(HTMLParser):
    """Reads a page as a person would: its texts, and whether every element that opens is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)
        assert self.open == []
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open and "svg" not in self.open:
            self.text += data + " "


def evidence(drop: float, width: float = 0.004) -> Evidence:
    """What a variant that loses `drop` of a score of 0.97 has proven."""
    worst = WorstClass(3, Interval(0.08, 0.01, 0.2), 75)
    return Evidence(
        score=Interval(0.97 - drop, 0.96 - drop, 0.98 - drop),
        agreement=Interval(0.99 - drop, 0.98 - drop, 1.0 - drop),
        accuracy_drop=Interval(drop, drop - width, drop + width),
        samples=750,
        batch_sizes=(32,),
        batch_invariance=0.0,
        fidelity=Fidelity(cosine=0.9987, kl=0.0123, worst_class=worst),
    )


def card(
    name: str,
    drop: float | None = 0.0,
    verdict: Verdict = Verdict.PASSED,
    *,
    reason: str | None = None,
    size: int = 1_000_000,
    made: bool = True,
    findings: Mapping[str, object] | None = None,
) -> Card:
    """A card on ONNX Runtime; a `drop` of None means without evidence, not `made` without an artefact."""
    return Card(
        variant=name,
        recipe=f"{name}-recipe",
        parameters={"sparsity": 0.5},
        artefact="model.onnx" if made else None,
        sha256=None,
        parent=None if name == REFERENCE else REFERENCE,
        requirements={"precision": "fp32"},
        size_bytes=size if made else 0,
        compressed_bytes=size // 2 if made else 0,
        weights=size // 4 if made else 0,
        flops=2 * size if made else 0,
        runtimes={} if drop is None else {"onnxruntime": evidence(drop)},
        gate=Gate(verdict, REASONS[verdict] if reason is None else reason),
        artefacts={"model.onnx": ""} if made else {},
        findings=findings or {},
    )


def measured(
    latency_us: float, layers: Sequence[tuple[str, int]] = (), runtime: str = "onnxruntime"
) -> dict[str, Measured]:
    """Latencies at batch sizes 1, 8 and 32 that begin at `latency_us`, with the memory and layers of the fastest."""
    profile = LatencyProfile((1, 8, 32), tuple(int(latency_us * 1000 * factor) for factor in (1, 4, 14)))
    times = tuple(LayerTime(name, "Conv", time_ns) for name, time_ns in layers)
    return {runtime: Measured(profile, int(latency_us * 1e5), times)}


def add_model(
    root: Path, name: str, cards: Sequence[Card], speeds: Mapping[str, Mapping[str, Measured]] | None = None
) -> Path:
    """Write a built model below `root`, fp32 first; returns its folder."""
    model = ModelFolder(root / name)
    (model.path / "1").mkdir(parents=True)
    (model.path / "model.yaml").write_text(GATE)
    version, content = model.newest(), root / f"{name}.artefact"
    content.write_bytes(b"an artefact")
    sha256 = file_sha256(content)
    for written in cards:
        made = written.artefact is not None
        hashes = {"sha256": sha256, "artefacts": {"model.onnx": sha256}} if made else {}
        files = {"model.onnx": content} if made else {}
        entry = ManifestEntry(parent_sha256=None if written.parent is None else sha256)
        version.write_variant(replaced(written, hashes), files, entry)
    content.unlink()
    if speeds is not None:
        write_measurements(version.path, Measurements("a fast CPU", "host", speeds))
    return model.path


def replaced(written: Card, values: Mapping[str, object]) -> Card:
    """The card with some values changed."""
    return Card(**({name: getattr(written, name) for name in Card.__dataclass_fields__} | dict(values)))


LAYERS = [(f"node_conv_{number}", 400_000 // number**2) for number in range(1, 16)]
FINDINGS: dict[str, object] = {
    "calibration": [
        {"method": "minmax", "drop": 0.001, "agreement": 0.99, "damage": 0.012, "passes": True, "chosen": False},
        {"method": "entropy", "drop": 0.0, "agreement": 0.995, "damage": 0.009, "passes": True, "chosen": True},
    ],
    "sensitivity": [
        {"layer": name, "operator": "Conv", "damage": 0.03 / (number + 1)} for number, (name, _) in enumerate(LAYERS)
    ],
    "mixed": [
        {"kept": kept, "drop": 0.03 / (kept + 1), "agreement": 0.98, "damage": 0.02, "passes": kept > 1}
        for kept in range(5)
    ],
    "tensors": [
        {"tensor": "w", "kind": "weight", "scale": [0.001, 0.02], "zero_point": 0, "low": -1, "high": 1, "error": 0.1},
        {"tensor": "x", "kind": "activation", "scale": 0.02, "zero_point": 12, "low": 0.0, "high": 5.1, "error": None},
    ],
    "sparsity": [
        {"sparsity": at, "weights": 1000, "flops": 2000, "drop": at**8 / 10, "damage": 0.1, "passes": at < 0.8}
        for at in (0.5, 0.75, 0.9)
    ],
    "training": [{"total": 2.0 / epoch, "response": 1.0 / epoch} for epoch in range(1, 7)],
    "channels": [{"layers": ["conv1", "conv2"], "before": 16, "after": 5}],
    "zero_share_by_layer": {"features.0.weight": 0.5, "features.3.weight": 0.91},
    "novelty": [{"what": "something new", "found": 0.125}],
}  # fmt: skip


def add_rich(root: Path, name: str = "rich") -> Path:
    """A model of eleven variants that has everything: every verdict, one far off, near neighbours, every finding."""
    cards = [
        card("fp32", 0.0),
        card("amp", 0.0, size=500_000),
        card("int8-dynamic", 0.001, size=260_000),
        card("int8-static", 0.002, size=250_000, findings=FINDINGS),
        card("int8-mixed", 0.0, size=300_000),
        card("pruned", 0.004, size=240_000),
        card("pruned-75", 0.009, size=60_000),
        card("pruned-90", 0.05, Verdict.REJECTED, size=20_000),
        card("pruned-99", 0.61, Verdict.REJECTED, size=9_000),
        card("distilled", 0.012, Verdict.INCONCLUSIVE, size=80_000),
        card("int8-qat", None, Verdict.REJECTED, reason="the recipe crashed: ValueError: no such layer", made=False),
    ]
    latencies = dict(zip((each.variant for each in cards), (800, 820, 500, 210, 240, 230, 60, 25, 9, 70), strict=False))
    speeds = {variant: measured(latency, LAYERS) for variant, latency in latencies.items()}
    speeds["fp32"] |= measured(2100, [("features.0", 900_000)], runtime="torch")
    return add_model(root, name, cards, speeds)
