"""One step of one batch: the loss of its images, and the gradient with respect to its canvases.

A network that takes only small batches sees a batch in chunks: a first pass without gradient
sums up the moments, a second one propagates the loss's derivatives with respect to these sums
through each chunk. The gradient is that of the whole batch at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from graph_tools.errors import GenerationError
from pipeline.generate.network import Network
from pipeline.generate.objective import Objective
from pipeline.generate.prior import ImagePrior, View
from pipeline.generate.statistics import SiteTargets, Sums
from pipeline.generate.store import Batch

__all__ = ["Step", "measure_batch"]


def measure_batch(images: Tensor, network: Network, targets: SiteTargets) -> Sums:
    """Return the moments of a batch of images, without gradient.

    Args:
        images: [N, C, H, W] in standardized pixel units.
        network: observes the tensors of ``targets``.
        targets: what to observe.

    Raises:
        GenerationError: a tensor is not finite.
    """
    with torch.no_grad():
        sums = targets.zero()
        for chunk in _chunks(images, network):
            sums = sums + targets.measure(network.observe(chunk))
    _check_finite(sums, targets, "measuring statistics")
    return sums


@dataclass(frozen=True, kw_only=True)
class _Part:
    """What a term of the loss alone gives."""

    gradient: Tensor
    own: Sums
    statistics: float
    output: float


class Step:
    """One step of one batch.

    Args:
        batch: the batch.
        view: how its images are shown.
        others: moments of the other images of its scope.
        network: observes what the objective needs.
        prior: from canvases to images.
        objective: the loss.
        first: index of the batch's first image among all images.
    """

    def __init__(
        self,
        batch: Batch,
        view: View,
        others: Sums,
        network: Network,
        prior: ImagePrior,
        objective: Objective,
        first: int = 0,
    ) -> None:
        self.batch, self.others, self.first = batch, others, first
        self.network, self.objective = network, objective
        self.images = prior.render(batch.canvas, view)
        self.chunks = _chunks(self.images, network)
        # With a single chunk its forward pass serves every purpose.
        self.values = network.observe(self.images) if len(self.chunks) == 1 else None
        self._parts: tuple[_Part, _Part] | None = None
        self._seen: list[tuple[Mapping[str, Tensor], int]] = []

    def gradient_ratio(self) -> float:
        """Return |gradient of the statistics| / |gradient of the output loss|.

        `backward` afterwards only adds the two up.
        """
        statistics, output = self._gradient(1.0, 0.0), self._gradient(0.0, 1.0)
        self._parts = statistics, output
        norms = [float(part.gradient.norm()) for part in self._parts]
        return norms[0] / max(norms[1], 1e-30) if np.isfinite(norms).all() else 0.0

    def backward(self, output_weight: float) -> tuple[Sums, dict[str, float]]:
        """Set the canvas's gradient; return the batch's moments and the loss terms."""
        self.batch.canvas.grad = None
        if self._parts is None:
            own, statistics, output = self._propagate(1.0, output_weight, keep=False)
        else:
            first, second = self._parts
            self.batch.canvas.grad = first.gradient.add_(second.gradient, alpha=output_weight)
            own, statistics, output = first.own, first.statistics, second.output
        for values, place in self._seen:
            self.objective.remember({n: v.detach() for n, v in values.items()}, place)
        _check_finite(own, self.objective.targets, "optimizing images")
        terms = {
            "total": statistics + output_weight * output,
            "statistics": statistics,
            "output": output,
            "output_weight": output_weight,
        }
        if not np.isfinite(terms["total"]):
            raise GenerationError(
                "the loss is not finite", hint="lower --learning-rate or check the weights"
            )
        return own, terms

    def _gradient(self, weight: float, output_weight: float) -> _Part:
        canvas = self.batch.canvas
        canvas.grad = None
        own, statistics, output = self._propagate(weight, output_weight, keep=True)
        assert canvas.grad is not None
        gradient, canvas.grad = canvas.grad, None
        return _Part(gradient=gradient, own=own, statistics=statistics, output=output)

    def _propagate(
        self, weight: float, output_weight: float, *, keep: bool
    ) -> tuple[Sums, float, float]:
        if self.values is None:
            return self._propagate_chunks(weight, output_weight, keep=keep)
        objective = self.objective
        sums = objective.measure(self.values, self.first)
        statistics = objective.statistics(self.others + sums)
        terms = objective.images(self.values, self.first)
        if terms is not None:
            statistics = statistics + terms
        loss, output = statistics * weight, None
        if output_weight:
            output = objective.output(self.values)
            loss = loss + output_weight * output
        loss.backward(retain_graph=keep)  # type: ignore[no-untyped-call]
        self._seen = [(self.values, self.first)]
        value = 0.0 if output is None else float(output.detach())
        return sums.detach(), float(statistics.detach()), value

    def _propagate_chunks(
        self, weight: float, output_weight: float, *, keep: bool
    ) -> tuple[Sums, float, float]:
        objective = self.objective
        with torch.no_grad():
            sums = objective.targets.zero()
            for chunk, first in self._places():
                sums = sums + objective.measure(self.network.observe(chunk), first)
        moments = [s.clone().requires_grad_() for s in (sums.first, sums.second)]
        whole = objective.statistics(self.others + Sums(sums.count, *moments))
        slopes = [torch.zeros_like(moment) for moment in moments]
        if whole.requires_grad:
            slopes = list(torch.autograd.grad(whole * weight, moments))
        statistics, output = float(whole.detach()), 0.0
        gradients: list[Tensor] = []
        self._seen = []
        for chunk, first in self._places():
            leaf = chunk.detach().requires_grad_()
            values = self.network.observe(leaf)
            share = len(chunk) / len(self.images)
            own = objective.measure(values, first)
            loss = (slopes[0] * own.first).sum() + (slopes[1] * own.second).sum()
            terms = objective.images(values, first)
            if terms is not None:
                statistics += share * float(terms.detach())
                loss = loss + weight * share * terms
            if output_weight:
                term = objective.output(values) * share
                output += float(term.detach())
                loss = loss + output_weight * term
            gradients.append(torch.autograd.grad(loss, leaf)[0])
            self._seen.append(({n: v.detach() for n, v in values.items()}, first))
        self.images.backward(torch.cat(gradients), retain_graph=keep)  # type: ignore[no-untyped-call]
        return sums, statistics, output

    def _places(self) -> list[tuple[Tensor, int]]:
        """Return each chunk with the index of its first image."""
        size = len(self.chunks[0])
        return [(chunk, self.first + place * size) for place, chunk in enumerate(self.chunks)]


def _chunks(images: Tensor, network: Network) -> Sequence[Tensor]:
    return torch.split(images, network.chunk or len(images))


def _check_finite(sums: Sums, targets: SiteTargets, what: str) -> None:
    site = targets.first_non_finite(sums)
    if site is not None:
        raise GenerationError(
            f"values that are not finite while {what}",
            where=f"node '{site.node}'",
            hint="check the weights before it and the input range (--mean, --std)",
        )
