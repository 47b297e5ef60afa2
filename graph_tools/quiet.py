"""Keep libraries from writing to the terminal."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import onnx_graphsurgeon as gs
import onnxruntime

__all__ = ["one_line", "quiet"]

_ORT_WARNING, _ORT_FATAL = 2, 4


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Python warnings, onnx-graphsurgeon and onnxruntime inside the block."""
    log = gs.logger.G_LOGGER
    severity = log.severity
    log.severity = log.CRITICAL + 1  # what is critical is raised as well
    onnxruntime.set_default_logger_severity(_ORT_FATAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        onnxruntime.set_default_logger_severity(_ORT_WARNING)
        log.severity = severity


def one_line(error: BaseException) -> str:
    """Return the start of an error's message on a single line."""
    return " ".join(str(error).split())[:160]
