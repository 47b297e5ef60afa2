"""Decide every quantizer of a network from images: the plan."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from graph_tools.blocks import find_blocks, find_layers
from graph_tools.errors import ModelError
from graph_tools.integer_tail import IntegerTail, find_integer_tail
from graph_tools.model import Model, initializers
from graph_tools.quantizer import FloatNode, Plan, QuantizedConstant, TensorQuantizer
from graph_tools.torch_graph import TorchGraph
from pipeline.images import ImageSet
from pipeline.quantize.bias_correction import correct_biases, correct_biases_analytically
from pipeline.quantize.exponents import learn_exponents
from pipeline.quantize.lockstep import Lockstep
from pipeline.quantize.mixed_precision import NUM_IMAGES, MixedPrecision, choose_mixed
from pipeline.quantize.observe import Histogram, observe
from pipeline.quantize.placement import Placement, Weighted, place
from pipeline.quantize.reconstruction import Learned, Reconstruction, reconstruct
from pipeline.quantize.second_moment import SecondMomentCorrection
from pipeline.quantize.shift_negative import shift_negatives
from pipeline.quantize.thresholds import activation_exponent, ceil_log2, without_outliers
from pipeline.quantize.weights import (
    bias_bits,
    input_exponent,
    quantize_bias,
    quantize_operand,
    quantize_weight,
)
from pipeline.quantize.widths import Widths, choose_widths
from pipeline.settings import QuantizeSettings

__all__ = ["Quantization", "quantize"]

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, np.dtype[Any]]

OnStep = Callable[[int, int, Mapping[str, float]], None]

DEFAULT_ITERATIONS = 100  # of learned rounding
_BATCH_BYTES = 16 * 2**20  # of one batch of images


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """A plan, and what was seen while making it.

    Attributes:
        model: the network that the plan is for: the given one, or with shifts added to it.
        plan: quantizers and integers.
        clipped_percent: share of each quantized tensor's float values outside its quantizer.
        notes: in words, for the user.
        mixed: how ``--target-size`` chose the bits of the weights; None without it.
    """

    model: Model
    plan: Plan
    clipped_percent: Mapping[str, float]
    notes: tuple[str, ...]
    mixed: MixedPrecision | None = None


def quantize(
    model: Model,
    images: ImageSet,
    settings: QuantizeSettings,
    *,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> Quantization:
    """Choose all quantizers of ``model`` from ``images``.

    Full scheme (HPTQ, arXiv 2109.09113): every tensor that crosses an operator,
    input and outputs included; weights per output channel; int32 biases. The academic
    scheme (BRECQ, arXiv 2102.05426) leaves some in float: `pipeline.quantize.placement`.

    Args:
        model: a network prepared for quantization.
        images: calibration images in the model's own layout and normalization.
        settings: bits, scheme, threshold error, rounding, corrections.
        seed: of the images drawn while roundings are learned.
        on_step: progress as (done, total, terms).

    Raises:
        ModelError: the graph has nothing to quantize.
        DataError: the network is not finite on the images.
    """
    size = _batch_size(model)

    def batches() -> Iterator[torch.Tensor]:
        for batch in images.batches(size):
            if model.fixed_batch is not None:  # what is left over is filled up from its start
                batch = np.resize(batch, (size, *batch.shape[1:]))
            yield torch.from_numpy(batch)

    notes: list[str] = []
    shifted: dict[str, str] = {}
    if settings.shift_negative:
        model, shifted = shift_negatives(model, batches, settings)
        notes.append(f"negative values shifted away: {len(shifted)} tensors")
    tail = find_integer_tail(model.proto)
    graph = TorchGraph(model.proto, outputs=tail.ends)
    ending = replace(model, outputs=tail.ends)
    placement = place(ending, graph.steps, scheme=settings.scheme, shifted=shifted)
    if not placement.weighted:
        raise ModelError(
            "no convolution, Gemm or MatMul with constant weights",
            where=str(model.source or "model"),
            hint="there is nothing to quantize",
        )
    widths = choose_widths(placement, graph.steps, ending, settings)
    histograms = observe(graph, placement.roots, batches)
    tensors = _activation_quantizers(placement, histograms, widths, settings, model.input.name)
    absorbed = _absorb_activations(placement, tensors)
    for tensor, root in placement.shares.items():
        tensors[tensor] = tensors[root]
    values = initializers(model.proto)
    results = {step.name: step.outputs[0] for step in graph.steps}
    mixed = _mixed(model, graph, placement, tensors, batches, widths, settings, on_step)
    if mixed is None:
        notes.extend(_other_widths(widths, settings))
    else:
        notes += [mixed.note, *_other_widths(replace(widths, weights={}), settings)]
        widths = replace(widths, weights={**widths.weights, **mixed.widths})
    constants = _constants(placement, tensors, values, widths, settings, results)

    def side_by_side(*, spill: bool = False) -> Lockstep:
        whole = model.fixed_batch is not None
        return Lockstep(graph, tensors, constants, batches(), whole_batches=whole, spill=spill)

    learned_rounding = settings.rounding != "nearest"
    if learned_rounding:
        lockstep = side_by_side(spill=True)
        learned = _learn(lockstep, placement, settings, seed, on_step)
        values.update(learned.biases)
        constants.update(learned.weights)
        constants.update(_biases(placement, tensors, constants, values))
        what = "roundings and biases" if learned.biases else "roundings"
        notes.append(f"{what} learned on {lockstep.num_images} images ({settings.rounding})")
    if settings.learn_exponents or (
        settings.learn_exponents is None and settings.rounding == "brecq"
    ):
        changes = learn_exponents(
            side_by_side(),
            {**placement.shares, **dict(placement.activations.values())},
            fixed=placement.unit_range,
            on_step=None if on_step is None else (lambda i, n: on_step(i, n, {})),
        )
        absorbed = _absorb_activations(placement, tensors)
        constants.update(_biases(placement, tensors, constants, values))
        notes.append(f"exponents learned, changed: {changes}")
    if learned_rounding:
        pass  # biases are learned, if at all
    elif settings.bias_correction == "analytic":
        constants.update(
            correct_biases_analytically(
                graph, batches(), placement.weighted, values, tensors, constants
            )
        )
        notes.append("biases corrected by the means of the float network's inputs")
    elif settings.bias_correction == "empirical":
        lockstep = side_by_side()
        rescale = (
            SecondMomentCorrection(values, settings.threshold)
            if settings.second_moment_correction
            else None
        )
        corrected = correct_biases(
            lockstep,
            placement.weighted,
            {
                site.bias: values[site.bias]
                for site in placement.weighted.values()
                if site.bias
            },
            rescale=rescale,
            on_step=None if on_step is None else (lambda i, n: on_step(i, n, {})),
        )
        constants.update(corrected)
        if rescale is not None:
            notes.append(f"second moments corrected: {rescale.num_channels} channels")
        notes.append(f"biases corrected on {lockstep.num_images} images")
    plan = Plan(
        tensors=tensors,
        constants=constants,
        absorbed=absorbed,
        shares=placement.shares,
        midpoint=_midpoint(placement, tensors, settings),
        float_nodes=(*placement.float_nodes, *_left_alone(model, tail)),
        float_results=placement.float_results,
    )
    clipped = {
        name: histogram.clipped_percent(
            (q := tensors[name]).qmin * float(q.scale) - float(q.scale) / 2,
            q.qmax * float(q.scale) + float(q.scale) / 2,
        )
        for name, histogram in histograms.items()
    }
    logger.info("%d tensors, %d constants quantized", len(tensors), len(constants))
    return Quantization(
        model=model, plan=plan, clipped_percent=clipped, notes=tuple(notes), mixed=mixed
    )


def _mixed(
    model: Model,
    graph: TorchGraph,
    placement: Placement,
    tensors: Mapping[str, TensorQuantizer],
    batches: Callable[[], Iterator[torch.Tensor]],
    widths: Widths,
    settings: QuantizeSettings,
    on_step: OnStep | None,
) -> MixedPrecision | None:
    """The bits of the weights by size budget, None if there is none."""
    target = settings.target()
    if target is None:
        return None
    values, whole = initializers(model.proto), model.fixed_batch is not None
    few = islice(batches(), -(-NUM_IMAGES // _batch_size(model)))
    return choose_mixed(
        Lockstep(graph, {}, {}, few, whole_batches=whole),
        placement.weighted,
        lambda site, bits: _weight(site, tensors, values, bits, settings),
        target,
        {node: widths.weights[node] for node in widths.named},
        correct_biases=settings.bias_correction != "none",
        on_step=None if on_step is None else (lambda done, total: on_step(done, total, {})),
    )


def _other_widths(widths: Widths, settings: QuantizeSettings) -> Iterator[str]:
    """Say how many weights and tensors have other bits than most."""
    for kind, bits, usual in (
        ("weights", widths.weights, settings.weights),
        ("tensors", widths.activations, settings.activations),
    ):
        found = Counter(count for count in bits.values() if count != usual)
        if found:
            listed = ", ".join(f"{number} have {count}" for count, number in found.items())
            yield f"bits of {len(bits)} {kind}: {usual}, but {listed}"


def _left_alone(model: Model, tail: IntegerTail) -> Iterator[FloatNode]:
    types = {node.name: node.op_type for node in model.proto.graph.node}
    for name in tail.nodes:
        yield FloatNode(
            node=name,
            op_type=types[name],
            reason="decides on what the last weighted operator computes",
        )


def _batch_size(model: Model) -> int:
    if model.fixed_batch is not None:
        return model.fixed_batch
    return int(np.clip(_BATCH_BYTES // (4 * np.prod(model.input.shape)), 1, 64))


def _activation_quantizers(
    placement: Placement,
    histograms: Mapping[str, Histogram],
    widths: Widths,
    settings: QuantizeSettings,
    input_name: str,
) -> dict[str, TensorQuantizer]:
    quantizers = {}
    bounds = {
        after: placement.clip_bounds[node][1]
        for node, (_, after) in placement.activations.items()
        if node in placement.clip_bounds
    }
    for name in placement.roots:
        histogram, bits = histograms[name], widths.activations[name]
        signed = name not in placement.nonnegative and not (
            name == input_name and histogram.low >= 0
        )
        if name in placement.unit_range:
            exponent = -(bits - signed)
        else:
            exponent = activation_exponent(
                histogram.centers,
                without_outliers(histogram.centers, histogram.counts, settings.outlier_z),
                bits=bits,
                signed=signed,
                metric=settings.threshold,
            )
        if 0 < bounds.get(name, np.inf) < np.inf:  # a Clip saturates there anyway
            exponent = min(exponent, ceil_log2(bounds[name]) - (bits - signed))
        quantizers[name] = TensorQuantizer(bits=bits, signed=signed, exponent=exponent)
    return quantizers


def _absorb_activations(
    placement: Placement, tensors: dict[str, TensorQuantizer]
) -> dict[str, str]:
    """Relu and Clip nodes that saturation does; the others get a quantizer before them, too."""
    absorbed = {}
    for node, (before, after) in placement.activations.items():
        quantizer = tensors[after]
        low, high = placement.clip_bounds.get(node, (0.0, np.inf))
        scale = float(quantizer.scale)
        tensors.pop(before, None)
        if quantizer.qmin * scale >= low and quantizer.qmax * scale <= high:
            absorbed[node] = after
        else:
            tensors[before] = quantizer
    return absorbed


def _learn(
    lockstep: Lockstep,
    placement: Placement,
    settings: QuantizeSettings,
    seed: int,
    on_step: OnStep | None,
) -> Learned:
    """Weights with learned roundings, and the biases learned with them."""
    find = find_layers if settings.rounding == "adaround" else find_blocks
    how = Reconstruction(
        iterations=settings.rounding_iterations or DEFAULT_ITERATIONS,
        biases=settings.bias_correction != "none",
        drop=settings.qdrop,
        fisher=settings.reconstruction == "fisher",
    )
    return reconstruct(
        lockstep,
        find(
            lockstep.graph,
            placement.weighted,
            apart={node.node for node in placement.float_nodes},
        ),
        placement.weighted,
        how,
        torch.Generator().manual_seed(seed),
        on_step=on_step,
    )


def _midpoint(
    placement: Placement, tensors: Mapping[str, TensorQuantizer], settings: QuantizeSettings
) -> frozenset[str]:
    """Signed tensors with several readers.

    onnxruntime on x64 computes in uint8 and turns int8 into it only where one operator reads
    the tensor; the others, and the operators around them, would stay in float.
    """
    if settings.zero_point == "zero":
        return frozenset()
    return frozenset(
        tensor
        for tensor, quantizer in tensors.items()
        if quantizer.signed and placement.num_readers.get(tensor, 0) > 1
    )


def _constants(
    placement: Placement,
    tensors: Mapping[str, TensorQuantizer],
    values: Mapping[str, Array],
    widths: Widths,
    settings: QuantizeSettings,
    results: Mapping[str, str],
) -> dict[str, QuantizedConstant]:
    """Integers of all constants; ``results``: the tensor that each node makes."""
    constants = {}
    for site in placement.weighted.values():
        bits = widths.weights[site.node]
        constants[site.weight] = _weight(site, tensors, values, bits, settings)
    constants.update(_biases(placement, tensors, constants, values))
    for name, node in placement.operands.items():
        made = results[node]  # an operand has the width of the result, Relu or Clip included
        made = dict(placement.activations.values()).get(made, made)
        bits = widths.activations.get(placement.shares.get(made, made), settings.activations)
        constants[name] = quantize_operand(node, values[name], bits=bits)
    return constants


def _weight(
    site: Weighted,
    tensors: Mapping[str, TensorQuantizer],
    values: Mapping[str, Array],
    bits: int,
    settings: QuantizeSettings,
) -> QuantizedConstant:
    return quantize_weight(
        site,
        values[site.weight],
        values[site.bias] if site.bias else None,
        input_exponent(site, tensors),
        bits=bits,
        metric=settings.threshold,
        bias_bits=bias_bits(site, tensors),
        free=settings.weight_scale == "free",
    )


def _biases(
    placement: Placement,
    tensors: Mapping[str, TensorQuantizer],
    constants: Mapping[str, QuantizedConstant],
    values: Mapping[str, Array],
) -> dict[str, QuantizedConstant]:
    return {
        site.bias: quantize_bias(
            site,
            values[site.bias],
            input_exponent(site, tensors),
            constants[site.weight],
        )
        for site in placement.weighted.values()
        if site.bias
    }
