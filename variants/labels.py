"""Targets that are class numbers: checked against what the model answers before anything is made."""

from __future__ import annotations

from variants.data import DataSets
from variants.repository import RepositoryError, VersionFolder
from variants.source import Source


def refuse_labels(version: VersionFolder, source: Source, data: DataSets) -> None:
    """Raise RepositoryError for targets that name a class which the model has not, before anything is made."""
    config, classes = version.model.config, source.signature.outputs[0].shape[-1:]
    if not (config.task == "classification" or config.metric in ("top1", "macro_f1")) or classes in ((), (-1,)):
        return
    for name in ("evaluation", "training", "tuning"):
        section, samples = getattr(config, name), getattr(data, name)
        if section is None or samples is None or samples.target is None:
            continue
        labels, path = samples.target, version.resolve(section.data)
        if classes == (1,):
            raise RepositoryError(
                f"{path}: array {section.target!r} holds classes, but the model has a single output: give it one "
                "output per class, or say another `task` and `metric`"
            )
        if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= classes[0]:
            raise RepositoryError(f"{path}: array {section.target!r} must hold class numbers 0..{classes[0] - 1}")
