"""Quantizers of activation tensors: bits, sign and threshold, and how they are stored."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from graph_tools.quantizer import TensorQuantizer
from pipeline.quantize.observe import Histogram
from pipeline.quantize.placement import Placement
from pipeline.quantize.thresholds import activation_exponent, ceil_log2, without_outliers
from pipeline.quantize.widths import Widths
from pipeline.settings import QuantizeSettings

__all__ = ["absorb_activations", "activation_quantizers", "midpoint_tensors"]


def activation_quantizers(
    placement: Placement,
    histograms: Mapping[str, Histogram],
    widths: Widths,
    settings: QuantizeSettings,
    input_name: str,
) -> dict[str, TensorQuantizer]:
    """Quantizers of the roots from their histograms.

    Args:
        placement: which tensors have one.
        histograms: of the float network, by root.
        widths: bits of each root.
        settings: threshold error, outliers.
        input_name: the network's input; it is unsigned where no value is negative.
    """
    quantizers = {}
    bounds = {
        after: placement.clip_bounds[node][1]
        for node, (_, after) in placement.activations.items()
        if node in placement.clip_bounds
    }
    for name in placement.roots:
        histogram, bits = histograms[name], widths.activations[name]
        signed = settings.signedness == "signed" or (
            name not in placement.nonnegative
            and not (name == input_name and histogram.low >= 0)
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
                lifted=signed and settings.lifted,
            )
        if 0 < bounds.get(name, np.inf) < np.inf:  # a Clip saturates there anyway
            exponent = min(exponent, ceil_log2(bounds[name]) - (bits - signed))
        quantizers[name] = TensorQuantizer(
            bits=bits, signed=signed, exponent=exponent, lifted=signed and settings.lifted
        )
    return quantizers


def absorb_activations(
    placement: Placement, tensors: dict[str, TensorQuantizer]
) -> dict[str, str]:
    """Relu and Clip nodes that saturation does; the others get a quantizer before them, too.

    Where a tensor without negative values has a signed quantizer, its Relu stays, and stands
    directly behind its operator: rounding before it would change nothing, and compilers for signed
    integers fuse the three.
    """
    absorbed = {}
    for node, (before, after) in placement.activations.items():
        quantizer = tensors[after]
        low, high = placement.clip_bounds.get(node, (0.0, np.inf))
        scale = float(quantizer.scale)
        tensors.pop(before, None)
        if quantizer.qmin * scale >= low and quantizer.qmax * scale <= high:
            absorbed[node] = after
        elif not (quantizer.signed and low >= 0):
            tensors[before] = quantizer
    return absorbed


def midpoint_tensors(
    placement: Placement, tensors: Mapping[str, TensorQuantizer], settings: QuantizeSettings
) -> frozenset[str]:
    """Signed tensors with several readers, or all.

    onnxruntime on x64 computes in uint8 and turns int8 into it only where one operator reads
    the tensor; the others, and the operators around them, would stay in float.
    """
    if settings.zero_point == "zero":
        return frozenset()
    return frozenset(
        tensor
        for tensor, quantizer in tensors.items()
        if quantizer.signed
        and (
            settings.zero_point in ("middle", "below")
            or placement.num_readers.get(tensor, 0) > 1
        )
    )
