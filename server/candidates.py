"""The ways to run a model's variants on this host: an artefact that is what was built, on a runtime that can and may.

Rules: nothing of the repository is executed as code; every file of a built variant is checked against the manifest
before a runtime sees it; a `.pt2` can execute code and is loaded only on the operator's word.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from variants.evaluate import judge, may_batch
from variants.hardware import Hardware, needs_reduced_range
from variants.measure import ProfileCache
from variants.model_config import GateConfig, RepositoryError
from variants.repository import VersionFolder, file_sha256
from variants.runtimes.runtime import Runtime, RuntimeUnavailable, Session
from variants.variant import REFERENCE, Card, Evidence, Verdict

ONNXRUNTIME = "onnxruntime"


@dataclass(frozen=True, slots=True)
class Host:
    """What models are loaded onto, and on which terms."""

    hardware: Hardware
    device: str
    threads: int
    executors: int
    runtimes: Mapping[str, Runtime]
    profiles: ProfileCache
    default_latency_ns: int
    allow_unverified: bool
    trust_torch_archives: bool


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to run one variant here: an artefact on a runtime, loaded."""

    variant: str
    runtime: str
    precision: str
    sha256: str
    session: Session
    evidence: Evidence | None
    is_invariant: bool
    """Whether batch-mates leave an answer as it is; without evidence the recipe's word counts."""

    @property
    def key(self) -> tuple[str, str]:
        """What tells candidates of one model apart."""
        return self.variant, self.runtime


def find_candidates(version: VersionFolder, card: Card, host: Host) -> tuple[list[Candidate], str]:
    """Every way to run a variant here, and why the others fell away."""
    artefacts, reasons = intact_artefacts(version, card)
    candidates = []
    for path, sha256 in artefacts.items():
        for runtime in host.runtimes.values():
            if runtime.suffix != path.suffix:
                continue  # the variant has another file for it, or none; no reason that a person would want to read
            try:
                candidates.append(_candidate(card, path, sha256, runtime, host, version.model.config.gate))
            except RuntimeUnavailable as error:
                reasons.append(str(error))
    return candidates, "; ".join(dict.fromkeys(reasons)) or card.gate.reason


def intact_artefacts(version: VersionFolder, card: Card) -> tuple[dict[Path, str], list[str]]:
    """The artefacts that are what the manifest says, with their sha256, and why the others are not touched.

    Before a build the reference's is the source. Raises RepositoryError where that is not there.
    """
    if card.variant == REFERENCE and not version.is_built:
        source = version.onnx_source
        if source is None:
            raise RepositoryError(f"{version.path}: the ONNX source is not there")
        return {source: file_sha256(source)}, []
    intact, reasons = {}, []
    for file, sha256 in card.artefacts.items():
        try:
            intact[version.artefact(card.variant, file)] = sha256
        except RepositoryError as error:
            reasons.append(str(error))
    return intact, reasons


def _candidate(card: Card, path: Path, sha256: str, runtime: Runtime, host: Host, gate: GateConfig) -> Candidate:
    name = runtime.name
    precision = precision_of(card)
    reason = runtime.why_not(path, precision, host.hardware)
    if reason is None and path.suffix == ".pt2" and not host.trust_torch_archives:
        reason = "a .pt2 archive can execute code and is loaded only with --trust-torch-archives"
    reason = reason or _not_like_the_build_host(card, name, precision, host)
    evidence = card.runtimes.get(name)
    is_unverified = card.gate.verdict is Verdict.UNVERIFIED
    needs_evidence = name != ONNXRUNTIME if card.variant == REFERENCE else not is_unverified
    if reason is None and evidence is None and needs_evidence:
        reason = f"nothing is proven about it on {name}; run `gearshift build` on a host like this one"
    if reason is None and evidence is not None and not _proven(card, name, evidence, gate):
        reason = f"it does not pass the gate on {name}"
    if reason is not None:
        raise RuntimeUnavailable(reason)
    session = runtime.load(path, precision=precision, threads=host.threads, device=device_of(name, host))
    return Candidate(card.variant, name, precision, sha256, session, evidence, may_batch(card, evidence))


def _not_like_the_build_host(card: Card, runtime: str, precision: str, host: Host) -> str | None:
    """Why evidence from the build host does not hold here: it is a CPU's, or for fp16 and TensorRT a CUDA device's."""
    device, proven_on_cuda = device_of(runtime, host), precision == "fp16" or runtime == "tensorrt"
    if proven_on_cuda:
        return None
    if card.requirements.get("exact_int8_sums") and needs_reduced_range(host.hardware):
        return "its 8-bit weights were proven on another kind of CPU and would saturate on this one, which has no VNNI"
    if card.variant != REFERENCE and card.runtimes and device != "cpu":
        return f"its evidence was measured on a CPU and proves nothing about {device}"
    return None


def _proven(card: Card, runtime: str, evidence: Evidence, gate: GateConfig) -> bool:
    """Whether a variant that passed its gate somewhere passes it on this runtime; the reference's home is the truth."""
    if card.gate.verdict is not Verdict.PASSED or (card.variant == REFERENCE and runtime == ONNXRUNTIME):
        return True
    return judge(evidence.accuracy_drop, evidence.agreement, evidence.samples, gate) is Verdict.PASSED


def precision_of(card: Card) -> str:
    """What a variant computes in."""
    if "precision" in card.requirements:
        return str(card.requirements["precision"])
    return "int8" if "int8" in card.recipe else "fp32"


def device_of(runtime: str, host: Host) -> str:
    """OpenVINO runs on the CPU whatever device the operator asked for."""
    return "cpu" if runtime == "openvino" else host.device
