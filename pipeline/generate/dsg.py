"""DSG: images may miss the statistics by a margin, and each minds one layer more (CVPR 2021).

For each image and BatchNormalization node, over the positions of the node's input,

    sum_c [ max(|m_c - mean_c| - delta, 0)^2 + max(|s_c - sigma_c| - gamma, 0)^2 ]

with the node's margins ``delta, gamma`` of `slack`; image j counts the node j, modulo the number of
nodes, twice (arXiv 2103.01049). The pixels are matched likewise, with mean 0 and variance 1.

As published: Adam at 0.9, a tenth of it after 260 of 500 steps without progress; start, views and
number of steps are those of ZeroQ. Terms that only the later, journal version has are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from pipeline.generate.job import Job, Made
from pipeline.generate.loop import OnStep
from pipeline.generate.objective import Objective
from pipeline.generate.single_images import image_errors
from pipeline.generate.slack import Margins, image_margins, own_site
from pipeline.generate.statistics import SiteTargets
from pipeline.generate.zeroq import plain_prior, watched_sites
from pipeline.images import ImageWriter

__all__ = ["DsgObjective", "make_dsg"]

_QUANTILE = 0.9
_LEARNING_RATE, _ITERATIONS, _PATIENCE = 0.9, 500, 260


@dataclass(frozen=True, kw_only=True)
class DsgObjective(Objective):
    """The loss of DSG.

    Args:
        targets: statistics that each image is to have, more or less.
        margins: how much more or less.
        sites: the first so many of ``targets.sites`` are shared out among the images.
    """

    targets: SiteTargets
    margins: Margins
    sites: int

    def images(self, values: Mapping[str, Tensor], first: int) -> Tensor:
        """Return the distances beyond the margins, averaged over the images."""
        offset, spread = self.margins.excess(*image_errors(values, self.targets))
        own = own_site(first, len(offset), self.sites).to(offset.device)
        weight = 1 + (self.targets.site_index == own.unsqueeze(1)).to(offset)
        return (weight * (offset.square() + spread.square())).sum(1).mean()


def make_dsg(job: Job, writer: ImageWriter, on_step: OnStep | None) -> Made:
    """Optimize images by DSG and write them."""
    settings = job.settings
    network, targets = job.network(()), watched_sites(job)
    quantile = _QUANTILE if settings.slack is None else settings.slack
    margins = image_margins(job.gaussians(), network, targets, quantile)
    objective = DsgObjective(targets=targets, margins=margins, sites=len(job.sites))
    how = job.by_adam(_LEARNING_RATE, patience=_PATIENCE, published=_ITERATIONS)
    return job.optimize(writer, network, plain_prior(job), objective, how, on_step)
