"""Empirical bias correction, layer by layer on the quantized prefix.

The float and the quantized network run side by side, operator by operator, over the calibration
images. Behind each weighted operator the mean error of each output channel,
``E[y_float - y_quantized]``, is added to its bias (Nagel et al. 2019, arXiv 1906.04721, section
4.2, the empirical form), so later layers see an input whose mean is right. On a depthwise network
with power-of-two scales this is worth more than ten points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from graph_tools.quantizer import QuantizedConstant
from pipeline.quantize.lockstep import Batches, Lockstep
from pipeline.quantize.placement import Weighted
from pipeline.quantize.weights import input_exponent, quantize_bias

__all__ = ["correct_biases"]

Array = np.ndarray[Any, np.dtype[Any]]


def correct_biases(
    lockstep: Lockstep,
    weighted: Mapping[str, Weighted],
    biases: Mapping[str, Array],
    *,
    on_step: Callable[[int, int], None] | None = None,
) -> dict[str, QuantizedConstant]:
    """Corrected integers of every bias.

    Args:
        lockstep: both networks, at their beginning.
        weighted: operators with constant weights, by node name.
        biases: float biases by initializer name, [channels].
        on_step: called with (operators done, operators).

    Returns:
        The corrected biases by initializer name.
    """
    corrected: dict[str, QuantizedConstant] = {}
    steps = lockstep.graph.steps
    for index, step in enumerate(steps):
        lockstep.run(step)
        site = weighted.get(step.name)
        if site is not None and site.bias:
            exact, rounded = lockstep.exact[site.output], lockstep.rounded[site.output]
            bias = quantize_bias(
                site,
                biases[site.bias] + _mean_error(exact, rounded, site.channel_axis),
                input_exponent(site, lockstep.tensors),
                lockstep.constants[site.weight],
            )
            change = torch.from_numpy(bias.values - lockstep.constants[site.bias].values)
            corrected[site.bias] = lockstep.constants[site.bias] = bias
            shape = [1] * exact[0].ndim
            shape[site.channel_axis] = -1
            change = change.reshape(shape)
            lockstep.rounded[site.output] = [y + change for y in rounded]
        lockstep.quantize(step.outputs)
        lockstep.forget(step)
        if on_step is not None:
            on_step(index + 1, len(steps))
    return corrected


def _mean_error(exact: Batches, rounded: Batches, axis: int) -> Array:
    """Per-channel mean of ``exact - rounded`` over all images and positions, float64."""
    total: Array = np.zeros(exact[0].shape[axis])
    count = 0
    for y, approximate in zip(exact, rounded, strict=True):
        error = (y - approximate).movedim(axis, 0).flatten(1).double()
        total = total + error.sum(dim=1).numpy()
        count += error.shape[1]
    # a quantized division by zero tells nothing about the bias
    return np.nan_to_num(total / max(count, 1), nan=0.0, posinf=0.0, neginf=0.0)
