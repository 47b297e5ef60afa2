"""YOLO-FastestV2: two grids, three anchors a cell, one softmax over the classes a cell.

    x, y = (2 s - 0.5 + cell) * stride      w, h = (2 s)^2 * anchor

with s the four sigmoids of an anchor (https://github.com/dog-qiuqiu/Yolo-FastestV2). The score of
a class is the anchor's objectness times the cell's probability of the class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from graph_tools.errors import ModelError

__all__ = ["ANCHORS", "decode_yolo_fastest_v2"]

Array = npt.NDArray[Any]

# Width and height in pixels; of the grid with stride 16, then of that with stride 32.
ANCHORS = (
    ((12.64, 19.39), (37.88, 51.48), (55.71, 138.31)),
    ((126.91, 78.23), (131.57, 214.55), (279.92, 258.87)),
)
_PER_CELL = len(ANCHORS[0])


def decode_yolo_fastest_v2(
    outputs: Mapping[str, Array], height: int, width: int
) -> tuple[Array, Array]:
    """Decode both grids.

    Args:
        outputs: two of [N, H / 16, W / 16, 15 + C] and [N, H / 32, W / 32, 15 + C]: 3 x 4 box
            sigmoids, 3 objectnesses, C probabilities.
        height: of the input, in pixels.
        width: of the input, in pixels.

    Returns:
        Boxes [N, K, 4], scores [N, K, C]; grid by grid, row by row, anchor by anchor.

    Raises:
        ModelError: outputs of other shapes.
    """
    grids = sorted(outputs.values(), key=lambda grid: -grid.shape[1] if grid.ndim > 1 else 0)
    expected = [(height // stride, width // stride) for stride in (16, 32)]
    shapes = [grid.shape[1:3] if grid.ndim == 4 else () for grid in grids]
    if shapes != expected or any(grid.shape[3] <= 5 * _PER_CELL for grid in grids):
        found = ", ".join(f"{name} {list(grid.shape)}" for name, grid in outputs.items())
        raise ModelError(
            f"its outputs, {found}, are not the two grids of YOLO-FastestV2",
            where="--decoder yolo-fastest-v2",
            hint="choose another decoder",
        )
    decoded = [
        _grid(grid, height / grid.shape[1], anchors)
        for grid, anchors in zip(grids, ANCHORS, strict=True)
    ]
    boxes, scores = zip(*decoded, strict=True)
    return np.concatenate(boxes, axis=1), np.concatenate(scores, axis=1)


def _grid(
    grid: Array, stride: float, anchors: tuple[tuple[float, float], ...]
) -> tuple[Array, Array]:
    count, rows, columns, _ = grid.shape
    sigmoids = grid[..., : 4 * _PER_CELL].reshape(count, rows, columns, _PER_CELL, 4)
    objectness = grid[..., 4 * _PER_CELL : 5 * _PER_CELL]
    classes = grid[..., 5 * _PER_CELL :]
    cells = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), axis=-1)
    center = (2 * sigmoids[..., :2] - 0.5 + cells[:, :, None]) * stride
    half = (2 * sigmoids[..., 2:]) ** 2 * np.array(anchors, dtype=grid.dtype) / 2
    boxes = np.concatenate([center - half, center + half], axis=-1)
    scores = objectness[..., None] * classes[..., None, :]
    return boxes.reshape(count, -1, 4), scores.reshape(count, -1, classes.shape[-1])
