"""What can go wrong while images are made, in the user's words."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from graph_tools.errors import GenerationError

__all__ = ["OutOfMemoryError", "first_non_finite", "memory_guard", "named_fault"]


class OutOfMemoryError(Exception):
    """A batch is too large for the device."""


@contextlib.contextmanager
def memory_guard() -> Iterator[None]:
    """Turn the errors of all allocators, of torch on any device, numpy and Python, into one.

    Raises:
        OutOfMemoryError: memory ran out in the block.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise OutOfMemoryError(str(error)) from error


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(
        words in str(error)
        for words in (
            "DefaultCPUAllocator",
            "can't allocate memory",
            "out of memory",
            "could not create a primitive",  # oneDNN's
        )
    )


def first_non_finite(values: Mapping[str, Tensor]) -> str:
    """Return the first of some tensors that is not finite, in words; empty if all are.

    Args:
        values: by name, in the order of the graph.
    """
    for name, value in values.items():
        if not bool(torch.isfinite(value).all()):
            return f"tensor '{name}'"
    return ""


@contextlib.contextmanager
def named_fault(values: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Name the first tensor that is not finite where the loss is all that is known not to be.

    Args:
        values: as for `first_non_finite`; None if they are not at hand.
    """
    try:
        yield
    except GenerationError as error:
        if not error.where and values is not None:
            error.where = first_non_finite(values)
        raise
