"""Settings: four sources, one precedence, and one clear line for everything that is wrong."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from server import settings
from server.settings import Settings, SettingsError


def load(*flags: str, environment: dict[str, str] | None = None) -> Settings:
    """Settings as `gearshift serve` would make them from this command line and environment."""
    parser = argparse.ArgumentParser()
    settings.add_flags(parser)
    return settings.load(vars(parser.parse_args(flags)), environment or {})


@pytest.fixture
def models(tmp_path: Path) -> str:
    """A folder that exists, which is all settings ask of a repository."""
    folder = tmp_path / "models"
    folder.mkdir()
    return str(folder)


def config(tmp_path: Path, text: str) -> str:
    """A configuration file with this content."""
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_the_defaults_are_those_of_the_reference(models: str) -> None:
    """Without any flag but --models every setting has the documented default."""
    expected = {
        "models": Path(models),
        "host": "127.0.0.1",
        "grpc_port": 8001,
        "http_port": 8002,
        "threads": None,
        "executors": None,
        "device": "auto",
        "max_message_bytes": 67108864,
        "max_queue_requests": 10_000,
        "max_queue_bytes": 268435456,
        "drain_seconds": 20.0,
        "policy": "fitdrain",
        "transport": "auto",
        "admin": False,
        "tls_cert": None,
        "tls_key": None,
        "tls_client_ca": None,
        "auth_tokens": None,
        "default_latency_ms": 1000.0,
        "allow_unverified": False,
        "trust_torch_archives": False,
        "insecure_bind": False,
        "strict": False,
        "log_format": "auto",
        "log_level": "info",
        "record_trace": None,
    }
    assert load("--models", models).model_dump() == expected


@pytest.mark.parametrize("name", [name for name in Settings.model_fields if name != "models"])
def test_every_setting_has_a_flag_a_variable_and_a_key(name: str, models: str, tmp_path: Path) -> None:
    """The three spellings of one setting give the same value, and the flag exists under the field's name."""
    other = tmp_path / "other"
    other.write_text("", encoding="utf-8")
    field = Settings.model_fields[name]
    values = {"host": "::1", "device": "cpu", "policy": "fitdrain", "transport": "grpcio", "log_format": "json"}
    value = values.get(name) or ("true" if field.annotation is bool else "error" if name == "log_level" else "4096")
    if name in {"tls_cert", "tls_key", "tls_client_ca", "auth_tokens", "record_trace"}:
        value = str(other)
    extra = {"tls_cert": ["--tls-key"], "tls_key": ["--tls-cert"], "tls_client_ca": ["--tls-cert", "--tls-key"]}
    flags = ["--models", models, *(part for flag in extra.get(name, []) for part in (flag, str(other)))]
    spelled = "--" + name.replace("_", "-")
    by_flag = load(*flags, spelled, *([] if field.annotation is bool else [value]))
    by_variable = load(*flags, environment={f"GEARSHIFT_{name.upper()}": value})
    by_file = load(*flags, "--config", config(tmp_path, f"{name}: {value}"))
    assert by_flag == by_variable == by_file
    assert getattr(by_flag, name) != field.default or name == "policy"


def test_flag_beats_environment_beats_file_beats_default(models: str, tmp_path: Path) -> None:
    """Each source wins over the next weaker one, and only for what it names."""
    file = config(tmp_path, f"models: {models}\nthreads: 3\nexecutors: 3\nhttp_port: 3\n")
    environment = {"GEARSHIFT_CONFIG": file, "GEARSHIFT_EXECUTORS": "2", "GEARSHIFT_HTTP_PORT": "2"}
    made = load("--http-port", "1", environment=environment)
    assert (made.grpc_port, made.threads, made.executors, made.http_port) == (8001, 3, 2, 1)


def test_a_flag_can_switch_off_what_the_environment_switched_on(models: str) -> None:
    """Boolean flags have a --no- form, so the command line really wins."""
    environment = {"GEARSHIFT_STRICT": "true"}
    assert load("--models", models, environment=environment).strict
    assert not load("--models", models, "--no-strict", environment=environment).strict


def test_an_empty_variable_counts_as_unset_and_foreign_variables_are_left_alone(models: str) -> None:
    """Compose files set empty variables, and Kubernetes makes some from a Service called gearshift."""
    environment = {
        "GEARSHIFT_THREADS": "",
        "GEARSHIFT_PORT": "tcp://10.0.0.1:8001",
        "GEARSHIFT_SERVICE_HOST": "10.0.0.1",
    }
    assert load("--models", models, environment=environment).threads is None


def test_keys_may_be_spelled_like_flags(models: str, tmp_path: Path) -> None:
    """`grpc-port` in the file is `grpc_port`."""
    assert load("--models", models, "--config", config(tmp_path, "grpc-port: 0")).grpc_port == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "--models is required"),
        (["--models", "/nowhere"], "--models"),
        (["--models", ".", "--grpc-port", "65536"], "--grpc-port"),
        (["--models", ".", "--threads", "0"], "--threads"),
        (["--models", ".", "--threads", "many"], "--threads"),
        (["--models", ".", "--device", "tpu"], "--device"),
        (["--models", ".", "--drain-seconds", "nan"], "--drain-seconds"),
        (["--models", ".", "--default-latency-ms", "0"], "--default-latency-ms"),
        (["--models", ".", "--policy", "fastest"], "fitdrain"),
        (["--models", ".", "--log-level", "loud"], "--log-level"),
        (["--models", ".", "--transport", "native"], "not part of this build"),
        (["--models", ".", "--tls-cert", __file__], "belong together"),
        (["--models", ".", "--tls-key", __file__], "belong together"),
        (["--models", ".", "--tls-client-ca", __file__], "needs --tls-cert"),
        (["--models", ".", "--auth-tokens", "/nowhere"], "--auth-tokens"),
        (["--models", ".", "--config", "/nowhere"], "--config /nowhere: cannot be read"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(flags: list[str], said: str) -> None:
    """Whatever is wrong is told in one line."""
    with pytest.raises(SettingsError) as caught:
        load(*flags)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("grpc_prot: 1", "unknown key 'grpc_prot'; the nearest valid one is 'grpc_port'"),
        ("thread: 1", "nearest valid one is 'threads'"),
        ("threads: many", "config.yaml: threads"),
        ("- a\n- b", "should hold"),
        ("a: [", "not YAML"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_the_file(text: str, said: str, models: str, tmp_path: Path) -> None:
    """An unknown key names the nearest valid one; a wrong value says which file it came from."""
    with pytest.raises(SettingsError) as caught:
        load("--models", models, "--config", config(tmp_path, text))
    assert said in str(caught.value)
    assert "config.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_variable_is_named(models: str) -> None:
    """The line names the variable, not the flag nobody gave."""
    with pytest.raises(SettingsError, match="GEARSHIFT_GRPC_PORT"):
        load("--models", models, environment={"GEARSHIFT_GRPC_PORT": "http"})


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_credentials(host: str, models: str) -> None:
    """An address only this machine can reach is served as it is."""
    assert load("--models", models, "--host", host).host == host


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])  # noqa: S104
def test_other_addresses_need_credentials_or_consent(host: str, models: str, tmp_path: Path) -> None:
    """A reachable address is refused unless TLS, tokens or --insecure-bind is given."""
    secret = tmp_path / "secret"
    secret.write_text("", encoding="utf-8")
    with pytest.raises(SettingsError, match="--insecure-bind"):
        load("--models", models, "--host", host)
    for consent in (["--insecure-bind"], ["--auth-tokens", str(secret)]):
        assert load("--models", models, "--host", host, *consent).host == host
    assert load("--models", models, "--host", host, "--tls-cert", str(secret), "--tls-key", str(secret)).host == host


def test_admin_on_a_reachable_address_needs_to_know_its_callers(models: str, tmp_path: Path) -> None:
    """Encryption alone lets anyone unload models, so TLS without client certificates is not enough for --admin."""
    secret = tmp_path / "secret"
    secret.write_text("", encoding="utf-8")
    flags = ["--models", models, "--host", "0.0.0.0", "--admin", "--tls-cert", str(secret), "--tls-key", str(secret)]  # noqa: S104
    with pytest.raises(SettingsError, match="--admin"):
        load(*flags)
    assert load(*flags, "--tls-client-ca", str(secret)).admin


def test_an_unknown_policy_is_told_in_our_words(models: str) -> None:
    """The line starts with the setting and what is wrong with it."""
    with pytest.raises(SettingsError, match=r"^--policy: there is no policy 'nope'; there are fitdrain, "):
        load("--models", models, "--policy", "nope")


def test_settings_cannot_change(models: str) -> None:
    """What was validated is what runs."""
    made = load("--models", models)
    with pytest.raises(ValueError, match="frozen"):
        setattr(made, "grpc_port", 1)  # noqa: B010 - the type checker already forbids the plain form
