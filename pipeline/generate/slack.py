"""DSG's two ideas, for its own method and for DGH: margins, and a layer of its own for each image.

Margins of a BatchNormalization node are what Gaussian images miss its statistics by: the quantile
(published: 0.9) of the distances over the channels, and over the images where each counts by itself
(Diversifying Sample Generation, CVPR 2021, arXiv 2103.01049, section 3.2). Layerwise enhancement
gives image j the node j, modulo the number of nodes, to count twice (section 3.3).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graph_tools.batchnorm import BatchNormSite
from pipeline.generate.network import Network
from pipeline.generate.single_images import image_errors
from pipeline.generate.statistics import SiteTargets

__all__ = ["Margins", "emphasize", "global_margins", "image_margins", "own_site"]

_EPSILON = 1e-6


@dataclass(frozen=True)
class Margins:
    """How far statistics may be off: [P] float64 each, the same for all channels of a node.

    Args:
        mean: of the means (delta).
        std: of the standard deviations (gamma).
    """

    mean: Tensor
    std: Tensor

    def excess(self, offset: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
        """Return by how much errors [..., P] exceed the margins, never negative."""
        mean, std = self.mean.to(offset.dtype), self.std.to(spread.dtype)
        return torch.relu(offset.abs() - mean), torch.relu(spread.abs() - std)


def image_margins(
    batches: Iterator[Tensor], network: Network, targets: SiteTargets, quantile: float
) -> Margins:
    """Return the margins of each image by itself.

    Args:
        batches: Gaussian images, [N, C, H, W].
        network: observes the tensors of ``targets``.
        targets: statistics that the images miss.
        quantile: share of the distances that lie within a margin.
    """
    with torch.no_grad():
        errors = [
            image_errors(network.observe(chunk), targets)
            for images in batches
            for chunk in torch.split(images, network.chunk or len(images))
        ]
    offset, spread = (torch.cat(part).double() for part in zip(*errors, strict=True))
    return _margins(offset, spread, targets, quantile)


def global_margins(
    batches: Iterator[Tensor], network: Network, targets: SiteTargets, quantile: float
) -> Margins:
    """Return the margins of the statistics over all images; arguments as `image_margins`."""
    sums = targets.zero()
    with torch.no_grad():
        for images in batches:
            for chunk in torch.split(images, network.chunk or len(images)):
                sums = sums + targets.measure(network.observe(chunk))
    offset, variance = sums.moments()
    spread = (variance + _EPSILON).sqrt() - (targets.variance + _EPSILON).sqrt()
    return _margins(offset, spread, targets, quantile)


def _margins(offset: Tensor, spread: Tensor, targets: SiteTargets, quantile: float) -> Margins:
    columns = []
    for errors in (offset.abs(), spread.abs()):
        found = [
            torch.quantile(errors[..., targets.site_index == site].flatten(), quantile)
            for site in range(len(targets.sites))
        ]
        columns.append(torch.stack(found)[targets.site_index])
    return Margins(*columns)


def own_site(first: int, count: int, sites: int) -> Tensor:
    """Return the node that each of ``count`` images counts twice: [count] int64."""
    return torch.arange(first, first + count) % sites


class _Emphasis(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, values: Tensor, weight: Tensor
    ) -> Tensor:
        ctx.save_for_backward(weight)
        return values.view_as(values)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad * weight.view(-1, *[1] * (grad.dim() - 1)), None


def emphasize(
    values: Mapping[str, Tensor], sites: Sequence[BatchNormSite], first: int
) -> dict[str, Tensor]:
    """Return the values unchanged, but each image's gradient through its own node twice as large.

    Args:
        values: observed tensors by name, [N, ...] each.
        sites: nodes to share out among the images.
        first: index of the first image.
    """
    result = dict(values)
    for place, site in enumerate(sites):
        tensor = result[site.tensor]
        own = own_site(first, len(tensor), len(sites)) == place
        if own.any():
            weight = (1.0 + own.to(tensor)).to(tensor)
            result[site.tensor] = _Emphasis.apply(tensor, weight)  # type: ignore[no-untyped-call]
    return result
