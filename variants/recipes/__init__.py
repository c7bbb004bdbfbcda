"""The recipes, each a function from ingredients to artefacts; see `recipe.py`."""

from __future__ import annotations

from types import MappingProxyType

from variants.recipes.distillation.distill import Distil, distil
from variants.recipes.int8.dynamic import QuantizeDynamic, quantize_dynamic, quantize_per_tensor
from variants.recipes.int8.mixed import QuantizeMixed, quantize_mixed
from variants.recipes.int8.qat import QuantizeAware, quantize_aware
from variants.recipes.int8.static import QuantizeStatic, quantize_static
from variants.recipes.precision import make_amp, make_fp32
from variants.recipes.pruning.channels import prune_channels
from variants.recipes.pruning.masks import PruneMasks, prune_masks
from variants.recipes.pruning.parameters import PruneChannels
from variants.recipes.pruning.unstructured import PruneUnstructured, prune_unstructured
from variants.recipes.recipe import Recipe


def _tries_calibrations(chosen: QuantizeStatic) -> bool:
    return chosen.calibrate == "auto"


RECIPES = MappingProxyType(
    {
        "fp32": Recipe(make_fp32),
        "amp": Recipe(make_amp),
        "int8-dynamic": Recipe(quantize_dynamic, QuantizeDynamic),
        "int8-dynamic-per-tensor": Recipe(quantize_per_tensor, QuantizeDynamic),
        "int8-static": Recipe(quantize_static, QuantizeStatic, _tries_calibrations),
        "int8-mixed": Recipe(quantize_mixed, QuantizeMixed, lambda _: True),
        "int8-qat": Recipe(quantize_aware, QuantizeAware, _tries_calibrations),
        "distilled": Recipe(distil, Distil),
        "prune-channels": Recipe(prune_channels, PruneChannels, lambda chosen: chosen.sparsity == "auto"),
        "prune-masks": Recipe(prune_masks, PruneMasks),
        "prune-unstructured": Recipe(prune_unstructured, PruneUnstructured),
    }
)
"""Every recipe by name."""
