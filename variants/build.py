"""`gearshift build`: recipe -> evaluate -> gate -> card, for every variant of a model.

Rules of this file: one variant's failure never stops the others; a variant appears whole or not at all; what is
unchanged is left alone. Exit codes are the contract's: 0 built or honestly rejected, 1 a recipe crashed, 2 a bad
repository or configuration, 130 interrupted.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from variants.cost import cost_of
from variants.data import DataSets, match_sets, read_files, spread, targets_of
from variants.hardware import Hardware, detect_hardware, needs_reduced_range
from variants.model_config import ModelConfig, RepositoryError, nearest
from variants.plan import Planned, is_current, kept_product, plan, tool_versions
from variants.progress import Advance, Reporter
from variants.recipes.chain import Made, run_chain
from variants.recipes.recipe import Ingredients, Product, RecipeRejected
from variants.repository import ManifestEntry, ModelFolder, VersionFolder, file_sha256, open_path
from variants.runtimes import available_runtimes
from variants.source import Source, importable, open_source
from variants.summary import measure_speeds, sentences, sound_cards, table
from variants.trial import Trial
from variants.variant import REFERENCE, Card, Gate, Verdict
from variants.verify import Verifier

QUICK_EVALUATION_SAMPLES = 256
_EXAMPLES = 9
"""How many samples are enough to trace a module and to compare its export at every checked batch size."""


def build(
    path: Path,
    *,
    only: list[str] | None = None,
    force: bool = False,
    quick: bool = False,
    reporter: Reporter | None = None,
) -> int:
    """Build the variants of a model's newest version, or of every model of a repository; returns the exit code.

    `only` limits the work to the named variants (the reference is always kept up to date), `force` builds what is
    current too, `quick` takes fewer samples and epochs.
    """
    reporter = reporter or Reporter()
    try:
        models = open_path(path)
    except RepositoryError as error:
        reporter.error(str(error))
        return 2
    codes = []
    try:
        for model in models:
            try:
                with _alone(model):
                    codes.append(_build_model(model, only, force=force, quick=quick, reporter=reporter))
            except RepositoryError as error:
                reporter.error(str(error))
                codes.append(2)
            except Exception as error:  # a full disk, or a reference that cannot be made: the others get their turn
                reporter.error(f"{model.path}: {type(error).__name__}: {_in_a_line(error)}")
                codes.append(1)
    except KeyboardInterrupt:
        reporter.error("interrupted; finished variants are kept, nothing is half written")
        return 130
    return max(codes)


@contextmanager
def _alone(model: ModelFolder) -> Iterator[None]:
    """Hold the model's folder against another build, which would overwrite the manifest. Raises RepositoryError."""
    folder = os.open(model.path, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise RepositoryError(f"{model.path}: another build is at work here") from error
    finally:
        os.close(folder)


def _build_model(model: ModelFolder, only: list[str] | None, *, force: bool, quick: bool, reporter: Reporter) -> int:
    """Build one model; returns 0, or 1 when a recipe crashed. Raises RepositoryError."""
    label, version, hardware = model.name, model.newest(), detect_hardware()
    version.recover()
    planned = plan(version, hardware, quick=quick)
    names = [variant.name for variant in planned]
    for wanted in only or ():
        if wanted not in names:
            raise RepositoryError(f"{model.path}: no variant {wanted!r} is configured; {nearest(wanted, names)}")
    for gone in sorted(set(version.manifest().variants) - set(names)):
        version.remove_variant(gone)
        reporter.line(f"{label} {gone}: removed, because it is no longer configured")
    chosen = [variant for variant in planned if only is None or variant.name in (*only, REFERENCE)]
    if not force and all(is_current(version, variant) for variant in chosen):
        _vouch_for_data(version)
        reporter.line(f"{label}: nothing changed, all {len(chosen)} variants are up to date")
        return 0
    keeps_reference = not force and kept_product(version, chosen[0]) is not None
    with importable(model.path), tempfile.TemporaryDirectory(prefix="gearshift-build-") as folder:
        opened = _open_factory(version, hardware, Path(folder), keeps_reference, quick=quick, reporter=reporter)
        factory = replace(opened, force=force)
        _vouch_for_data(version)  # first, so that an interrupt leaves a manifest that is whole
        due = (variant for variant in chosen if force or not is_current(version, variant))
        done = [factory.make(variant) for variant in due]  # asked one by one: a new reference leaves its children stale
        factory.summarise()
    return 0 if all(done) else 1


@dataclass(frozen=True, slots=True)
class _Factory:
    """What the variants of one version share while they are made."""

    version: VersionFolder
    hardware: Hardware
    source: Source
    data: DataSets
    verifier: Verifier
    work: Path
    trial: Trial | None
    quick: bool
    reporter: Reporter
    force: bool = False
    made: Made = field(default_factory=dict)

    def make(self, planned: Planned) -> bool:
        """Build, evaluate, gate and write one variant; returns False when its recipe crashed."""
        label = f"{self.version.model.name} {planned.name}"
        with self.reporter.step(label) as advance:
            card, files, crashed = self._attempt(planned, advance)
            entry = ManifestEntry(
                fingerprint="" if crashed else planned.fingerprint,
                made="" if crashed else planned.made,
                parent_sha256=file_sha256(self._parent(card)),
                evaluation_sha256=self._evaluation_sha256(),
            )
            self.version.write_variant(card, files, entry)
        self.reporter.line(f"{label}: {card.gate.verdict}: {card.gate.reason}")
        return not crashed

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
            kept = None if self.force else kept_product(self.version, planned)
            product = kept or run_chain(planned.steps, self._ingredients(planned, advance), self.made)
            advance("evaluating", 0.9)
            return self._prove(planned, product), product.files, False
        except RecipeRejected as error:
            return _rejected(planned, str(error)), {}, False
        except RepositoryError:
            raise
        except Exception as error:  # whatever goes wrong inside one recipe, the others still deserve their turn
            if planned.name == REFERENCE:
                raise
            return _rejected(planned, f"the recipe crashed: {type(error).__name__}: {_in_a_line(error)}"), {}, True

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
            quick=self.quick,
            progress=lambda share: advance("training", 0.9 * share),
        )

    def _prove(self, planned: Planned, product: Product) -> Card:
        """The card of something that was made."""
        runtimes, gate = self.verifier.verify(planned.name, product.files, product.precision)
        cost = cost_of(product.files[product.artefact])
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

    def _requirements(self, product: Product) -> dict[str, object]:
        """What a host needs: 8-bit weights were proven here only if sums of their products do not saturate here."""
        by_step = [product.facts, *(facts for facts in product.facts.values() if isinstance(facts, dict))]
        is_wide = any(facts.get("reduce_range") is False for facts in by_step)
        is_wide &= not needs_reduced_range(self.hardware)
        return {"precision": product.precision} | ({"exact_int8_sums": True} if is_wide else {})

    def summarise(self) -> None:
        """The table of all variants, with their speed beside fp32's, and what a person should know."""
        cards, absent = sound_cards(self.version)
        with self.reporter.step(f"{self.version.model.name} speed") as advance:
            advance("measuring", 0.0)
            speeds = measure_speeds(self.version, cards, self.source, self.data.any, self.verifier)
        self.reporter.table(table(cards, speeds, f"{self.version.model.name} version {self.version.number}"))
        for sentence in (*sentences(cards, speeds), *absent):
            self.reporter.line(sentence)


def _vouch_for_data(version: VersionFolder) -> None:
    """Put the evaluation data, which a server may load to verify again, and the tools into the manifest."""
    manifest, evaluation = version.manifest(), version.model.config.evaluation
    files = {file: sha for file, sha in manifest.files.items() if file.startswith("variants/")}
    if evaluation is not None:
        files[evaluation.data] = file_sha256(version.resolve(evaluation.data))
    vouched = manifest.model_copy(update={"files": files, "tools": tool_versions()})
    if vouched != manifest:
        version.write_manifest(vouched)


def _open_factory(
    version: VersionFolder, hardware: Hardware, work: Path, keeps_reference: bool, *, quick: bool, reporter: Reporter
) -> _Factory:
    """Read data and source, and check them against each other. Raises RepositoryError."""
    with reporter.step(version.model.name) as advance:
        advance("reading data and source", 0.0)
        files, targets = read_files(version), targets_of(version)
        first = next(iter(files.values()), {})
        example = {name: array[:_EXAMPLES] for name, array in first.items() if name not in targets}
        source = open_source(version, example or None, work)
        data = match_sets(version, files, source.sample_specs)
    if keeps_reference:  # children must descend from the artefact that is served
        source = replace(source, graph=version.artefact(REFERENCE, "model.onnx"))
    if quick and data.evaluation is not None:
        data = replace(data, evaluation=spread(data.evaluation, QUICK_EVALUATION_SAMPLES))
    _use_our_cores(source, hardware)
    config, runtimes = version.model.config, available_runtimes()
    verifier = Verifier(config, data.evaluation, source.graph, source.max_batch, runtimes, hardware)
    trial = _trial(source, data, config, hardware)
    return _Factory(version, hardware, source, data, verifier, work, trial, quick, reporter)


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


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _rejected(planned: Planned, reason: str) -> Card:
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
    )
