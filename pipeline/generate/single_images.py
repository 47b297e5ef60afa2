"""BatchNormalization statistics of each image by itself, over its positions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.generate.statistics import SiteTargets

__all__ = ["image_errors"]

_EPSILON = 1e-6


def image_errors(values: Mapping[str, Tensor], targets: SiteTargets) -> tuple[Tensor, Tensor]:
    """Return how far each image is from the targets, as ZeroQ's published code has it.

    Args:
        values: observed tensors by name, [N, C, ...] each.
        targets: what they should be.

    Returns:
        ``m - mean`` and ``sqrt(v + 1e-6) - sqrt(variance + 1e-6)``: [N, P] float32 each, P the
        channels of all sites together; ``v`` is the unbiased variance over the positions of a
        tensor. Where there is only one position, the second is 0.
    """
    offsets, spreads = [], []
    for site in targets.sites:
        tensor = values[site.tensor].flatten(2) if values[site.tensor].dim() > 2 else None
        if tensor is None or tensor.shape[2] == 1:
            mean = values[site.tensor].flatten(1)
            spread = torch.zeros_like(mean)
        else:
            variance, mean = torch.var_mean(tensor, dim=2)
            wanted = variance.new_tensor(site.variance)
            spread = (variance + _EPSILON).sqrt() - (wanted + _EPSILON).sqrt()
        offsets.append(mean - mean.new_tensor(site.mean))
        spreads.append(spread)
    return torch.cat(offsets, 1), torch.cat(spreads, 1)
