"""Empirical bias correction, layer by layer on the quantized prefix.

The float and the quantized network run side by side, operator by operator, over the calibration
images. Behind each weighted operator the mean error of each output channel,
``E[y_float - y_quantized]``, is added to its bias (Nagel et al. 2019, arXiv 1906.04721, section
4.2, the empirical form), so later layers see an input whose mean is right. On a depthwise network
with power-of-two scales this is worth more than ten points.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch

from graph_tools.quantizer import QuantizedConstant, TensorQuantizer
from graph_tools.torch_graph import Step, TorchGraph
from pipeline.quantize.placement import Weighted
from pipeline.quantize.simulate import fake_quantize
from pipeline.quantize.weights import quantize_bias

__all__ = ["correct_biases"]

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, np.dtype[Any]]
Batches = list[torch.Tensor]

MEMORY_BUDGET = 2 * 2**30
"""Bytes of live activations, float and quantized; fewer images are used when they need more."""


def correct_biases(
    graph: TorchGraph,
    weighted: Mapping[str, Weighted],
    tensors: Mapping[str, TensorQuantizer],
    constants: Mapping[str, QuantizedConstant],
    biases: Mapping[str, Array],
    batches: Iterable[torch.Tensor],
    *,
    on_step: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, QuantizedConstant], int]:
    """Corrected integers of every bias.

    Args:
        graph: the float network.
        weighted: operators with constant weights, by node name.
        tensors: quantizers of the activation tensors.
        constants: integers of weights, biases and operands, by initializer name.
        biases: float biases by initializer name, [channels].
        batches: the images, [n, ...] each; only as many are read as fit the memory budget.
        on_step: called with (operators done, operators).

    Returns:
        The corrected biases by initializer name, and the number of images used.
    """
    corrected: dict[str, QuantizedConstant] = {}
    images = _images_within_budget(graph, batches)
    used = sum(len(batch) for batch in images)
    name = graph.input_names[0]
    exact: dict[str, Batches] = {name: images}
    rounded: dict[str, Batches] = {name: [_quantize(name, x, tensors) for x in images]}
    last_reader = _last_readers(graph)
    with torch.no_grad():
        for index, step in enumerate(graph.steps):
            fixed = {  # of one operator at a time: all together are as large as the weights
                name: torch.from_numpy(constants[name].values)
                for name in step.inputs
                if name in constants
            }
            for batch in range(len(images)):
                _run(graph, step, exact, batch, {})
                _run(graph, step, rounded, batch, fixed)
            site = weighted.get(step.name)
            if site is not None and site.bias:
                error = _mean_error(
                    exact[site.output], rounded[site.output], site.channel_axis
                )
                before = fixed[site.bias]
                bias = quantize_bias(
                    site,
                    biases[site.bias] + error,
                    int(tensors[site.input].exponent),  # type: ignore[arg-type]
                    constants[site.weight],
                )
                corrected[site.bias] = bias
                fixed[site.bias] = torch.from_numpy(bias.values)
                shape = [1] * exact[site.output][0].ndim
                shape[site.channel_axis] = -1
                change = (fixed[site.bias] - before).reshape(shape)
                rounded[site.output] = [y + change for y in rounded[site.output]]
            for tensor in step.outputs:
                rounded[tensor] = [_quantize(tensor, y, tensors) for y in rounded[tensor]]
            for tensor in {*step.inputs, *step.outputs}:
                if last_reader.get(tensor, -1) <= index:
                    exact.pop(tensor, None)
                    rounded.pop(tensor, None)
            if on_step is not None:
                on_step(index + 1, len(graph.steps))
    return corrected, used


def _last_readers(graph: TorchGraph) -> dict[str, int]:
    """Index of the last step that reads each tensor."""
    return {tensor: i for i, s in enumerate(graph.steps) for tensor in s.inputs}


def _quantize(
    tensor: str, value: torch.Tensor, tensors: Mapping[str, TensorQuantizer]
) -> torch.Tensor:
    quantizer = tensors.get(tensor)
    return value if quantizer is None else fake_quantize(value, quantizer)


def _run(
    graph: TorchGraph,
    step: Step,
    values: dict[str, Batches],
    batch: int,
    fixed: Mapping[str, torch.Tensor],
) -> None:
    inputs = {tensor: values[tensor][batch] for tensor in step.inputs if tensor in values}
    inputs.update((tensor, fixed[tensor]) for tensor in step.inputs if tensor in fixed)
    outputs = graph.run_step(step, inputs)
    for tensor, value in zip(step.outputs, outputs, strict=False):
        values.setdefault(tensor, []).append(value)


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


def _images_within_budget(graph: TorchGraph, batches: Iterable[torch.Tensor]) -> Batches:
    """As many batches as keep the live activations within the memory budget."""
    taken: Batches = []
    limit, used = 0, 0
    for batch in batches:
        if not taken:
            per_image = 2 * _live_bytes(graph, batch) / len(batch)
            limit = max(1, int(MEMORY_BUDGET / per_image))
        if used + len(batch) > limit:
            batch = batch[: limit - used]
        if len(batch):
            taken.append(batch.clone())
            used += len(batch)
        if used >= limit:
            logger.info("bias correction uses %d images (memory budget)", used)
            break
    return taken


def _live_bytes(graph: TorchGraph, batch: torch.Tensor) -> int:
    """Largest number of bytes alive at one time when the graph runs on ``batch``."""
    sizes: dict[str, int] = {}

    def measure(name: str, value: torch.Tensor) -> torch.Tensor:
        sizes[name] = value.numel() * value.element_size()
        return value

    with torch.no_grad():
        graph(batch, hook=measure)
    last_reader = _last_readers(graph)
    live = {graph.input_names[0]}
    peak = 0
    for index, step in enumerate(graph.steps):
        live.update(step.outputs)
        peak = max(peak, sum(sizes.get(tensor, 0) for tensor in live))
        live = {tensor for tensor in live if last_reader.get(tensor, -1) > index}
    return max(peak, 1)
