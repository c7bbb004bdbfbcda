"""The sparsest network that the gate lets pass: pruned further and further, each time from what was recovered before.

Rules of this file: candidates are judged on the tuning samples, as a forecast of the gate. Of networks that descend
from one another the sparsest is the fastest: it has the fewest operations of the same kinds.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from variants.cost import cost_of
from variants.recipes.pruning.parameters import PruneChannels
from variants.recipes.pruning.steps import exported, recover, start
from variants.recipes.recipe import Ingredients, RecipeRejected
from variants.recipes.training.fit import Losses, effort

if TYPE_CHECKING:
    from variants.recipes.pruning.pruning import Pruning

_SPARSITIES, _QUICK_SPARSITIES = (0.3, 0.5, 0.7, 0.8, 0.9), (0.5, 0.75)
"""A half, a quarter, a tenth, a twentieth and a hundredth of the weights that touch pruned channels on both sides."""
_SHARE = 0.1
"""A candidate's part of all the work."""


class SparsitySearch:
    """What was tried so far, and the best of it. Raises RecipeRejected without tuning samples."""

    def __init__(self, ingredients: Ingredients, parameters: PruneChannels) -> None:
        if ingredients.trial is None or ingredients.source.module is None:
            raise RecipeRejected(
                "`sparsity: auto` chooses on tuning samples; add `tuning:` or more `training:` data, or name a sparsity"
            )
        self._ingredients, self._parameters, self._trial = ingredients, parameters, ingredients.trial
        self._total = 0 if parameters.recover == "none" else effort(ingredients)[0]
        self._sparsity = 0.0
        self.best: Pruning = start(ingredients.source.module, ingredients, parameters)
        self.losses: Losses = []
        self.tried: list[dict[str, object]] = []
        self._harm, self._mildest = (0.0, 0.0), (1.0, "")

    def run(self) -> None:
        """Find the best. Raises RecipeRejected if nothing passes.

        Candidates get half the epochs each; one that loses nothing more is not tried. After the first that does not
        pass one more is tried, half way back. The best is trained for all epochs in the end, and stays as it was if
        that does harm on the tuning samples.
        """
        for sparsity in _QUICK_SPARSITIES if self._ingredients.quick else _SPARSITIES:
            if not self._passes(sparsity):
                self._passes(round((self._sparsity + sparsity) / 2, 3))
                break
        if not self.tried:
            self.best.require_smaller()
        if self._sparsity == 0:
            message = f"no sparsity passes the gate on the tuning samples; {self._mildest[1]}"
            raise RecipeRejected(message, {"sparsity": self.tried})
        if self._total:
            self._passes(self._sparsity, self._total)

    def _passes(self, sparsity: float, epochs: int | None = None) -> bool:
        """Prune a copy of the best further, train it, and keep it if the gate would."""
        candidate, begun = copy.deepcopy(self.best), _SHARE * len(self.tried)
        if sparsity > self._sparsity:
            candidate.to(sparsity)
            if candidate.weights == self.best.weights:
                self.best = candidate  # it knows why
                return True
        part = (begun, _SHARE if epochs is None else 1 - begun)
        epochs = (self._total + 1) // 2 if epochs is None else epochs
        losses = self.losses + recover(candidate.module, self._ingredients, self._parameters, epochs, part)
        graph = exported(candidate.module, self._ingredients, f"candidate-{len(self.tried)}.onnx")
        cost, tried = cost_of(graph), self._trial.judge(graph)
        reached = round(candidate.sparsity, 4)
        facts = {"sparsity": reached, "epochs": len(losses), "weights": cost.weights, "flops": cost.flops}
        self.tried.append({**facts, **tried.facts()})
        lost, same = tried.drop.value, tried.agreement.value
        how = f"without {reached:.0%} of the channels {lost:.2%} of accuracy is lost and {same:.2%} of answers agree"
        self._mildest = min(self._mildest, (reached, how))
        harm = (lost, -same)
        if tried.passes and (sparsity > self._sparsity or harm <= self._harm):
            self.best, self.losses, self._sparsity, self._harm = candidate, losses, sparsity, harm
        return tried.passes
