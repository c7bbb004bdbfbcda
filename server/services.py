"""Every rpc that is not an inference: health, metadata, statistics, the repository, variants, reflection.

Rules: an answer is made at once from what is loaded, except where the work takes long (loading a model): that runs on
the administration's own thread and replies when it is done. Errors leave as `ServingError`s; the engine gives them
their status.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, cast

from server.administration import Administration
from server.eligibility import without
from server.errors import Infeasible, NotFound, NotOffered, Unavailable
from server.models import Models, ServedModel
from server.scheduling.explain import explain
from server.scheduling.scheduler import Scheduler
from server.statistics import Statistics, Tally
from server.transport.transport import Call, Kind, Reply, Transport
from server.wire import health, inference, metadata, reflection, variants
from server.wire.tensors import quoted
from variants.variant import REFERENCE, State, Variant

METHODS = cast("Mapping[str, Kind]", {**inference.METHODS, **variants.METHODS, **health.METHODS, **reflection.METHODS})
"""Every rpc this server knows, full path -> kind."""

Snapshot = Callable[[Callable[[Scheduler, int], Any]], Any]
"""Runs a function on the scheduler at one consistent moment."""


class ServerServices:
    """Answers control calls; `ready` is what health and readiness say."""

    def __init__(
        self,
        models: Models,
        statistics: Statistics,
        transport: Transport,
        snapshot: Snapshot,
        administration: Administration | None,
        executors: int,
    ) -> None:
        self._models = models
        self._statistics = statistics
        self._transport = transport
        self._snapshot = snapshot
        self._administration = administration
        self._executors = executors
        self._accepting = False
        self._not_accepting = "starting"
        self._watchers: dict[Call, tuple[str, bool | None]] = {}
        self._lock = threading.Lock()
        prefix = f"/{inference.SERVICE}/"
        self._answers: dict[str, Callable[[Call], bytes | None]] = {
            prefix + "ServerLive": lambda _: metadata.encode_live(True),
            prefix + "ServerReady": lambda _: metadata.encode_ready(self.ready),
            prefix + "ServerMetadata": self._server_metadata,
            prefix + "ModelReady": self._model_ready,
            prefix + "ModelMetadata": self._model_metadata,
            prefix + "ModelConfig": self._model_config,
            prefix + "ModelStatistics": self._model_statistics,
            prefix + "RepositoryIndex": self._repository_index,
            prefix + "RepositoryModelLoad": self._load,
            prefix + "RepositoryModelUnload": self._unload,
            variants.LIST_VARIANTS: self._list_variants,
            variants.EXPLAIN_ROUTE: self._explain_route,
            variants.SET_VARIANT_STATE: self._set_variant_state,
            health.CHECK: self._check,
            health.WATCH: self._watch,
            **dict.fromkeys(reflection.METHODS, lambda call: reflection.answer(call.message)),
        }

    @property
    def ready(self) -> bool:
        """Whether inferences are accepted and some model can answer them."""
        return self._accepting and bool(self._models.served())

    @property
    def not_ready_reason(self) -> str:
        """Why `ready` is False."""
        return "no model is loaded" if self._accepting else self._not_accepting

    def accept(self, accepting: bool) -> None:
        """Say whether the server takes inferences from now on, and tell whoever watches."""
        self._accepting = accepting
        self._not_accepting = "draining"
        self.changed()

    def changed(self) -> None:
        """Tell every watcher whose service has another status than it was told last."""
        replies = []
        with self._lock:
            for call, (service, told) in self._watchers.items():
                serving = self._serving(service)
                if serving is not told:
                    self._watchers[call] = service, serving
                    replies.append(Reply(call, health.encode_watch(serving), final=False))
            if replies:
                self._transport.reply(replies)

    def answer(self, call: Call) -> Sequence[Reply]:
        """The replies to a call; none yet where the answer comes later. Raises ServingError."""
        answer = self._answers.get(call.method)
        if answer is None:
            raise NotOffered(f"{call.method.rpartition('/')[2]} is not offered by this server")
        message = answer(call)
        if message is None:
            return ()
        return [Reply(call, message)]

    def forget(self, call: Call) -> None:
        """The client of a call went away."""
        with self._lock:
            self._watchers.pop(call, None)

    def _check(self, call: Call) -> bytes:
        service = health.read_service(call.message)
        return health.encode_check(service, self._serving(service))

    def _watch(self, call: Call) -> None:
        service = health.read_service(call.message)
        with self._lock:  # held while replying, so that a watcher never sees an older status after a newer one
            serving = self._serving(service)
            self._watchers[call] = service, serving
            self._transport.reply([Reply(call, health.encode_watch(serving), final=False)])

    def _serving(self, service: str) -> bool | None:
        """A service's health; None for one nobody has heard of."""
        if service == health.LIVE:
            return True
        if service in ("", inference.SERVICE, variants.SERVICE):
            return self.ready
        if any(model.name == service for model in self._models.served()):
            return self._accepting
        return False if any(entry.name == service for entry in self._models.not_served()) else None

    def _server_metadata(self, _: Call) -> bytes:
        return metadata.encode_server_metadata(_own_version(), administration=self._administration is not None)

    def _model_ready(self, call: Call) -> bytes:
        name, wanted = metadata.read_model(call.message)
        known = any(m.name == name and wanted in ("", m.version) for m in self._models.served())
        return metadata.encode_ready(known and self._accepting)

    def _model_metadata(self, call: Call) -> bytes:
        return metadata.encode_model_metadata(self._facts(self._models.find(*metadata.read_model(call.message))))

    def _model_config(self, call: Call) -> bytes:
        return metadata.encode_model_config(self._facts(self._models.find(*metadata.read_model(call.message))))

    def _facts(self, model: ServedModel) -> metadata.ModelFacts:
        reference = next(variant for variant in model.variants if variant.name == REFERENCE)
        return metadata.ModelFacts(
            name=model.name,
            versions=(model.version,),
            platform=f"{reference.runtime}_onnx",
            signature=model.signature,
            executors=self._executors,
            on_gpu=reference.device.startswith("cuda"),
            parameters={"variants": ",".join(variant.name for variant in model.variants)},
        )

    def _model_statistics(self, call: Call) -> bytes:
        name, wanted = metadata.read_model(call.message)
        models = [self._models.find(name, wanted)] if name else self._models.served()
        return metadata.encode_statistics(self._totals(model) for model in models)

    def _totals(self, model: ServedModel) -> metadata.StatisticsFacts:
        tallies = self._statistics.of(model.name, model.version)
        copying = metadata.Duration(tallies.compute.count)  # within compute_infer; perf_analyzer wants equal counts
        return metadata.StatisticsFacts(
            name=model.name,
            version=model.version,
            last_inference_ms=tallies.last_inference_ms,
            samples=tallies.inferences,
            batches=tallies.executions,
            success=_duration(tallies.success),
            fail=_duration(tallies.fail),
            queue=_duration(tallies.queue),
            compute_input=copying,
            compute_infer=_duration(tallies.compute),
            compute_output=copying,
            batch_sizes=tuple(
                metadata.BatchFacts(
                    size, metadata.Duration(tally.count), _duration(tally), metadata.Duration(tally.count)
                )
                for size, tally in sorted(dict(tallies.batches).items())
            ),
        )

    def _repository_index(self, call: Call) -> bytes:
        ready_only = metadata.read_index(call.message)
        entries = [metadata.IndexEntry(model.name, model.version, "READY") for model in self._models.served()]
        if not ready_only:
            entries += [
                metadata.IndexEntry(entry.name, entry.version, entry.state, entry.reason)
                for entry in self._models.not_served()
            ]
        return metadata.encode_index(entries)

    def _load(self, call: Call) -> None:
        name = metadata.read_load(call.message)
        self._administrator().load(name, call)

    def _unload(self, call: Call) -> None:
        name = metadata.read_unload(call.message)
        self._administrator().unload(name, call)

    def _administrator(self) -> Administration:
        if self._administration is None:
            raise NotOffered("administration is off; the server's operator can switch it on with --admin")
        return self._administration

    def _list_variants(self, call: Call) -> bytes:
        model = self._models.find(*variants.read_list_variants(call.message))
        described = [_described(model, variant) for variant in model.current_variants()]
        return variants.encode_variants(model.name, model.version, described, self._executors, model.defaults)

    def _explain_route(self, call: Call) -> bytes:
        asked = variants.read_explain_route(call.message)
        model = self._models.find(asked.model, asked.version)
        explanation = self._snapshot(
            lambda scheduler, now_ns: explain(
                model.queue,
                model.current_variants(),
                asked.slo,
                model.defaults,
                scheduler.load(model.queue, now_ns),
                scheduler.policy(model.key),
            )
        )
        return variants.encode_explanation(model.name, model.version, explanation)

    def _set_variant_state(self, call: Call) -> bytes:
        self._administrator()
        asked = variants.read_set_variant_state(call.message)
        model = self._models.find(asked.model, asked.version)
        loaded = next((variant for variant in model.variants if variant.name == asked.variant), None)
        if loaded is None:
            raise NotFound(f"model {model.name} has no variant {quoted(asked.variant)}")
        if loaded.profile is None:
            raise Infeasible(f"variant {loaded.name} cannot run on this host: {loaded.reason}")
        disabled = {name for name, state in model.queue.states.items() if state is State.DISABLED} - {loaded.name}
        now = without(model.variants, disabled if asked.enabled else disabled | {loaded.name})
        states = {variant.name: variant.state for variant in now if variant.profile is not None}
        if not self._snapshot(lambda scheduler, _: scheduler.set_states(model.key, states)):
            raise Unavailable(f"model {model.name} was just replaced or unloaded")
        self._transport.wake()  # what waited for the variant must be looked at again
        self._administrator().variant_changed(model)
        current = next(variant for variant in model.current_variants() if variant.name == loaded.name)
        return variants.encode_variant_state(_described(model, current))


def _described(model: ServedModel, variant: Variant) -> variants.Described:
    card = model.cards[variant.name]
    return variants.Described(variant, card.recipe, card.gate.verdict)


def _duration(tally: Tally) -> metadata.Duration:
    return metadata.Duration(tally.count, tally.ns)


def _own_version() -> str:
    try:
        return version("gearshift")
    except PackageNotFoundError:
        return "unknown"
