"""Integers of weights, biases and constant operands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from graph_tools.quantizer import QuantizedConstant, TensorQuantizer
from pipeline.quantize.placement import Weighted
from pipeline.quantize.thresholds import (
    Metric,
    ceil_log2,
    weight_exponents,
    weight_scales,
)

__all__ = [
    "bias_bits",
    "input_exponent",
    "quantize_bias",
    "quantize_operand",
    "quantize_weight",
    "scale_candidates",
]

Array = np.ndarray[Any, np.dtype[Any]]

_NEIGHBORS = (0, -1, 1, -2)
"""Exponents around the one that suits the weights; the first wins ties."""
_FREE_NEIGHBORS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 1.15, 1.3)
"""The same for free scales, as factors."""

BIAS_BITS = 22
"""The bias of a channel stays below 2**22 steps, so that accumulators stay below 2**24, where
float32 simulation is exact, in all but extreme cases, and int32 never overflows."""

WIDE_BIAS_BITS = 28
"""The same behind inputs of 16 bits, whose steps are 256 times smaller; sums exceed 2**24 there
anyway."""


def input_exponent(site: Weighted, tensors: Mapping[str, TensorQuantizer]) -> int:
    """Exponent of the scale of an operator's input."""
    exponent = tensors[site.input].exponent
    assert isinstance(exponent, int)  # activations have one scale
    return exponent


def bias_bits(site: Weighted, tensors: Mapping[str, TensorQuantizer]) -> int:
    """Width that the bias of an operator may take."""
    return BIAS_BITS if tensors[site.input].bits <= 8 else WIDE_BIAS_BITS


def quantize_weight(
    site: Weighted,
    weight: Array,
    bias: Array | None,
    input_exponent: int,
    *,
    bits: int,
    metric: Metric,
    bias_bits: int = BIAS_BITS,
    free: bool = False,
    per_tensor: bool = False,
    lifted: bool = False,
) -> QuantizedConstant:
    """Per-output-channel integers of a weight.

    A channel whose weights are tiny beside its bias gets a larger scale than its weights ask for:
    its bias must fit the accumulator (a dead channel otherwise overflows int32).

    Args:
        site: where the weight is.
        weight: float, output channels on ``site.axis``.
        bias: float [channels], None if there is none.
        input_exponent: exponent of the input's scale.
        bits: width of the integers.
        metric: error that the threshold search minimizes.
        bias_bits: width that the bias may take.
        free: scales need not be powers of two.
        per_tensor: all channels share one scale.
        lifted: see `TensorQuantizer`.
    """
    if free:
        scales = np.array(
            weight_scales(weight, axis=site.axis, bits=bits, metric=metric, lifted=lifted)
        )
        least = _least_scales(bias, scales.size, input_exponent, bias_bits)
        scales = np.maximum(scales, least)
        quantizer = _free_quantizer(scales, bits=bits, axis=site.axis, lifted=lifted)
        return QuantizedConstant(
            integers=quantizer.quantize(weight),
            quantizer=quantizer,
            role="weight",
            node=site.node,
        )
    if per_tensor:
        whole = np.reshape(weight, (1, -1))
        shared = weight_exponents(whole, axis=0, bits=bits, metric=metric, lifted=lifted)
        exponents = np.repeat(np.array(shared), weight.shape[site.axis])
    else:
        exponents = np.array(
            weight_exponents(weight, axis=site.axis, bits=bits, metric=metric, lifted=lifted)
        )
    exponents = np.maximum(
        exponents, _least_exponents(bias, exponents.size, input_exponent, bias_bits)
    )
    if per_tensor:
        exponents[:] = exponents.max(initial=-1000)
    quantizer = TensorQuantizer(
        bits=bits,
        signed=True,
        exponent=tuple(int(exponent) for exponent in exponents),
        axis=site.axis,
        lifted=lifted,
    )
    return QuantizedConstant(
        integers=quantizer.quantize(weight), quantizer=quantizer, role="weight", node=site.node
    )


def scale_candidates(
    quantizer: TensorQuantizer, bias: Array | None, input_exponent: int, bias_bits: int
) -> list[TensorQuantizer]:
    """Quantizers around that of a weight, itself first, with which the bias still fits.

    Args:
        quantizer: one scale a channel.
        bias: float [channels], None if there is none.
        input_exponent: exponent of the input's scale.
        bias_bits: width that the bias may take.
    """
    assert isinstance(quantizer.exponent, tuple)
    assert quantizer.axis is not None
    channels = len(quantizer.exponent)
    if quantizer.power_of_two:
        least = _least_exponents(bias, channels, input_exponent, bias_bits)
        return [
            replace(
                quantizer,
                exponent=tuple(
                    int(e) for e in np.maximum(np.add(quantizer.exponent, step), least)
                ),
            )
            for step in _NEIGHBORS
        ]
    return [
        _free_quantizer(
            np.maximum(
                quantizer.scale * factor,
                _least_scales(bias, channels, input_exponent, bias_bits),
            ),
            bits=quantizer.bits,
            axis=quantizer.axis,
            lifted=quantizer.lifted,
        )
        for factor in _FREE_NEIGHBORS
    ]


def _least_exponents(
    bias: Array | None, channels: int, input_exponent: int, bias_bits: int
) -> Array:
    """Smallest exponent of each channel's scale with which the bias fits."""
    if bias is None or not bias.size:
        return np.full(channels, -1000)
    magnitude = _largest_bias(bias, channels)
    return np.array(
        [ceil_log2(m) - bias_bits - input_exponent if m else -1000 for m in magnitude]
    )


def _least_scales(
    bias: Array | None, channels: int, input_exponent: int, bias_bits: int
) -> Array:
    """Smallest scale of each channel with which the bias fits."""
    if bias is None or not bias.size:
        return np.zeros(channels)
    found: Array = _largest_bias(bias, channels) / 2.0**bias_bits / 2.0**input_exponent
    return found


def _largest_bias(bias: Array, channels: int) -> Array:
    magnitude: Array = np.abs(np.asarray(bias, np.float64))
    if magnitude.size != channels:  # grouped ConvTranspose: groups share a scale
        magnitude = magnitude.reshape(-1, channels).max(axis=0)
    return magnitude


def _free_quantizer(
    scales: Array, *, bits: int, axis: int, lifted: bool = False
) -> TensorQuantizer:
    found = tuple(float(scale) for scale in np.asarray(scales, np.float32))
    return TensorQuantizer(
        bits=bits,
        signed=True,
        exponent=tuple(ceil_log2(scale) for scale in found),
        axis=axis,
        scales=found,
        lifted=lifted,
    )


def quantize_bias(
    site: Weighted, bias: Array, input_exponent: int, weight: QuantizedConstant
) -> QuantizedConstant:
    """int32 bias with the scale of input times weight, per channel."""
    exponents = weight.quantizer.exponent
    assert isinstance(exponents, tuple)
    groups = bias.size // len(exponents)
    if weight.quantizer.power_of_two:
        quantizer = TensorQuantizer(
            bits=32,
            signed=True,
            exponent=tuple(input_exponent + exponent for exponent in exponents * groups),
            axis=0,
        )
    else:
        scales = weight.quantizer.scale * np.float32(2.0**input_exponent)
        quantizer = _free_quantizer(np.tile(scales, groups), bits=32, axis=0)
    return QuantizedConstant(
        integers=quantizer.quantize(bias), quantizer=quantizer, role="bias", node=site.node
    )


def quantize_operand(
    node: str, values: Array, *, bits: int, signed: bool = False, lifted: bool = False
) -> QuantizedConstant:
    """Per-tensor integers of a constant operand of Add, Sub, Mul or Div.

    They are signed if a value is negative, or by request; signed ones are lifted.
    """
    signed = signed or bool((values < 0).any())
    flat = np.abs(np.asarray(values, np.float64)).max(initial=0.0)
    unit = TensorQuantizer(bits=bits, signed=signed, exponent=0, lifted=signed and lifted)
    top = min(-unit.qmin, unit.qmax) if signed else unit.qmax
    quantizer = replace(unit, exponent=ceil_log2(max(float(flat) / top, 2.0**-40)))
    return QuantizedConstant(
        integers=quantizer.quantize(values), quantizer=quantizer, role="operand", node=node
    )
