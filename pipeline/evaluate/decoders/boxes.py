"""Outputs that are boxes and scores already, as of networks exported with their decoding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from graph_tools.errors import ModelError

__all__ = ["decode_boxes", "find_boxes_and_scores", "without_background"]

Array = npt.NDArray[Any]

_LARGEST_SHARE = 2.0  # coordinates up to here are shares of the input's sides
_SOFTMAX = 0.05  # by which a softmax in 8-bit steps may miss 1


def decode_boxes(outputs: Mapping[str, Array], height: int, width: int) -> tuple[Array, Array]:
    """Take boxes and scores as they are.

    Boxes whose coordinates all lie below 2 are shares of width and height. Scores that sum to 1
    over the classes come from a softmax, whose first class is "nothing": it is left out.

    Args:
        outputs: boxes [N, K, 4], x1 y1 x2 y2, and scores [N, K, C] or [N, K].
        height: of the input, in pixels.
        width: of the input, in pixels.

    Returns:
        Boxes [N, K, 4] in pixels, scores [N, K, C].

    Raises:
        ModelError: the outputs are not these two.
    """
    boxes, scores = find_boxes_and_scores(outputs, "boxes")
    if boxes.size and np.abs(boxes).max() <= _LARGEST_SHARE:
        boxes = boxes * np.array([width, height, width, height], dtype=boxes.dtype)
    return boxes, without_background(scores)


def find_boxes_and_scores(outputs: Mapping[str, Array], decoder: str) -> tuple[Array, Array]:
    """Return the output [N, K, 4] and the output [N, K, C] or [N, K], the latter as [N, K, C].

    Of two outputs with four columns, that is the box whose name says so (box, loc, bbox).

    Raises:
        ModelError: they are not among the outputs.
    """
    fours = [
        name for name, value in outputs.items() if value.ndim == 3 and value.shape[2] == 4
    ]
    if len(fours) > 1:
        fours = [n for n in fours if any(word in n.lower() for word in ("box", "loc"))]
    rows = outputs[fours[0]].shape[:2] if len(fours) == 1 else None
    others = [
        value
        for name, value in outputs.items()
        if name not in fours and value.ndim in (2, 3) and value.shape[:2] == rows
    ]
    if len(others) != 1:
        found = ", ".join(f"{name} {list(value.shape)}" for name, value in outputs.items())
        raise ModelError(
            f"its outputs, {found}, are not boxes [N, K, 4] and scores [N, K, C]",
            where=f"--decoder {decoder}",
            hint="choose another decoder",
        )
    scores = others[0]
    return outputs[fours[0]], scores[..., None] if scores.ndim == 2 else scores


def without_background(scores: Array) -> Array:
    """Leave out the first class of a softmax, which stands for nothing.

    Args:
        scores: [N, K, C].

    Returns:
        [N, K, C - 1] if the classes of each box sum to 1 and are two or more, else ``scores``.
    """
    if scores.shape[2] < 2 or not scores.size:
        return scores
    sums = scores.astype(np.float64).sum(axis=2)
    return scores[..., 1:] if np.abs(sums - 1).mean() <= _SOFTMAX else scores
