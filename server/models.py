"""The loaded models, by name, and what became of those that could not load.

Rules: a `ServedModel` is complete before anybody sees it; the registry is changed by replacing entries, so readers
need no lock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from threading import Lock

from server.eligibility import without
from server.errors import NotFound, Unavailable
from server.scheduling.admission import Defaults
from server.scheduling.model_queue import ModelQueue
from server.scheduling.slo import ModelKey
from server.wire.inference import Signature
from server.wire.tensors import quoted
from variants.runtimes.runtime import Session
from variants.variant import Card, State, Variant


@dataclass(frozen=True, slots=True, eq=False)
class ServedModel:
    """A model that answers. `variants` has every one, `queue` ranks those that can run here.

    `sessions` holds one session for each of these, shared by all executors.
    """

    name: str
    version: str
    signature: Signature
    variants: tuple[Variant, ...]
    cards: Mapping[str, Card]
    sessions: Mapping[str, Session]
    queue: ModelQueue
    defaults: Defaults
    load_ns: int

    @property
    def key(self) -> ModelKey:
        """How the scheduler addresses the model."""
        return self.queue.key

    def current_variants(self) -> tuple[Variant, ...]:
        """The variants in the states they have now; an operator may have disabled some since they were loaded."""
        disabled = {name for name, state in self.queue.states.items() if state is State.DISABLED}
        return tuple(without(self.variants, disabled)) if disabled else self.variants


@dataclass(frozen=True, slots=True)
class NotServed:
    """A model that is known and does not answer, and the sentence that says why."""

    name: str
    version: str
    state: str
    reason: str


class Models:
    """The registry. One version of a model serves at a time."""

    def __init__(self) -> None:
        self._served: dict[str, ServedModel] = {}
        self._not_served: dict[str, NotServed] = {}
        self._lock = Lock()

    def add(self, model: ServedModel) -> None:
        """Serve a model, in place of the version that served before."""
        with self._lock:
            self._served = {**self._served, model.name: model}
            self._not_served = {name: entry for name, entry in self._not_served.items() if name != model.name}

    def drop(self, entry: NotServed) -> None:
        """Stop serving a model, or note that it could not be loaded."""
        with self._lock:
            self._served = {name: model for name, model in self._served.items() if name != entry.name}
            self._not_served = {**self._not_served, entry.name: entry}

    def served(self) -> list[ServedModel]:
        """Every model that answers, by name."""
        return [self._served[name] for name in sorted(self._served)]

    def not_served(self) -> list[NotServed]:
        """Every model that is known and does not answer, by name."""
        return [self._not_served[name] for name in sorted(self._not_served)]

    def find(self, name: str, version: str = "") -> ServedModel:
        """The model that serves under this name; an empty version is whichever serves.

        Raises NotFound for an unknown name or another version, Unavailable for a model that could not load.
        """
        model = self._served.get(name)
        if model is None:
            if name in self._not_served:
                raise Unavailable(f"model {name} is not ready")
            raise NotFound(f"there is no model {quoted(name)}")
        if version not in ("", model.version):
            raise NotFound(f"model {name} has no version {quoted(version)}; version {model.version} serves")
        return model
