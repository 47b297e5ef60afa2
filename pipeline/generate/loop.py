"""Optimize images batch by batch against statistics over many of them.

Every step renders one batch (`prior`), runs the network, merges the batch's moments with those
that the other batches of its scope last had, and moves the batch's canvases along the gradient
(`step`). The scope is all batches in DGH, the batch alone in methods that match batch statistics.
As in DGH's published code, and unlike its Algorithm 1, a batch's stored moments are those of the
forward pass that its gradient came from: one forward and one backward pass a step. They are out of
date by a step of their batch; `OptimizeSettings.refresh` says how often all are measured anew.

Published is one batch after the other, each by totals that the one before has just changed. With
several processes (`pipeline.ranks`) as many batches advance at the same time
(`pipeline.generate.exchange`), each by the totals from before the step, so that the others' moments
are older by up to one step of each. That schedule is a setting of its own, which one process can
follow, too: what it gives depends on how many batches advance together, not on how many processes
there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, chain
from typing import Literal

import numpy as np
import torch

from graph_tools.errors import SettingsError
from pipeline.generate.checkpoints import Stage
from pipeline.generate.exchange import Moved, draw_order, exchange
from pipeline.generate.faults import named_fault
from pipeline.generate.network import Network
from pipeline.generate.objective import Objective
from pipeline.generate.prior import ImagePrior, View
from pipeline.generate.schedule import Plateau
from pipeline.generate.snapshot import Snapshot, State
from pipeline.generate.statistics import Sums
from pipeline.generate.step import Step, measure_batch
from pipeline.generate.store import Batch, BatchStore, part_name
from pipeline.ranks import ALONE, Ranks

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
        refresh: iterations between measurements of all batches as they are shown next. With 1
            every gradient is that of the loss over all images at once, for one more forward
            pass a step; 0 for never.
        parallel: batches that advance at the same time.
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
    refresh: int = 0
    parallel: int = 1

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
    stage: Stage | None = None,
    ranks: Ranks = ALONE,
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
        stage: where checkpoints go, and where to go on from.
        ranks: the processes of the run; each holds the batches that it owns.

    Returns:
        The statistics of all images before the first step, and the loss of every iteration.

    Raises:
        GenerationError: the loss is not finite; names the first site that is not.
        SettingsError: several batches are to advance at once, and the objective cannot do that.
        Interrupted: the end was asked for; there is a checkpoint.
        DataError: no checkpoint can be written.
    """
    if objective.one_by_one and settings.parallel > 1:
        raise SettingsError(
            "this method compares each batch with what the others last were, one after the other",
            where=f"--parallel-batches {settings.parallel}",
            hint="leave it out, and use one process",
        )
    run = _Run(store, network, prior, objective, settings, generator, ranks)
    found = stage.restore() if stage is not None else None
    if found is None:
        run.start()
    else:
        run.load(found)
    while run.iteration < settings.iterations:
        before = run.done
        run.step(on_step)
        if stage is not None:
            stage.step(run.done, run.state, ahead=run.done - before)
    if stage is not None:
        stage.end(run.done, run.state)
    return run.before, run.history


class _Run:
    """The loop between two steps; arguments as for `optimize`.

    Attributes:
        before: the statistics of all images before the first step.
        history: the loss of every iteration that is over.
        iteration: how many these are.
    """

    def __init__(
        self,
        store: BatchStore,
        network: Network,
        prior: ImagePrior,
        objective: Objective,
        settings: OptimizeSettings,
        generator: torch.Generator,
        ranks: Ranks,
    ) -> None:
        self._store, self._network, self._prior = store, network, prior
        self._ranks = ranks
        self._objective, self._settings, self._generator = objective, settings, generator
        self._group = _groups(len(store.sizes), settings.scope)
        self._firsts = [0, *accumulate(store.sizes)]
        self._totals = [objective.targets.zero() for _ in dict.fromkeys(self._group)]
        self._plateaus = [settings.plateau() for _ in store.sizes]
        self._weight = settings.output_weight if objective.heads else 0.0
        self._order: list[int] = []  # of the batches in this iteration
        self._rows: list[dict[str, float]] = []  # of its steps so far
        self.before = objective.targets.zero()
        self.history: list[LossRecord] = []
        self.iteration = 0

    @property
    def done(self) -> float:
        """Iterations so far."""
        return self.iteration + len(self._rows) / len(self._store.sizes)

    def start(self) -> None:
        """Draw all canvases and measure them."""
        prior, places = self._prior, range(len(self._store.sizes))
        for index in places:
            # Everywhere, for the random state that comes after it.
            canvas = prior.start(self._store.sizes[index], self._generator)
            if self._ranks.owns(index):
                self._store.create(index, canvas.to(self._network.device))
        self._measure((index, prior.center()) for index in places)
        self.before = self._totals[0]
        for total in self._totals[1:]:
            self.before = self.before + total

    def step(self, on_step: OnStep | None) -> None:
        """Move the next batches in an order drawn anew for every iteration.

        They are `OptimizeSettings.parallel` many. Each sees of the others the moments from before
        this step; the totals then take all new moments in one fixed order, so that it does not
        matter which process moved which batch.
        """
        count, lanes = len(self._store.sizes), self._settings.parallel
        if not self._rows:
            self._order = draw_order(count, lanes, self._generator)
            refresh = self._settings.refresh
            if refresh and self.iteration % refresh == 0:
                self._refresh()
        indices = self._order[len(self._rows) : len(self._rows) + lanes]
        zero = self._objective.targets.zero()
        results = exchange(self._moved(indices), len(indices), zero, self._ranks)
        for index, moved in zip(indices, results, strict=True):
            group, plateau = self._group[index], self._plateaus[index]
            self._totals[group] = (self._totals[group] - moved.old) + moved.new
            plateau.step(moved.terms["statistics"])
            self._rows.append({**moved.terms, "learning_rate": plateau.rate})
            if on_step is not None:
                done, steps = len(self._rows), self._settings.iterations * count
                on_step(self.iteration * count + done, steps, self._rows[-1])
        if len(self._rows) == count:
            rows, self._rows = self._rows, []
            mean = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
            self.iteration += 1
            self.history.append(LossRecord(iteration=self.iteration, **mean))

    def _refresh(self) -> None:
        """Measure all batches as the steps of this iteration will see them.

        Until the iteration is over the totals then stay what they are: each step finds the very
        moments that were measured here, and so follows the gradient of the loss over all images.
        """
        ahead = torch.Generator()
        ahead.set_state(self._generator.get_state())
        sizes = self._store.sizes
        self._measure((index, self._prior.draw(ahead, sizes[index])) for index in self._order)

    def _measure(self, shown: Iterable[tuple[int, View]]) -> None:
        """Measure all batches anew, each by a view; batch after batch is of the next process."""
        targets, order, own = self._objective.targets, [], []
        zero = targets.zero()
        for index, view in shown:
            order.append(index)
            if self._ranks.owns(index):
                batch = self._store.get(index)
                images = self._prior.render(batch.canvas.detach(), view)
                sums = measure_batch(images, self._network, targets)
                batch.set_sums(sums)
                own.append(Moved(zero, sums, {}))
        self._totals = [zero for _ in self._totals]
        for index, moved in zip(
            order, exchange(own, len(order), zero, self._ranks), strict=True
        ):
            group = self._group[index]
            self._totals[group] = self._totals[group] + moved.new

    def _moved(self, indices: Sequence[int]) -> list[Moved]:
        """Move those of some batches that are here."""
        settings, ranks = self._settings, self._ranks
        views = [self._prior.draw(self._generator, self._store.sizes[i]) for i in indices]
        automatic = settings.output_weight is None and bool(self._objective.heads)
        due = automatic and not self._rows and self.iteration % _WEIGHT_INTERVAL == 0
        if due and not ranks.owns(indices[0]):
            self._weight = ranks.broadcast_number(0.0, ranks.owner(indices[0]))
        found = []
        for place, (index, view) in enumerate(zip(indices, views, strict=True)):
            if not ranks.owns(index):
                continue
            batch = self._store.get(index)
            old = batch.copy_sums()
            step = Step(
                batch,
                view,
                self._totals[self._group[index]] - old,
                self._network,
                self._prior,
                self._objective,
                self._firsts[index],
            )
            with named_fault(step.values):
                if due and place == 0:
                    weight = settings.output_ratio * step.gradient_ratio()
                    weight = weight if self._weight is None else (self._weight + weight) / 2
                    self._weight = ranks.broadcast_number(weight, ranks.rank)
                assert self._weight is not None
                own, terms = step.backward(self._weight)
            _move(batch, settings.optimizer, self._plateaus[index].rate, self.iteration)
            batch.set_sums(own)
            found.append(Moved(old, own, terms))
        return found

    def state(self) -> State:
        """Return all that the steps to come depend on."""
        totals = {
            name: torch.stack([getattr(total, name) for total in self._totals])
            for name in ("count", "first", "second")
        }
        before = {name: getattr(self.before, name) for name in totals}
        facts = {
            "iteration": self.iteration,
            "order": self._order,
            "rows": self._rows,
            "history": [asdict(record) for record in self.history],
            "plateaus": [plateau.state for plateau in self._plateaus],
            "weight": self._weight,
        }
        parts = (
            ("generator", {"state": self._generator.get_state()}),
            ("totals", totals),
            ("before", before),
            ("objective", self._objective.state()),
        )
        return State(facts=facts, parts=chain(parts, self._store.parts(self._ranks)))

    def load(self, found: Snapshot) -> None:
        """Go on from what `state` gave."""
        facts, device = found.facts, self._network.device
        self.iteration, self._weight = facts["iteration"], facts["weight"]
        self._order, self._rows = list(facts["order"]), list(facts["rows"])
        self.history = [LossRecord(**record) for record in facts["history"]]
        for plateau, state in zip(self._plateaus, facts["plateaus"], strict=True):
            plateau.state = tuple(state)
        self._generator.set_state(found.part("generator")["state"])
        totals, before = found.part("totals"), found.part("before")
        names = ("count", "first", "second")
        self._totals = [
            Sums(*(totals[name][place].to(device) for name in names))
            for place in range(len(self._totals))
        ]
        self.before = Sums(*(before[name].to(device) for name in names))
        self._objective.load_state(found.part("objective"))
        for index in range(len(self._store.sizes)):
            tensors = found.part(part_name(index))
            if self._ranks.owns(index):
                self._store.put(index, tensors)


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
