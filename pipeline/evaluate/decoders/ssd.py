"""SSD: offsets to default boxes (priors), in units of two variances (arXiv 1512.02325).

    center = prior center + offset * 0.1 * prior size      size = prior size * exp(offset * 0.2)

The priors are not in a file whose decoding was left out; they follow from the network's input
and the number of boxes. Known are the layouts of SSD300 and of UltraFace (1:1 boxes of a few
sizes). For another, call `decode_offsets` from a decoder of your own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from graph_tools.errors import ModelError
from pipeline.evaluate.decoders.boxes import find_boxes_and_scores

__all__ = ["decode_offsets", "decode_ssd", "ssd300_priors", "ultraface_priors"]

Array = npt.NDArray[Any]
VARIANCES = (0.1, 0.2)


def decode_ssd(outputs: Mapping[str, Array], height: int, width: int) -> tuple[Array, Array]:
    """Decode offsets with the priors that fit the number of boxes.

    Args:
        outputs: offsets [N, K, 4] (x y w h), and scores [N, K, C], probabilities or logits of
            a softmax whose first class is "nothing".
        height: of the input, in pixels.
        width: of the input, in pixels.

    Returns:
        Boxes [N, K, 4], scores [N, K, C - 1].

    Raises:
        ModelError: other outputs, or no known priors are K in number.
    """
    offsets, scores = find_boxes_and_scores(outputs, "ssd")
    layouts = [ultraface_priors(height, width), ssd300_priors()]
    priors = next((one for one in layouts if len(one) == offsets.shape[1]), None)
    if priors is None or scores.shape[2] < 2:
        raise ModelError(
            f"{offsets.shape[1]} boxes with {scores.shape[2]} score(s) have no known priors",
            where="--decoder ssd",
            hint="write a decoder with pipeline.evaluate.decoders.ssd.decode_offsets, and give "
            "it as --decoder file.py:function",
        )
    boxes = decode_offsets(offsets, priors) * np.array([width, height, width, height])
    return boxes, _probabilities(scores)[..., 1:]


def decode_offsets(
    offsets: Array, priors: Array, variances: tuple[float, float] = VARIANCES
) -> Array:
    """Return the boxes that offsets stand for.

    Args:
        offsets: [N, K, 4], of center x, center y, width, height.
        priors: [K, 4], center x, center y, width, height, as shares of the input.
        variances: of centers and of sizes.

    Returns:
        [N, K, 4], x1 y1 x2 y2, as shares of the input.
    """
    center = priors[:, :2] + offsets[..., :2] * variances[0] * priors[:, 2:]
    half = priors[:, 2:] * np.exp(offsets[..., 2:] * variances[1]) / 2
    return np.concatenate([center - half, center + half], axis=-1)


def ultraface_priors(height: int, width: int) -> npt.NDArray[np.float64]:
    """Return the priors of UltraFace (github.com/Linzaer), [K, 4]: squares in pixels."""
    sizes = ((10, 16, 24), (32, 48), (64, 96), (128, 192, 256))
    levels = []
    for stride, sides in zip((8, 16, 32, 64), sizes, strict=True):
        rows, columns = math.ceil(height / stride), math.ceil(width / stride)
        # Cells are shares of the map: smaller than the stride where its size is rounded up.
        cells = ((x / columns, y / rows) for x, y in _centers(rows, columns))
        levels.append(_cross(cells, [(side / width, side / height) for side in sides]))
    return np.clip(np.concatenate(levels), 0, 1)


def ssd300_priors() -> npt.NDArray[np.float64]:
    """Return the 8,732 priors of SSD300 (as trained on VOC), [8732, 4]."""
    maps = (38, 19, 10, 5, 3, 1)
    steps = (8, 16, 32, 64, 100, 300)
    sides = (30, 60, 111, 162, 213, 264, 315)
    ratios = ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,))
    levels = []
    for index, (cells, step) in enumerate(zip(maps, steps, strict=True)):
        side, between = sides[index] / 300, math.sqrt(sides[index] * sides[index + 1]) / 300
        shapes = [(side, side), (between, between)]
        for ratio in ratios[index]:
            root = math.sqrt(ratio)
            shapes += [(side * root, side / root), (side / root, side * root)]
        centers = ((x * step / 300, y * step / 300) for x, y in _centers(cells, cells))
        levels.append(_cross(centers, shapes))
    return np.clip(np.concatenate(levels), 0, 1)


def _centers(rows: int, columns: int) -> Iterable[tuple[float, float]]:
    return ((column + 0.5, row + 0.5) for row in range(rows) for column in range(columns))


def _cross(
    cells: Iterable[tuple[float, float]], shapes: Sequence[tuple[float, float]]
) -> npt.NDArray[np.float64]:
    pairs = itertools.product(cells, shapes)
    return np.array([(*cell, *shape) for cell, shape in pairs], dtype=np.float64)


def _probabilities(scores: Array) -> Array:
    if scores.size and (scores.min() < 0 or scores.max() > 1):  # logits
        powers = np.exp(scores - scores.max(axis=2, keepdims=True))
        return np.asarray(powers / powers.sum(axis=2, keepdims=True))
    return scores
