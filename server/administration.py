"""What an operator may change while the server runs: load and unload models. Exists only with `--admin`.

Rules: one thing at a time, on a thread of its own, since loading measures latencies for seconds; the client gets its
answer when it is done. A name from a client reaches the repository only after it was found among its models.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from server.errors import Infeasible, NotFound, ServingError
from server.models import ServedModel
from server.transport.transport import Call, Reply, Transport
from server.wire.tensors import quoted
from variants.repository import ModelFolder

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Actions:
    """What the assembly lets an operator do. `load` returns why a model could not be loaded, or None."""

    folders: Callable[[], Sequence[ModelFolder]]
    load: Callable[[ModelFolder], str | None]
    unload: Callable[[str], None]
    variant_changed: Callable[[ServedModel], None]


class Administration:
    """Carries out load and unload in the order they came."""

    def __init__(self, actions: Actions, transport: Transport, refuse: Callable[[Call, ServingError], Reply]) -> None:
        """`refuse` makes the reply that carries an error."""
        self._actions = actions
        self._transport = transport
        self._refuse = refuse
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="administration")

    def load(self, name: str, call: Call) -> None:
        """Load a model of the repository, again if it is loaded; replies to the call when that is done."""
        self._submit(call, lambda: self._load(name))

    def unload(self, name: str, call: Call) -> None:
        """Stop serving the model that has this name when its turn comes; replies when what it admitted is answered."""
        self._submit(call, lambda: self._actions.unload(name))

    def variant_changed(self, model: ServedModel) -> None:
        """Make it known that a variant's state changed."""
        self._actions.variant_changed(model)

    def stop(self) -> None:
        """Finish what has begun, drop the rest."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _load(self, name: str) -> None:
        folder = next((folder for folder in self._actions.folders() if folder.path.name == name), None)
        if folder is None:
            raise NotFound(f"the repository has no model {quoted(name)}")
        reason = self._actions.load(folder)
        if reason is not None:
            raise Infeasible(f"model {name} cannot load: {reason}")

    def _submit(self, call: Call, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
                reply = Reply(call, b"")  # both answers are empty messages
            except ServingError as error:
                reply = self._refuse(call, error)
            except Exception:
                log.exception("administration failed")
                reply = self._refuse(call, Infeasible("the change failed; the server's log explains"))
            self._transport.reply([reply])

        self._thread.submit(run)
