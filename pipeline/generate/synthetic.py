"""Images with the statistics of natural ones, from a seed alone.

What photographs share, whatever they show (Field 1987; Ruderman 1994; Lee, Mumford and Huang
2001):

    leaves    opaque shapes of all sizes that occlude each other, radii by the law r^-3, each with
              its color, shading and texture: regions, edges and corners (the dead leaves model)
    pink      noise with the amplitude spectrum 1/f: clouds, slow gradients
    gratings  oriented waves and edges of all frequencies within windows: lines, stripes

Colors are drawn along the principal axes of natural colors: nearly all variance is brightness,
some blue against yellow, little green against magenta (Ruderman et al. 1998; Krizhevsky et al.
2012). Images differ in brightness and in contrast.

Everything is computed for a batch at once, in units of about zero mean and unit variance; how
these become pixels is the caller's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.generate.network import pixel_site
from pipeline.generate.prior import Source
from pipeline.preprocessing import Preprocessing

__all__ = ["KINDS", "colored", "pink_noise", "synthetic_images", "synthetic_source"]

# Brightness, blue-yellow and green-magenta, with their shares of the variance.
_AXES = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (1.0, -2.0, 1.0))
_SHARES = (0.93, 0.055, 0.015)
_SHARED = 0.93  # of the variance of other than three channels

_LEAVES = 100  # cover an image of any size
_SMALLEST, _LARGEST = 1 / 24, 0.6  # radius of a leaf as a share of the shorter side
_SIMPLEST = 1 / 3  # smallest radius in the images of few, large shapes
_BETWEEN = 0.35  # share of the variance that is between images
_CONTRAST_SPREAD = 0.4  # of the logarithm of an image's contrast


def synthetic_images(
    count: int,
    shape: tuple[int, int, int],
    generator: torch.Generator,
    *,
    kinds: tuple[str, ...] = ("leaves", "gratings"),
) -> Tensor:
    """Make images that look like nothing in particular, and natural.

    Args:
        count: number of images N.
        shape: [C, H, W]; RGB if C is 3.
        generator: on the CPU.
        kinds: of `KINDS`, taken in turn.

    Returns:
        [N, C, H, W] float32 of about zero mean and unit variance in each channel, unclipped.
    """
    images = torch.empty((count, *shape))
    for place, kind in enumerate(kinds):
        chosen = range(place, count, len(kinds))
        if chosen:
            images[list(chosen)] = KINDS[kind](len(chosen), shape, generator)
    return images


def synthetic_source(preprocessing: Preprocessing, channels: int) -> Source:
    """Return a source of synthetic images with the mean and variance of the network's images.

    These are what the normalization tells of the training images (`pixel_site`), else those of
    natural images.
    """
    site = pixel_site(preprocessing, channels)
    mean, std = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    if site is not None:
        mean = torch.from_numpy(site.mean).view(1, -1, 1, 1)
        std = torch.from_numpy(site.variance).sqrt().view(1, -1, 1, 1)
    step = -1 if preprocessing.channels == "bgr" and channels == 3 else 1

    def source(count: int, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
        images = synthetic_images(count, shape, generator)
        return mean + std * (images if step == 1 else images.flip(1))

    return source


def colored(values: Tensor) -> Tensor:
    """Give independent channels of unit variance the correlations of natural colors.

    Args:
        values: [N, C, ...]; brightness first if C is 3.

    Returns:
        Likewise, each channel of unit variance.
    """
    channels = values.shape[1]
    if channels == 3:
        axes = torch.tensor(_AXES)
        axes = axes / axes.norm(dim=1, keepdim=True)
        shares = torch.tensor(_SHARES).sqrt()
        colors: Tensor = torch.einsum("ni...,i,ic->nc...", values, shares, axes) * 3**0.5
        return colors
    if channels == 1:
        return values
    brightness = values.mean(1, keepdim=True) * channels**0.5
    mixed: Tensor = _SHARED**0.5 * brightness + (1 - _SHARED) ** 0.5 * values
    return mixed / math.sqrt(1 + 2 * math.sqrt(_SHARED * (1 - _SHARED) / channels))


def pink_noise(count: int, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Return noise with the amplitude spectrum 1/f: [N, C, H, W], unit variance, no color."""
    channels, height, width = shape
    rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None]
    frequency = torch.sqrt(rows.square() + columns.square())
    frequency[0, 0] = 1 / max(height, width)  # images differ in brightness, too
    white = torch.randn((count, channels, height, width), generator=generator)
    pink = torch.fft.irfft2(torch.fft.rfft2(white) / frequency, s=(height, width))
    noise: Tensor = pink / pink.square().mean().sqrt()
    return noise


def _pink(count: int, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    return colored(pink_noise(count, shape, generator))


def _gratings(count: int, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Three colored waves in windows on a plain ground."""
    channels, height, width = shape
    side = min(height, width)
    images = torch.zeros((count, channels, height, width))
    rows, columns = _grid(height, width)
    for _ in range(3):
        draw = _Draw(count, generator)
        angle = draw.uniform(0, math.pi)
        period = side * torch.exp(draw.uniform(math.log(3 / side), math.log(2)))
        across = columns * angle.cos() + rows * angle.sin()
        wave = torch.sin(2 * math.pi * (across / period + draw.uniform(0, 1)))
        sharpness = torch.exp(draw.uniform(-2, 3))  # from a sine to an edge
        wave = torch.tanh(sharpness * wave) / torch.tanh(sharpness)
        window = side * torch.exp(draw.uniform(math.log(0.2), math.log(3)))
        distance = (rows - height * draw.uniform(0, 1)).square() + (
            columns - width * draw.uniform(0, 1)
        ).square()
        wave = wave * torch.exp(-distance / (2 * window.square()))
        images = images + wave.unsqueeze(1) * draw.color(channels)
    return _toned(images, generator)


def _leaves(count: int, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Leaves from back to front, over a cloudy ground."""
    channels, height, width = shape
    side = min(height, width)
    rows, columns = _grid(height, width)
    texture = pink_noise(count, (1, height, width), generator)[:, 0]
    texture = texture - texture.mean((1, 2), keepdim=True)
    images = _pink(count, shape, generator)
    draw = _Draw(count, generator)
    smallest = torch.exp(draw.uniform(math.log(_SMALLEST), math.log(_SIMPLEST)))
    for _ in range(_LEAVES):
        ratio = (smallest / _LARGEST).square()
        radius = smallest * side / torch.sqrt(1 - draw.uniform(0, 1) * (1 - ratio))
        angle, aspect = draw.uniform(0, math.pi), torch.exp(draw.uniform(-0.7, 0.7))
        down, right = rows - height * draw.uniform(0, 1), columns - width * draw.uniform(0, 1)
        along = (right * angle.cos() + down * angle.sin()) / (radius * aspect)
        across = (down * angle.cos() - right * angle.sin()) * (aspect / radius)
        ellipse = torch.hypot(along, across)
        box = torch.maximum(along.abs(), across.abs())
        distance = torch.where(draw.uniform(0, 1) < 0.5, ellipse, box) - 1
        softness = torch.exp(draw.uniform(0, 1).pow(3) * math.log(side / 4))  # in pixels
        cover = torch.clamp(0.5 - distance * radius / softness, 0, 1)
        relief = 0.5 * draw.normal() * along + 0.7 * draw.uniform(0, 1) * texture
        leaf = draw.color(channels) + _tint(channels) * relief.unsqueeze(1)
        images = torch.lerp(images, leaf, cover.unsqueeze(1))
    return _toned(images, generator)


def _tint(channels: int) -> Tensor:
    """Brightness: the same in all channels, [1, C, 1, 1]."""
    return torch.full((1, channels, 1, 1), _SHARES[0] ** 0.5)


def _toned(images: Tensor, generator: torch.Generator) -> Tensor:
    """Give every image its own brightness and contrast; the whole has unit variance."""
    count, channels = images.shape[:2]
    images = images - images.mean((2, 3), keepdim=True)
    spread = images.square().mean((1, 2, 3), keepdim=True).sqrt().clamp_min(1e-6)
    draw = _Draw(count, generator)
    contrast = torch.exp(_CONTRAST_SPREAD * draw.normal() - _CONTRAST_SPREAD**2)
    contrast = (1 - _BETWEEN) ** 0.5 * contrast.unsqueeze(1)
    toned: Tensor = contrast * images / spread + _BETWEEN**0.5 * draw.color(channels)
    return toned


class _Draw:
    """Random numbers, one an image."""

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self._count, self._generator = count, generator

    def uniform(self, low: float, high: float) -> Tensor:
        """Return [N, 1, 1] in [low, high)."""
        values = torch.rand((self._count, 1, 1), generator=self._generator)
        return low + (high - low) * values

    def normal(self) -> Tensor:
        """Return [N, 1, 1] of N(0, 1)."""
        return torch.randn((self._count, 1, 1), generator=self._generator)

    def color(self, channels: int) -> Tensor:
        """Return natural colors, [N, C, 1, 1], each channel of unit variance."""
        values = torch.randn((self._count, channels, 1, 1), generator=self._generator)
        return colored(values)


def _grid(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the pixels' rows [1, H, 1] and columns [1, 1, W]."""
    return torch.arange(height).view(1, -1, 1) + 0.5, torch.arange(width).view(1, 1, -1) + 0.5


KINDS: dict[str, Callable[[int, tuple[int, int, int], torch.Generator], Tensor]] = {
    "leaves": _leaves,
    "pink": _pink,
    "gratings": _gratings,
}
