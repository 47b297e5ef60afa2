"""A small network from random codes to images, whose weights are learned with the codes (GENIE).

Linear, BatchNormalization, then twice: doubled by nearest neighbours, 3x3 convolution; between the
two BatchNormalization and LeakyReLU, behind them tanh and BatchNormalization (CVPR 2023, arXiv
2212.04780). Images share what they have in common through its weights.

Beyond 224 pixels a side the first map would outgrow memory: it stays at 56, and the images double
more often.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["CODE", "ImageGenerator"]

CODE = 256
"""Numbers in the code of an image."""

_WIDE, _NARROW = 128, 64
_LARGEST = 56  # side of the first map: a quarter of 224


class ImageGenerator(nn.Module):
    """From codes [N, 256] to images [N, C, H, W] of given mean and variance in each channel.

    Statistics are those of the batch, always: there is one generator a batch.

    Args:
        shape: [C, H, W] of the images.
        mean: [C] of the pixels over all images of a batch; None learns it.
        std: [C] likewise, standard deviation.
        seed: of the weights.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        channels, height, width = shape
        doublings = 2
        while max(height, width) > _LARGEST * 2**doublings:
            doublings += 1
        # Sizes from small to large; each is the one behind it halved, rounded up.
        self.sizes = [
            (-(-height // 2**step), -(-width // 2**step)) for step in range(doublings, -1, -1)
        ]
        rows, columns = self.sizes[0]
        widths = [_WIDE] * (doublings - 1) + [_NARROW, channels]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first = nn.Linear(CODE, _WIDE * rows * columns)
            self.convolutions = nn.ModuleList(
                nn.Conv2d(before, after, 3, padding=1)
                for before, after in itertools.pairwise(widths)
            )
        self.gains = nn.ParameterList(torch.ones(count) for count in widths[:-1])
        self.shifts = nn.ParameterList(torch.zeros(count) for count in widths[:-1])
        known = mean is not None and std is not None
        gain = std if known else torch.ones(channels)
        shift = mean if known else torch.zeros(channels)
        assert gain is not None
        assert shift is not None
        self.gain = nn.Parameter(gain.clone(), requires_grad=not known)
        self.shift = nn.Parameter(shift.clone(), requires_grad=not known)

    def forward(self, codes: Tensor) -> Tensor:
        """Return images [N, C, H, W].

        Args:
            codes: [N, 256].
        """
        values = self.first(codes).view(len(codes), _WIDE, *self.sizes[0])
        last = len(self.convolutions) - 1
        for index, convolution in enumerate(self.convolutions):
            values = _normalized(values, self.gains[index], self.shifts[index])
            if index > 0:
                values = functional.leaky_relu(values, 0.2)
            values = functional.interpolate(values, self.sizes[index + 1], mode="nearest")
            values = convolution(values)
            if index == last:
                values = torch.tanh(values)
        return _normalized(values, self.gain, self.shift)


def _normalized(values: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """BatchNormalization by the batch's statistics, also of a single value (which becomes 0)."""
    return torch.batch_norm(values, gain, shift, None, None, True, 0.0, 1e-5, False)
