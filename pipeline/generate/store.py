"""Canvases and optimizer state of every batch: in memory if they are small, else in files.

Plain reads and writes of one batch at a time, so that beyond a bound the memory of a run does not
depend on the number of images.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
from torch import Tensor

from graph_tools.errors import DataError
from pipeline.generate.statistics import Sums
from pipeline.ranks import Ranks

__all__ = [
    "Batch",
    "BatchStore",
    "batch_sizes",
    "memory_budget",
    "open_store",
    "part_name",
    "temporary_folder",
]

_NAMES = ("canvas", "first_moment", "second_moment", "count", "first", "second")
"""Of the tensors of a `Batch`."""


def batch_sizes(num_images: int, batch_size: int) -> tuple[int, ...]:
    """Split images into batches; the last one may be smaller."""
    full, rest = divmod(num_images, batch_size)
    return (batch_size,) * full + ((rest,) if rest else ())


@dataclass(frozen=True)
class Batch:
    """A batch in memory. Where others are in files, its tensors are reused for the next one.

    Args:
        canvas: [N, C, H, W] float32, a leaf that requires gradient.
        first_moment: RAdam's running mean of the gradient, like ``canvas``.
        second_moment: RAdam's running mean of the squared gradient, like ``canvas``.
        sums: what this batch last contributed to the statistics of all images.
    """

    canvas: Tensor
    first_moment: Tensor
    second_moment: Tensor
    sums: Sums

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Everything that is stored."""
        sums = self.sums
        return (
            self.canvas.detach(),
            self.first_moment,
            self.second_moment,
            sums.count,
            sums.first,
            sums.second,
        )

    def copy_sums(self) -> Sums:
        """Return the contribution to the statistics, to keep."""
        own = self.sums
        return Sums(own.count.clone(), own.first.clone(), own.second.clone())

    def set_sums(self, sums: Sums) -> None:
        """Replace the contribution to the statistics."""
        own = self.sums
        for old, new in ((own.count, sums.count), (own.first, sums.first)):
            old.copy_(new)
        own.second.copy_(sums.second)


class BatchStore:
    """All batches, of which one is in memory.

    Args:
        folder: where the files go; `open_store` makes and removes it.
        sizes: images in each batch.
        canvas_shape: [C, H, W] of a canvas.
        num_statistics: length of the vectors of `Sums`.
        device: where the batches in memory live.
        in_memory: all batches, instead of one; by default if they fit `memory_budget`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        sizes: Sequence[int],
        canvas_shape: tuple[int, int, int],
        num_statistics: int,
        device: torch.device,
        in_memory: bool | None = None,
    ) -> None:
        self.sizes = tuple(sizes)
        self._folder = folder
        self._current: int | None = None
        if in_memory is None:
            values = 3 * sum(self.sizes) * math.prod(canvas_shape)
            in_memory = 4 * values <= memory_budget(device)
        self._in_memory = in_memory
        make = partial(
            _new_batch,
            canvas_shape=canvas_shape,
            num_statistics=num_statistics,
            device=device,
        )
        shared = {} if in_memory else {size: make(size) for size in dict.fromkeys(self.sizes)}
        self._batches = [make(size) if in_memory else shared[size] for size in self.sizes]

    def create(self, index: int, canvas: Tensor) -> Batch:
        """Start a batch: this canvas, no optimizer state, no statistics."""
        self._put_away()
        batch = self._batches[index]
        for tensor in batch.tensors:
            tensor.zero_()
        batch.canvas.detach().copy_(canvas)
        self._current = index
        return batch

    def get(self, index: int) -> Batch:
        """Bring a batch to memory; the one that was there is written back."""
        batch = self._batches[index]
        if index != self._current and not self._in_memory:
            self._put_away()
            with self._file(index, "rb") as file:
                for tensor in batch.tensors:
                    data = np.fromfile(file, dtype=_dtype(tensor), count=tensor.numel())
                    tensor.copy_(torch.from_numpy(data).view(tensor.shape))
            self._current = index
        return batch

    def parts(self, ranks: Ranks) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield each batch's tensors by name, wherever it is; they change with the next one."""
        for index in range(len(self.sizes)):
            if ranks.owns(index):
                batch = self.get(index)
            else:  # room for it
                self._put_away()
                batch, self._current = self._batches[index], None
            tensors = [ranks.broadcast(t, ranks.owner(index)) for t in batch.tensors]
            yield part_name(index), dict(zip(_NAMES, tensors, strict=True))

    def put(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Set a batch to what `parts` gave."""
        self._put_away()
        for name, tensor in zip(_NAMES, self._batches[index].tensors, strict=True):
            tensor.copy_(tensors[name])
        self._current = index

    def _put_away(self) -> None:
        if self._current is None or self._in_memory:
            return
        with self._file(self._current, "wb") as file:
            for tensor in self._batches[self._current].tensors:
                file.write(np.ascontiguousarray(tensor.cpu().numpy()).data)

    @contextlib.contextmanager
    def _file(self, index: int, mode: Literal["rb", "wb"]) -> Iterator[BinaryIO]:
        path = self._folder / f"{index:06d}"
        try:
            with path.open(mode) as file:
                yield file
        except OSError as error:
            raise DataError(
                f"temporary file cannot be used ({error.strerror or error})",
                where=str(path),
                hint="free some space, or make fewer images",
            ) from error


def memory_budget(device: torch.device) -> int:
    """Return how many bytes of batches may stay in memory: 256 MiB, or half of a GPU's free."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) // 2
    return 2**28


def part_name(index: int) -> str:
    """Return the name of a batch in a checkpoint."""
    return f"batch{index:06d}"


@contextlib.contextmanager
def temporary_folder(beside: Path) -> Iterator[Path]:
    """Make a hidden folder beside a file, removed at the end.

    Raises:
        DataError: the folder cannot be made.
    """
    try:
        folder = tempfile.TemporaryDirectory(
            prefix=f".{beside.name}.", dir=beside.parent, ignore_cleanup_errors=True
        )
    except OSError as error:
        raise DataError(
            f"no folder can be made there ({error.strerror or error})",
            where=str(beside.parent),
            hint="choose another place with -o",
        ) from error
    with folder as name:
        yield Path(name)


@contextlib.contextmanager
def open_store(
    beside: Path,
    *,
    sizes: Sequence[int],
    canvas_shape: tuple[int, int, int],
    num_statistics: int,
    device: torch.device,
    in_memory: bool | None = None,
) -> Iterator[BatchStore]:
    """Keep batches, if not in memory, in a hidden folder beside ``beside``, removed at the end.

    Raises:
        DataError: the folder cannot be made or written.
    """
    with temporary_folder(beside) as folder:
        yield BatchStore(
            folder,
            sizes=sizes,
            canvas_shape=canvas_shape,
            num_statistics=num_statistics,
            device=device,
            in_memory=in_memory,
        )


def _new_batch(
    size: int, canvas_shape: tuple[int, int, int], num_statistics: int, device: torch.device
) -> Batch:
    canvas, first, second = (
        torch.zeros((size, *canvas_shape), device=device) for _ in range(3)
    )
    sums = [torch.zeros(num_statistics, dtype=torch.float64, device=device) for _ in range(3)]
    return Batch(canvas.requires_grad_(), first, second, Sums(*sums))


def _dtype(tensor: Tensor) -> type[np.floating]:
    return np.float64 if tensor.dtype == torch.float64 else np.float32
