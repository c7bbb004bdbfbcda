"""The recipes: one file per family, each a function from ingredients to artefacts; see `recipe.py`."""

from __future__ import annotations

from types import MappingProxyType

from variants.recipes.channels import PruneChannels, prune_channels
from variants.recipes.dynamic import QuantizeDynamic, quantize_dynamic
from variants.recipes.precision import make_amp, make_fp32
from variants.recipes.recipe import Recipe
from variants.recipes.static import QuantizeStatic, quantize_static
from variants.recipes.unstructured import PruneUnstructured, prune_unstructured

RECIPES = MappingProxyType(
    {
        "fp32": Recipe(make_fp32),
        "amp": Recipe(make_amp),
        "int8-dynamic": Recipe(quantize_dynamic, QuantizeDynamic),
        "int8-static": Recipe(quantize_static, QuantizeStatic),
        "prune-channels": Recipe(prune_channels, PruneChannels),
        "prune-unstructured": Recipe(prune_unstructured, PruneUnstructured),
    }
)
"""Every recipe by name."""
