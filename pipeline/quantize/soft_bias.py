"""Biases that are learned beside the roundings of the weights before them."""

from __future__ import annotations

import torch

__all__ = ["SoftBias"]


class SoftBias:
    """A bias and how far it moves, in units that fit every layer.

    Args:
        bias: float, [channels].
        output: what the layer computes, some images of it.
        axis: of its channels.

    Attributes:
        shift: the parameter to learn, [channels], in standard deviations of the channel.
    """

    def __init__(self, bias: torch.Tensor, output: torch.Tensor, axis: int) -> None:
        self._bias = bias
        channels = output.detach().movedim(axis, 0).flatten(1)
        self._unit = channels.std(dim=1, correction=0).nan_to_num(0.0, 0.0, 0.0)
        self.shift = torch.zeros_like(bias).requires_grad_()

    def value(self) -> torch.Tensor:
        """The bias, differentiable in ``shift``."""
        return self._bias + self._unit * self.shift
