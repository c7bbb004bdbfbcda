"""The Kubernetes base: the restricted security context field by field, and numbers that agree with the server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from server import settings
from server.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "k8s" / "base"
MARGIN_SECONDS = 5
LOADING_SECONDS = 300


def documents() -> dict[str, dict[str, Any]]:
    """Every resource that the kustomization names, by kind."""
    names = yaml.safe_load((BASE / "kustomization.yaml").read_text())["resources"]
    found = [yaml.safe_load((BASE / name).read_text()) for name in names]
    return {document["kind"]: document for document in found}


@pytest.fixture
def pod() -> dict[str, Any]:
    """The deployment's pod specification."""
    spec: dict[str, Any] = documents()["Deployment"]["spec"]["template"]["spec"]
    return spec


@pytest.fixture
def container(pod: dict[str, Any]) -> dict[str, Any]:
    """Its one container."""
    (container,) = pod["containers"]
    assert isinstance(container, dict)
    return container


def environment(container: dict[str, Any]) -> dict[str, str]:
    """The container's variables."""
    return {entry["name"]: entry["value"] for entry in container["env"]}


def test_every_file_is_named_and_every_kind_is_there() -> None:
    """No manifest lies about unused, and the base has what a gRPC server needs."""
    names = yaml.safe_load((BASE / "kustomization.yaml").read_text())["resources"]
    assert set(names) == {path.name for path in BASE.glob("*.yaml")} - {"kustomization.yaml"}
    assert set(documents()) == {"Namespace", "Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy"}


def test_the_pod_meets_the_restricted_standard(pod: dict[str, Any], container: dict[str, Any]) -> None:
    """Each field that the restricted Pod Security Standard looks at, and a read-only root on top."""
    context, own = pod["securityContext"], container["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["runAsUser"] > 0
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert own["allowPrivilegeEscalation"] is False
    assert own["capabilities"] == {"drop": ["ALL"]}
    assert own["readOnlyRootFilesystem"] is True
    assert not own.get("privileged")
    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers", "ephemeralContainers"} & pod.keys()
    assert all("hostPort" not in port for port in container["ports"])
    allowed = {
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "persistentVolumeClaim",
        "projected",
        "secret",
    }
    assert all(volume.keys() - {"name"} <= allowed for volume in pod["volumes"])
    assert pod["automountServiceAccountToken"] is False
    assert documents()["Namespace"]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_the_user_is_the_images_user(pod: dict[str, Any]) -> None:
    """The Dockerfile and the deployment name the same uid."""
    user = pod["securityContext"]["runAsUser"]
    assert f"USER {user}:{user}" in (ROOT / "Dockerfile").read_text()


def test_termination_leaves_time_to_drain(pod: dict[str, Any], container: dict[str, Any]) -> None:
    """preStop, then the drain, then a margin, all before the kubelet kills."""
    sleep = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain = float(environment(container)["GEARSHIFT_DRAIN_SECONDS"])
    assert pod["terminationGracePeriodSeconds"] >= sleep + drain + MARGIN_SECONDS
    readiness = container["readinessProbe"]
    assert sleep >= readiness["periodSeconds"] * readiness["failureThreshold"]


def test_each_probe_asks_its_own_question(container: dict[str, Any]) -> None:
    """Liveness never depends on models, readiness does, and start-up may take minutes."""
    port = Settings.model_fields["grpc_port"].default
    services = {"startupProbe": "", "readinessProbe": "inference.GRPCInferenceService", "livenessProbe": "live"}
    for probe, service in services.items():
        assert container[probe]["grpc"] == {"port": port, "service": service}
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= LOADING_SECONDS


def test_the_environment_is_a_valid_configuration(container: dict[str, Any], tmp_path: Path) -> None:
    """The server accepts exactly these variables, and each of them names a setting."""
    variables = environment(container)
    assert {name.removeprefix(settings.PREFIX).lower() for name in variables} <= Settings.model_fields.keys()
    made = settings.load({}, variables | {"GEARSHIFT_MODELS": str(tmp_path)})
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"grpc": made.grpc_port, "http": made.http_port}


def test_what_is_written_is_writable_and_models_are_not(pod: dict[str, Any], container: dict[str, Any]) -> None:
    """With a read-only root, caches and temporary files need volumes; the models mount stays read-only."""
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    for path in ("/tmp", "/home/gearshift/.cache"):  # noqa: S108 - a path inside the container
        assert "emptyDir" in volumes[mounts[path]["name"]]
    models = mounts[environment(container)["GEARSHIFT_MODELS"]]
    assert models["readOnly"] is True


def test_cpus_are_whole_and_guaranteed(container: dict[str, Any]) -> None:
    """Requests equal limits in whole CPUs, so that the static CPU manager can pin them."""
    resources = container["resources"]
    assert resources["requests"] == resources["limits"]
    assert int(resources["limits"]["cpu"]) >= 1


def test_all_selectors_select_the_pods() -> None:
    """Service, budget, policy, spreading and the deployment itself mean the same pods."""
    found = documents()
    deployment = found["Deployment"]["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    spread = deployment["template"]["spec"]["topologySpreadConstraints"]
    selectors = [
        deployment["selector"]["matchLabels"],
        found["Service"]["spec"]["selector"],
        found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        found["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
        *(constraint["labelSelector"]["matchLabels"] for constraint in spread),
    ]
    assert all(selector == labels for selector in selectors)


def test_the_service_is_headless_and_names_ports_that_exist(container: dict[str, Any]) -> None:
    """Every gRPC client sees every pod."""
    service = documents()["Service"]["spec"]
    assert service["clusterIP"] == "None"
    assert {port["targetPort"] for port in service["ports"]} == {port["name"] for port in container["ports"]}


def test_a_rollout_never_has_fewer_pods_than_asked() -> None:
    """A new pod is ready before an old one goes, and a drained node takes one pod at a time."""
    found = documents()
    assert found["Deployment"]["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    assert found["PodDisruptionBudget"]["spec"]["maxUnavailable"] == 1
    assert found["Deployment"]["spec"]["replicas"] >= 2
