"""What `variants: auto` tried on a version and how each attempt ended, so that nothing is tried twice.

Rules of this file: an attempt has one end; its reason is a sentence for a person and nothing reads it. The record is
written after every attempt, so that an interrupt costs one attempt and never what was proven before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, TypeAdapter

from variants.durable import write_durably
from variants.model_config import VariantConfig
from variants.records import read_record_file
from variants.variant import Card, Verdict

FILE = "auto.json"


class End(StrEnum):
    """How an attempt ended: on the front, off it, not begun for a reason or for lack of time, or in a crash."""

    KEPT = "kept"
    FELL = "not kept"
    NOT_TRIED = "not tried"
    OUT_OF_BUDGET = "out of budget"
    CRASHED = "crashed"


def _whole(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """An entry that `model.yaml` would take. Raises ValueError."""
    VariantConfig.model_validate(entry)
    return entry


Finite = Annotated[float, Field(ge=0, le=1e12)]


@dataclass(frozen=True, slots=True)
class Attempt:
    """One line of the record: a candidate, as `model.yaml` would have it, its end, and why.

    `card` is that of the attempt; where it crashed or time ran out, of what was there before, if anything was.
    `fingerprint` is empty where nothing was made.
    """

    entry: Annotated[Mapping[str, Any], AfterValidator(_whole)]
    end: End
    reason: str
    card: Card | None = None
    fingerprint: str = ""
    seconds: Finite = 0.0

    @property
    def name(self) -> str:
        """The variant's name."""
        return str(self.entry["name"])

    @property
    def passed(self) -> bool:
        """Whether the variant passed the gate, kept or not."""
        return self.end in (End.KEPT, End.FELL) and self.card is not None and self.card.gate.verdict is Verdict.PASSED

    @property
    def stays(self) -> bool:
        """Whether the repository still has it: a crash, or a budget that is used up, takes nothing away."""
        made = self.card is not None and self.card.artefact is not None
        return self.end is End.KEPT or (self.end in (End.CRASHED, End.OUT_OF_BUDGET) and made)


@dataclass(frozen=True, slots=True)
class Record:
    """What `auto` did on a version and a host (`Hardware.fingerprint`); not `complete` if it was interrupted."""

    host: str
    budget_minutes: Finite
    complete: bool
    attempts: tuple[Attempt, ...]

    @property
    def out_of_budget(self) -> bool:
        """Whether more time would try more."""
        return any(attempt.end is End.OUT_OF_BUDGET for attempt in self.attempts)


_RECORD = TypeAdapter(Record)


def read_record(version: Path) -> Record | None:
    """What `auto` last did, None if it never ran. Raises RepositoryError."""
    return read_record_file(version / FILE, _RECORD)


def write_record(version: Path, record: Record) -> None:
    """Replace the record."""
    write_durably(version / FILE, _RECORD.dump_json(record, indent=1))
