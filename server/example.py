"""What a model is measured with: one real sample where there is data that fits, else an invented one.

Rules: evaluation data are read only, and of a built version only if they are the manifest's; data that do not fit are a
warning and never a reason not to serve.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

from server.wire.inference import Signature
from variants.data import Array, match_inputs, read_arrays, targets_of
from variants.measure import Example, synthetic_inputs
from variants.model_config import EvaluationConfig, RepositoryError
from variants.repository import VersionFolder

log = logging.getLogger(__name__)


def example_inputs(version: VersionFolder, signature: Signature) -> Example:
    """The inputs of one sample, or for a model without a batch a function that gives them as they are."""
    evaluation = version.model.config.evaluation
    has_rows = _has_rows(version, signature)
    inputs: Mapping[str, Array] = synthetic_inputs(signature.inputs, 1, batch_axis=has_rows)
    if evaluation is not None:
        try:
            inputs = _first_sample(version, evaluation, signature, has_rows=has_rows)
        except RepositoryError as error:
            log.warning("model %s: profiling with synthetic inputs: %s", version.model.name, error)
    return inputs if signature.max_batch_size else lambda _: inputs


def _has_rows(version: VersionFolder, signature: Signature) -> bool:
    """Whether dim 0 counts samples: it is a batch, or `build` takes it for one because it is fixed to 1 everywhere."""
    if signature.max_batch_size or not version.model.config.batching.max_batch_size:
        return signature.max_batch_size > 0
    return all(spec.shape[:1] == (1,) for spec in (*signature.inputs, *signature.outputs))


def _first_sample(
    version: VersionFolder, evaluation: EvaluationConfig, signature: Signature, *, has_rows: bool
) -> dict[str, Array]:
    """The first sample of the evaluation data, shaped as the model takes it. Raises RepositoryError."""
    specs = [replace(spec, shape=spec.shape[1:]) for spec in signature.inputs] if has_rows else signature.inputs
    path = version.verify(evaluation.data) if version.is_built else version.resolve(evaluation.data)
    found = match_inputs(
        path, read_arrays(path), specs, target=evaluation.target, other_targets=targets_of(version)
    ).inputs
    return {name: array[:1] if has_rows else array[0, ...] for name, array in found.items()}
