"""A network that loses channels: how many of each group stay, and which of them go.

Rules of this file: the module that is given stays as it is; every group loses the same share, rounding apart; what
cannot go soundly stays, with the reason.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from variants.recipes.pruning.attention import with_plain_attention
from variants.recipes.pruning.removal import UnsoundRemoval, answers, difference, remove
from variants.recipes.pruning.units import Structure, Values, find_groups, find_structure, rank
from variants.recipes.recipe import RecipeRejected

Measure = Callable[[nn.Module, Structure], list[Values]]
"""What ranks units: see `rank`."""


_CHANGES = ("module", "_structure", "_units", "_reasons")


class Pruning:
    """A copy of a module in eval mode, and how much of it is left.

    Every removal is proven on `tensors`, real samples; `round_to` makes the widths that stay multiples of it.
    """

    def __init__(self, module: nn.Module, tensors: Sequence[torch.Tensor], measure: Measure, round_to: int) -> None:
        self._tensors, self._measure, self._round_to = tensors, measure, round_to
        self._units: dict[tuple[str, ...], list[int]] = {}
        self.module = _prunable(module, tensors)
        self._structure = _followed(self.module, tensors)
        self._reasons = dict(self._structure.reasons)
        self.weights_before = self.weights

    def __deepcopy__(self, memo: dict[int, Any]) -> Pruning:
        """Another one that goes its own way from here."""
        twin = copy.copy(self)
        twin.__dict__ |= copy.deepcopy({name: vars(self)[name] for name in _CHANGES}, memo)
        return twin

    @property
    def weights(self) -> int:
        """How many trained values are left."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    @property
    def sparsity(self) -> float:
        """The share of the units that is gone, among those that might go."""
        first, left = (sum(each) for each in zip(*self._units.values(), strict=True))
        return float(1 - left / first)

    def to(self, sparsity: float) -> None:
        """Remove units until this share of each group's is gone."""
        values = self._measure(self.module, self._structure)
        for group in find_groups(self._structure, values):
            counts = self._units.setdefault(group.layers, [len(group.units)] * 2)
            counts[1] = len(group.units)
            left = kept(counts[0], sparsity, self._round_to if group.width == 1 else 1)
            going = counts[1] - left
            if going <= 0:
                if counts[0] == counts[1]:
                    self._reasons |= dict.fromkeys(group.layers, _whole(counts[0], self._round_to))
                continue
            lowest = np.argsort(rank(values, group.units), kind="stable")[:going]
            try:
                remove(self.module, self._structure, group, lowest.tolist(), self._tensors)
                counts[1] -= going
                self._reasons = {name: why for name, why in self._reasons.items() if name not in group.layers}
            except UnsoundRemoval as error:
                self._reasons |= dict.fromkeys(group.layers, str(error))

    def require_smaller(self) -> None:
        """Raise RecipeRejected, with the reasons, if nothing has gone."""
        if self.weights == self.weights_before:
            why = "; ".join(f"{name}: {reason}" for name, reason in list(self._reasons.items())[:5])
            raise RecipeRejected(f"no channel can be removed soundly ({why or 'each layer has its least width'})")

    def findings(self) -> dict[str, object]:
        """The widths of what may go, and why other layers keep theirs, as plain JSON values."""
        groups = [{"layers": list(n), "before": first, "after": left} for n, (first, left) in self._units.items()]
        return {"channels": groups, "kept_channels": self._reasons}


def _whole(units: int, round_to: int) -> str:
    """Why a group of which this share might have gone has all its units."""
    if units == 1:
        return "its channels all depend on one another"
    return f"{units} units less this share round to {units} (round_to: {round_to})"


def kept(units: int, sparsity: float, round_to: int) -> int:
    """How many of `units` stay: the nearest multiple of `round_to`, but at least that and at most all."""
    multiples = max(1, round(units * (1 - sparsity) / round_to))
    return min(units, multiples * round_to)


def _prunable(module: nn.Module, tensors: Sequence[torch.Tensor]) -> nn.Module:
    """A copy whose attention heads can go, or as it is where code depends on torch's own attention."""
    plain = copy.deepcopy(module).eval()
    with_plain_attention(plain)
    same = difference(plain, tensors, answers(module, tensors)) is None
    return plain if same else copy.deepcopy(module).eval()


def _followed(module: nn.Module, tensors: Sequence[torch.Tensor]) -> Structure:
    try:
        return find_structure(module, tensors)
    except Exception as error:  # it is someone's own code, run on values it may not expect
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise RecipeRejected(f"its channels cannot be followed ({why})") from error
