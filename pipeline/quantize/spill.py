"""Tensors in files, for activations that do not fit into memory."""

from __future__ import annotations

import os
import tempfile

import numpy as np
import torch

from graph_tools.errors import ZsqError

__all__ = ["free_bytes", "on_disk"]


def free_bytes() -> int:
    """Room in the folder for temporary files, in bytes."""
    found = os.statvfs(tempfile.gettempdir())
    return found.f_bavail * found.f_frsize


def on_disk(value: torch.Tensor) -> torch.Tensor:
    """A copy of ``value`` in a file without a name, which goes when the tensor goes.

    Args:
        value: any shape and strides, on the CPU; the copy has the same.

    Raises:
        ZsqError: there is no room for it.
    """
    flat = torch.empty_like(value)  # dense, in the memory format of value
    try:
        with tempfile.TemporaryFile() as file:
            # reserved at once: a full disk would otherwise be a bus error later
            os.posix_fallocate(file.fileno(), 0, value.nbytes)
            array = np.memmap(file, dtype=flat.numpy().dtype, mode="r+", shape=value.numel())
    except OSError as error:
        raise ZsqError(
            f"no room for the activations: {error.strerror or error}",
            where=tempfile.gettempdir(),
            hint="set TMPDIR to a folder with more, or use fewer images (--num-images)",
        ) from error
    copy = torch.from_numpy(array).as_strided(value.shape, flat.stride())
    return copy.copy_(value)
