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
        self._groups, self._sizes, self._mixed = groups, sizes, mixed
        self._places = [(b, i) for b, size in enumerate(sizes) for i in range(size)]

    def draw(self, count: int, generator: torch.Generator) -> Sequence[Sample]:
        """Draw ``count`` images at random, or as many batches as hold them."""
        if self._mixed:
            rows = torch.randint(len(self._places), (count,), generator=generator)
            return [self._rows(rows.tolist())]
        drawn = torch.randint(
            len(self._sizes), (self._num_batches(count),), generator=generator
        )
        return [self._batch(index) for index in drawn.tolist()]

    def first(self, count: int) -> Sequence[Sample]:
        """The first ``count`` images, or the first batches that hold them."""
        if self._mixed:
            return [self._rows(range(min(count, len(self._places))))]
        return [self._batch(index) for index in range(self._num_batches(count))]

    def _num_batches(self, count: int) -> int:
        return min(math.ceil(count / self._sizes[0]), len(self._sizes))

    def _batch(self, index: int) -> Sample:
        return {
            group: {name: batches[index] for name, batches in named.items()}
            for group, named in self._groups.items()
        }

    def _rows(self, rows: Sequence[int]) -> Sample:
        places = [self._places[row] for row in rows]
        return {
            group: {
                name: torch.cat([batches[b][i : i + 1] for b, i in places])
                for name, batches in named.items()
            }
            for group, named in self._groups.items()
        }
