"""The rest of the V2 protocol: live, ready, metadata, configuration, statistics and the repository's index.

Rules: requests become plain values and plain values become bytes; what is true of the server is the caller's to know.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from protos import open_inference_pb2 as pb
from server.errors import InvalidRequest
from server.wire.inference import Signature
from server.wire.messages import parse
from server.wire.tensors import quoted
from variants.variant import TensorSpec

EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "parameters",
    "schedule_policy",
    "statistics",
)
"""What this server honours beyond the protocol's core; `model_repository` joins where administration is on."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What clients may know of a loaded model. `versions` are those that serve, `platform` is the reference's runtime.

    `parameters` are free texts for the configuration, e.g. the variants' names.
    """

    name: str
    versions: tuple[str, ...]
    platform: str
    signature: Signature
    executors: int = 1
    on_gpu: bool = False
    parameters: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Duration:
    """How often something happened and how long it took altogether."""

    count: int = 0
    total_ns: int = 0


@dataclass(frozen=True, slots=True)
class BatchFacts:
    """Totals over all batches of one size."""

    batch_size: int
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


@dataclass(frozen=True, slots=True)
class StatisticsFacts:
    """Totals of one model version since it was loaded; `last_inference_ms` is since the epoch, 0 for never."""

    name: str
    version: str
    last_inference_ms: int
    samples: int
    batches: int
    success: Duration
    fail: Duration
    queue: Duration
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration
    batch_sizes: tuple[BatchFacts, ...] = ()


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One model version of the repository; `state` is READY, LOADING, UNLOADING or UNAVAILABLE with its reason."""

    name: str
    version: str
    state: str
    reason: str = ""


def read_model(message: bytes) -> tuple[str, str]:
    """Name and version of a ModelReady, ModelMetadata, ModelConfig or ModelStatistics request: they share one form."""
    request = parse(pb.ModelReadyRequest, message)
    return request.name, request.version


def read_index(message: bytes) -> bool:
    """Whether RepositoryIndex asks for ready models only. Raises InvalidRequest if it names a repository."""
    request = parse(pb.RepositoryIndexRequest, message)
    _check_repository(request.repository_name)
    return request.ready


def read_load(message: bytes) -> str:
    """The model to load. Raises InvalidRequest for parameters: clients bring neither configuration nor files."""
    request = parse(pb.RepositoryModelLoadRequest, message)
    _check_repository(request.repository_name)
    if request.parameters:
        raise InvalidRequest("a model is loaded as the repository has it; configuration and files are not accepted")
    return request.model_name


def read_unload(message: bytes) -> str:
    """The model to unload; parameters have nothing to say here and are ignored, since stock clients always send one."""
    request = parse(pb.RepositoryModelUnloadRequest, message)
    _check_repository(request.repository_name)
    return request.model_name


def encode_live(live: bool) -> bytes:
    """The answer to ServerLive."""
    return pb.ServerLiveResponse(live=live).SerializeToString()


def encode_ready(ready: bool) -> bytes:
    """The answer to ServerReady and to ModelReady, which share one form."""
    return pb.ServerReadyResponse(ready=ready).SerializeToString()


def encode_server_metadata(version: str, *, administration: bool) -> bytes:
    """The answer to ServerMetadata."""
    extensions = (*EXTENSIONS, "model_repository") if administration else EXTENSIONS
    return pb.ServerMetadataResponse(name="gearshift", version=version, extensions=extensions).SerializeToString()


def encode_model_metadata(facts: ModelFacts) -> bytes:
    """The answer to ModelMetadata."""
    return pb.ModelMetadataResponse(
        name=facts.name,
        versions=facts.versions,
        platform=facts.platform,
        inputs=map(_tensor_metadata, facts.signature.inputs),
        outputs=map(_tensor_metadata, facts.signature.outputs),
    ).SerializeToString()


def encode_model_config(facts: ModelFacts) -> bytes:
    """The answer to ModelConfig: dimensions come without the batch dimension there."""
    signature = facts.signature
    batched = signature.max_batch_size > 0
    config = pb.ModelConfig(
        name=facts.name,
        platform=facts.platform,
        backend=facts.platform,
        max_batch_size=signature.max_batch_size,
        input=[
            pb.ModelInput(name=spec.name, data_type=_data_type(spec), dims=spec.shape[batched:])
            for spec in signature.inputs
        ],
        output=[
            pb.ModelOutput(name=spec.name, data_type=_data_type(spec), dims=spec.shape[batched:])
            for spec in signature.outputs
        ],
        model_transaction_policy=pb.ModelTransactionPolicy(decoupled=False),
        parameters={name: pb.ModelParameter(string_value=text) for name, text in facts.parameters.items()},
    )
    kind = pb.ModelInstanceGroup.KIND_GPU if facts.on_gpu else pb.ModelInstanceGroup.KIND_CPU
    config.instance_group.add(name=facts.name, count=facts.executors, kind=kind)
    config.version_policy.specific.versions.extend(int(version) for version in facts.versions)
    if batched:
        config.dynamic_batching.SetInParent()
    return pb.ModelConfigResponse(config=config).SerializeToString()


def encode_statistics(models: Iterable[StatisticsFacts]) -> bytes:
    """The answer to ModelStatistics."""
    return pb.ModelStatisticsResponse(model_stats=map(_statistics, models)).SerializeToString()


def encode_index(entries: Iterable[IndexEntry]) -> bytes:
    """The answer to RepositoryIndex."""
    models = [
        pb.RepositoryIndexResponse.ModelIndex(name=e.name, version=e.version, state=e.state, reason=e.reason)
        for e in entries
    ]
    return pb.RepositoryIndexResponse(models=models).SerializeToString()


def _check_repository(name: str) -> None:
    if name:
        raise InvalidRequest(f"there is one repository, without a name; got {quoted(name)}")


def _tensor_metadata(spec: TensorSpec) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(name=spec.name, datatype=spec.datatype, shape=spec.shape)


def _data_type(spec: TensorSpec) -> str:
    """The enum value's name, which protobuf takes as well as its number."""
    return "TYPE_STRING" if spec.datatype == "BYTES" else f"TYPE_{spec.datatype}"


def _duration(duration: Duration) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=duration.count, ns=duration.total_ns)


def _statistics(facts: StatisticsFacts) -> pb.ModelStatistics:
    return pb.ModelStatistics(
        name=facts.name,
        version=facts.version,
        last_inference=facts.last_inference_ms,
        inference_count=facts.samples,
        execution_count=facts.batches,
        inference_stats=pb.InferStatistics(
            success=_duration(facts.success),
            fail=_duration(facts.fail),
            queue=_duration(facts.queue),
            compute_input=_duration(facts.compute_input),
            compute_infer=_duration(facts.compute_infer),
            compute_output=_duration(facts.compute_output),
        ),
        batch_stats=[
            pb.InferBatchStatistics(
                batch_size=batch.batch_size,
                compute_input=_duration(batch.compute_input),
                compute_infer=_duration(batch.compute_infer),
                compute_output=_duration(batch.compute_output),
            )
            for batch in facts.batch_sizes
        ],
    )
