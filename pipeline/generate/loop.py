"""Optimize images batch by batch against statistics over many of them.

Every step renders one batch (`prior`), runs the network, merges the batch's moments with those
that the other batches of its scope last had, and moves the batch's canvases along the gradient
(`step`). The scope is all batches in DGH, the batch alone in methods that match batch statistics.
As in DGH's published code, and unlike its Algorithm 1, a batch's stored moments are those of the
forward pass that its gradient came from: one forward and one backward pass a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import numpy as np
import torch

from pipeline.generate.network import Network
from pipeline.generate.objective import Objective
from pipeline.generate.prior import ImagePrior
from pipeline.generate.schedule import Plateau
from pipeline.generate.statistics import Sums
from pipeline.generate.step import Step, measure_batch
from pipeline.generate.store import Batch, BatchStore

__all__ = ["LossRecord", "OnStep", "OptimizeSettings", "optimize"]

OnStep = Callable[[int, int, Mapping[str, float]], None]
"""(done, total, loss terms)"""

_WEIGHT_INTERVAL = 10  # iterations between measurements of the output weight
_OPTIMIZERS = {"radam": torch.optim.RAdam, "adam": torch.optim.Adam}


@dataclass(frozen=True, kw_only=True)
class LossRecord:
    """One iteration, averaged over the batches.

    Args:
        iteration: from 1.
        total: what was minimized.
        statistics: loss of the statistics, and of single images where the method has such terms.
        output: loss of the outputs, unweighted; 0 without outputs.
        output_weight: its weight (lambda) in ``total``.
        learning_rate: of the optimizer.
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
        learning_rate: at the start.
        output_weight: lambda of the output loss; None keeps its gradient at ``output_ratio``
            of the gradient of the statistics.
        output_ratio: see there.
        optimizer: what moves the canvases; its other parameters are torch's defaults.
        patience: steps without progress before the rate falls; None: a fiftieth of the
            iterations, at least 10 (DGH: 20 of 1000).
        factor: by which it falls.
        forgets: whether the best loss is forgotten then, see `schedule`.
        scope: batches in a row whose statistics count together; 0 for all.
    """

    iterations: int
    learning_rate: float
    output_weight: float | None = 0.0
    output_ratio: float = 0.2
    optimizer: Literal["radam", "adam"] = "radam"
    patience: int | None = None
    factor: float = 0.5
    forgets: bool = True
    scope: int = 0

    def plateau(self) -> Plateau:
        """Return the learning rate of a batch."""
        patience = self.patience
        if patience is None:
            patience = max(10, self.iterations // 50)
        return Plateau(self.learning_rate, patience, self.factor, self.forgets)


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
        The statistics of all images before the first step, and the loss of every iteration.

    Raises:
        GenerationError: the loss is not finite; names the first site that is not.
    """
    group = _groups(len(store.sizes), settings.scope)
    firsts = [0, *accumulate(store.sizes)]
    totals = [objective.targets.zero() for _ in dict.fromkeys(group)]
    for index, size in enumerate(store.sizes):
        batch = store.create(index, prior.start(size, generator).to(network.device))
        images = prior.render(batch.canvas.detach(), prior.center())
        batch.set_sums(measure_batch(images, network, objective.targets))
        totals[group[index]] = totals[group[index]] + batch.sums
    before = totals[0]
    for total in totals[1:]:
        before = before + total

    plateaus = [settings.plateau() for _ in store.sizes]
    weight = settings.output_weight if objective.heads else 0.0
    history: list[LossRecord] = []
    steps = settings.iterations * len(store.sizes)
    for iteration in range(settings.iterations):
        order = torch.randperm(len(store.sizes), generator=generator).tolist()
        rows = []
        for position, index in enumerate(order):
            batch = store.get(index)
            view = prior.draw(generator, store.sizes[index])
            others = totals[group[index]] - batch.sums
            step = Step(batch, view, others, network, prior, objective, firsts[index])
            if settings.output_weight is None and objective.heads:
                due = position == 0 and iteration % _WEIGHT_INTERVAL == 0
                if weight is None or due:
                    measured = settings.output_ratio * step.gradient_ratio()
                    weight = measured if weight is None else (weight + measured) / 2
            assert weight is not None
            own, terms = step.backward(weight)
            _move(batch, settings.optimizer, plateaus[index].rate, iteration)
            plateaus[index].step(terms["statistics"])
            batch.set_sums(own)
            totals[group[index]] = others + own
            terms["learning_rate"] = plateaus[index].rate
            rows.append(terms)
            if on_step is not None:
                on_step(iteration * len(order) + position + 1, steps, terms)
        mean = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
        history.append(LossRecord(iteration=iteration + 1, **mean))
    return before, history


def _groups(batches: int, scope: int) -> Sequence[int]:
    """Return the group of each batch: those of a group share their statistics."""
    return [index // (scope or batches) for index in range(batches)]


def _move(batch: Batch, optimizer: str, rate: float, steps_before: int) -> None:
    """Move a canvas by one step of torch's optimizer, with the state that the batch carries."""
    torch_optimizer = _OPTIMIZERS[optimizer]([batch.canvas], lr=rate)
    torch_optimizer.state[batch.canvas] = {
        "step": torch.tensor(float(steps_before)),
        "exp_avg": batch.first_moment,
        "exp_avg_sq": batch.second_moment,
    }
    torch_optimizer.step()
