"""Integers of all constants of a network, from the scales of its activations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from graph_tools.quantizer import QuantizedConstant, TensorQuantizer
from pipeline.quantize.placement import Placement, Weighted
from pipeline.quantize.weights import (
    bias_bits,
    input_exponent,
    quantize_bias,
    quantize_operand,
    quantize_weight,
)
from pipeline.quantize.widths import Widths
from pipeline.settings import QuantizeSettings

__all__ = ["quantize_biases", "quantize_constants", "quantize_site", "with_scalar_scales"]

Array = np.ndarray[Any, np.dtype[Any]]


def quantize_constants(
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
        constants[site.weight] = quantize_site(site, tensors, values, bits, settings)
    constants.update(quantize_biases(placement, tensors, constants, values))
    for name, node in placement.operands.items():
        made = results[node]  # an operand has the width of the result, Relu or Clip included
        made = dict(placement.activations.values()).get(made, made)
        bits = widths.activations.get(placement.shares.get(made, made), settings.activations)
        constants[name] = quantize_operand(
            node,
            values[name],
            bits=bits,
            signed=settings.signedness == "signed",
            lifted=settings.lifted,
        )
    return constants


def with_scalar_scales(
    constants: Mapping[str, QuantizedConstant],
) -> dict[str, QuantizedConstant]:
    """Write the one exponent that all channels of weights and biases share as a scalar."""
    found = dict(constants)
    for name, constant in constants.items():
        exponent = constant.quantizer.exponent
        if isinstance(exponent, tuple) and len(set(exponent)) == 1:
            scalar = replace(constant.quantizer, exponent=exponent[0], axis=None)
            found[name] = replace(constant, quantizer=scalar)
    return found


def quantize_site(
    site: Weighted,
    tensors: Mapping[str, TensorQuantizer],
    values: Mapping[str, Array],
    bits: int,
    settings: QuantizeSettings,
) -> QuantizedConstant:
    """Integers of the weight of one operator, rounded to nearest."""
    if settings.weight_range == "7bit":
        bits = min(bits, 7)
    return quantize_weight(
        site,
        values[site.weight],
        values[site.bias] if site.bias else None,
        input_exponent(site, tensors),
        bits=bits,
        metric=settings.threshold,
        bias_bits=bias_bits(site, tensors),
        free=settings.weight_scale == "free",
        per_tensor=settings.weight_granularity == "tensor",
        lifted=settings.lifted,
    )


def quantize_biases(
    placement: Placement,
    tensors: Mapping[str, TensorQuantizer],
    constants: Mapping[str, QuantizedConstant],
    values: Mapping[str, Array],
) -> dict[str, QuantizedConstant]:
    """Integers of all biases with the scales of inputs and weights that are in force."""
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
