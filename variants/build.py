"""`gearshift build`: recipe -> evaluate -> gate -> card, for every variant of a model.

Rules of this file: one variant's failure never stops the others; a variant appears whole or not at all; what is
unchanged is left alone. `variants: auto` goes the same way with a plan of its own (see `auto.py`), and takes nothing
away before it knows better. Exit codes are the contract's: 0 built or honestly rejected, 1 a recipe crashed, 2 a bad
repository or configuration, 130 interrupted.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from variants import attempts
from variants.attempts import Attempt, End, Record
from variants.auto import OUT_OF_BUDGET, Candidate, candidates
from variants.factory import Factory, Options, in_a_line, open_factory
from variants.hardware import Hardware, detect_hardware
from variants.model_config import RepositoryError, VariantConfig, nearest
from variants.plan import Planned, is_current, plan, tool_versions
from variants.progress import Reporter
from variants.repository import ModelFolder, VersionFolder, file_sha256, open_path
from variants.source import importable
from variants.summary import not_worth_keeping
from variants.variant import REFERENCE, Verdict


def build(
    path: Path, *, only: list[str] | None = None, options: Options | None = None, reporter: Reporter | None = None
) -> int:
    """Build the variants of a model's newest version, or of every model of a repository; returns the exit code.

    `only` limits the work to the named variants; the reference is always kept up to date.
    """
    reporter, options = reporter or Reporter(), options or Options()
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
                    codes.append(_build_model(model, only, options, reporter))
            except RepositoryError as error:
                reporter.error(str(error))
                codes.append(2)
            except Exception as error:  # a full disk, or a reference that cannot be made: the others get their turn
                reporter.error(f"{model.path}: {type(error).__name__}: {in_a_line(error)}")
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


def _build_model(model: ModelFolder, only: list[str] | None, options: Options, reporter: Reporter) -> int:
    """Build one model; returns 0, or 1 when a recipe crashed. Raises RepositoryError."""
    version, hardware = model.newest(), detect_hardware()
    version.recover()
    if model.config.auto:
        if only is not None:
            raise RepositoryError(
                f"{model.path}: --variants chooses among configured ones, and `variants: auto` has none"
            )
        return _build_auto(version, hardware, options, reporter)
    planned = plan(version, hardware, quick=options.quick)
    names = [variant.name for variant in planned]
    for wanted in only or ():
        if wanted not in names:
            raise RepositoryError(f"{model.path}: no variant {wanted!r} is configured; {nearest(wanted, names)}")
    (version.path / attempts.FILE).unlink(missing_ok=True)  # what an earlier `variants: auto` did is history
    _remove_others(version, names, reporter)
    chosen = [variant for variant in planned if only is None or variant.name in (*only, REFERENCE)]
    if not options.force and all(is_current(version, variant) for variant in chosen):
        _vouch_for_data(version)
        reporter.line(f"{model.name}: nothing changed, all {len(chosen)} variants are up to date")
        return 0
    with _factory(version, planned[0], hardware, options, reporter) as factory:
        due = (variant for variant in chosen if options.force or not is_current(version, variant))
        crashes = [factory.make(variant) for variant in due]  # one by one: a new reference leaves its children stale
        factory.summarise()
    return 1 if any(crashes) else 0


@contextmanager
def _factory(
    version: VersionFolder, reference: Planned, hardware: Hardware, options: Options, reporter: Reporter
) -> Iterator[Factory]:
    """The opened factory of a version, in a folder that goes with it."""
    with importable(version.model.path), tempfile.TemporaryDirectory(prefix="gearshift-build-") as folder:
        factory = open_factory(version, reference, hardware, Path(folder), options, reporter)
        _vouch_for_data(version)  # first, so that an interrupt leaves a manifest that is whole
        yield factory


def _remove_others(version: VersionFolder, names: list[str], reporter: Reporter) -> None:
    for gone in sorted(set(version.manifest().variants) - set(names)):
        version.remove_variant(gone)
        reporter.line(f"{version.model.name} {gone}: removed, because it is no longer configured")


def _build_auto(version: VersionFolder, hardware: Hardware, options: Options, reporter: Reporter) -> int:
    """Try what `auto.candidates` says within the budget and keep the front. Returns as `_build_model`."""
    label, record, known = version.model.name, None, dict[str, Attempt]()
    with suppress(RepositoryError):  # a damaged record, or another release's, is as good as none
        record = None if options.force else attempts.read_record(version.path)
        known = _known(version, record, hardware, options)
    if record is not None and _is_settled(version, record, known, options):
        _vouch_for_data(version)
        kept = [attempt.name for attempt in record.attempts if attempt.end is End.KEPT]
        reporter.line(f"{label}: nothing changed; of {len(record.attempts)} techniques it keeps {', '.join(kept)}")
        return 0
    reference = plan(version, hardware, quick=options.quick, entries=[])[0]
    with _factory(version, reference, hardware, options, reporter) as factory:
        plans = candidates(factory.facts())
        _remove_others(version, [candidate.variant.name for candidate in plans], reporter)
        tried = _try_all(factory, plans, known)
        standing = {a.name: a.card for a in tried if a.card and a.end is End.KEPT}
        fallen = not_worth_keeping(standing, factory.summarise())
    settled = [replace(a, end=End.FELL, reason=fallen[a.name]) if a.name in fallen else a for a in tried]
    for attempt in settled:
        if attempt.name in version.manifest().variants and not attempt.stays:
            version.remove_variant(attempt.name)
        reporter.line(f"{label} {attempt.name}: {attempt.end}: {attempt.reason}")
    attempts.write_record(version.path, Record(hardware.fingerprint, options.budget_minutes, True, tuple(settled)))
    return 1 if any(attempt.end is End.CRASHED for attempt in settled) else 0


def _known(version: VersionFolder, record: Record | None, hardware: Hardware, options: Options) -> dict[str, Attempt]:
    """What was tried before from the same things on the same host, and ended. Raises RepositoryError."""
    if record is None or record.host != hardware.fingerprint:
        return {}
    entries = [VariantConfig.model_validate(attempt.entry) for attempt in record.attempts]
    planned = {each.name: each for each in plan(version, hardware, quick=options.quick, entries=entries)}
    return {
        attempt.name: attempt
        for attempt in record.attempts
        if attempt.end is not End.CRASHED
        and attempt.fingerprint in ("", planned[attempt.name].fingerprint)
        and (attempt.end is not End.KEPT or is_current(version, planned[attempt.name]))
    }


def _is_settled(version: VersionFolder, record: Record, known: Mapping[str, Attempt], options: Options) -> bool:
    """Whether nothing changed since, and a larger budget would not try more."""
    there = {attempt.name for attempt in record.attempts if attempt.stays}
    is_whole = record.complete and len(known) == len(record.attempts) and there == set(version.manifest().variants)
    return is_whole and (not record.out_of_budget or options.budget_minutes <= record.budget_minutes)


def _try_all(factory: Factory, plans: list[Candidate], known: Mapping[str, Attempt]) -> list[Attempt]:
    """Every candidate in turn, each written down at once together with what is known of those to come."""
    end = time.monotonic() + factory.options.budget_minutes * 60
    tried: dict[str, Attempt] = {}
    for candidate in plans:
        name = candidate.variant.name
        is_late = time.monotonic() > end and name != REFERENCE
        tried[name] = _attempt(factory, candidate, known.get(name), tried, is_late=is_late)
        record = Record(
            factory.hardware.fingerprint, factory.options.budget_minutes, False, tuple({**known, **tried}.values())
        )
        attempts.write_record(factory.version.path, record)
    return list(tried.values())


def _attempt(
    factory: Factory, candidate: Candidate, before: Attempt | None, tried: Mapping[str, Attempt], *, is_late: bool
) -> Attempt:
    """One candidate. What is known to have fallen is not made again, and what is current costs no time to keep."""
    version, variant, started = factory.version, candidate.variant, time.monotonic()
    if before is not None and before.end is End.FELL:
        return before
    planned = plan(version, factory.hardware, quick=factory.options.quick, entries=[variant])[-1]
    obstacle = candidate.obstacle(factory.facts(), tried)
    if is_current(version, planned) and (not factory.options.force or obstacle or is_late):
        return before if before and before.end is End.KEPT else _judged(version, variant, planned.fingerprint)
    if obstacle:
        return Attempt(variant.entry, End.NOT_TRIED, obstacle)
    if is_late:
        return replace(_judged(version, variant, ""), end=End.OUT_OF_BUDGET, reason=OUT_OF_BUDGET)
    crash = factory.make(planned, spares_proven=True)
    attempt = replace(_judged(version, variant, planned.fingerprint), seconds=round(time.monotonic() - started, 1))
    return replace(attempt, end=End.CRASHED, reason=crash) if crash else attempt


def _judged(version: VersionFolder, variant: VariantConfig, fingerprint: str) -> Attempt:
    """An attempt as the card in the repository has it, if there is one: one that passed is kept until all are known."""
    try:
        card = version.stored_card(variant.name)
    except RepositoryError:  # there is none, or it is damaged
        return Attempt(variant.entry, End.NOT_TRIED, "there is no card")
    end = End.KEPT if card.gate.verdict is Verdict.PASSED else End.FELL
    return Attempt(variant.entry, end, f"{card.gate.verdict}: {card.gate.reason}", card, fingerprint)


def _vouch_for_data(version: VersionFolder) -> None:
    """Put the evaluation data, which a server may load to verify again, and the tools into the manifest."""
    manifest, evaluation = version.manifest(), version.model.config.evaluation
    files = {file: sha for file, sha in manifest.files.items() if file.startswith("variants/")}
    if evaluation is not None:
        files[evaluation.data] = file_sha256(version.resolve(evaluation.data))
    vouched = manifest.model_copy(update={"files": files, "tools": tool_versions()})
    if vouched != manifest:
        version.write_manifest(vouched)
