from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Interval(_message.Message):
    __slots__ = ("value", "low", "high")
    VALUE_FIELD_NUMBER: _ClassVar[int]
    LOW_FIELD_NUMBER: _ClassVar[int]
    HIGH_FIELD_NUMBER: _ClassVar[int]
    value: float
    low: float
    high: float
    def __init__(self, value: _Optional[float] = ..., low: _Optional[float] = ..., high: _Optional[float] = ...) -> None: ...

class BatchLatency(_message.Message):
    __slots__ = ("batch_size", "latency_us")
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    LATENCY_US_FIELD_NUMBER: _ClassVar[int]
    batch_size: int
    latency_us: float
    def __init__(self, batch_size: _Optional[int] = ..., latency_us: _Optional[float] = ...) -> None: ...

class LengthLatency(_message.Message):
    __slots__ = ("elements", "latency")
    ELEMENTS_FIELD_NUMBER: _ClassVar[int]
    LATENCY_FIELD_NUMBER: _ClassVar[int]
    elements: int
    latency: _containers.RepeatedCompositeFieldContainer[BatchLatency]
    def __init__(self, elements: _Optional[int] = ..., latency: _Optional[_Iterable[_Union[BatchLatency, _Mapping]]] = ...) -> None: ...

class VariantInfo(_message.Message):
    __slots__ = ("variant", "recipe", "state", "reason", "precision", "runtime", "device", "accuracy", "accuracy_drop", "latency", "samples_per_second", "size_bytes", "gate_verdict", "crowded_latency", "lengths", "batchable")
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    RECIPE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    RUNTIME_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    ACCURACY_FIELD_NUMBER: _ClassVar[int]
    ACCURACY_DROP_FIELD_NUMBER: _ClassVar[int]
    LATENCY_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    GATE_VERDICT_FIELD_NUMBER: _ClassVar[int]
    CROWDED_LATENCY_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    BATCHABLE_FIELD_NUMBER: _ClassVar[int]
    variant: str
    recipe: str
    state: str
    reason: str
    precision: str
    runtime: str
    device: str
    accuracy: Interval
    accuracy_drop: Interval
    latency: _containers.RepeatedCompositeFieldContainer[BatchLatency]
    samples_per_second: float
    size_bytes: int
    gate_verdict: str
    crowded_latency: _containers.RepeatedCompositeFieldContainer[BatchLatency]
    lengths: _containers.RepeatedCompositeFieldContainer[LengthLatency]
    batchable: bool
    def __init__(self, variant: _Optional[str] = ..., recipe: _Optional[str] = ..., state: _Optional[str] = ..., reason: _Optional[str] = ..., precision: _Optional[str] = ..., runtime: _Optional[str] = ..., device: _Optional[str] = ..., accuracy: _Optional[_Union[Interval, _Mapping]] = ..., accuracy_drop: _Optional[_Union[Interval, _Mapping]] = ..., latency: _Optional[_Iterable[_Union[BatchLatency, _Mapping]]] = ..., samples_per_second: _Optional[float] = ..., size_bytes: _Optional[int] = ..., gate_verdict: _Optional[str] = ..., crowded_latency: _Optional[_Iterable[_Union[BatchLatency, _Mapping]]] = ..., lengths: _Optional[_Iterable[_Union[LengthLatency, _Mapping]]] = ..., batchable: bool = ...) -> None: ...

class ListVariantsRequest(_message.Message):
    __slots__ = ("model", "version")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: str
    def __init__(self, model: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class ListVariantsResponse(_message.Message):
    __slots__ = ("model", "version", "variants", "executors", "default_slo")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    VARIANTS_FIELD_NUMBER: _ClassVar[int]
    EXECUTORS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_SLO_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: str
    variants: _containers.RepeatedCompositeFieldContainer[VariantInfo]
    executors: int
    default_slo: Slo
    def __init__(self, model: _Optional[str] = ..., version: _Optional[str] = ..., variants: _Optional[_Iterable[_Union[VariantInfo, _Mapping]]] = ..., executors: _Optional[int] = ..., default_slo: _Optional[_Union[Slo, _Mapping]] = ...) -> None: ...

class Slo(_message.Message):
    __slots__ = ("latency_ms", "min_accuracy", "max_accuracy_drop", "floor", "on_infeasible", "variant", "priority")
    LATENCY_MS_FIELD_NUMBER: _ClassVar[int]
    MIN_ACCURACY_FIELD_NUMBER: _ClassVar[int]
    MAX_ACCURACY_DROP_FIELD_NUMBER: _ClassVar[int]
    FLOOR_FIELD_NUMBER: _ClassVar[int]
    ON_INFEASIBLE_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    latency_ms: float
    min_accuracy: float
    max_accuracy_drop: float
    floor: str
    on_infeasible: _containers.RepeatedScalarFieldContainer[str]
    variant: str
    priority: int
    def __init__(self, latency_ms: _Optional[float] = ..., min_accuracy: _Optional[float] = ..., max_accuracy_drop: _Optional[float] = ..., floor: _Optional[str] = ..., on_infeasible: _Optional[_Iterable[str]] = ..., variant: _Optional[str] = ..., priority: _Optional[int] = ...) -> None: ...

class ExplainRouteRequest(_message.Message):
    __slots__ = ("model", "version", "slo")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SLO_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: str
    slo: Slo
    def __init__(self, model: _Optional[str] = ..., version: _Optional[str] = ..., slo: _Optional[_Union[Slo, _Mapping]] = ...) -> None: ...

class Candidate(_message.Message):
    __slots__ = ("variant", "allowed", "why", "predicted_latency_us")
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_LATENCY_US_FIELD_NUMBER: _ClassVar[int]
    variant: str
    allowed: bool
    why: str
    predicted_latency_us: float
    def __init__(self, variant: _Optional[str] = ..., allowed: bool = ..., why: _Optional[str] = ..., predicted_latency_us: _Optional[float] = ...) -> None: ...

class ExplainRouteResponse(_message.Message):
    __slots__ = ("model", "version", "variant", "reason", "candidates")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: str
    variant: str
    reason: str
    candidates: _containers.RepeatedCompositeFieldContainer[Candidate]
    def __init__(self, model: _Optional[str] = ..., version: _Optional[str] = ..., variant: _Optional[str] = ..., reason: _Optional[str] = ..., candidates: _Optional[_Iterable[_Union[Candidate, _Mapping]]] = ...) -> None: ...

class SetVariantStateRequest(_message.Message):
    __slots__ = ("model", "version", "variant", "state")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATE_UNSPECIFIED: _ClassVar[SetVariantStateRequest.State]
        ENABLED: _ClassVar[SetVariantStateRequest.State]
        DISABLED: _ClassVar[SetVariantStateRequest.State]
    STATE_UNSPECIFIED: SetVariantStateRequest.State
    ENABLED: SetVariantStateRequest.State
    DISABLED: SetVariantStateRequest.State
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: str
    variant: str
    state: SetVariantStateRequest.State
    def __init__(self, model: _Optional[str] = ..., version: _Optional[str] = ..., variant: _Optional[str] = ..., state: _Optional[_Union[SetVariantStateRequest.State, str]] = ...) -> None: ...

class SetVariantStateResponse(_message.Message):
    __slots__ = ("info",)
    INFO_FIELD_NUMBER: _ClassVar[int]
    info: VariantInfo
    def __init__(self, info: _Optional[_Union[VariantInfo, _Mapping]] = ...) -> None: ...
