"""How a picture is laid on a network's input, and how boxes get back from there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.evaluate.pictures import fit

__all__ = ["Placement", "Resize", "place", "placement"]

Resize = Literal["crop", "stretch", "letterbox"]
"""crop: scaled until it covers the input, then cropped at the center; stretch: both sides
scaled to the input's, whatever the shape; letterbox: scaled until it fits, gray bars around."""

_GRAY = 114  # of the bars, as YOLO networks are trained with


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a picture lies on the input: ``x_input = x_picture * scale_x + left``.

    Args:
        scale_x: pixels of the input for one of the picture; ``scale_y`` likewise.
        left: of the picture's left edge on the input, in pixels; negative if it is cropped.
        top: likewise.
    """

    scale_x: float
    scale_y: float
    left: float
    top: float

    def to_picture(self, boxes: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Turn boxes in pixels of the input into boxes in pixels of the picture.

        Args:
            boxes: [K, 4], x1 y1 x2 y2.

        Returns:
            [K, 4] float64.
        """
        offset = np.array([self.left, self.top] * 2)
        return np.asarray((boxes - offset) / np.array([self.scale_x, self.scale_y] * 2))


def placement(size: tuple[int, int], height: int, width: int, resize: Resize) -> Placement:
    """Return where a picture of ``size`` (width, height) lies on an input."""
    scaled = _scaled(size, height, width, resize)
    return Placement(
        scale_x=scaled[0] / size[0],
        scale_y=scaled[1] / size[1],
        left=_start(scaled[0], width),
        top=_start(scaled[1], height),
    )


def place(
    image: Image.Image, height: int, width: int, resize: Resize, where: str
) -> npt.NDArray[np.uint8]:
    """Lay a picture on an input (bilinear, antialiased).

    Args:
        image: mode "L" or "RGB".
        height: of the input, in pixels.
        width: of the input, in pixels.
        resize: how.
        where: the file's name, for messages.

    Returns:
        [height, width, 1 or 3] uint8.

    Raises:
        DataError: cropped, the picture would grow beyond `pictures.MAX_PIXELS`.
    """
    if resize == "crop":
        return fit(image, height, width, where)
    scaled = _scaled(image.size, height, width, resize)
    if scaled != image.size:
        image = image.resize(scaled, Image.Resampling.BILINEAR)
    pixels = np.asarray(image, dtype=np.uint8)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if scaled == (width, height):
        return pixels
    canvas = np.full((height, width, pixels.shape[2]), _GRAY, dtype=np.uint8)
    left, top = _start(scaled[0], width), _start(scaled[1], height)
    canvas[top : top + scaled[1], left : left + scaled[0]] = pixels
    return canvas


def _scaled(size: tuple[int, int], height: int, width: int, resize: Resize) -> tuple[int, int]:
    """Return the width and height of a picture once it is scaled."""
    if resize == "stretch":
        return width, height
    if resize == "letterbox":
        scale = min(width / size[0], height / size[1])
        return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    scale = max(width / size[0], height / size[1])
    return max(width, round(size[0] * scale)), max(height, round(size[1] * scale))


def _start(scaled: int, side: int) -> int:
    return round((side - scaled) / 2) if scaled < side else -round((scaled - side) / 2)
