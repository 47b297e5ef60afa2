"""What images look like to the network while they are optimized: flip, blur, crop, clip.

An image is optimized on a canvas somewhat larger than the network's input. Every step shows the
network a randomly flipped, blurred and cropped view of it, so that no single pixel position can
be exploited; the final image is the blurred center (DGH, arXiv 2410.22110, section 3.3).

Canvases are in standardized pixel units, ``(pixel - 0.45) / 0.226`` with pixels in 0..1: the
units that the published learning rate is for, whatever range the network takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "PIXEL_MEAN",
    "PIXEL_STD",
    "ImagePrior",
    "Source",
    "View",
    "blur_kernel",
    "clip_straight_through",
    "default_blur",
    "default_padding",
    "random_crops",
    "white_noise",
]

PIXEL_MEAN, PIXEL_STD = 0.45, 0.226
"""Mean and standard deviation of the pixels (0..1) of natural images, about ImageNet's."""


Source = Callable[[int, tuple[int, int, int], torch.Generator], Tensor]
"""Makes (count, [C, H, W], generator on the CPU) canvases, in standardized pixel units."""


def white_noise(count: int, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Return standard normal noise, what DGH starts from."""
    return torch.randn((count, *shape), generator=generator)


def default_padding(side: int) -> int:
    """Return by how many pixels a canvas exceeds the input, for the input's shorter side.

    32 at 224 as published; 8 at 32, the usual training augmentation of small images.
    """
    return 2 * round(max(min(8, side / 4), side / 7) / 2)


def default_blur(side: int) -> float:
    """Return the sigma of the 3x3 blur in pixels: 1.25 at 224 as published, 0 up to 32."""
    return 1.25 * min(1.0, max(0.0, (side - 32) / (224 - 32)))


def blur_kernel(sigma: float) -> tuple[float, float]:
    """Return the center and the side weight of a three-tap Gaussian; 1, 0 for ``sigma`` 0.

    The 3x3 kernel is its product with itself along both axes, and sums to 1.
    """
    side = math.exp(-1 / (2 * sigma**2)) if sigma > 0 else 0.0
    return 1 / (1 + 2 * side), side / (1 + 2 * side)


class _Blur(torch.autograd.Function):
    """The 3x3 blur with zeros around the image: symmetric, so it is its own gradient.

    Shifted sums; a convolution of one channel takes several times as long.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, images: Tensor, center: float, side: float
    ) -> Tensor:
        ctx.weights = center, side  # type: ignore[attr-defined]
        return _blurred(images, center, side)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor, None, None]:
        return _blurred(grad, *ctx.weights), None, None  # type: ignore[attr-defined]


def _blurred(images: Tensor, center: float, side: float) -> Tensor:
    for axis in (2, 3):
        size = images.shape[axis] - 1
        result = images * center
        result.narrow(axis, 1, size).add_(images.narrow(axis, 0, size), alpha=side)
        result.narrow(axis, 0, size).add_(images.narrow(axis, 1, size), alpha=side)
        images = result
    return images


class _Clip(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, images: Tensor, low: Tensor, high: Tensor
    ) -> Tensor:
        return torch.clamp(images, low, high)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor, None, None]:
        return grad, None, None


def clip_straight_through(images: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Clip ``images`` to [low, high]; the gradient passes as if nothing were clipped.

    Without it a pixel that has left the valid range could never come back.
    """
    clipped: Tensor = _Clip.apply(images, low, high)  # type: ignore[no-untyped-call]
    return clipped


@dataclass(frozen=True, kw_only=True)
class View:
    """One random view of a whole batch of canvases.

    Args:
        flip: mirror left and right.
        top: first row of the crop.
        left: first column of the crop.
        crops: [N, 2, 3], for each image the affine map from places in the image to places in the
            canvas, both -1..1, x before y: a crop of its own, resized and perhaps mirrored, in
            place of ``flip``, ``top`` and ``left``. None without.
    """

    flip: bool
    top: int
    left: int
    crops: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class ImagePrior:
    """From canvases to images.

    Args:
        height: of the images.
        width: of the images.
        padding: by how much canvases are higher and wider, even.
        kernel: center and side weight of the blur, see `blur_kernel`.
        low: [1, C, 1, 1] smallest valid value, standardized pixel units.
        high: [1, C, 1, 1] largest valid value.
        flip: whether views are mirrored at random.
        source: makes what images are optimized from.
        moving: share of the images that are optimized, the first ones of a batch; the others stay
            as the source made them.
        crop_scale: smallest share of the canvas's area that a resized crop shows; 1 for no
            resized crops.
        crop_chance: share of the views that are resized crops, one for each image.
    """

    height: int
    width: int
    padding: int
    kernel: tuple[float, float]
    low: Tensor
    high: Tensor
    flip: bool = True
    source: Source = white_noise
    moving: float = 1.0
    crop_scale: float = 1.0
    crop_chance: float = 0.5

    @property
    def canvas_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a canvas."""
        padding = self.padding
        return (self.low.shape[1], self.height + padding, self.width + padding)

    def start(self, count: int, generator: torch.Generator) -> Tensor:
        """Return ``count`` canvases of the source, clipped, on the CPU."""
        canvas = self.source(count, self.canvas_shape, generator)
        return torch.clamp(canvas, self.low.cpu(), self.high.cpu())

    def draw(self, generator: torch.Generator, count: int) -> View:
        """Draw a random view of ``count`` canvases."""
        flip, top, left = torch.rand(3, generator=generator).tolist()
        crops = None
        if (
            self.crop_scale < 1
            and float(torch.rand(1, generator=generator)) < self.crop_chance
        ):
            crops = random_crops(count, self.crop_scale, generator, flip=self.flip)
        return View(
            flip=self.flip and flip < 0.5,
            top=int(top * (self.padding + 1)),
            left=int(left * (self.padding + 1)),
            crops=crops,
        )

    def center(self) -> View:
        """Return the view that makes the final images."""
        return View(flip=False, top=self.padding // 2, left=self.padding // 2)

    def render(self, canvas: Tensor, view: View) -> Tensor:
        """Flip, blur, crop and clip, differentiably.

        Args:
            canvas: [N, C, height + padding, width + padding] float32.
            view: which flip and crop.

        Returns:
            [N, C, height, width] float32 in [low, high].
        """
        if self.moving < 1:
            count = math.ceil(self.moving * len(canvas))
            canvas = torch.cat([canvas[:count], canvas[count:].detach()])
        if view.flip and view.crops is None:
            canvas = canvas.flip(3)
        if self.kernel[1]:
            canvas = _Blur.apply(canvas, *self.kernel)  # type: ignore[no-untyped-call]
        if view.crops is not None:
            crop = self._resized(canvas, view.crops)
        else:
            rows = slice(view.top, view.top + self.height)
            crop = canvas[:, :, rows, view.left : view.left + self.width]
        return clip_straight_through(crop, self.low, self.high)

    def _resized(self, canvas: Tensor, crops: Tensor) -> Tensor:
        size = [*canvas.shape[:2], self.height, self.width]
        places = functional.affine_grid(crops.to(canvas), size, align_corners=False)
        return functional.grid_sample(
            canvas, places, padding_mode="border", align_corners=False
        )


def random_crops(
    count: int, scale: float, generator: torch.Generator, *, flip: bool = True
) -> Tensor:
    """Draw resized crops: an area between ``scale`` and 1, 3:4 to 4:3 in shape, half mirrored.

    Args:
        count: number of images.
        scale: smallest share of the area.
        generator: on the CPU.
        flip: whether any are mirrored.

    Returns:
        [count, 2, 3] as in `View`.
    """
    area, shape, x, y, mirror = torch.rand((5, count), generator=generator)
    area = scale + (1 - scale) * area
    shape = torch.exp((2 * shape - 1) * math.log(4 / 3) / 2)
    width = (area.sqrt() * shape).clamp_max(1)
    height = (area.sqrt() / shape).clamp_max(1)
    maps = torch.zeros(count, 2, 3)
    maps[:, 0, 0] = torch.where(mirror < 0.5, -width, width) if flip else width
    maps[:, 1, 1] = height
    maps[:, 0, 2], maps[:, 1, 2] = (2 * x - 1) * (1 - width), (2 * y - 1) * (1 - height)
    return maps
