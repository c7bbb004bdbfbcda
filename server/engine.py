"""The life of a request between the transport and the scheduler: admitted, queued, run, answered once.

Rules: the scheduler is touched only under `_lock`, which is never held during a runtime call, a reply or a listener.
Success, failure, expiry and cancellation of a request all end in `_close`, which only the first of them passes.
The listeners hear of an end before its client does, so that whoever has an answer finds it counted.
The threads that call in here are `Executors`'.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from typing import Protocol, TypeVar

from server.endings import (
    answer_record,
    batch_record,
    end_record,
    error_reply,
    incident,
    reason_for,
    refusal_outcome,
)
from server.errors import Cancelled, ServingError, Unavailable
from server.events import Decided, Event, Listener
from server.executors import Executors
from server.inference import Inference, Part, gather, scatter
from server.models import Models, ServedModel
from server.scheduling.admission import make_request
from server.scheduling.scheduler import End, Run, Scheduler
from server.scheduling.slo import ModelKey, Outcome, Request
from server.transport.transport import Call, Reply, Taken, Transport
from server.wire.inference import (
    MODEL_INFER,
    MODEL_STREAM_INFER,
    encode_stream_response,
    parse_infer,
    read_request,
)

log = logging.getLogger(__name__)

Seen = TypeVar("Seen")

Authorise = Callable[[str, Iterable[tuple[str, str | bytes]]], None]
"""Takes a method and its metadata; raises Unauthenticated or PermissionDenied."""


class Services(Protocol):
    """Answers every call that is not an inference."""

    def answer(self, call: Call) -> Sequence[Reply]:
        """The replies to a call; none yet where the answer comes later."""
        ...

    def forget(self, call: Call) -> None:
        """The client of a call went away."""
        ...


class Engine:
    """Carries out what the scheduler says. `clock` is `time.monotonic_ns`, which the transport's calls use too."""

    def __init__(  # noqa: PLR0913 - the composition root names its parts
        self,
        *,
        scheduler: Scheduler,
        models: Models,
        transport: Transport,
        services: Services,
        listeners: Sequence[Listener],
        executors: int,
        authorise: Authorise | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._scheduler = scheduler
        self._models = models
        self._by_key: dict[ModelKey, ServedModel] = {}
        self._transport = transport
        self._services = services
        self._listeners = tuple(listeners)
        self._authorise = authorise
        self._clock = clock
        self._numbers = count()
        self._inferences: dict[Call, Inference] = {}
        self._lock = threading.Lock()
        self._settled = threading.Condition(self._lock)
        self._draining = False
        self._executors = Executors(executors, self, transport)

    def start(self) -> None:
        """Start serving what the transport takes in."""
        self._executors.start()

    def add_model(self, model: ServedModel) -> None:
        """Serve a model; one that served under its name before answers what it has admitted."""
        with self._lock:
            self._by_key[model.key] = model
            self._scheduler.add_model(model.queue)
        self._models.add(model)

    def remove_model(self, model: ServedModel) -> None:
        """Forget a model that the registry no longer names, once nothing of it waits or runs."""
        with self._settled:
            self._scheduler.retire_model(model.key)
            self._transport.wake()
            self._settled.wait_for(lambda: not self._busy_with(model))
            self._scheduler.remove_model(model.key)
            self._by_key.pop(model.key, None)

    def _busy_with(self, model: ServedModel) -> bool:
        """Whether something of a model waits or runs; a batch may outlive its clients."""
        return self._scheduler.runs(model.key) or any(i.model is model for i in self._inferences.values())

    def drain(self, seconds: float) -> bool:
        """Refuse new inferences and wait for the admitted ones; False when some were left after `seconds`."""
        self._draining = True
        with self._settled:
            return self._settled.wait_for(lambda: not self._inferences, seconds)

    def stop(self, seconds: float = 5.0) -> None:
        """Stop the threads; what still waits is not answered, and who is in a runtime for longer is left there."""
        self._executors.stop(seconds)

    def snapshot(self, read: Callable[[Scheduler, int], Seen]) -> Seen:
        """What `read` makes of the scheduler at this moment, consistently."""
        with self._lock:
            return read(self._scheduler, self._clock())

    def inflight(self) -> Mapping[str, int]:
        """Admitted and unanswered inferences by model."""
        with self._lock:
            counts: dict[str, int] = {}
            for inference in self._inferences.values():
                if not inference.ended:
                    counts[inference.model.name] = counts.get(inference.model.name, 0) + 1
            return counts

    def decide(self, executor: int | None) -> tuple[Run | None, int | None]:
        """The executor's next batch, or how many ns to wait for calls before asking again; see `Work`."""
        run: Run | None = None
        wait_ns: int | None = None
        ended: list[End] = []
        try:
            with self._lock:
                start_ns = self._clock()
                ended += self._scheduler.tick(start_ns)
                if executor is not None:
                    run, given_up = self._scheduler.decide(executor, start_ns)
                    ended += given_up
                now_ns = self._clock()
                if run is None:
                    event_ns = self._scheduler.next_event_ns(now_ns)
                    wait_ns = None if event_ns is None else max(0, event_ns - now_ns)
        finally:  # what was handed over has left its queue: whatever goes wrong, nobody else would tell its client
            self._end_all(ended)
        if run is not None:
            self._tell(Decided(run.model.name, now_ns - start_ns))
        return run, wait_ns

    def handle(self, taken: Taken) -> None:
        """Admit or answer every call, then let go of those whose client went away."""
        for call in taken.calls:
            if call.method in (MODEL_INFER, MODEL_STREAM_INFER):
                self._admit(call)
            else:
                self._answer(call)
        for call in taken.cancelled:  # after the calls: one may have come and gone in the same moment
            self._cancel(call)

    def _answer(self, call: Call) -> None:
        """Let the services answer a call that is not an inference."""
        try:
            self._check_credentials(call)
            replies = self._services.answer(call)
        except ServingError as error:
            replies = [error_reply(call, error)]
        except Exception:
            replies = [error_reply(call, incident(f"answering {call.method}"))]
        self._transport.reply(replies)

    def _check_credentials(self, call: Call) -> None:
        if self._authorise is not None:
            self._authorise(call.method, call.metadata)

    def _admit(self, call: Call) -> None:
        """Decode, check and queue one inference; whatever is wrong with it ends here and touches nobody else."""
        name = version = request_id = ""
        try:
            self._check_credentials(call)
            message = parse_infer(call.message)
            call.message = b""  # decoded: while the request waits, its bytes need not be held twice
            name, version, request_id = message.model_name, message.model_version, message.id
            model = self._models.find(name, version)
            version = model.version
            if self._draining:
                raise Unavailable("the server is draining")
            while not self._queue(Inference(call, read_request(message, model.signature), model)):
                model = self._newer(model, message.model_version)
        except ServingError as error:
            self._refuse(call, name, version, request_id, error)
        except Exception:
            self._refuse(call, name, version, request_id, incident(f"admitting a request for {name!r}"))

    def _newer(self, model: ServedModel, version: str) -> ServedModel:
        """What serves in place of a model that has just gone. Raises what `find` raises, and Unavailable."""
        newer = self._models.find(model.name, version)
        if newer is model:
            raise Unavailable(f"model {model.name} is being replaced")
        return newer

    def _queue(self, inference: Inference) -> bool:
        """Admit or refuse; False when the model has gone, and with it the ranking its floor class would refer to."""
        call, key = inference.call, inference.model.key
        ended: list[End] = []
        inference.requests = [self._request(inference, part) for part in inference.parts()]
        inference.open_parts = len(inference.requests)
        inference.deadline_ns = inference.requests[0].deadline_ns
        try:
            with self._lock:
                if self._by_key.get(key) is not inference.model:
                    return False
                self._inferences[call] = inference
                for request in inference.requests:
                    ended += self._scheduler.arrived(request, self._clock())
                    if ended and ended[-1].request is request:
                        break
        finally:  # as in `decide`
            self._end_all(ended)
        return True

    def _request(self, inference: Inference, part: Part) -> Request:
        call, request, model = inference.call, inference.request, inference.model
        timeout_ns = inference.timeout_ns
        return make_request(
            model.queue,
            request.slo,
            model.defaults,
            number=next(self._numbers),
            samples=part.samples,
            size_bytes=request.payload_bytes * part.samples // max(request.samples, 1),
            shape=request.shape_key,
            length=request.length,
            arrival_ns=call.arrival_ns,
            rpc_deadline_ns=None if timeout_ns is None else call.arrival_ns + timeout_ns,
            payload=part,
        )

    def execute(self, run: Run) -> None:
        """Run a batch on the thread that calls, and answer it."""
        model = self._by_key[run.model]
        parts: list[Part] = [request.payload for request in run.requests]  # type: ignore[misc]
        batched = model.signature.max_batch_size > 0
        start_ns = self._clock()
        try:
            outputs = model.sessions[run.variant].run(gather(parts))
            shares = scatter(parts, outputs, batched=batched)
        except Exception:
            self._failed(run, start_ns)
            return
        end_ns = self._clock()
        answered: list[Inference] = []
        with self._lock:
            counts = set(self._scheduler.finished(run, end_ns, end_ns - start_ns))
            for request, part, share in zip(run.requests, parts, shares, strict=True):
                if request not in counts:
                    continue  # tried again meanwhile: its answer comes, or came, from there
                part.outputs, part.place, part.batch_size = share, run.place, run.samples
                part.reason, part.floor_met = reason_for(request, run), bool(request.asked >> run.place & 1)
                part.queue_ns, part.compute_ns = start_ns - request.arrival_ns, end_ns - start_ns
                if part.inference.part_answered():
                    answered.append(part.inference)
            self._settled.notify_all()
        self._tell(batch_record(run, end_ns - start_ns, failed=False))
        self._reply(answered)

    def _failed(self, run: Run, start_ns: int) -> None:
        error = incident(f"running {run.samples} samples of {run.model.name} on {run.variant}")
        end_ns = self._clock()
        for request in run.requests:
            request.payload.failed_on = run.variant  # type: ignore[attr-defined]
        with self._lock:
            ended = self._scheduler.failed(run, end_ns, error.incident)
            self._settled.notify_all()
        self._transport.wake()  # whoever leads must see the requests that wait again
        self._tell(batch_record(run, end_ns - start_ns, failed=True))
        self._end_all(ended)

    def _reply(self, answered: Sequence[Inference]) -> None:
        """Encode and send the answers of one batch together."""
        replies, closed = [], []
        now_ns = self._clock()
        for inference in answered:
            if not self._close(inference):
                continue
            outcome = inference.outcome(now_ns)
            try:
                message = _encoded(inference, outcome)
            except Exception:  # this one cannot be encoded; its batch-mates can
                error = incident(f"encoding an answer of {inference.model.name}")
                self._refuse_queued(inference, Outcome.FAILED, error, inference.variant().name)
                continue
            self._tell(answer_record(inference, outcome, now_ns))
            replies.append(Reply(inference.call, message))
            closed.append(inference)
        if replies:
            self._transport.reply(replies)
            self._forget(closed)

    def _close(self, inference: Inference) -> bool:
        """Claim the one end of an inference; False when it has ended already."""
        with self._lock:
            if inference.ended:
                return False
            inference.ended = True
            for request in inference.requests:
                self._scheduler.cancelled(request)
            return True

    def _forget(self, inferences: Iterable[Inference]) -> None:
        """Let go of what was replied to; who drains waits for this, and not just for the end."""
        with self._settled:
            for inference in inferences:
                self._inferences.pop(inference.call, None)
                inference.requests = []  # a cycle would keep its arrays until Python looks for cycles
            self._settled.notify_all()

    def _end_all(self, ended: Iterable[End]) -> None:
        """Tell each of them; a bug met with one keeps neither the others from theirs nor a batch from running."""
        for end in ended:
            part: Part = end.request.payload  # type: ignore[assignment]
            variant = part.failed_on if end.outcome is Outcome.FAILED else ""
            try:
                self._end(part.inference, end.outcome, end.error, variant)
            except Exception:
                log.exception("ending a request of %s failed", end.request.model.name)

    def _end(self, inference: Inference, outcome: Outcome, error: ServingError, variant: str = "") -> None:
        """End an inference with an error, unless it has ended."""
        if self._close(inference):
            self._refuse_queued(inference, outcome, error, variant)

    def _refuse_queued(self, inference: Inference, outcome: Outcome, error: ServingError, variant: str) -> None:
        call, request, now_ns = inference.call, inference.request, self._clock()
        facts = {"reason": str(outcome), "slo_met": "false", "queue_us": str((now_ns - call.arrival_ns) // 1000)}
        if variant:
            facts["variant"] = variant
        self._tell(end_record(call, inference.model.key[:2], outcome, now_ns, inference, variant))
        self._transport.reply([error_reply(call, error, request.id, facts)])
        self._forget([inference])

    def _cancel(self, call: Call) -> None:
        inference = self._inferences.get(call)
        if inference is None:
            self._services.forget(call)
            return
        expired = call.deadline_ns is not None and self._clock() >= call.deadline_ns
        outcome = Outcome.EXPIRED if expired else Outcome.CANCELLED
        self._end(inference, outcome, Cancelled("the client went away"))

    def _refuse(self, call: Call, name: str, version: str, request_id: str, error: ServingError) -> None:
        outcome = refusal_outcome(error)
        inference = self._inferences.get(call)
        if inference is not None:  # a bug of ours struck half-way through queueing it
            self._end(inference, outcome, error)
            return
        self._tell(end_record(call, (name, version), outcome, self._clock()))
        self._transport.reply([error_reply(call, error, request_id, {"reason": str(outcome)})])

    def _tell(self, event: Event) -> None:
        for listener in self._listeners:
            try:
                listener(event)
            except Exception:  # whoever is told of a request must not cost it its reply
                log.exception("a listener failed on %s", type(event).__name__)


def _encoded(inference: Inference, outcome: Outcome) -> bytes:
    message = inference.answer(outcome)
    return message if inference.call.stream is None else encode_stream_response(message)
