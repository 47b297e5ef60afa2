"""How much the network's outputs suffer when one weight alone has few bits.

For each weight and each width the float network runs on the calibration images with this one
weight rounded to the nearest integers, as in ZeroQ (arXiv 2001.00281, section 3.3). There the
measure is the Kullback-Leibler divergence of the outputs; here it is the root of their squared
error over their power, summed over the outputs, which any network has, not only classifiers. Sums
of these over several weights bound the error of all of them together (triangle inequality) while
errors are small; sums of squares, which take the errors as independent, chose worse widths (top-1
of ResNet-20 at 0.4x and 0.375x of 8 bits: 46 and 23 against 63 and 62; divergence: 63 and 14).
Where biases will be corrected, the mean error of each of the layer's output channels is taken off:
it will not be there.

What comes before the layer is computed once: a pass is the layer and what is behind it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from graph_tools.quantizer import TensorQuantizer
from graph_tools.torch_graph import Step, TorchGraph
from pipeline.quantize.bias_correction import mean_error
from pipeline.quantize.lockstep import Batches, Lockstep
from pipeline.quantize.placement import Weighted
from pipeline.quantize.simulate import fake_quantize

__all__ = ["finish", "measure_sensitivity"]

Tensors = dict[str, torch.Tensor]


def measure_sensitivity(
    lockstep: Lockstep,
    sites: Mapping[str, Weighted],
    widths: Mapping[str, Sequence[int]],
    rounded: Callable[[Weighted, int], torch.Tensor],
    *,
    correct_biases: bool,
    on_step: Callable[[int, int], None] | None = None,
) -> dict[str, dict[int, float]]:
    """Error of the outputs for each weight and width.

    Args:
        lockstep: at its beginning; only its float network is run.
        sites: operators with constant weights, by node name.
        widths: bits to try, by initializer name of the weight.
        rounded: values of an operator's weight, rounded to a number of bits.
        correct_biases: take the mean error of each output channel off, behind the first
            operator that reads the weight.
        on_step: called with (passes done, passes).

    Returns:
        By initializer name and bits: the sum over the network's outputs of their relative error
        (Euclidean norms over all images); 0 is perfect.
    """
    graph = lockstep.graph
    with torch.no_grad():
        exact = [graph(batch) for batch in lockstep.exact[graph.input_names[0]]]
    power = {name: sum(_power(batch[name]) for batch in exact) for name in graph.output_names}
    found: dict[str, dict[int, float]] = {name: {} for name in widths}
    passes = sum(map(len, widths.values()))
    waiting = dict(widths)
    for index, step in enumerate(graph.steps):
        lockstep.run_exact(step)
        site = sites.get(step.name)
        for bits in waiting.pop(site.weight, ()) if site else ():
            assert site is not None
            weights = {site.weight: rounded(site, bits)}
            results = _run(lockstep, step, weights)
            if correct_biases and site.bias:
                results = _centered(lockstep.exact[site.output], results, site.channel_axis)
            errors = dict.fromkeys(graph.output_names, 0.0)
            for batch, outputs in enumerate(exact):
                values = {name: all_[batch] for name, all_ in lockstep.exact.items()}
                values[site.output] = results[batch]
                finish(graph, graph.steps[index + 1 :], values, weights)
                for name in errors.keys() & values.keys():  # the others were made before
                    errors[name] += _power(values[name] - outputs[name])
            found[site.weight][bits] = sum(
                math.sqrt(error / power[name]) for name, error in errors.items() if power[name]
            )
            if on_step is not None:
                on_step(sum(map(len, found.values())), passes)
        lockstep.forget(step)
    return found


def _run(lockstep: Lockstep, step: Step, weights: Tensors) -> Batches:
    """The step's output with other weights, batch by batch."""
    results = []
    with torch.no_grad():
        for batch in range(len(lockstep.sizes)):
            given = {n: lockstep.exact[n][batch] for n in step.inputs if n in lockstep.exact}
            results.append(lockstep.graph.run_step(step, {**given, **weights})[0])
    return results


def _centered(exact: Batches, rounded: Batches, axis: int) -> Batches:
    """``rounded`` with the mean of ``exact`` in each channel."""
    shape = [1] * exact[0].ndim
    shape[axis] = -1
    error = torch.from_numpy(mean_error(exact, rounded, axis)).float().reshape(shape)
    return [value + error for value in rounded]


def finish(
    graph: TorchGraph,
    steps: Sequence[Step],
    values: Tensors,
    weights: Tensors,
    tensors: Mapping[str, TensorQuantizer] | None = None,
) -> None:
    """Compute the rest of the graph in ``values``; only what is still needed stays there.

    Args:
        graph: the float network.
        steps: the rest of its steps.
        values: all that they read from others; changed in place.
        weights: replace constants of the graph.
        tensors: quantizers of tensors that the steps make.
    """
    last = {name: index for index, step in enumerate(steps) for name in step.inputs}
    with torch.no_grad():
        for index, step in enumerate(steps):
            given = {n: values[n] for n in step.inputs if n in values}
            given.update((n, weights[n]) for n in step.inputs if n in weights)
            for name, value in zip(step.outputs, graph.run_step(step, given), strict=False):
                quantizer = tensors.get(name) if tensors else None
                values[name] = value if quantizer is None else fake_quantize(value, quantizer)
            for name in (*step.inputs, *step.outputs):
                if last.get(name, -1) <= index and name not in graph.output_names:
                    values.pop(name, None)


def _power(value: torch.Tensor) -> float:
    return float(value.double().square().sum())
