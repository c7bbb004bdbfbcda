"""A freshly made variant on every runtime that can run it here: evidence for the card, and the gate's verdict.

Rules of this file: accuracy belongs to an artefact on a runtime, never to the artefact alone; the reference answers
come from the fp32 graph on ONNX Runtime; a runtime that fails is named in the reason and harms no other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from variants.data import Array, Samples
from variants.evaluate import (
    INVARIANT,
    against_itself,
    batch_invariance,
    compare,
    evidence,
    explain,
    overall,
    run_samples,
)
from variants.fidelity import fidelity
from variants.hardware import Hardware
from variants.model_config import ModelConfig, RepositoryError
from variants.runtimes.runtime import Runtime, Session
from variants.variant import REFERENCE, Evidence, Gate, Verdict

REFERENCE_RUNTIME = "onnxruntime"
_BATCH = 32


@dataclass(slots=True)
class Verifier:
    """Compares variants with the reference graph on the evaluation samples; None means there are none."""

    config: ModelConfig
    evaluation: Samples | None
    reference_graph: Path
    max_batch: int
    runtimes: Mapping[str, Runtime]
    hardware: Hardware
    _reference: Array | None = field(default=None, init=False)

    def verify(
        self, name: str, files: Mapping[str, Path], precision: str, *, solo: bool = False
    ) -> tuple[dict[str, Evidence], Gate]:
        """Evidence by runtime, and one verdict. Raises RepositoryError when the data do not fit the metric.

        `solo` says that batch-mates change its answers by design, so it is scored as it is served: one by one.
        """
        if self.evaluation is None:
            return {}, self._without_data(name)
        evidences, gates, failures = {}, {}, []
        for runtime, artefact in self.candidates(files, precision):
            try:
                session = self.load(runtime, artefact, precision)
                proof, gate = self._measure(session, is_reference=self._is_reference(name, runtime), solo=solo)
            except RepositoryError:
                raise
            except Exception as error:  # whatever a runtime cannot do, another may
                failures.append(f"{runtime.name} failed: {' '.join(str(error).split())[:200]}")
                continue
            evidences[runtime.name], gates[runtime.name] = proof, gate
        if not gates and not failures:
            failures = self._why_none(files, precision)
        return evidences, self._verdict(name, gates, failures)

    def candidates(self, files: Mapping[str, Path], precision: str) -> Iterator[tuple[Runtime, Path]]:
        """Each runtime that may run one of the files here, with that file."""
        for runtime in self.runtimes.values():
            fitting = [f for f in files.values() if self._obstacle(runtime, f, precision) is None]
            if fitting:
                yield runtime, fitting[0]

    def load(self, runtime: Runtime, artefact: Path, precision: str, threads: int | None = None) -> Session:
        """A session, on all our cores unless told otherwise; fp16 and TensorRT mean CUDA. Raises RuntimeUnavailable."""
        device = "cuda" if precision == "fp16" or runtime.name == "tensorrt" else "cpu"
        return runtime.load(artefact, precision=precision, threads=threads or self.hardware.cores, device=device)

    def _obstacle(self, runtime: Runtime, artefact: Path, precision: str) -> str | None:
        """Why a runtime cannot run a file here, or None; torch emulates bf16 on any CPU, slowly, so it may prove it."""
        if runtime.name == "torch" and artefact.suffix == ".pt2" and precision == "bf16":
            return None
        return runtime.why_not(artefact, precision, self.hardware)

    @property
    def _batch_size(self) -> int:
        return min(self.max_batch, _BATCH)

    def _is_reference(self, name: str, runtime: Runtime) -> bool:
        return name == REFERENCE and runtime.name == REFERENCE_RUNTIME

    def _measure(self, session: Session, *, is_reference: bool, solo: bool) -> tuple[Evidence, Gate]:
        """The evidence for one session, and the gate's verdict on it.

        What batch-mates change is served alone, so it is scored alone.
        """
        if self.evaluation is None:
            raise RuntimeError("verify asks for evaluation samples first")
        inputs, target, metric, task = (
            self.evaluation.inputs,
            self.evaluation.target,
            self.config.metric,
            self.config.task,
        )
        if is_reference:
            self._refuse_uneven(session)
        invariance = batch_invariance(session, inputs, self._batch_size)
        size = self._batch_size if invariance <= INVARIANT and not solo else min(1, self._batch_size)
        answers = run_samples(session, inputs, size)[0]
        if is_reference:
            self._reference = answers
            comparison = against_itself(answers, target, metric, task)
        elif answers.shape != self.reference.shape:
            raise ValueError(f"its answers have shape {answers.shape}, the reference's {self.reference.shape}")
        else:
            comparison = compare(answers, self.reference, target, metric, task)
        described = fidelity(comparison, answers, self.reference, target, metric, task)
        return evidence(comparison, [max(1, size)], invariance, described), explain(comparison, self.config.gate)

    def _refuse_uneven(self, session: Session) -> None:
        """Raise RepositoryError unless each output has one row per sample: else no answer belongs to a request."""
        if self.evaluation is None or self.max_batch == 0:
            return
        rows = min(len(self.evaluation), self._batch_size)
        some = self.evaluation.take(slice(rows))
        for spec, answer in zip(session.outputs, session.run(some.inputs), strict=True):
            if answer.shape[:1] != (rows,):
                raise RepositoryError(f"output {spec.name!r} has shape {answer.shape} for a batch of {rows} samples")

    @property
    def reference(self) -> Array:
        """The reference's answers [samples, ...], computed once."""
        if self._reference is None:
            if self.evaluation is None:
                raise RuntimeError("there are no evaluation samples")
            session = self.load(self.runtimes[REFERENCE_RUNTIME], self.reference_graph, REFERENCE)
            is_invariant = batch_invariance(session, self.evaluation.inputs, self._batch_size) <= INVARIANT
            size = self._batch_size if is_invariant else 1
            self._reference = run_samples(session, self.evaluation.inputs, size)[0]
        return self._reference

    def _without_data(self, name: str) -> Gate:
        if name == REFERENCE:
            return Gate(Verdict.PASSED, "the reference by definition; there is no evaluation data to score it")
        return Gate(Verdict.UNVERIFIED, "there is no evaluation data; add `evaluation:` to model.yaml")

    def _verdict(self, name: str, gates: Mapping[str, Gate], failures: list[str]) -> Gate:
        if name == REFERENCE and REFERENCE_RUNTIME in gates:
            return Gate(Verdict.PASSED, "; ".join(["the reference by definition", *failures]))
        gate = overall(gates)
        reasons = [gate.reason, *failures] if gates else [f"{gate.reason}: {'; '.join(failures)}"]
        return Gate(gate.verdict, "; ".join(reasons))

    def _why_none(self, files: Mapping[str, Path], precision: str) -> list[str]:
        """What stands in each runtime's way."""
        pairs = [(runtime, file) for runtime in self.runtimes.values() for file in files.values()]
        return [obstacle for runtime, file in pairs if (obstacle := self._obstacle(runtime, file, precision))]
