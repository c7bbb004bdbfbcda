"""Quiet: what libraries tell their own developers stays off a user's terminal."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_NOISY_LOGGERS = ("", "torch.onnx", "onnxscript", "onnx_ir", "nncf")


@contextmanager
def without_library_noise() -> Iterator[None]:
    """Keep the libraries' notices to their own developers off the user's terminal; errors are raised as ever.

    Meant for the calls of an exporter or a quantiser only: inside it, deprecations and advice are dropped.
    """
    loggers = {name: logging.getLogger(name) for name in _NOISY_LOGGERS}
    levels, handlers = {name: logger.level for name, logger in loggers.items()}, list(logging.root.handlers)
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning, UserWarning):
            warnings.simplefilter("ignore", category)
        try:
            for logger in loggers.values():
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for name, logger in loggers.items():
                logger.setLevel(levels[name])
            logging.root.handlers[:] = handlers  # logging.warning() installs one behind our back
