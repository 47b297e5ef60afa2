"""Second-moment correction: rounded weights keep each output channel's standard deviation.

A factor per channel, ``std(y_float) / std(y_quantized)`` on the quantized prefix, goes into the
float weight before it is rounded, since a power-of-two scale cannot take it. Rounding anew does
not give exactly the standard deviation asked for: the factor is corrected a few times, and each
channel keeps the integers that came nearest, its old ones included. The means are what bias
correction (`bias_correction`) brings back, right behind it.

The effect is that of measuring the folded BatchNormalization's statistics anew on the quantized
network (the form that the authors of HPTQ, arXiv 2109.09113, ship with it).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from graph_tools.quantizer import QuantizedConstant
from graph_tools.torch_graph import Step
from pipeline.quantize.lockstep import Batches, Lockstep
from pipeline.quantize.placement import Weighted
from pipeline.quantize.thresholds import Metric
from pipeline.quantize.weights import (
    bias_bits,
    input_exponent,
    quantize_bias,
    quantize_weight,
)

__all__ = ["SecondMomentCorrection"]

Array = np.ndarray[Any, np.dtype[Any]]

_TRIALS = 4

_LARGEST = 2.0
"""Factors beyond this (and its inverse) mean that the channel is noise."""


class SecondMomentCorrection:
    """Replaces the weights of one operator after the other, in graph order.

    Args:
        values: float weights and biases by initializer name.
        metric: error that the threshold search of weights minimizes.

    Attributes:
        num_channels: how many channels have been rescaled.
    """

    def __init__(self, values: Mapping[str, Array], metric: Metric) -> None:
        self._values, self._metric = values, metric
        self.num_channels = 0

    def __call__(self, lockstep: Lockstep, step: Step, site: Weighted) -> QuantizedConstant:
        """Rescale the weight of an operator that both networks have just computed.

        Its output in the quantized network is computed anew.

        Returns:
            The new integers; the old ones where no channel comes nearer to its standard deviation.
        """
        old = lockstep.constants[site.weight]
        weight = self._values[site.weight]
        wanted = _deviations(lockstep.exact[site.output], site.channel_axis)
        before = _deviations(lockstep.rounded[site.output], site.channel_axis)
        if (
            wanted.size != weight.shape[site.axis]
        ):  # grouped ConvTranspose: groups share a scale
            return old
        shape = [1] * weight.ndim
        shape[site.axis] = -1
        best, best_error = old, np.abs(before - wanted)
        factor, current = np.ones_like(wanted), before
        for _ in range(_TRIALS):
            usable = (wanted > 0) & (current > 0)
            factor = factor * np.divide(
                wanted, current, out=np.ones_like(wanted), where=usable
            )
            factor = np.clip(factor, 1 / _LARGEST, _LARGEST)
            trial = quantize_weight(
                site,
                (weight * factor.reshape(shape)).astype(np.float32),
                self._values[site.bias],
                input_exponent(site, lockstep.tensors),
                bits=old.quantizer.bits,
                metric=self._metric,
                bias_bits=bias_bits(site, lockstep.tensors),
            )
            self._recompute(lockstep, step, site, trial)
            current = _deviations(lockstep.rounded[site.output], site.channel_axis)
            nearer = np.abs(current - wanted) < best_error
            best = _mixed(trial, best, nearer)
            best_error = np.where(nearer, np.abs(current - wanted), best_error)
        self._recompute(lockstep, step, site, best)
        self.num_channels += int((best_error < np.abs(before - wanted)).sum())
        return best

    def _recompute(
        self,
        lockstep: Lockstep,
        step: Step,
        site: Weighted,
        weight: QuantizedConstant,
    ) -> None:
        """Run the operator in the quantized network again, with a bias of the new scale."""
        lockstep.constants[site.weight] = weight
        lockstep.constants[site.bias] = quantize_bias(
            site, self._values[site.bias], input_exponent(site, lockstep.tensors), weight
        )
        for name in step.outputs:
            lockstep.rounded.pop(name, None)
        lockstep.run_rounded(step)


def _mixed(
    new: QuantizedConstant, old: QuantizedConstant, takes_new: Array
) -> QuantizedConstant:
    """Channel by channel the new integers or the old ones."""
    axis = new.quantizer.axis
    assert axis is not None  # weights have one scale a channel
    shape = [1] * new.integers.ndim
    shape[axis] = -1
    exponents = np.where(takes_new, new.quantizer.exponent, old.quantizer.exponent)
    return replace(
        new,
        integers=np.where(takes_new.reshape(shape), new.integers, old.integers),
        quantizer=replace(new.quantizer, exponent=tuple(int(e) for e in exponents)),
    )


def _deviations(batches: Batches, axis: int) -> Array:
    """Standard deviation of each channel over all images and positions, float64."""
    rows = [batch.movedim(axis, 0).flatten(1).double() for batch in batches]
    count = sum(row.shape[1] for row in rows)
    mean = torch.stack([row.sum(dim=1) for row in rows]).sum(dim=0) / count
    squares = [((row - mean[:, None]) ** 2).sum(dim=1) for row in rows]
    return np.sqrt(torch.stack(squares).sum(dim=0).numpy() / count)
