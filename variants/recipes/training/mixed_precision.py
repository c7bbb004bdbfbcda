"""Where training computes, and in which precision: in fp32 on a CPU, in mixed precision on CUDA.

Rules of this file: weights and optimiser state stay fp32; autocast chooses the precision of each operator. bf16 has
fp32's range and needs no scaling; fp16 does not, so its losses are scaled up, and a step whose gradients overflowed
is skipped and the scale halved (Micikevicius et al., "Mixed Precision Training", 2018).

Not run on CUDA: no such device was at hand. The scaler, skipped steps included, is tested with fp16 on a CPU.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class MixedPrecision:
    """A device, the reduced precision that training uses there (None for fp32), and the scaler that fp16 needs."""

    def __init__(self, device: str, reduced: torch.dtype | None = None, *, first_scale: float = 2.0**16) -> None:
        import torch

        self.device, self._reduced = device, reduced
        self._scaler = torch.amp.GradScaler(device, init_scale=first_scale, enabled=reduced is torch.float16)

    @classmethod
    def here(cls) -> MixedPrecision:
        """CUDA in bf16 where the GPU computes in it, in fp16 where not; a CPU in fp32, where training gains nothing."""
        import torch

        if not torch.cuda.is_available():
            return cls("cpu")
        return cls("cuda", torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16)

    def autocast(self) -> AbstractContextManager[object]:
        """The context for a forward pass and its loss."""
        import torch

        return torch.autocast(self.device, self._reduced, enabled=self._reduced is not None)

    def step(self, loss: torch.Tensor, optimiser: torch.optim.Optimizer) -> bool:
        """Learn from one batch; False when the step was skipped because a gradient overflowed."""
        optimiser.zero_grad()
        self._scaler.scale(loss).backward()
        scale = self._scaler.get_scale()
        self._scaler.step(optimiser)
        self._scaler.update()
        return self._scaler.get_scale() >= scale
