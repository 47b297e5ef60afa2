"""ZeroQ: every image by itself has the statistics that the network stores (CVPR 2020).

For each image and each BatchNormalization node, over the positions of the node's own input, and
for the pixels with mean 0 and variance 1,

    sum_c [ (m_c - mean_c)^2 + (s_c - sigma_c)^2 ],   summed over the nodes, averaged over images

(arXiv 2001.00281; epsilon and the unbiased variance as in the published code, which however takes
convolutions for the nodes behind them). As published: images start from noise near zero and are
neither smoothed, moved, mirrored nor clipped; Adam at 0.5, a tenth of it after a fifth of the steps
without progress. Published are 500 steps for 32 images; here there are as many as DGH takes from
noise. In standardized pixel units, whatever range the network takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.generate.job import Job, Made
from pipeline.generate.loop import OnStep
from pipeline.generate.network import PIXELS, blank_site
from pipeline.generate.objective import Objective
from pipeline.generate.prior import ImagePrior
from pipeline.generate.single_images import image_errors
from pipeline.generate.statistics import SiteTargets
from pipeline.images import ImageWriter

__all__ = ["ZeroqObjective", "make_zeroq", "near_zero", "plain_prior", "watched_sites"]

_LEARNING_RATE, _ITERATIONS, _PATIENCE = 0.5, 500, 100


@dataclass(frozen=True, kw_only=True)
class ZeroqObjective(Objective):
    """The loss of ZeroQ.

    Args:
        targets: statistics that each image is to have.
    """

    targets: SiteTargets

    def images(self, values: Mapping[str, Tensor], first: int) -> Tensor:
        """Return the distances from the statistics, averaged over the images."""
        offset, spread = image_errors(values, self.targets)
        return (offset.square() + spread.square()).sum(1).mean()


def near_zero(count: int, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Return ZeroQ's start: even noise within 0.0235 of zero."""
    levels = torch.randint(0, 255, (count, *shape), generator=generator)
    return (levels - 127.5) / 5418.75


def watched_sites(job: Job) -> SiteTargets:
    """Return the network's nodes, and the pixels with mean 0 and variance 1."""
    pixels = [blank_site(PIXELS, PIXELS, job.shape[0])] if job.settings.pixel_prior else []
    return SiteTargets((*job.sites, *pixels), job.device)


def plain_prior(job: Job) -> ImagePrior:
    """Return images as they are optimized: nothing is blurred, moved, mirrored or clipped."""
    return job.image_prior(source=near_zero, padding=0, blur=0.0, flip=False, clip=False)


def make_zeroq(job: Job, writer: ImageWriter, on_step: OnStep | None) -> Made:
    """Optimize images by ZeroQ and write them."""
    how = job.by_adam(_LEARNING_RATE, patience=_PATIENCE, published=_ITERATIONS)
    objective = ZeroqObjective(targets=watched_sites(job))
    return job.optimize(writer, job.network(()), plain_prior(job), objective, how, on_step)
