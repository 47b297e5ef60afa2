"""Non-maximum suppression: of boxes of a class that overlap, the one with the best score."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["overlaps", "suppress"]


def overlaps(box: npt.NDArray[Any], boxes: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return the intersection over union of one box with others, 0 where nothing has an area.

    Args:
        box: [4], x1 y1 x2 y2.
        boxes: [K, 4], likewise.

    Returns:
        [K] float64.
    """
    low = np.maximum(box[:2], boxes[:, :2])
    high = np.minimum(box[2:], boxes[:, 2:])
    common = np.clip(high - low, 0, None).prod(axis=1)
    union = _area(box[None]) + _area(boxes) - common
    none = np.zeros(len(boxes))
    return np.asarray(np.divide(common, union, out=none, where=union > 0))


def suppress(
    boxes: npt.NDArray[Any],
    scores: npt.NDArray[Any],
    classes: npt.NDArray[Any],
    *,
    overlap: float,
    most: int,
) -> npt.NDArray[np.int64]:
    """Return which boxes are left, best scores first.

    Boxes are taken in order of their scores (of equal ones the first); each removes those of
    its own class that overlap it by more than ``overlap``.

    Args:
        boxes: [K, 4], x1 y1 x2 y2.
        scores: [K].
        classes: [K] integers.
        overlap: intersection over union, 0..1.
        most: stop after this many boxes.

    Returns:
        [<= most] int64 indices.
    """
    waiting = np.argsort(-scores, kind="stable")
    boxes = boxes.astype(np.float64)
    kept: list[int] = []
    while len(waiting) and len(kept) < most:
        best, rest = waiting[0], waiting[1:]
        kept.append(int(best))
        covered = overlaps(boxes[best], boxes[rest]) > overlap
        waiting = rest[~(covered & (classes[rest] == classes[best]))]
    return np.array(kept, dtype=np.int64)


def _area(boxes: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.asarray(np.clip(boxes[:, 2:] - boxes[:, :2], 0, None).prod(axis=1))
