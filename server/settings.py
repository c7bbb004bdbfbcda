"""Where flags, environment and configuration file become one frozen `Settings`; nothing else reads any of the three.

Rules of this file: every setting is declared once, as a field of `Settings`, and its flag (``--grpc-port``), its
variable (``GEARSHIFT_GRPC_PORT``) and its key in the file (``grpc_port``) follow from the field's name. A flag beats
the environment, the environment beats the file, the file beats the default; an empty variable counts as unset.
Whatever is wrong is one `SettingsError` of one line that names the setting and where its value came from.
Variables that name no setting are left alone: Kubernetes makes some of its own from a Service's name.
"""

from __future__ import annotations

import argparse
import difflib
import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    DirectoryPath,
    Field,
    FilePath,
    ValidationError,
)

from server.scheduling.policies import policy_factory

PREFIX = "GEARSHIFT_"
CONFIG = "config"
"""The one flag that is not a setting: the file that holds settings."""


class SettingsError(Exception):
    """A wrong setting, told in one line."""


def _auto_is_none(value: object) -> object:
    return None if value == "auto" else value


def _known_policy(name: str) -> str:
    policy_factory(name)
    return name


Count = Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(_auto_is_none)]
Port = Annotated[int, Field(ge=0, le=65535)]


class Settings(BaseModel):
    """Everything `gearshift serve` can be told. Units are in the names."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    models: DirectoryPath = Field(description="the model repository: one folder per model")
    host: str = Field("127.0.0.1", min_length=1, description="address to bind")
    grpc_port: Port = Field(8001, description="port of the gRPC services; 0 picks a free one")
    http_port: Port = Field(8002, description="port of /metrics, the status page and health; 0 picks a free one")
    threads: Count = Field(None, description="cores to compute with, or auto: from cgroup quota and affinity")
    executors: Count = Field(None, description="batches that run at a time, or auto: measured; on a GPU one")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
    max_message_bytes: int = Field(64 << 20, ge=1024, lt=1 << 31, description="largest gRPC message accepted or sent")
    max_queue_requests: int = Field(10_000, ge=1, description="requests one model's queue may hold")
    max_queue_bytes: int = Field(256 << 20, ge=1024, description="bytes one model's queue may hold")
    drain_seconds: float = Field(
        20.0, ge=0, le=86_400, allow_inf_nan=False, description="time admitted work gets to finish at shutdown"
    )
    policy: Annotated[str, AfterValidator(_known_policy)] = Field(
        "fitdrain", description="how batches are formed and variants chosen; others than fitdrain are for comparison"
    )
    transport: Literal["auto", "native", "grpcio"] = Field("auto", description="what moves bytes: auto, native, grpcio")
    admin: bool = Field(False, description="allow loading and unloading models and switching variants")
    tls_cert: FilePath | None = Field(None, description="PEM certificate chain of the gRPC port")
    tls_key: FilePath | None = Field(None, description="PEM key that belongs to --tls-cert")
    tls_client_ca: FilePath | None = Field(None, description="PEM bundle; clients must show a certificate signed by it")
    auth_tokens: FilePath | None = Field(None, description="file of lines `TOKEN scope[,scope]`: infer, stats, admin")
    default_latency_ms: float = Field(
        1000.0, gt=0, le=86_400_000, allow_inf_nan=False, description="SLO of requests and models that name none"
    )
    allow_unverified: bool = Field(False, description="let variants without evidence take traffic")
    trust_torch_archives: bool = Field(False, description="load .pt2 artefacts, which can execute code")
    insecure_bind: bool = Field(False, description="allow a non-loopback address without TLS or tokens")
    strict: bool = Field(False, description="exit when a model cannot load")
    log_format: Literal["auto", "console", "json"] = Field("auto", description="auto: console on a terminal, else json")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="debug, info, warning or error")
    record_trace: Path | None = Field(None, description="file that gets one line per request, never its payload")

    @property
    def secured(self) -> bool:
        """Whether the gRPC port has TLS or asks for tokens."""
        return self.tls_cert is not None or self.auth_tokens is not None


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Declare `--config` and one flag per setting. Values stay text here: `load` validates every source alike."""
    parser.add_argument("--config", metavar="FILE.yaml", help="read settings from a YAML file; flags win")
    for name, field in Settings.model_fields.items():
        shown = field.description or ""
        if not field.is_required() and field.default not in (None, False):
            shown += f" (default {field.default})"
        if field.annotation is bool:
            parser.add_argument(_flag(name), action=argparse.BooleanOptionalAction, default=None, help=shown)
        else:
            parser.add_argument(_flag(name), metavar=name.rsplit("_", 1)[-1].upper(), help=shown)


def load(flags: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> Settings:
    """Settings from parsed flags (None: not given), environment (this process's) and `--config`.

    Raises:
        SettingsError: something is wrong; the text is one line for a person.
    """
    environment = os.environ if environment is None else environment
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    config = flags.get(CONFIG) or environment.get(PREFIX + CONFIG.upper())
    if config:
        from_file = _read_file(Path(config))
        values |= from_file
        origins |= {name: f"{config}: {name}" for name in from_file}
    for name in Settings.model_fields:
        variable = PREFIX + name.upper()
        if environment.get(variable):
            values[name], origins[name] = environment[variable], variable
        if flags.get(name) is not None:
            values[name], origins[name] = flags[name], _flag(name)
    try:
        settings = Settings(**values)
    except ValidationError as error:
        raise SettingsError(_one_line(error, origins)) from None
    _check_together(settings)
    return settings


def _read_file(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--config {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise SettingsError(f"--config {path}: not YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError(f"--config {path}: should hold `key: value` lines")
    settings: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in Settings.model_fields:
            nearest = difflib.get_close_matches(name, Settings.model_fields, n=1, cutoff=0.0)[0]
            raise SettingsError(f"{path}: unknown key {str(key)!r}; the nearest valid one is {nearest!r}")
        if value is not None:
            settings[name] = value
    return settings


def _check_together(settings: Settings) -> None:
    """Rules that span settings. Raises SettingsError."""
    if (settings.tls_cert is None) != (settings.tls_key is None):
        raise SettingsError("--tls-cert and --tls-key belong together: give both or neither")
    if settings.tls_client_ca and not settings.tls_cert:
        raise SettingsError("--tls-client-ca needs --tls-cert and --tls-key")
    if settings.transport == "native":
        raise SettingsError("--transport native is not part of this build: use auto or grpcio")
    if settings.insecure_bind or _is_loopback(settings.host):
        return
    if not settings.secured:
        raise SettingsError(
            f"--host {settings.host} may be reachable from other machines: give --tls-cert and --tls-key or "
            "--auth-tokens, or accept the risk with --insecure-bind"
        )
    if settings.admin and not (settings.auth_tokens or settings.tls_client_ca):
        raise SettingsError(
            f"--admin on --host {settings.host} would let anyone change models: give --auth-tokens or --tls-client-ca, "
            "or accept the risk with --insecure-bind"
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:  # a name: whatever it resolves to today may not be loopback tomorrow
        return False


def _one_line(error: ValidationError, origins: Mapping[str, str]) -> str:
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0])
    if first["type"] == "missing":
        return f"{_flag(name)} is required: {Settings.model_fields[name].description}"
    hint = Settings.model_fields[name].description
    wrong = first["msg"].removeprefix("Value error, ")  # pydantic's words for what a check of our own says
    return f"{origins.get(name, _flag(name))}: {wrong}, got {first['input']!r} ({hint})"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
