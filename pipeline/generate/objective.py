"""What images should fulfil: the loss that a method hands to the loop.

    loss = statistics(moments of all images of the scope)
         + images(values of the batch)            each image by itself, as ZeroQ's statistics
         + weight * output(values of the batch)   the outputs' range; the weight may be automatic

A method's objective derives from `Objective` and overrides what it needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from pipeline.generate.statistics import SiteTargets, Sums

__all__ = ["Objective"]


class Objective:
    """A loss without terms.

    Images are known by their index among all images: an argument ``first`` is that of the first
    row of the values.

    Attributes:
        targets: the tensors whose moments the loss is about, and what they should be.
        heads: names of the outputs to stretch; empty where there is no output loss.
        one_by_one: whether a batch is compared with what others last were, so that no two can
            advance at the same time.
    """

    targets: SiteTargets
    heads: Sequence[str] = ()
    one_by_one: ClassVar[bool] = False

    def measure(self, values: Mapping[str, Tensor], first: int) -> Sums:
        """Return the moments of some images, differentiable.

        Args:
            values: observed tensors by name, [N, ...] each.
            first: index of the first image.
        """
        return self.targets.measure(values)

    def statistics(self, sums: Sums) -> Tensor:
        """Return the loss of the moments of all images of the scope: a float64 scalar."""
        return sums.first.new_zeros(())

    def images(self, values: Mapping[str, Tensor], first: int) -> Tensor | None:
        """Return the terms of single images, averaged over them; None where there are none.

        Args:
            values: observed tensors by name, [N, ...] each.
            first: index of the first image.
        """
        return None

    def output(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the output loss, averaged over the images. Asked for only with ``heads``."""
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """Return what was taken note of, for a checkpoint."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take note of what `state` gave, on the CPU, instead."""

    def remember(self, values: Mapping[str, Tensor], first: int) -> None:
        """Take note of images after a step: what later steps are to compare theirs with.

        Args:
            values: as for `images`, without gradient.
            first: index of the first image.
        """
