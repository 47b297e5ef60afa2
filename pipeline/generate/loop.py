"""Optimize images batch by batch against statistics over all of them.

Every step renders one batch (`prior`), runs the network, merges the batch's moments with those
that all other batches last had, and moves the batch's canvases along the gradient. As in the
published code, and unlike its Algorithm 1, a batch's stored moments are those of the forward
pass that its gradient came from: one forward and one backward pass a step.

A network that takes only small batches sees a batch in chunks: a first pass without gradient
sums up the moments, a second one propagates the loss's derivatives with respect to these sums
through each chunk. The gradient is that of the whole batch at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from graph_tools.errors import GenerationError
from pipeline.generate.network import Network
from pipeline.generate.prior import ImagePrior, View
from pipeline.generate.schedule import Plateau
from pipeline.generate.statistics import SiteTargets, Sums
from pipeline.generate.store import Batch, BatchStore

__all__ = [
    "LossRecord",
    "Objective",
    "OnStep",
    "OptimizeSettings",
    "measure_batch",
    "optimize",
]

OnStep = Callable[[int, int, Mapping[str, float]], None]
"""(done, total, loss terms)"""

_WEIGHT_INTERVAL = 10  # iterations between measurements of the output weight


class Objective(Protocol):
    """What images should fulfil."""

    @property
    def targets(self) -> SiteTargets:
        """The tensors whose moments the loss is about."""

    @property
    def heads(self) -> Sequence[str]:
        """Names of the outputs to stretch."""

    def statistics(self, sums: Sums) -> Tensor:
        """Return the loss of the moments of all images together: a float64 scalar."""

    def output(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the output loss of a batch, averaged over its images."""


@dataclass(frozen=True, kw_only=True)
class LossRecord:
    """One iteration, averaged over the batches.

    Args:
        iteration: from 1.
        total: what was minimized.
        statistics: loss of the statistics over all images.
        output: loss of the outputs, unweighted; 0 without outputs.
        output_weight: its weight (lambda) in ``total``.
        learning_rate: of RAdam.
    """

    iteration: int
    total: float
    statistics: float
    output: float
    output_weight: float
    learning_rate: float


@dataclass(frozen=True, kw_only=True)
class OptimizeSettings:
    """How to optimize.

    Args:
        iterations: steps of each batch.
        learning_rate: of RAdam, at the start.
        output_weight: lambda of the output loss; None keeps its gradient at ``output_ratio``
            of the gradient of the statistics.
        output_ratio: see there.
    """

    iterations: int
    learning_rate: float
    output_weight: float | None
    output_ratio: float


def optimize(
    store: BatchStore,
    network: Network,
    prior: ImagePrior,
    objective: Objective,
    settings: OptimizeSettings,
    generator: torch.Generator,
    on_step: OnStep | None = None,
) -> tuple[Sums, list[LossRecord]]:
    """Fill a store with optimized canvases.

    Args:
        store: empty; holds the canvases afterwards.
        network: observes the tensors of the objective.
        prior: from canvases to images.
        objective: the loss.
        settings: how.
        generator: source of all randomness, on the CPU.
        on_step: called after each step of each batch.

    Returns:
        The statistics of the images before the first step, and the loss of every iteration.

    Raises:
        GenerationError: the loss is not finite; names the first site that is not.
    """
    total = objective.targets.zero()
    for index, size in enumerate(store.sizes):
        batch = store.create(index, prior.start(size, generator).to(network.device))
        images = prior.render(batch.canvas.detach(), prior.center())
        batch.set_sums(measure_batch(images, network, objective.targets))
        total = total + batch.sums
    before = total

    patience = max(10, settings.iterations // 50)  # published: 20 of 1000
    plateaus = [Plateau(settings.learning_rate, patience) for _ in store.sizes]
    weight = settings.output_weight if objective.heads else 0.0
    history: list[LossRecord] = []
    steps = settings.iterations * len(store.sizes)
    for iteration in range(settings.iterations):
        order = torch.randperm(len(store.sizes), generator=generator).tolist()
        rows = []
        for position, index in enumerate(order):
            batch = store.get(index)
            view = prior.draw(generator)
            others = total - batch.sums
            step = _Step(batch, view, others, network, prior, objective)
            if settings.output_weight is None and objective.heads:
                due = position == 0 and iteration % _WEIGHT_INTERVAL == 0
                if weight is None or due:
                    measured = settings.output_ratio * step.gradient_ratio()
                    weight = measured if weight is None else (weight + measured) / 2
            assert weight is not None
            own, terms = step.backward(weight)
            _radam_step(batch, plateaus[index].rate, iteration)
            plateaus[index].step(terms["statistics"])
            batch.set_sums(own)
            total = others + own
            terms["learning_rate"] = plateaus[index].rate
            rows.append(terms)
            if on_step is not None:
                on_step(iteration * len(order) + position + 1, steps, terms)
        mean = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
        history.append(LossRecord(iteration=iteration + 1, **mean))
    return before, history


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


class _Step:
    """One step of one batch: the loss, and its gradient with respect to the canvas."""

    def __init__(
        self,
        batch: Batch,
        view: View,
        others: Sums,
        network: Network,
        prior: ImagePrior,
        objective: Objective,
    ) -> None:
        self.batch, self.others = batch, others
        self.network, self.objective = network, objective
        self.images = prior.render(batch.canvas, view)
        self.chunks = _chunks(self.images, network)
        # With a single chunk its forward pass serves every purpose.
        self.values = network.observe(self.images) if len(self.chunks) == 1 else None

    def gradient_ratio(self) -> float:
        """Return |gradient of the statistics| / |gradient of the output loss|."""
        norms: list[float] = []
        for statistics, output in ((1.0, 0.0), (0.0, 1.0)):
            self.batch.canvas.grad = None
            self._propagate(statistics, output, keep=True)
            assert self.batch.canvas.grad is not None
            norms.append(float(self.batch.canvas.grad.norm()))
        return norms[0] / max(norms[1], 1e-30) if np.isfinite(norms).all() else 0.0

    def backward(self, output_weight: float) -> tuple[Sums, dict[str, float]]:
        """Set the canvas's gradient; return the batch's moments and the loss terms."""
        self.batch.canvas.grad = None
        own, statistics, output = self._propagate(1.0, output_weight, keep=False)
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

    def _propagate(
        self, weight: float, output_weight: float, *, keep: bool
    ) -> tuple[Sums, float, float]:
        objective = self.objective
        if self.values is not None:
            sums = objective.targets.measure(self.values)
            statistics = objective.statistics(self.others + sums)
            loss, output = statistics * weight, None
            if output_weight:
                output = objective.output(self.values)
                loss = loss + output_weight * output
            loss.backward(retain_graph=keep)  # type: ignore[no-untyped-call]
            value = 0.0 if output is None else float(output.detach())
            return sums.detach(), float(statistics.detach()), value
        return self._propagate_chunks(weight, output_weight, keep=keep)

    def _propagate_chunks(
        self, weight: float, output_weight: float, *, keep: bool
    ) -> tuple[Sums, float, float]:
        objective, targets = self.objective, self.objective.targets
        with torch.no_grad():
            sums = targets.zero()
            for chunk in self.chunks:
                sums = sums + targets.measure(self.network.observe(chunk))
        first, second = (s.clone().requires_grad_() for s in (sums.first, sums.second))
        statistics = objective.statistics(self.others + Sums(sums.count, first, second))
        slopes = torch.autograd.grad(statistics * weight, (first, second))
        gradients, output = [], 0.0
        for chunk in self.chunks:
            leaf = chunk.detach().requires_grad_()
            values = self.network.observe(leaf)
            own = targets.measure(values)
            loss = (slopes[0] * own.first).sum() + (slopes[1] * own.second).sum()
            if output_weight:
                share = objective.output(values) * (len(chunk) / len(self.images))
                output += float(share.detach())
                loss = loss + output_weight * share
            gradients.append(torch.autograd.grad(loss, leaf)[0])
        self.images.backward(torch.cat(gradients), retain_graph=keep)  # type: ignore[no-untyped-call]
        return sums, float(statistics.detach()), output


def _chunks(images: Tensor, network: Network) -> Sequence[Tensor]:
    return torch.split(images, network.chunk or len(images))


def _radam_step(batch: Batch, rate: float, steps_before: int) -> None:
    """Move a canvas by one step of torch's RAdam, with the state that the batch carries."""
    optimizer = torch.optim.RAdam([batch.canvas], lr=rate)
    optimizer.state[batch.canvas] = {
        "step": torch.tensor(float(steps_before)),
        "exp_avg": batch.first_moment,
        "exp_avg_sq": batch.second_moment,
    }
    optimizer.step()


def _check_finite(sums: Sums, targets: SiteTargets, what: str) -> None:
    site = targets.first_non_finite(sums)
    if site is not None:
        raise GenerationError(
            f"values that are not finite while {what}",
            where=f"node '{site.node}'",
            hint="check the weights before it and the input range (--mean, --std)",
        )
