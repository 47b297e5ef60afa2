"""Gaussian noise images: the usual baseline, which needs nothing from the network.

Pixels are N(0.45, 0.226), unclipped: N(0, 1) in the standardized units that most networks take,
and the same image for networks that take another range.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pipeline.generate.job import Job, Made
from pipeline.generate.loop import OnStep
from pipeline.generate.statistics import SiteTargets
from pipeline.generate.step import measure_batch
from pipeline.images import ImageWriter

__all__ = ["make_noise", "noise_images"]


def make_noise(job: Job, writer: ImageWriter, on_step: OnStep | None) -> Made:
    """Write Gaussian noise."""
    network = job.network(())
    targets = SiteTargets(job.sites, job.device) if job.sites else None
    total = targets.zero() if targets is not None else None
    for noise in noise_images(job.sizes, job.shape, job.generator):
        images = noise.to(job.device)
        if targets is not None and total is not None:
            total = total + measure_batch(images, network, targets)
        writer.append(network.model_input(images).cpu().numpy())
    if targets is None or total is None:
        return (), ()
    return targets.match(total, total), ()


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
