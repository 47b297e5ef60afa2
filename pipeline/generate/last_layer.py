"""How alike the gradients are that two images give the last linear layer (SADAG).

Let ``f`` be what the last linear layer of a quantized network reads and ``r = y - y_q`` how far its
outputs are from those of the float network. The gradient of ``|r|^2 / 2`` with respect to that
layer's weight is ``-r f^T``, hence between two images (ICML 2024, arXiv 2510.07018)

    cos(gradient_i, gradient_j) = cos(f_i, f_j) * cos(r_i, r_j),

which costs no backward pass at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "Pairs",
    "Seen",
    "diversity_loss",
    "matching_loss",
    "neighbor",
    "similarities",
    "similarity",
]


@dataclass(frozen=True)
class Pairs:
    """Directions of the gradients of N images.

    Args:
        features: ``f / |f|``, [N, F].
        residuals: ``r / |r|``, [N, K]; 0 where the networks agree.
    """

    features: Tensor
    residuals: Tensor

    @classmethod
    def of(cls, features: Tensor, outputs: Tensor, quantized: Tensor) -> Pairs:
        """Return the directions for what the last layer reads, and both networks' outputs.

        Args:
            features: [N, ...] of the quantized network.
            outputs: [N, ...] of the float network.
            quantized: [N, ...] of the quantized network.
        """
        residuals = outputs.flatten(1) - quantized.flatten(1)
        return cls(
            functional.normalize(features.flatten(1), dim=1, eps=1e-12),
            functional.normalize(residuals, dim=1, eps=1e-12),
        )

    def detach(self) -> Pairs:
        """Return the same numbers, cut from the gradient graph."""
        return Pairs(self.features.detach(), self.residuals.detach())


def similarity(first: Pairs, second: Pairs) -> Tensor:
    """Return the cosine of the gradients of each image with its partner's, [N]."""
    features = (first.features * second.features).sum(1)
    return features * (first.residuals * second.residuals).sum(1)


def similarities(first: Pairs, second: Pairs) -> Tensor:
    """Return the cosines of the gradients of all images with all others, [N, M]."""
    features = first.features @ second.features.T
    return features * (first.residuals @ second.residuals.T)


def matching_loss(neighbors: Pairs, own: Pairs) -> Tensor:
    """Return 1 - mean cosine of each image with its neighbor: low where the network is flat."""
    return 1 - similarity(neighbors, own).mean()


def diversity_loss(own: Pairs, others: Pairs | None = None) -> Tensor:
    """Return how alike each image is to the one most like it, averaged: in 0..1.

    Args:
        own: of the images to change, at least two unless there are others.
        others: of images made before, held fixed.
    """
    count = len(own.features)
    inner = similarities(own, own).abs()
    inner = inner.masked_fill(torch.eye(count, dtype=torch.bool, device=inner.device), 0.0)
    if others is not None and len(others.features):
        inner = torch.cat([inner, similarities(own, others).abs()], 1)
    return inner.amax(1).mean()


def neighbor(
    points: Tensor,
    pairs: Callable[[Tensor], Pairs],
    *,
    radius: float,
    generator: torch.Generator,
) -> Tensor:
    """Return the step from each point to a neighbor whose gradient is less like its own.

    As published the step follows the gradient of ``<u, u'>``, ``u = f / |f|`` and ``u'`` the same
    vector held fixed (and likewise r), which is 0: a unit vector cannot come nearer to itself. What
    is left is rounding error. Here the search starts from a random point half a radius away, where
    the gradient is not 0, and goes on against it for half a radius.

    Args:
        points: [N, ...]: codes or images.
        pairs: the directions at such points, differentiable.
        radius: of the neighborhood, as a share of each point's norm.
        generator: of the random start, on the CPU.

    Returns:
        Like ``points``, without gradient; its norm is at most ``radius`` times theirs.
    """
    points = points.detach()
    half = radius / 2 * _norm(points)
    direction = torch.randn(points.shape, generator=generator).to(points.device)
    start = half * _unit(direction)
    moved = (points + start).requires_grad_()
    with torch.no_grad():
        own = pairs(points)
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(similarity(pairs(moved), own).sum(), moved)
    return start - half * _unit(slope)


def _norm(points: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(points.flatten(1), dim=1)
    return norms.view(-1, *[1] * (points.dim() - 1))


def _unit(points: Tensor) -> Tensor:
    unit: Tensor = points / _norm(points).clamp_min(1e-30)
    return unit


class Seen:
    """Directions of all images made so far.

    Args:
        count: how many there will be.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._filled = torch.zeros(count, dtype=torch.bool)
        self._pairs: Pairs | None = None

    def put(self, first: int, pairs: Pairs) -> None:
        """Note the directions of the images from index ``first`` on."""
        pairs = pairs.detach()
        if self._pairs is None:
            self._pairs = Pairs(
                *(
                    part.new_zeros((self._count, part.shape[1]))
                    for part in (pairs.features, pairs.residuals)
                )
            )
        rows = slice(first, first + len(pairs.features))
        self._pairs.features[rows] = pairs.features
        self._pairs.residuals[rows] = pairs.residuals
        self._filled[rows] = True

    def state(self) -> dict[str, Tensor]:
        """Return all of it."""
        if self._pairs is None:
            return {}
        pairs = self._pairs
        return {
            "features": pairs.features,
            "residuals": pairs.residuals,
            "filled": self._filled,
        }

    def load_state(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Go on from what `state` gave."""
        if state:
            self._pairs = Pairs(
                *(state[name].to(device) for name in ("features", "residuals"))
            )
            self._filled = state["filled"]

    def others(self, first: int, count: int) -> Pairs | None:
        """Return those of all images but ``count`` from index ``first`` on."""
        if self._pairs is None:
            return None
        wanted = self._filled.clone()
        wanted[first : first + count] = False
        wanted = wanted.to(self._pairs.features.device)
        return Pairs(self._pairs.features[wanted], self._pairs.residuals[wanted])
