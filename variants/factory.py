"""The factory: how one variant of a version is made, judged and written, and what all of them share meanwhile.

Rules of this file: one variant's failure never stops the others; a variant appears whole or not at all; what was made
before from the same things is judged anew, not made anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx

from variants.auto import DEFAULT_BUDGET_MINUTES, Facts
from variants.benchmark import measure_variants
from variants.cost import cost_of
from variants.data import DataSets, match_sets, read_files, spread, targets_of
from variants.hardware import Hardware, needs_reduced_range
from variants.labels import refuse_labels
from variants.measurements import write_measurements
from variants.model_config import ModelConfig, RepositoryError
from variants.plan import Planned, kept_product
from variants.progress import Advance, Reporter
from variants.recipes.chain import Made, run_chain
from variants.recipes.recipe import Ingredients, Product, RecipeRejected
from variants.repository import ManifestEntry, VersionFolder, file_sha256
from variants.runtimes import available_runtimes
from variants.runtimes.onnx_signature import read_signature
from variants.source import Source, open_source
from variants.summary import Speed, sentences, sound_cards, speeds, table
from variants.trial import Trial
from variants.variant import REFERENCE, Card, Gate, Verdict
from variants.verify import Verifier

QUICK_EVALUATION_SAMPLES = 256
_EXAMPLES = 9
"""How many samples are enough to trace a module and to compare its export at every checked batch size."""


@dataclass(frozen=True, slots=True)
class Options:
    """How a person wants it built: all anew, with less effort, and for how long `variants: auto` may try."""

    force: bool = False
    quick: bool = False
    budget_minutes: float = DEFAULT_BUDGET_MINUTES


@dataclass(frozen=True, slots=True)
class Factory:
    """What the variants of one version share while they are made."""

    version: VersionFolder
    hardware: Hardware
    source: Source
    data: DataSets
    verifier: Verifier
    work: Path
    trial: Trial | None
    options: Options
    reporter: Reporter
    made: Made = field(default_factory=dict)

    def make(self, planned: Planned, *, spares_proven: bool = False) -> str | None:
        """Build, evaluate, gate and write one variant; returns how its recipe crashed, None if it did not.

        After a crash what an earlier build made of the same things stays; with `spares_proven` also what was made of
        others, if it is sound and not stale.
        """
        label = f"{self.version.model.name} {planned.name}"
        with self.reporter.step(label) as advance:
            card, files, crashed = self._attempt(planned, advance)
            if crashed and (kept_product(self.version, planned) or (spares_proven and self._is_proven(planned.name))):
                self.version.doubt(planned.name)
                said = f"{card.gate.reason}; what was made before stays"
                self.reporter.line(f"{label}: {said}")
                return said
            entry = ManifestEntry(
                fingerprint="" if crashed else planned.fingerprint,
                made="" if crashed else planned.made,
                parent_sha256=file_sha256(self._parent(card)),
                evaluation_sha256=self._evaluation_sha256(),
            )
            self.version.write_variant(card, files, entry)
        self.reporter.line(f"{label}: {card.gate.verdict}: {card.gate.reason}")
        return card.gate.reason if crashed else None

    def _is_proven(self, name: str) -> bool:
        """Whether a variant of this name is there and sound, and its evidence still holds."""
        try:
            card = self.version.card(name) if name in self.version.manifest().variants else None
            files = [self.version.artefact(name, file) for file in card.artefacts] if card else []
        except RepositoryError:  # damaged
            return False
        return bool(files)

    def _parent(self, card: Card) -> Path:
        """What a variant was made from: the reference's artefact, or for the reference the source as it was given."""
        given = self.version.source.onnx or self.version.source.weights
        if card.parent is None and given is not None:
            return self.version.resolve(given)
        return self.version.artefact(REFERENCE, "model.onnx")

    def _evaluation_sha256(self) -> str | None:
        """A digest of all that a score depends on beside the artefact: evidence is comparable where it is the same."""
        config = self.version.model.config
        if config.evaluation is None:
            return None
        data = file_sha256(self.version.resolve(config.evaluation.data))
        facts = [data, config.evaluation.target, config.metric, config.task]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _attempt(self, planned: Planned, advance: Advance) -> tuple[Card, Mapping[str, Path], bool]:
        """The card and files of a variant, and whether its recipe crashed; the reference must not fail."""
        try:
            advance("making", 0.0)
            kept = None if self.options.force else kept_product(self.version, planned)
            product = kept or run_chain(planned.steps, self._ingredients(planned, advance), self.made)
            advance("evaluating", 0.9)
            return self._prove(planned, product), product.files, False
        except RecipeRejected as error:
            return _rejected(planned, str(error), error.findings), {}, False
        except RepositoryError:
            raise
        except Exception as error:  # whatever goes wrong inside one recipe, the others still deserve their turn
            if planned.name == REFERENCE:
                raise
            return _rejected(planned, f"the recipe crashed: {type(error).__name__}: {in_a_line(error)}"), {}, True

    def _ingredients(self, planned: Planned, advance: Advance) -> Ingredients:
        work = self.work / planned.name
        work.mkdir()
        return Ingredients(
            source=self.source,
            example=self.data.any,
            config=self.version.model.config,
            calibration=self.data.calibration,
            training=self.data.training,
            hardware=self.hardware,
            work=work,
            teacher=self.source.module,
            trial=self.trial,
            quick=self.options.quick,
            progress=lambda share: advance("training", 0.9 * share),
        )

    def _prove(self, planned: Planned, product: Product) -> Card:
        """The card of something that was made. Raises RecipeRejected for what clients could not use like the source."""
        made = product.files[product.artefact]
        if made.suffix == ".onnx" and not self.source.signature.fits(read_signature(made)):
            raise RecipeRejected("what was made takes or gives other tensors than the source")
        solo = _says(product, "batch_invariant", False)
        runtimes, gate = self.verifier.verify(planned.name, product.files, product.precision, solo=solo)
        cost = cost_of(made)
        artefacts = {name: file_sha256(file) for name, file in product.files.items()}
        return Card(
            variant=planned.name,
            recipe=planned.recipe,
            parameters=planned.parameters | dict(product.facts),
            artefact=product.artefact,
            sha256=artefacts[product.artefact],
            parent=None if planned.name == REFERENCE else REFERENCE,
            requirements=self._requirements(product),
            size_bytes=cost.size_bytes,
            compressed_bytes=cost.compressed_bytes,
            weights=cost.weights,
            flops=cost.flops,
            runtimes=runtimes,
            gate=gate,
            artefacts=artefacts,
            findings=product.findings,
        )

    def facts(self) -> Facts:
        """What decides which techniques are worth a try."""
        return Facts(
            operators={node.op_type for node in onnx.load(self.source.graph, load_external_data=False).graph.node},
            has_module=self.source.module is not None,
            has_evaluation=self.data.evaluation is not None,
            has_training=self.data.training is not None,
            has_calibration=self.data.calibration is not None,
            hardware=self.hardware,
        )

    def _requirements(self, product: Product) -> dict[str, object]:
        """What a host needs, and whether a sample must run alone (`solo`) because batch-mates change its answer.

        8-bit weights were proven here only if sums of their products do not saturate here.
        """
        is_wide = _says(product, "reduce_range", False)
        is_wide &= not needs_reduced_range(self.hardware)
        flags = {"exact_int8_sums": is_wide, "solo": _says(product, "batch_invariant", False)}
        return {"precision": product.precision} | {name: True for name, holds in flags.items() if holds}

    def summarise(self) -> Mapping[str, Speed]:
        """Measure all variants, show the table and what a person should know; returns their speeds."""
        cards, absent = sound_cards(self.version)
        with self.reporter.step(f"{self.version.model.name} speed") as advance:
            advance("measuring", 0.0)
            measured = measure_variants(
                self.version, cards, self.source, self.data.any, self.verifier, quick=self.options.quick
            )
        write_measurements(self.version.path, measured)
        found = speeds(measured, cards, self.version.model.config.gate)
        self.reporter.table(table(cards, found, f"{self.version.model.name} version {self.version.number}"))
        for sentence in (*sentences(cards, found), *absent):
            self.reporter.line(sentence)
        return found


def open_factory(
    version: VersionFolder, reference: Planned, hardware: Hardware, work: Path, options: Options, reporter: Reporter
) -> Factory:
    """Read data and source, and check them against each other. Raises RepositoryError."""
    with reporter.step(version.model.name) as advance:
        advance("reading data and source", 0.0)
        files, targets = read_files(version), targets_of(version)
        first = next(iter(files.values()), {})
        example = {name: array[:_EXAMPLES] for name, array in first.items() if name not in targets}
        source = open_source(version, example or None, work)
        data = match_sets(version, files, source.sample_specs)
        refuse_labels(version, source, data)
    if not options.force and kept_product(version, reference) is not None:
        served = version.artefact(REFERENCE, "model.onnx")  # which children must descend from
        source = replace(source, graph=served)
    if options.quick and data.evaluation is not None:
        data = replace(data, evaluation=spread(data.evaluation, QUICK_EVALUATION_SAMPLES))
    _use_our_cores(source, hardware)
    config, runtimes = version.model.config, available_runtimes()
    verifier = Verifier(config, data.evaluation, source.graph, source.max_batch, runtimes, hardware)
    trial = _trial(source, data, config, hardware)
    return Factory(version, hardware, source, data, verifier, work, trial, options, reporter)


def _trial(source: Source, data: DataSets, config: ModelConfig, hardware: Hardware) -> Trial | None:
    """What candidates are tried with; None where no data is left for it."""
    if data.tuning is None:
        return None
    evaluated = len(data.evaluation) if data.evaluation else 0
    return Trial(source.graph, data.tuning, config, source.max_batch, evaluated, hardware.cores)


def _use_our_cores(source: Source, hardware: Hardware) -> None:
    """Torch takes a thread per core of the node, and collapses when they are more than our share."""
    if source.module is not None:
        import torch

        torch.set_num_threads(hardware.cores)


def in_a_line(error: Exception) -> str:
    """An error as one line of bounded length."""
    return " ".join(str(error).split())[:300]


def _says(product: Product, fact: str, value: object) -> bool:
    """Whether a fact has this value, for the recipe or for one of a chain's."""
    steps = [product.facts, *(facts for facts in product.facts.values() if isinstance(facts, dict))]
    return any(facts.get(fact) is value for facts in steps)


def _rejected(planned: Planned, reason: str, findings: Mapping[str, object] | None = None) -> Card:
    """The card of a variant that was not made."""
    return Card(
        variant=planned.name,
        recipe=planned.recipe,
        parameters=planned.parameters,
        artefact=None,
        sha256=None,
        parent=REFERENCE,
        requirements={},
        size_bytes=0,
        compressed_bytes=0,
        weights=0,
        flops=0,
        runtimes={},
        gate=Gate(Verdict.REJECTED, reason),
        findings=findings or {},
    )
