"""Gaussian noise images: the usual baseline, which needs nothing from the network.

Pixels are N(0.45, 0.226), unclipped: N(0, 1) in the standardized units that most networks take,
and the same image for networks that take another range.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["noise_images"]


def noise_images(
    sizes: Sequence[int], shape: tuple[int, int, int], generator: torch.Generator
) -> Iterator[Tensor]:
    """Yield one batch of standard normal noise for each of ``sizes``.

    Args:
        sizes: images in each batch.
        shape: [C, H, W].
        generator: on the CPU.

    Yields:
        [N, C, H, W] float32 in standardized pixel units.
    """
    for size in sizes:
        yield torch.randn((size, *shape), generator=generator)
