"""Numbers that follow from the size of the images, where the user gives none."""

from __future__ import annotations

import math
from typing import Literal

import torch

__all__ = [
    "default_batch_size",
    "default_iterations",
    "default_learning_rate",
    "default_num_images",
]

Start = Literal["natural", "noise"]


def default_batch_size(height: int, width: int, device: str = "cpu") -> int:
    """Return how many images are optimized together: 64 up to 128 x 128, 16 at 224 x 224.

    On a CPU larger batches leave the caches; a GPU takes eight times as many.
    """
    pixels = 2**20 if torch.device(device).type == "cpu" else 2**23
    most = 64 if torch.device(device).type == "cpu" else 256
    fitting = max(1, pixels // (height * width))
    return min(most, 1 << (fitting.bit_length() - 1))


def default_num_images(height: int, width: int) -> int:
    """Return how many images calibrate a network: 256 up to 128 x 128 pixels, 64 beyond.

    A large image has as many positions as many small ones, and takes as long to make.
    """
    return 256 if height * width <= 128 * 128 else 64


def default_iterations(height: int, width: int, start: Start = "natural") -> int:
    """Return the steps of each batch: 300 up to 256 x 256 pixels, 200 beyond.

    By then the loss has left its steep part; the published 1000 are for GPUs. Small images that
    start natural need 100: their statistics are not far from those wanted.
    """
    if start == "natural" and height * width <= 64 * 64:
        return 100
    return 300 if height * width <= 256 * 256 else 200


def default_learning_rate(iterations: int, side: int, start: Start = "natural") -> float:
    """Return RAdam's learning rate, in standardized pixel units.

    Images that start natural must not lose what makes them so: 0.1 up to 32 x 32 pixels, and more
    where a feature sees more of them. From noise: the published 16 for the published 1000 steps,
    else 4; with fewer steps there is no time to come down from 16.

    Args:
        iterations: steps of each batch.
        side: the shorter one of an image, in pixels.
        start: what is optimized.
    """
    if start == "natural":
        return 0.1 * math.sqrt(max(side, 32) / 32)
    return 16.0 if iterations >= 1000 else 4.0
