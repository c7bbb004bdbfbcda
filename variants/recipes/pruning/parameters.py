"""What a person may say to prune-channels in model.yaml."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from variants.model_config import Section

Importance = Literal["l1", "l2", "activation", "taylor", "batchnorm"]


class PruneChannels(Section):
    """`sparsity` is the share of each layer's channels that goes, or `auto` for as much as the gate lets pass.

    `importance` says which channels go, `recover` how accuracy comes back, and `round_to` of what number the widths
    that stay are multiples: ONNX Runtime's fast convolutions want 4. A given sparsity may be reached in `steps`, which
    share the epochs; `auto` takes its own.
    """

    sparsity: float | Literal["auto"] = 0.5
    importance: Importance = "l1"
    recover: Literal["distill", "finetune", "none"] = "distill"
    steps: int = Field(1, ge=1, le=20)
    round_to: int = Field(4, ge=1)

    @field_validator("sparsity", mode="before")
    @classmethod
    def _is_share(cls, value: Any) -> Any:
        if value == "auto" or (isinstance(value, (int, float)) and 0 < value < 1):
            return value
        raise ValueError(f"a share of the channels between 0 and 1, or auto, not {value!r}")
