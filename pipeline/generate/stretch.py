"""Stretch outputs over their range: nothing near the end of a network binds it otherwise.

DGH's output loss (arXiv 2410.22110, eq. 6). Of outputs with many elements, as those of detectors,
not only the two outermost count but the outermost thousandth. Several outputs are brought to a
common scale first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from graph_tools.errors import ModelError

__all__ = ["ranges", "stretch"]


def stretch(
    values: Mapping[str, Tensor], heads: Sequence[str], *, squared: bool = False
) -> Tensor:
    """Return the negative range of the outputs, averaged over images and outputs.

    Args:
        values: observed tensors by name, [N, ...] each.
        heads: names of the outputs.
        squared: the range squared, as in the paper.
    """
    spans = torch.stack([ranges(values[name]) for name in heads])  # [heads, N]
    if squared:
        spans = spans.square()
    if len(spans) > 1:
        scale = spans.detach().mean(1, keepdim=True).clamp_min(1e-12)
        spans = spans * (scale.mean() / scale)
    return -spans.mean()


def ranges(values: Tensor) -> Tensor:
    """Return the range of each image's elements, [N].

    Args:
        values: [N, ...].

    Raises:
        ModelError: there are none.
    """
    flat = values.flatten(1)
    if not flat.shape[1]:
        raise ModelError(
            f"an output has no elements: its shape is {tuple(values.shape)}",
            hint="check the file's shapes and slices, and --input-shape",
        )
    count = max(1, flat.shape[1] // 1000)
    if count == 1:
        return flat.amax(1) - flat.amin(1)
    high = flat.topk(count, dim=1, sorted=False).values
    low = flat.topk(count, dim=1, largest=False, sorted=False).values
    return high.mean(1) - low.mean(1)
