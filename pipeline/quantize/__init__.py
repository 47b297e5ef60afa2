"""Decide every quantizer of a network from images: the plan."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import onnx
import torch

from graph_tools.errors import ModelError
from graph_tools.integer_tail import IntegerTail, find_integer_tail
from graph_tools.model import Model, initializers, replace_proto
from graph_tools.quantizer import FloatNode, Plan, QuantizedConstant, TensorQuantizer
from graph_tools.torch_graph import TorchGraph
from pipeline.images import ImageSet
from pipeline.quantize.activations import (
    absorb_activations,
    activation_quantizers,
    midpoint_tensors,
)
from pipeline.quantize.constants import (
    quantize_constants,
    quantize_site,
    with_scalar_scales,
)
from pipeline.quantize.lockstep import Lockstep
from pipeline.quantize.mixed_precision import NUM_IMAGES, MixedPrecision, choose_mixed
from pipeline.quantize.observe import Histogram, observe
from pipeline.quantize.placement import Placement, Weighted, place
from pipeline.quantize.refinement import OnStep, Refinement, without_terms
from pipeline.quantize.scale_absorption import absorb_scales
from pipeline.quantize.shift_negative import shift_negatives
from pipeline.quantize.widths import Widths, choose_widths, tensor_bits
from pipeline.settings import QuantizeSettings

__all__ = ["Quantization", "quantize"]

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, np.dtype[Any]]

_BATCH_BYTES = 16 * 2**20  # of one batch of images


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """A plan, and what was seen while making it.

    Attributes:
        model: the network that the plan is for: the given one, or with channels scaled or shifts
            added.
        plan: quantizers and integers.
        clipped_percent: share of each quantized tensor's float values outside its quantizer.
        notes: in words, for the user.
        mixed: how ``--target-size`` chose the bits of the weights; None without it.
        histograms: of the float network's tensors on the calibration images, from which the
            thresholds were chosen; by tensor that has a quantizer of its own.
        weighted: operators with constant weights, by node name.
        roots: tensors that share a quantizer, with the one that has it.
    """

    model: Model
    plan: Plan
    clipped_percent: Mapping[str, float]
    notes: tuple[str, ...]
    mixed: MixedPrecision | None = None
    histograms: Mapping[str, Histogram] = field(default_factory=dict)
    weighted: Mapping[str, Weighted] = field(default_factory=dict)
    roots: Mapping[str, str] = field(default_factory=dict)


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
    layout = _Layout.of(model, settings, {})
    if settings.scale_absorption:
        bits = tensor_bits(layout.placement, layout.widths)
        model, note = absorb_scales(
            model, layout.graph, batches, layout.widths.weights, bits, settings
        )
        notes.append(note)
        layout = _Layout.of(model, settings, {})
    if settings.shift_negative:
        bits = tensor_bits(layout.placement, layout.widths)
        model, shifted = shift_negatives(model, batches, bits, settings)
        notes.append(f"negative values shifted away: {len(shifted)} tensors")
        layout = _Layout.of(model, settings, shifted)
    tail, graph = layout.tail, layout.graph
    placement, widths = layout.placement, layout.widths
    histograms = observe(graph, placement.roots, batches)
    tensors = activation_quantizers(placement, histograms, widths, settings, model.input.name)
    absorb_activations(placement, tensors)
    for tensor, root in placement.shares.items():
        tensors[tensor] = tensors[root]
    values = initializers(model.proto)
    results = {step.name: step.outputs[0] for step in graph.steps}
    mixed = _mixed(
        model, graph, placement, tensors, values, batches, widths, settings, on_step
    )
    if mixed is None:
        notes.extend(_other_widths(widths, settings))
    else:
        notes += [mixed.note, *_other_widths(replace(widths, weights={}), settings)]
        widths = replace(widths, weights={**widths.weights, **mixed.widths})
    constants = quantize_constants(placement, tensors, values, widths, settings, results)

    refinement = Refinement(model, graph, placement, tensors, constants, values, batches)
    notes += refinement.run(settings, seed, on_step)
    absorbed = absorb_activations(placement, tensors)
    if settings.weight_granularity == "tensor":
        constants = with_scalar_scales(constants)
    if settings.bias_storage == "float":
        model, constants = _with_float_biases(model, constants)
    plan = Plan(
        tensors=tensors,
        constants=constants,
        absorbed=absorbed,
        shares=placement.shares,
        midpoint=midpoint_tensors(placement, tensors, settings),
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
        model=model,
        plan=plan,
        clipped_percent=clipped,
        notes=tuple(notes),
        mixed=mixed,
        histograms=histograms,
        weighted=placement.weighted,
        roots={**placement.shares, **dict(placement.activations.values())},
    )


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """What is quantized, and with how many bits, before any range is known."""

    tail: IntegerTail
    graph: TorchGraph
    placement: Placement
    widths: Widths

    @classmethod
    def of(
        cls, model: Model, settings: QuantizeSettings, shifted: Mapping[str, str]
    ) -> _Layout:
        tail = find_integer_tail(model.proto)
        graph = TorchGraph(model.proto, outputs=tail.ends)
        ending = replace(model, outputs=tail.ends)
        placement = place(
            ending,
            graph.steps,
            scheme=settings.scheme,
            fused_sums=settings.fused_sums == "yes",
            shifted=shifted,
        )
        if not placement.weighted:
            raise ModelError(
                "no convolution, Gemm or MatMul with constant weights",
                where=str(model.source or "model"),
                hint="there is nothing to quantize",
            )
        widths = choose_widths(placement, graph.steps, ending, settings)
        return cls(tail=tail, graph=graph, placement=placement, widths=widths)


def _mixed(
    model: Model,
    graph: TorchGraph,
    placement: Placement,
    tensors: Mapping[str, TensorQuantizer],
    values: Mapping[str, Array],
    batches: Callable[[], Iterator[torch.Tensor]],
    widths: Widths,
    settings: QuantizeSettings,
    on_step: OnStep | None,
) -> MixedPrecision | None:
    """The bits of the weights by size budget, None if there is none."""
    target = settings.target()
    if target is None:
        return None
    whole = model.fixed_batch is not None
    few = islice(batches(), -(-NUM_IMAGES // _batch_size(model)))
    return choose_mixed(
        Lockstep(graph, {}, {}, few, whole_batches=whole),
        placement.weighted,
        lambda site, bits: quantize_site(site, tensors, values, bits, settings),
        target,
        {node: widths.weights[node] for node in widths.named},
        correct_biases=settings.bias_correction != "none",
        on_step=without_terms(on_step),
    )


def _with_float_biases(
    model: Model, constants: Mapping[str, QuantizedConstant]
) -> tuple[Model, dict[str, QuantizedConstant]]:
    """Put the values of the biases' integers into the network, and take them from the plan."""
    biases = {name for name, constant in constants.items() if constant.role == "bias"}
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    kept = [entry for entry in proto.graph.initializer if entry.name not in biases]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    for name in sorted(biases):
        proto.graph.initializer.append(
            onnx.numpy_helper.from_array(constants[name].values, name)
        )
    others = {name: entry for name, entry in constants.items() if name not in biases}
    return replace_proto(model, proto), others


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
