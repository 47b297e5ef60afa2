"""Bias correction: what the rounding of weights adds to the means goes into the biases.

Empirical, layer by layer on the quantized prefix: the float and the quantized network run side by
side, operator by operator, over the calibration images. Behind each weighted operator the mean
error of each output channel, ``E[y_float - y_quantized]``, is added to its bias (Nagel et al.
2019, arXiv 1906.04721, section 4.2, the empirical form), so later layers see an input whose mean
is right. On a depthwise network with power-of-two scales this is worth more than ten points.

Analytic, HPTQ's form (arXiv 2109.09113) of the same paper's equation: each bias loses
``sum_i E[x_i] sum_kernel (W_quantized - W)[o, i]``, with ``E[x_i]`` the mean of channel ``i`` of
the *float* network's input over the calibration images. It knows nothing of errors in that input,
nor of zero padding, and costs one run of the float network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch

from graph_tools.quantizer import QuantizedConstant, TensorQuantizer
from graph_tools.torch_graph import Step, TorchGraph
from pipeline.quantize.lockstep import Batches, Lockstep
from pipeline.quantize.placement import Weighted
from pipeline.quantize.weights import input_exponent, quantize_bias

__all__ = ["correct_biases", "correct_biases_analytically", "mean_error"]

Array = np.ndarray[Any, np.dtype[Any]]

Rescale = Callable[[Lockstep, Step, Weighted], QuantizedConstant]


def correct_biases(
    lockstep: Lockstep,
    weighted: Mapping[str, Weighted],
    biases: Mapping[str, Array],
    *,
    rescale: Rescale | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> dict[str, QuantizedConstant]:
    """Corrected integers of every bias.

    Args:
        lockstep: both networks, at their beginning.
        weighted: operators with constant weights, by node name.
        biases: float biases by initializer name, [channels].
        rescale: replaces the weight of an operator that both networks have just computed, and
            its output in the quantized one (second-moment correction).
        on_step: called with (operators done, operators).

    Returns:
        The corrected biases by initializer name, and the weights that ``rescale`` replaced.
    """
    corrected: dict[str, QuantizedConstant] = {}
    steps = lockstep.graph.steps
    for index, step in enumerate(steps):
        lockstep.run(step)
        site = weighted.get(step.name)
        if site is not None and site.bias:
            if rescale is not None:
                corrected[site.weight] = rescale(lockstep, step, site)
            exact, rounded = lockstep.exact[site.output], lockstep.rounded[site.output]
            bias = quantize_bias(
                site,
                biases[site.bias] + mean_error(exact, rounded, site.channel_axis),
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


def mean_error(exact: Batches, rounded: Batches, axis: int) -> Array:
    """Per-channel mean of ``exact - rounded`` over all images and positions, float64."""
    total: Array = np.zeros(exact[0].shape[axis])
    count = 0
    for y, approximate in zip(exact, rounded, strict=True):
        error = (y - approximate).movedim(axis, 0).flatten(1).double()
        total = total + error.sum(dim=1).numpy()
        count += error.shape[1]
    # a quantized division by zero tells nothing about the bias
    return np.nan_to_num(total / max(count, 1), nan=0.0, posinf=0.0, neginf=0.0)


def correct_biases_analytically(
    graph: TorchGraph,
    batches: Iterable[torch.Tensor],
    weighted: Mapping[str, Weighted],
    values: Mapping[str, Array],
    tensors: Mapping[str, TensorQuantizer],
    constants: Mapping[str, QuantizedConstant],
) -> dict[str, QuantizedConstant]:
    """Corrected integers of every bias, from the means of the float network's inputs.

    Args:
        graph: the float network.
        batches: the images, [n, ...] each.
        weighted: operators with constant weights, by node name.
        values: float weights and biases by initializer name.
        tensors: quantizers of the activation tensors.
        constants: integers of the weights, by initializer name.

    Returns:
        The corrected biases by initializer name.
    """
    sites = [site for site in weighted.values() if site.bias]
    means = _channel_means(graph, batches, {site.input for site in sites})
    steps = {step.name: step for step in graph.steps}
    return {
        site.bias: quantize_bias(
            site,
            values[site.bias]
            - _response(
                steps[site.node],
                site,
                constants[site.weight].values.astype(np.float64) - values[site.weight],
                means[site.input],
            ),
            input_exponent(site, tensors),
            constants[site.weight],
        )
        for site in sites
    }


def _channel_means(
    graph: TorchGraph, batches: Iterable[torch.Tensor], names: set[str]
) -> dict[str, Array]:
    """Mean of each channel (axis 1) of the tensors over all images and positions, float64."""
    sums: dict[str, Array] = {}
    counts: dict[str, int] = {}

    def add(name: str, value: torch.Tensor) -> torch.Tensor:
        if name in names:
            rows = value.movedim(1, 0).flatten(1).double()
            sums[name] = sums.get(name, 0.0) + rows.sum(dim=1).numpy()
            counts[name] = counts.get(name, 0) + rows.shape[1]
        return value

    with torch.no_grad():
        for batch in batches:
            graph(batch, hook=add)
    return {name: sums[name] / max(counts[name], 1) for name in sums}


def _response(step: Step, site: Weighted, weight: Array, mean: Array) -> Array:
    """What a weight makes of an input that is ``mean`` per channel everywhere, ``[out]``."""
    groups = step.attributes.get("group", 1)
    if step.op_type == "Gemm":
        return np.asarray((weight if site.axis == 0 else weight.T) @ mean)
    kernel = weight.reshape(*weight.shape[:2], -1).sum(axis=2)
    if step.op_type == "Conv":  # [out, in/groups]
        rows = kernel.reshape(groups, -1, kernel.shape[1])
        return np.asarray(np.einsum("goi,gi->go", rows, mean.reshape(groups, -1))).reshape(-1)
    # ConvTranspose [in, out/groups]: of its taps each output sees one in as many as the strides
    rows = kernel.reshape(groups, -1, kernel.shape[1])
    taps = np.prod(step.attributes.get("strides", (1,)))
    seen = np.asarray(np.einsum("gio,gi->go", rows, mean.reshape(groups, -1))).reshape(-1)
    return np.asarray(seen / taps)
