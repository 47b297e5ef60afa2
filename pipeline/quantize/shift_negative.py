"""Decide which hardly negative tensors are shifted, and how far (shift-negative correction).

HPTQ (arXiv 2109.09113) shifts a tensor where its minimum is small beside its threshold. Here a
tensor is shifted where that makes the quantization error on the calibration images smaller, which
needs no ratio. The shift is the smallest multiple of the new quantizer's step that makes the
minimum zero or more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch

from graph_tools.model import Model
from graph_tools.shift_negative import find_shiftable, shift_tensors
from graph_tools.torch_graph import TorchGraph
from pipeline.quantize.observe import Histogram, observe
from pipeline.quantize.thresholds import activation_exponent, squared_error, without_outliers
from pipeline.settings import QuantizeSettings

__all__ = ["choose_shift", "shift_negatives"]


def shift_negatives(
    model: Model,
    batches: Callable[[], Iterable[torch.Tensor]],
    bits: Mapping[str, int],
    settings: QuantizeSettings,
) -> tuple[Model, dict[str, str]]:
    """Shift the tensors of a network that gain by it.

    Args:
        model: prepared for quantization.
        batches: starts a new pass over the images, each batch ``[n, ...]`` in the model's layout.
        bits: of the tensors that are quantized; others are not shifted.
        settings: threshold error.

    Returns:
        The network, same values in float, and by name of a tensor that was shifted the name of
        the shifted one. The first is not to be quantized, or it would be rounded twice.
    """
    names = tuple(name for name in find_shiftable(model) if name in bits)
    if not names:
        return model, {}
    histograms = observe(TorchGraph(model.proto, outputs=names), names, batches)
    chosen = {name: choose_shift(histograms[name], bits[name], settings) for name in names}
    shifts = {name: shift for name, shift in chosen.items() if shift > 0}
    return shift_tensors(model, shifts) if shifts else (model, {})


def choose_shift(histogram: Histogram, bits: int, settings: QuantizeSettings) -> float:
    """The shift of one tensor of ``bits`` bits, 0 if a signed quantizer serves it better."""
    metric = settings.threshold
    if histogram.low >= 0:
        return 0.0
    centers = histogram.centers
    counts = without_outliers(centers, histogram.counts, settings.outlier_z)
    signed = activation_exponent(centers, counts, bits=bits, signed=True, metric=metric)
    shift = -histogram.low
    unsigned = activation_exponent(
        centers + shift, counts, bits=bits, signed=False, metric=metric
    )
    shift = math.ceil(shift / 2.0**unsigned) * 2.0**unsigned
    before = squared_error(centers, counts, exponent=signed, bits=bits, signed=True)
    after = squared_error(centers + shift, counts, exponent=unsigned, bits=bits, signed=False)
    return shift if after < before else 0.0
