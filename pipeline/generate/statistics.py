"""Moments of every BatchNormalization input over any number of images, differentiable.

A batch contributes three additive numbers a channel: its count, and the first and second moment
of the values about a fixed center ``k``, the mean that the network itself stores,

    n,   S1 = n (m - k),   S2 = n (v + (m - k)^2)        (batch mean m, variance v, biased)

so that sums over batches of any sizes give the moments over all their images at once:

    mean = k + S1/n,   variance = S2/n - (S1/n)^2.

Values near the center do not cancel, and the sums are float64, so the order and the sizes of the
batches leave no trace (Chan, Golub and LeVeque, 1983). Adding a new batch and subtracting its
old sums keeps a running total whose size does not depend on the number of images. This is
equation 5 of DGH (arXiv 2410.22110), which holds only for equal batches, made exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from graph_tools.batchnorm import BatchNormSite
from graph_tools.folded_taps import Tap

__all__ = ["SiteTargets", "StatisticsMatch", "Sums", "moments"]

# Rows summed in one float32 accumulator of the channels_last kernel: the rounding error of a
# longer run would show in the fifth digit.
_ROWS = 16384


@dataclass(frozen=True, kw_only=True)
class StatisticsMatch:
    """How well images reproduce the statistics of one BatchNormalization node.

    Errors are root mean squares over the channels of ``(m - mean) / sigma`` and
    ``(s - sigma) / sigma``, with ``sigma = sqrt(variance + epsilon)`` of the network.

    Args:
        node: name of the BatchNormalization node.
        tensor: its input.
        channels: number of channels.
        mean_error_before: for the images that optimization starts from.
        mean_error_after: for the images as written.
        std_error_before: likewise, standard deviation.
        std_error_after: likewise, standard deviation.
    """

    node: str
    tensor: str
    channels: int
    mean_error_before: float
    mean_error_after: float
    std_error_before: float
    std_error_after: float


@dataclass(frozen=True)
class Sums:
    """Additive moments of all sites, concatenated: three [P] float64 vectors on one device.

    Args:
        count: values a channel.
        first: sum of (value - center).
        second: sum of (value - center)^2.
    """

    count: Tensor
    first: Tensor
    second: Tensor

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.count + other.count, self.first + other.first, self.second + other.second
        )

    def __sub__(self, other: Sums) -> Sums:
        return Sums(
            self.count - other.count, self.first - other.first, self.second - other.second
        )

    def detach(self) -> Sums:
        """Return the same numbers, cut from the gradient graph."""
        return Sums(self.count, self.first.detach(), self.second.detach())

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return ``mean - center`` and ``variance`` (biased): [P] float64."""
        offset = self.first / self.count
        return offset, (self.second / self.count - offset.square()).clamp_min(0.0)


class _Moments(torch.autograd.Function):
    """Mean and variance of each channel in one pass forward and one backward.

    `torch.var_mean` does the same several times slower on CPU, and dozens of times slower in
    the channels_last memory format, in which the convolutions run best.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        mean, variance = _reduce(values)
        ctx.save_for_backward(values, mean)
        return mean, variance

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_mean: Tensor, grad_variance: Tensor
    ) -> Tensor:
        values, mean = ctx.saved_tensors  # type: ignore[attr-defined]
        count = values.numel() // values.shape[1]
        slope = grad_variance * (2 / count)
        offset = grad_mean / count - slope * mean
        shape = [1, -1] + [1] * (values.dim() - 2)
        return torch.addcmul(
            offset.to(values.dtype).view(shape), values, slope.to(values.dtype).view(shape)
        )


def _reduce(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each channel, [C] float64, without gradient."""
    if values.device.type not in ("cpu", "cuda"):
        dims = [axis for axis in range(values.dim()) if axis != 1]
        variance, mean = torch.var_mean(values, dim=dims, correction=0)
        return mean.double(), variance.double()
    rows = values.numel() // (values.shape[0] * values.shape[1])
    parts = (
        torch.split(values, max(1, _ROWS // rows))
        if values.device.type == "cpu"
        else (values,)
    )
    means, variances = zip(*map(_part_moments, parts), strict=True)
    count = torch.tensor([len(part) for part in parts], device=values.device).double()
    mean, variance = torch.stack(means).double(), torch.stack(variances).double()
    weight = (count / count.sum()).unsqueeze(1)
    total = (weight * mean).sum(0)
    return total, (weight * (variance + (mean - total).square())).sum(0)


def _part_moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each channel, [C] float32 or float64."""
    if values.dtype in (torch.float32, torch.float64):
        mean, variance = torch.batch_norm_update_stats(values, None, None, 0.0)
        return mean, variance
    # Of other types it returns that type; running statistics of momentum 1 are float32.
    running = values.new_zeros((2, values.shape[1]), dtype=torch.float32)
    torch.batch_norm_update_stats(values, running[0], running[1], 1.0)
    count = values.numel() // values.shape[1]
    if count == 1:  # whose unbiased variance is none
        return running[0], torch.zeros_like(running[1])
    return running[0], running[1] * ((count - 1) / count)


def moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and biased variance of each channel.

    Args:
        values: [N, C, ...] float32 or float64.

    Returns:
        ``mean, variance``: [C] float64, differentiable with respect to ``values``.
    """
    mean, variance = _Moments.apply(values)  # type: ignore[no-untyped-call]
    return mean, variance


class SiteTargets:
    """The statistics that a network stores, of all its BatchNormalization nodes in a row.

    Args:
        sites: BatchNormalization nodes in graph order, at least one.
        device: where the vectors live.
        taps: by name of a site's tensor, where it is seen instead (`graph_tools.folded_taps`).

    Attributes:
        sites: as given.
        taps: as given.
        center: means, [P] float64, P the channels of all sites together.
        variance: variances, [P] float64.
        epsilon: epsilon of each site, [P] float64.
        site_index: site of each channel, [P] int64.
    """

    def __init__(
        self,
        sites: Sequence[BatchNormSite],
        device: torch.device,
        taps: Mapping[str, Tap] | None = None,
    ) -> None:
        def row(values: Sequence[np.ndarray]) -> Tensor:
            joined = np.concatenate([np.asarray(value, dtype=np.float64) for value in values])
            return torch.from_numpy(joined).to(device)

        self.sites, self.taps = tuple(sites), dict(taps or {})
        self.center = row([site.mean for site in sites])
        self.variance = row([site.variance for site in sites])
        self.epsilon = row([np.full(site.channels, site.epsilon) for site in sites])
        pairs = [(site, self.taps.get(site.tensor)) for site in sites]
        self._gain = row([np.ones(s.channels) if t is None else t.gain for s, t in pairs])
        self._seen_center = row([s.mean if t is None else t.center for s, t in pairs])
        channels = [site.channels for site in sites]
        self.site_index = torch.repeat_interleave(
            torch.arange(len(sites)), torch.tensor(channels)
        ).to(device)

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors to observe, one a site."""
        return tuple(
            self.taps[site.tensor].tensor if site.tensor in self.taps else site.tensor
            for site in self.sites
        )

    def zero(self) -> Sums:
        """Return the sums of no images."""
        return Sums(*(torch.zeros_like(self.center) for _ in range(3)))

    def measure(self, values: Mapping[str, Tensor]) -> Sums:
        """Sum up the observed tensors of one batch, differentiably.

        Args:
            values: by tensor name, [N, C, ...].
        """
        observed = {name: moments(values[name]) for name in dict.fromkeys(self.tensors)}
        mean = torch.cat([observed[name][0] for name in self.tensors])
        variance = torch.cat([observed[name][1] for name in self.tensors])
        count = torch.cat(
            [
                self.center.new_full((site.channels,), values[name].numel()) / site.channels
                for site, name in zip(self.sites, self.tensors, strict=True)
            ]
        )
        if self.taps:
            variance = variance * self._gain.square()
        offset = (mean - self._seen_center) * self._gain
        return Sums(count, count * offset, count * (variance + offset.square()))

    def mean_over_channels(self, values: Tensor) -> Tensor:
        """Average [P] values over the channels of each site: [sites] float64."""
        sums = values.new_zeros(len(self.sites)).index_add(0, self.site_index, values)
        return sums / torch.bincount(self.site_index)

    def errors(self, sums: Sums) -> list[tuple[float, float]]:
        """Return mean and std error of each site, as `StatisticsMatch` defines them."""
        offset, variance = sums.moments()
        sigma = (self.variance + self.epsilon).sqrt()
        spread = ((variance + self.epsilon).sqrt() - sigma) / sigma
        columns = [
            self.mean_over_channels(value.square()).sqrt().tolist()
            for value in (offset / sigma, spread)
        ]
        return list(zip(*columns, strict=True))

    def first_non_finite(self, sums: Sums) -> BatchNormSite | None:
        """Return the first site in graph order whose sums are not finite."""
        finite = torch.isfinite(sums.first) & torch.isfinite(sums.second)
        if bool(finite.all()):
            return None
        return self.sites[int(self.site_index[int(torch.argmin(finite.int()))])]

    def match(self, before: Sums, after: Sums) -> tuple[StatisticsMatch, ...]:
        """Compare the images that optimization started from with the final ones."""
        rows = zip(self.sites, self.errors(before), self.errors(after), strict=True)
        return tuple(
            StatisticsMatch(
                node=site.node,
                tensor=site.tensor,
                channels=site.channels,
                mean_error_before=old[0],
                mean_error_after=new[0],
                std_error_before=old[1],
                std_error_after=new[1],
            )
            for site, old, new in rows
        )
