"""Steps on a batch of images that a generator makes, which a checkpoint can interrupt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from pipeline.generate.checkpoints import Stage
from pipeline.generate.image_generator import ImageGenerator
from pipeline.generate.last_layer import Seen
from pipeline.generate.optimizer_state import (
    load_optimizer,
    optimizer_facts,
    optimizer_tensors,
)
from pipeline.generate.snapshot import Snapshot, State

__all__ = ["LatentSteps", "Terms"]

Terms = Mapping[str, float]
"""The fields of a `LossRecord` but its iteration."""


class _Latent(Protocol):
    @property
    def generator(self) -> ImageGenerator: ...

    @property
    def codes(self) -> Tensor: ...


class LatentSteps:
    """The steps of one batch.

    Args:
        latent: the batch; changed in place.
        step: takes one step.
        optimizers: that the step uses.
        schedules: of their rates.
        generator: source of all randomness, on the CPU.
        seen: what the step compares the batch with, and adds it to.
    """

    def __init__(
        self,
        latent: _Latent,
        step: Callable[[], Terms],
        *,
        optimizers: Sequence[torch.optim.Optimizer],
        schedules: Sequence[torch.optim.lr_scheduler.LRScheduler] = (),
        generator: torch.Generator,
        seen: Seen | None = None,
    ) -> None:
        self._latent, self._step = latent, step
        self._optimizers, self._schedules = optimizers, schedules
        self._generator, self._seen = generator, seen
        self._rows: list[Terms] = []

    def run(
        self,
        steps: int,
        stage: Stage | None,
        told: Callable[[Terms], object],
        *,
        alone: bool = False,
    ) -> list[Terms]:
        """Take all steps, or those that a checkpoint leaves to take.

        Args:
            steps: how many.
            stage: where checkpoints go, and where to go on from.
            told: called after each step, also of those taken before.
            alone: there is no other batch; otherwise what is finished is always kept.

        Returns:
            The loss terms of all steps.
        """
        found = stage.restore() if stage is not None else None
        if found is not None:
            self._load(found)
            for terms in self._rows:
                told(terms)
        taken = len(self._rows)
        while len(self._rows) < steps:
            self._rows.append(self._step())
            told(self._rows[-1])
            if stage is not None:
                stage.step(len(self._rows), self._state, ahead=1)
        if stage is not None and len(self._rows) > taken:
            if alone:
                stage.end(steps, self._state)
            else:
                stage.save(steps, self._state(), only=True)
        return self._rows

    def _state(self) -> State:
        latent, seen = self._latent, self._seen
        facts = {
            "rows": self._rows,
            "optimizers": [optimizer_facts(optimizer) for optimizer in self._optimizers],
            "schedules": [schedule.state_dict() for schedule in self._schedules],
        }
        parts = (
            ("random", {"state": self._generator.get_state()}),
            ("latent", {**latent.generator.state_dict(), "codes": latent.codes}),
            ("seen", {} if seen is None else seen.state()),
            *(
                (f"optimizer{place}", optimizer_tensors(optimizer))
                for place, optimizer in enumerate(self._optimizers)
            ),
        )
        return State(facts=facts, parts=parts)

    def _load(self, found: Snapshot) -> None:
        latent, facts = self._latent, found.facts
        self._rows = list(facts["rows"])
        self._generator.set_state(found.part("random")["state"])
        tensors = found.part("latent")
        latent.codes.detach().copy_(tensors.pop("codes"))
        latent.generator.load_state_dict(tensors)
        if self._seen is not None:
            self._seen.load_state(found.part("seen"), latent.codes.device)
        for place, optimizer in enumerate(self._optimizers):
            load_optimizer(
                optimizer, found.part(f"optimizer{place}"), facts["optimizers"][place]
            )
        for schedule, state in zip(self._schedules, facts["schedules"], strict=True):
            schedule.load_state_dict(state)
