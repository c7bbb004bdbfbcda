"""Assembly: settings in, a serving process out; start, readiness and drain.

Rules: this is the only place that constructs the parts and knows them all. Nothing listens before every model is loaded
or known to have failed, so a client that can connect gets answers.
"""

from __future__ import annotations

import logging
import os
import ssl
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from prometheus_client import CollectorRegistry

from server.administration import Actions, Administration
from server.device import why_not_cuda
from server.endings import error_reply
from server.engine import Engine
from server.layout import choose_layout
from server.loading import Host, for_clients, load_model
from server.metrics import ExecutorHealth, Metrics, ModelLoad
from server.models import Models, NotServed, ServedModel
from server.scheduling.policies import check_policy, policy_factory
from server.scheduling.scheduler import Scheduler
from server.security import Authorizer
from server.services import METHODS, ServerServices
from server.settings import Settings
from server.statistics import Statistics
from server.status import ModelStatus, Recent, ServerStatus
from server.trace import TraceRecorder
from server.transport.grpcio_transport import GrpcioTransport, Limits, Tls
from server.web import Site, WebServer, tls_context
from variants.hardware import Hardware, detect_hardware
from variants.measure import ProfileCache
from variants.model_config import RepositoryError
from variants.repository import ModelFolder, Repository
from variants.runtimes import available_runtimes

log = logging.getLogger(__name__)

_REASONS = ("best", "slack", "batch", "drain", "reserve", "pinned", "overload", "late", "retry", "policy")
_GRACE_S = 1.0
"""What open rpcs get to end after the drain, and then the executors."""


_NO_LOAD = ModelLoad(0, 0, 0, 0.0)


class StartError(Exception):
    """The server cannot start; one line says why."""


class Server:
    """All parts of one serving process."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.hardware = detect_hardware()
        self.models = Models()
        self.statistics = Statistics()
        self.recent = Recent(clock_ns=time.monotonic_ns)
        self.registry = CollectorRegistry()
        self.metrics = Metrics(self.registry, self._slo_thresholds_ns(), _REASONS)
        self.trace = _trace(settings)
        self.host = self._host()
        self.executors = self.host.executors
        self.scheduler = Scheduler(
            self.executors,
            max_requests=settings.max_queue_requests,
            max_bytes=settings.max_queue_bytes,
            policy=policy_factory(settings.policy),
        )
        authorizer = Authorizer.from_file(settings.auth_tokens) if settings.auth_tokens else None
        tls, host = _tls(settings), settings.host.strip("[]")
        self.transport = GrpcioTransport(
            METHODS,
            f"[{host}]:{settings.grpc_port}" if ":" in host else f"{host}:{settings.grpc_port}",
            limits=Limits(max_message_bytes=settings.max_message_bytes),
            tls=tls,
        )
        self.administration = self._administration() if settings.admin else None
        self.services = ServerServices(
            models=self.models,
            statistics=self.statistics,
            transport=self.transport,
            snapshot=lambda read: self.engine.snapshot(read),  # noqa: PLW0108 - the engine comes after its services
            administration=self.administration,
            executors=self.executors,
        )
        self.engine = Engine(
            scheduler=self.scheduler,
            models=self.models,
            transport=self.transport,
            services=self.services,
            listeners=[self.metrics, self.statistics, self.recent, *([self.trace] if self.trace else [])],
            executors=self.executors,
            authorise=authorizer.check if authorizer else None,
        )
        site = Site(self.registry, self.status, self.recent, authorizer)
        self.web = WebServer((settings.host, settings.http_port), site, _web_tls(settings))

    def _host(self) -> Host:
        """What models are loaded onto; how the cores of a CPU are shared is measured where nobody says."""
        host = _host(self.settings, self.hardware, *share_cores(self.settings, self.hardware))
        if self.settings.executors is None and host.device == "cpu":
            return choose_layout(host, self._folders())
        return host

    def _slo_thresholds_ns(self) -> list[int]:
        """The latencies that requests are judged by if they name none: edges of the latency histogram."""
        latencies_ms = {self.settings.default_latency_ms}
        for folder in self._folders():
            with suppress(RepositoryError):  # reported when the model is loaded
                latencies_ms.add(folder.config.slo.latency_ms or self.settings.default_latency_ms)
        return [int(latency_ms * 1e6) for latency_ms in sorted(latencies_ms)]

    def load_models(self) -> None:
        """Load every model of the repository. Raises StartError with --strict when one cannot load."""
        self.metrics.add_executors(self.executors)
        self.metrics.set_hardware(_hardware_facts(self.hardware, self.host.device))
        self.metrics.watch(self.loads)
        self.metrics.watch_executors(lambda: self.engine.snapshot(_executors_health))
        for folder in self._folders():
            self.load(folder)
        for failed in self.models.not_served():
            if self.settings.strict:
                raise StartError(f"--strict: model {failed.name} cannot load: {failed.reason}")

    def load(self, folder: ModelFolder) -> str | None:
        """Load one model and serve it, in place of what served under its name; returns why it could not be loaded."""
        name = folder.path.name
        try:
            model = load_model(ModelFolder(folder.path), self.host)
            self._check_policy(model)
        except RepositoryError as error:
            log.error("model %s cannot load: %s", name, error)
            reason = for_clients(str(error), folder)
        except Exception as error:
            log.exception("model %s cannot load", name)
            reason = f"internal error: {type(error).__name__}"
        else:
            before = next((served for served in self.models.served() if served.name == name), None)
            self.add(model)
            if before is not None:
                self.forget(before)
            return None
        if all(served.name != name for served in self.models.served()):
            self.models.drop(NotServed(name, "", "UNAVAILABLE", reason))
        return reason

    def _check_policy(self, model: ServedModel) -> None:
        """Raises RepositoryError for a model that the policy could not decide for."""
        try:
            check_policy(self.settings.policy, model.queue)
        except ValueError as error:
            raise RepositoryError(f"--policy {error}") from None

    def unload(self, name: str) -> None:
        """Stop serving a model at an operator's word. Raises NotFound or Unavailable where none serves."""
        self.remove(self.models.find(name), "unloaded")

    def show_states(self, model: ServedModel) -> None:
        """Let the metrics show the variants' states as they are now."""
        for variant in model.current_variants():
            self.metrics.set_variant(model.name, model.version, variant)

    def _folders(self) -> list[ModelFolder]:
        return Repository(self.settings.models.resolve()).models()

    def _administration(self) -> Administration:
        actions = Actions(
            folders=self._folders,
            load=self.load,
            unload=self.unload,
            variant_changed=self.show_states,
        )
        return Administration(actions, self.transport, error_reply)

    def add(self, model: ServedModel) -> None:
        """Serve a loaded model."""
        self.statistics.add_model(model.name, model.version)
        self.metrics.add_model(model.name, model.version, model.variants, model.load_ns)
        self.engine.add_model(model)
        self.services.changed()
        for variant in model.variants:
            log.info(
                "model %s/%s: %s is %s (%s)", model.name, model.version, variant.name, variant.state, variant.reason
            )

    def remove(self, model: ServedModel, reason: str) -> None:
        """Stop serving a model: new requests are refused, admitted ones answered first."""
        self.models.drop(NotServed(model.name, model.version, "UNAVAILABLE", reason))
        self.services.changed()
        self.forget(model)

    def forget(self, model: ServedModel) -> None:
        """Let go of a model that the registry no longer names, once what it has admitted is answered."""
        self.engine.remove_model(model)
        again = next((served for served in self.models.served() if served.key[:2] == model.key[:2]), None)
        if again is None:
            self.metrics.remove_model(model.name, model.version)
        else:
            kept = {variant.name for variant in again.variants}
            self.metrics.remove_variants(model.name, model.version, {v.name for v in model.variants} - kept)

    def start(self) -> tuple[int, int]:
        """Listen; returns the gRPC and the HTTP port. Raises StartError when an address cannot be bound."""
        host, http_port = self.settings.host, self.settings.http_port
        try:
            http_port = self.web.start()
        except OSError as error:
            raise StartError(f"cannot listen on {host}, --http-port {http_port}: {error.strerror}") from None
        try:
            grpc_port = self.transport.start()
        except OSError as error:
            self.web.stop()
            raise StartError(f"cannot listen on {host}, --grpc-port {self.settings.grpc_port}: {error}") from None
        self.engine.start()
        self.services.accept(True)
        return grpc_port, http_port

    def stop(self) -> bool:
        """Drain and stop, both within the drain time; False when admitted work was left unanswered."""
        grace_s = min(_GRACE_S, self.settings.drain_seconds / 4)
        self.services.accept(False)
        drained = self.engine.drain(self.settings.drain_seconds - 2 * grace_s)
        if self.administration is not None:
            self.administration.stop()
        self.transport.stop(grace_ns=int(grace_s * 1e9))
        self.engine.stop(grace_s)
        self.web.stop()
        if self.trace:
            self.trace.close()
        return drained

    def loads(self) -> Mapping[str, ModelLoad]:
        """Every model's load, for the gauges."""
        inflight = self.engine.inflight()

        def read(scheduler: Scheduler, now_ns: int) -> dict[str, ModelLoad]:
            loads: dict[str, ModelLoad] = {}
            for queue in scheduler.models.values():  # of one that was loaded again there may be two
                name = queue.key.name
                other = loads.get(name, _NO_LOAD)
                loads[name] = ModelLoad(
                    queue_depth=queue.waiting + other.queue_depth,
                    queue_bytes=queue.waiting_bytes + other.queue_bytes,
                    inflight_requests=inflight.get(name, 0),
                    saturation_ratio=max(scheduler.saturation(queue.key, now_ns), other.saturation_ratio),
                )
            return loads

        return self.engine.snapshot(read)

    def status(self) -> ServerStatus:
        """The server as it is now, for the status page and the probes."""
        loads = self.loads()
        return ServerStatus(
            live=True,
            ready=self.services.ready,
            reason="" if self.services.ready else self.services.not_ready_reason,
            executors=self.executors,
            busy_executors=self.engine.snapshot(lambda scheduler, _: scheduler.busy_executors),
            hardware=f"{self.hardware.cpu}, {self.hardware.cores} cores, {self.host.device}",
            models=tuple(
                ModelStatus(m.name, m.version, m.current_variants(), loads.get(m.name, _NO_LOAD))
                for m in self.models.served()
            ),
            failed={entry.name: entry.reason for entry in self.models.not_served()},
        )


def share_cores(settings: Settings, hardware: Hardware) -> tuple[int, int]:
    """Executors and threads for each, such that together they never exceed the cores that are ours.

    Where nobody says, a GPU has one executor that keeps the device to itself, and a CPU one executor per core until
    `choose_layout` has measured what is best.
    """
    threads = settings.threads or hardware.cores
    automatic = 1 if _device(settings, hardware) != "cpu" else threads
    executors = settings.executors or automatic
    return executors, max(1, threads // executors)


def _host(settings: Settings, hardware: Hardware, executors: int, threads: int) -> Host:
    is_gpu_host = hardware.cuda or "CUDA_VISIBLE_DEVICES" in os.environ
    if settings.device == "auto" and is_gpu_host and (why_not := why_not_cuda(hardware)):
        log.info("models run on the CPU: %s", why_not)
    return Host(
        hardware=hardware,
        device=_device(settings, hardware),
        threads=threads,
        executors=executors,
        runtimes=available_runtimes(executors),
        profiles=ProfileCache(_cache_folder()),
        default_latency_ns=int(settings.default_latency_ms * 1e6),
        allow_unverified=settings.allow_unverified,
        trust_torch_archives=settings.trust_torch_archives,
    )


def _device(settings: Settings, hardware: Hardware) -> str:
    if settings.device == "auto":
        return "cpu" if why_not_cuda(hardware) else "cuda"
    if settings.device.startswith("cuda") and (why_not := why_not_cuda(hardware)):
        raise StartError(f"--device {settings.device}: {why_not}")
    return settings.device


def _cache_folder() -> Path | None:
    """Where profiles are remembered: the XDG cache. None where there is no home to put it in."""
    with suppress(RuntimeError):
        base = os.environ.get("XDG_CACHE_HOME")
        return (Path(base) if base else Path.home() / ".cache") / "gearshift" / "profiles"
    return None


def _trace(settings: Settings) -> TraceRecorder | None:
    if settings.record_trace is None:
        return None
    try:
        return TraceRecorder(settings.record_trace, time.monotonic_ns)
    except OSError as error:
        raise StartError(f"--record-trace {settings.record_trace}: {error.strerror}") from None


def _tls(settings: Settings) -> Tls | None:
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    client_ca = settings.tls_client_ca.read_bytes() if settings.tls_client_ca else None
    if client_ca is not None:
        try:
            ssl.create_default_context(cafile=settings.tls_client_ca)
        except OSError as error:
            raise StartError(f"--tls-client-ca holds no certificate authority: {error}") from None
    return Tls(settings.tls_cert.read_bytes(), settings.tls_key.read_bytes(), client_ca)


def _web_tls(settings: Settings) -> ssl.SSLContext | None:
    """The HTTP port shows the gRPC port's certificate: tokens and figures cross no network in the clear."""
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    try:
        return tls_context(settings.tls_cert, settings.tls_key)
    except OSError as error:
        raise StartError(f"--tls-cert and --tls-key do not make a certificate with its key: {error}") from None


def _executors_health(scheduler: Scheduler, now_ns: int) -> list[ExecutorHealth]:
    """How every executor stands, for the gauges."""
    pool = scheduler.pool
    return [ExecutorHealth(pool.slowdown(executor, now_ns), lost) for executor, lost in enumerate(pool.lost)]


def _hardware_facts(hardware: Hardware, device: str) -> dict[str, str]:
    return {
        "cpu": hardware.cpu,
        "cores": str(hardware.cores),
        "isa": ",".join(sorted(hardware.isa)),
        "device": device,
        "cuda": ",".join(gpu.name for gpu in hardware.cuda),
    }
