"""Swing convolutions: strided convolutions that see their input at a random offset (GENIE).

A convolution of stride 2 reads some positions of its input more often than others, and gradients
paint that grid into the images. While images are optimized, GENIE (CVPR 2023, arXiv 2212.04780,
section 3.2) reflects one row or column at each edge of such an input and crops it back to its size
at a random offset, so that no position is special.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from graph_tools.torch_graph import Entry, Step

__all__ = ["swing", "swing_entry"]


def swing(values: Tensor, top: int, left: int) -> Tensor:
    """Shift maps by up to one position, reflecting them at the edges.

    Args:
        values: [N, C, H, W].
        top: 0..2, first row of the crop from the map padded by 1; 1 leaves it in place.
        left: likewise, first column.

    Returns:
        [N, C, H, W]. An axis of size 1 has nothing to reflect, and stays as it is.
    """
    height, width = values.shape[2:]
    rows, columns = int(height > 1), int(width > 1)
    padded = functional.pad(values, (columns, columns, rows, rows), mode="reflect")
    top, left = top * rows, left * columns
    return padded[:, :, top : top + height, left : left + width]


def swing_entry(generator: torch.Generator) -> Entry:
    """Return what `TorchGraph.forward` takes as ``entry``: it swings strided convolutions.

    Args:
        generator: of the offsets, on the CPU; one offset a convolution and batch.
    """

    def entry(step: Step, values: Tensor) -> Tensor:
        strides = step.attributes.get("strides", ())
        if step.op_type != "Conv" or values.dim() != 4 or max(strides, default=1) == 1:
            return values
        top, left = torch.randint(3, (2,), generator=generator).tolist()
        return swing(values, top, left)

    return entry
