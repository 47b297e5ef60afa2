"""DGH: what images should fulfil, and the published defaults (WACV 2025, arXiv 2410.22110).

For every BatchNormalization node, over all images together (`pipeline.generate.statistics`):

    code form:   (1/C) sum_c [ (m_c - mean_c)^2 + std_weight (s_c - sigma_c)^2 ], averaged over
                 the nodes; s = sqrt(variance + 1e-6)
    paper form:  sum_c [ (m_c - mean_c)^2 + (v_c - variance_c)^2 ], summed over the nodes (eq. 4)

The code form is the default: it is what the published results were made with. Each node's loss
is also divided by ``mean variance ** site_balance``. As published the exponent is 0, and a node
with large values, say the first one of a network that takes pixels 0..255, drowns all others;
with 1 every node counts alike, and the wide tensors that dominate mobile networks are met less
well. 1/2 serves networks of both kinds.

The output loss stretches the range of each output of each image, since nothing near the end of
the network is bound by BatchNormalization otherwise:

    -(max - min), or squared as in the paper (eq. 6)
    + optionally relu(|m_L - mean_L|^2 / C - delta) + relu(|s_L - sigma_L|^2 / C - delta) with
      the statistics of this image at the last node (eq. 7)

`pipeline.generate.stretch` has the range.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from graph_tools.batchnorm import find_bare_convolutions
from pipeline.generate.defaults import default_iterations, default_learning_rate
from pipeline.generate.heads import find_heads
from pipeline.generate.job import Job, Made
from pipeline.generate.loop import OnStep, OptimizeSettings
from pipeline.generate.network import pixel_site
from pipeline.generate.objective import Objective
from pipeline.generate.prior import Source, white_noise
from pipeline.generate.slack import Margins, emphasize, global_margins
from pipeline.generate.statistics import SiteTargets, Sums
from pipeline.generate.stretch import stretch
from pipeline.generate.synthetic import synthetic_source
from pipeline.images import ImageWriter

__all__ = ["DghObjective", "dgh_parts", "make_dgh"]

_EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class DghObjective(Objective):
    """The loss of DGH.

    Args:
        targets: statistics to match.
        form: that of the published code or of the paper.
        std_weight: weight of the std term, code form only.
        site_balance: exponent of the mean variance that each node's loss is divided by, code
            form only.
        output_range: range as is or squared.
        output_hinge: delta of the hinges; None leaves them out.
        heads: names of the outputs to stretch.
        last: index in ``targets.sites`` of the node that the hinges watch.
        margins: what errors of means and deviations are let be, code form only.
        enhanced: the first so many of ``targets.sites`` are shared out among the images, each to
            follow its own twice as far (`slack`).
    """

    targets: SiteTargets
    form: Literal["code", "paper"] = "code"
    std_weight: float = 10.0
    site_balance: float = 0.5
    output_range: Literal["linear", "squared"] = "linear"
    output_hinge: float | None = None
    heads: Sequence[str] = ()
    last: int = -1
    margins: Margins | None = None
    enhanced: int = 0

    def measure(self, values: Mapping[str, Tensor], first: int) -> Sums:
        """Return the moments of some images, differentiable."""
        if self.enhanced:
            values = emphasize(values, self.targets.sites[: self.enhanced], first)
        return self.targets.measure(values)

    def statistics(self, sums: Sums) -> Tensor:
        """Return how far all images together are from the targets: a float64 scalar."""
        targets = self.targets
        offset, variance = sums.moments()
        if self.form == "paper":
            return (offset.square() + (variance - targets.variance).square()).sum()
        std = (variance + _EPSILON).sqrt() - (targets.variance + _EPSILON).sqrt()
        if self.margins is not None:
            offset, std = self.margins.excess(offset, std)
        error = targets.mean_over_channels(offset.square() + self.std_weight * std.square())
        scale = targets.mean_over_channels(targets.variance) + _EPSILON
        return (error / scale**self.site_balance).mean()

    def output(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the output loss of a batch, averaged over its images.

        Args:
            values: observed tensors by name, [N, ...] each.
        """
        loss = stretch(values, self.heads, squared=self.output_range == "squared")
        if self.output_hinge is not None:
            loss = loss + self._hinges(values, self.output_hinge)
        return loss

    def _hinges(self, values: Mapping[str, Tensor], delta: float) -> Tensor:
        site = self.targets.sites[self.last]
        tensor = (
            values[site.tensor].flatten(2)
            if values[site.tensor].dim() > 2
            else (values[site.tensor].unsqueeze(2))
        )
        variance, mean = torch.var_mean(tensor, dim=2, correction=0)  # [N, C]
        target = mean.new_tensor(site.mean), mean.new_tensor(site.variance)
        spread = (variance + _EPSILON).sqrt() - (target[1] + _EPSILON).sqrt()
        excess = torch.stack([(mean - target[0]).square().mean(1), spread.square().mean(1)])
        return torch.relu(excess - delta).sum(0).mean()


def make_dgh(job: Job, writer: ImageWriter, on_step: OnStep | None) -> Made:
    """Optimize images by DGH and write them."""
    objective, how = dgh_parts(job)
    source: Source = white_noise
    if job.settings.start == "natural":
        source = synthetic_source(job.preprocessing, job.shape[0])
    prior = job.image_prior(source=source)
    network = job.network(objective.heads, folded=bool(objective.targets.taps))
    return job.optimize(writer, network, prior, objective, how, on_step)


def dgh_parts(job: Job) -> tuple[DghObjective, OptimizeSettings]:
    """Return the loss that the settings of a job ask for, and how to optimize it."""
    settings = job.settings
    channels, height, width = job.shape
    heads = find_heads(job.model) if settings.output_weight != 0 else ()
    if heads and settings.stretch_unbound:
        heads = tuple(dict.fromkeys((*heads, *find_bare_convolutions(job.model))))
    pixels = pixel_site(job.preprocessing, channels) if settings.pixel_prior else None
    watched = (*job.sites, pixels) if pixels is not None else job.sites
    # What looks at single images or single values needs the inputs themselves.
    folds = settings.engine == "torch" and settings.slack is None
    folds &= settings.output_hinge is None and not settings.layer_enhancement
    targets = SiteTargets(watched, job.device, job.folded[1] if folds else None)
    margins = None
    if settings.slack is not None:
        network = job.network(heads)
        margins = global_margins(job.gaussians(), network, targets, settings.slack)
    objective = DghObjective(
        targets=targets,
        form=settings.loss,
        std_weight=settings.std_weight,
        site_balance=settings.site_balance,
        output_range=settings.output_range,
        output_hinge=settings.output_hinge,
        heads=heads,
        last=len(job.sites) - 1,
        margins=margins,
        enhanced=len(job.sites) if settings.layer_enhancement else 0,
    )
    iterations = settings.iterations or default_iterations(height, width, settings.start)
    how = OptimizeSettings(
        iterations=iterations,
        learning_rate=settings.learning_rate
        or default_learning_rate(iterations, min(height, width), settings.start),
        output_weight=settings.output_weight,
        output_ratio=settings.output_ratio,
        scope=settings.scope,
        refresh=settings.refresh,
        parallel=settings.parallel_batches or 1,
    )
    return objective, how
