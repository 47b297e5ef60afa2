"""Pad in its four modes; negative pads cut off."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from graph_tools.torch_ops.registry import Compute, Node, operator
from graph_tools.torch_ops.windows import torch_pads

__all__ = ["pad"]

_TORCH_MODES = {"reflect": "reflect", "edge": "replicate"}


@operator("Pad", host=(1, 3))
def pad(node: Node) -> Compute:
    """Extend or cut the axes at both ends."""
    mode = node.text("mode", "constant")
    pads_input, axes_input = node.ints_input(1), node.ints_input(3)
    fill = node.scalar(2)

    def compute(
        x: torch.Tensor,
        pads: torch.Tensor,
        value: torch.Tensor | None = None,
        axes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        given, chosen = pads_input(pads) or (), axes_input(axes)
        chosen = tuple(range(x.dim())) if chosen is None else chosen
        begin, end = [0] * x.dim(), [0] * x.dim()
        for position, axis in enumerate(chosen):
            begin[axis], end[axis] = given[position], given[position + len(chosen)]
        if mode != "constant":
            return _pad_by_copies(x, begin, end, mode)
        constant = fill if fill is not None else (0 if value is None else value.item())
        return functional.pad(x, _trimmed(torch_pads(begin, end)), value=constant)

    return compute


def _trimmed(pads: list[int]) -> list[int]:
    """Drop leading axes without padding, which torch would otherwise still walk."""
    while len(pads) > 2 and pads[-2:] == [0, 0]:
        pads = pads[:-2]
    return pads


def _pad_by_copies(
    x: torch.Tensor, begin: Sequence[int], end: Sequence[int], mode: str
) -> torch.Tensor:
    """Pad with elements of the tensor itself: by torch where it can, else by index lists."""
    pads = torch_pads(begin, end)
    spatial = min(x.dim() - 2, 3)
    native = (
        mode in _TORCH_MODES
        and x.dtype.is_floating_point
        and spatial > 0
        and not any(pads[2 * spatial :])
        and all(
            0 <= min(b, e) and max(b, e) < length
            for b, e, length in zip(begin, end, x.shape, strict=True)
        )
    )
    if native:
        return functional.pad(x, pads[: 2 * spatial], mode=_TORCH_MODES[mode])
    for axis, (before, behind) in enumerate(zip(begin, end, strict=True)):
        if before == behind == 0:
            continue
        kept = np.arange(x.shape[axis])[max(-before, 0) : x.shape[axis] - max(-behind, 0)]
        picked = np.pad(kept, (max(before, 0), max(behind, 0)), mode=mode)  # type: ignore[call-overload]
        x = x.index_select(axis, torch.from_numpy(picked).to(x.device))
    return x
