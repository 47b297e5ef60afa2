"""Histograms of the float network's tensors over all images, whatever the batch size.

Two passes: the first finds each tensor's range, the second counts. Bins are a power of two wide
and aligned to zero, so every candidate threshold falls on a bin edge, and the counts do not
depend on how the images are batched. Memory does not grow with the number of images.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from graph_tools.errors import DataError
from graph_tools.torch_graph import TorchGraph
from pipeline.quantize.thresholds import FLOOR, ceil_log2

__all__ = ["Histogram", "observe"]

Array = np.ndarray[Any, np.dtype[Any]]

_LARGEST = 2.0**127  # the power of two above it is not in float32
_BINS = 8192  # on each side of zero: 32 bins to a step of 8 bits unsigned


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Distribution of one tensor.

    Attributes:
        low: smallest value seen; ``high`` the largest.
        centers: [bins] float64; ``counts`` likewise.
    """

    low: float
    high: float
    centers: Array
    counts: Array

    def clipped_percent(self, lowest: float, highest: float) -> float:
        """Percentage of values outside [lowest, highest]."""
        outside = (self.centers < lowest) | (self.centers > highest)
        return float(100.0 * self.counts[outside].sum() / max(self.counts.sum(), 1.0))


def observe(
    graph: TorchGraph,
    tensors: Collection[str],
    batches: Callable[[], Iterable[torch.Tensor]],
) -> dict[str, Histogram]:
    """Histograms of ``tensors`` over all batches.

    Args:
        graph: the float network.
        tensors: names of activation tensors (the graph input may be one).
        batches: starts a new pass over the images, each batch ``[n, ...]`` in the model's layout.

    Raises:
        DataError: a tensor is empty or not finite on these images, or beyond the powers of two of
            float32.
    """
    wanted = set(tensors)
    ranges: dict[str, tuple[float, float]] = {}

    def find_range(name: str, value: torch.Tensor) -> torch.Tensor:
        if name in wanted and value.numel():
            low, high = (float(edge) for edge in torch.aminmax(value))
            if not np.isfinite([low, high]).all():
                raise DataError(
                    "the network's values are not finite on these images",
                    where=f"tensor {name}",
                    hint="check the input range (--mean, --std)",
                )
            if max(-low, high) > _LARGEST:
                raise DataError(
                    f"the network's values reach {max(-low, high):.3g} on these images, too much "
                    "for a power-of-two range in float32",
                    where=f"tensor {name}",
                    hint="check the file's weights, and the input range (--mean, --std)",
                )
            before = ranges.get(name, (low, high))
            ranges[name] = min(low, before[0]), max(high, before[1])
        return value

    counts: dict[str, Array] = {}

    def count(name: str, value: torch.Tensor) -> torch.Tensor:
        if name in wanted and value.numel():
            limit = _limit(*ranges[name])
            low = 0.0 if ranges[name][0] >= 0 else -limit
            bins = _BINS if low == 0.0 else 2 * _BINS
            found = torch.histc(value.detach().float().flatten(), bins, low, limit).numpy()
            counts[name] = counts.get(name, 0.0) + found.astype(np.float64)
        return value

    with torch.no_grad():
        for hook in (find_range, count):
            for batch in batches():
                graph(batch, hook=hook)
    for name in tensors:
        if name not in ranges:
            raise DataError(
                "has no elements on these images",
                where=f"tensor {name}",
                hint="check the file's shapes and slices, and --input-shape",
            )
    return {name: _histogram(*ranges[name], counts[name]) for name in tensors}


def _limit(low: float, high: float) -> float:
    return float(2.0 ** ceil_log2(max(-low, high, FLOOR)))


def _histogram(low: float, high: float, counts: Array) -> Histogram:
    limit = _limit(low, high)
    width = limit / _BINS
    start = 0.0 if low >= 0 else -limit
    centers = start + width * (np.arange(counts.size) + 0.5)
    return Histogram(low=low, high=high, centers=centers, counts=counts)
