"""Images drawn for a step of learning, with all that belongs to them.

Where every tensor has one row for each image, any images make a batch. Where images are merged
with windows or tokens, or the network takes only batches of one size, batches are drawn as they
were run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from pipeline.quantize.lockstep import Batches

__all__ = ["Sample", "Samples"]

Sample = Mapping[str, Mapping[str, torch.Tensor]]
"""Some images' tensors, by group and name."""


class Samples:
    """Tensors of all images to draw from.

    Args:
        groups: batches of tensors, by group and name; the same images in each.
        sizes: how many images are in each batch.
        mixed: whether every tensor has one row for each image, and batches may be of any size.
    """

    def __init__(
        self,
        groups: Mapping[str, Mapping[str, Batches]],
        sizes: Sequence[int],
        *,
        mixed: bool,
    ) -> None:
        self._sizes, self._mixed = sizes, mixed
        parts = range(1 if mixed else len(sizes))
        self._parts: list[Sample] = [
            {
                group: {
                    name: _joined(batches) if mixed else batches[part]
                    for name, batches in named.items()
                }
                for group, named in groups.items()
            }
            for part in parts
        ]

    def draw(self, count: int, generator: torch.Generator) -> Sequence[Sample]:
        """Draw ``count`` images at random, or as many batches as hold them."""
        if self._mixed:
            rows = torch.randint(sum(self._sizes), (count,), generator=generator)
            return [_rows(self._parts[0], rows)]
        drawn = torch.randint(
            len(self._parts), (self._num_batches(count),), generator=generator
        )
        return [self._parts[index] for index in drawn.tolist()]

    def first(self, count: int) -> Sequence[Sample]:
        """The first ``count`` images, or the first batches that hold them."""
        if self._mixed:
            return [_rows(self._parts[0], torch.arange(min(count, sum(self._sizes))))]
        return self._parts[: self._num_batches(count)]

    def _num_batches(self, count: int) -> int:
        return min(math.ceil(count / self._sizes[0]), len(self._parts))


def _rows(sample: Sample, rows: torch.Tensor) -> Sample:
    return {
        group: {name: value[rows] for name, value in named.items()}
        for group, named in sample.items()
    }


def _joined(batches: Sequence[torch.Tensor]) -> torch.Tensor:
    """All images of a tensor; convolutions run fastest in this memory format."""
    joined = torch.cat(list(batches))
    return (
        joined.contiguous(memory_format=torch.channels_last) if joined.dim() == 4 else joined
    )
