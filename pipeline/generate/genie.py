"""GENIE: images out of a generator network, against the statistics of a batch (CVPR 2023).

Each batch has an `ImageGenerator` of its own; its weights and the images' codes are optimized
together (arXiv 2212.04780), while strided convolutions swing (`pipeline.generate.swing`):

    sum_l (1/C) sum_c [ (m_c - mean_c)^2 + (s_c - sigma_c)^2 ]
    + mean over the images of |mean - its target|^2 + |std - its target|^2 of the pixels

with the moments ``m, s`` of the batch at every BatchNormalization node. The second line is left out
where nothing is known of the pixels. Codes: Adam at 0.1, a tenth of that after a plateau; weights:
Adam at 0.01, falling exponentially. The published 4000 steps take hours without a GPU; the periods
of both schedules are the same share of fewer steps.

The generator normalizes its images and, as published, nothing clips them. Here they are clipped to
the pixels that exist, with a gradient that ignores it, so that the images written are those that
were optimized. Nodes with large values drown others as published; ``site_balance`` is as in DGH.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from graph_tools.batchnorm import BatchNormSite
from graph_tools.errors import GenerationError, SettingsError
from graph_tools.torch_graph import Entry
from pipeline.generate.dgh import DghObjective
from pipeline.generate.faults import first_non_finite
from pipeline.generate.image_generator import CODE, ImageGenerator
from pipeline.generate.job import Job, Made
from pipeline.generate.latent_steps import LatentSteps, Terms
from pipeline.generate.loop import LossRecord, OnStep
from pipeline.generate.network import PIXELS, Network, pixel_site, standard_range
from pipeline.generate.prior import clip_straight_through
from pipeline.generate.statistics import SiteTargets, Sums
from pipeline.generate.step import measure_batch
from pipeline.generate.swing import swing_entry
from pipeline.images import ImageWriter

__all__ = [
    "ITERATIONS",
    "LEARNING_RATE",
    "GenieLoss",
    "Latent",
    "LatentRun",
    "Terms",
    "check_finite",
    "counted",
    "history_of",
    "loss_terms",
    "make_genie",
    "observe_all",
]

ITERATIONS = 200
"""Steps of a batch; published: 4000.

On a ResNet-20 and 64 images the loss is 15.2 at the first step, 1.06 after 10, 0.48 after 50, 0.36
after 100, 0.29 after 150 and 0.26 after 200.
"""
LEARNING_RATE = 0.01
"""Of the generator's weights; the codes move ten times as fast."""

_PERIODS = 40  # of the schedules: every 100 of the published 4000 steps
_DECAY = 0.95
_SLOWEST = 1e-4
_EPSILON = 1e-6


def make_genie(job: Job, writer: ImageWriter, on_step: OnStep | None) -> Made:
    """Make images by GENIE and write them."""
    run = LatentRun(job)
    before, after = run.targets.zero(), run.targets.zero()
    rows: list[Sequence[Terms]] = []
    steps = run.iterations * len(job.sizes)
    told = counted(on_step, steps)
    for index, size in enumerate(job.sizes):
        latent = run.new(size)
        before = before + run.measure(latent)
        stage = job.stage(f"batch {index + 1} of {len(job.sizes)}, step")
        alone = len(job.sizes) == 1
        rows.append(run.steps(latent).run(run.iterations, stage, told, alone=alone))
        after = after + run.measure(latent)
        writer.append(run.finished(latent))
    return run.targets.match(before, after), history_of(rows)


def counted(on_step: OnStep | None, total: int) -> Callable[[Terms], None]:
    """Return what tells ``on_step`` of one step after the other."""
    numbers = itertools.count(1)

    def told(terms: Terms) -> None:
        done = next(numbers)
        if on_step is not None:
            on_step(done, total, terms)

    return told


@dataclass(frozen=True, kw_only=True)
class Latent:
    """A batch of images as a generator and codes.

    Args:
        generator: of this batch only.
        codes: [N, 256], a leaf that requires gradient.
        low: [1, C, 1, 1] smallest valid pixel, in standardized pixel units.
        high: likewise, largest.
    """

    generator: ImageGenerator
    codes: Tensor
    low: Tensor
    high: Tensor

    def images(self, codes: Tensor | None = None) -> Tensor:
        """Return the images of ``codes``: [N, C, H, W] in standardized pixel units."""
        images = self.generator(self.codes if codes is None else codes)
        return clip_straight_through(images, self.low, self.high)

    @property
    def weights(self) -> list[Tensor]:
        """Weights of the generator that are learned."""
        return [weight for weight in self.generator.parameters() if weight.requires_grad]


@dataclass(frozen=True, kw_only=True)
class GenieLoss:
    """What a batch should fulfil.

    Args:
        objective: of the statistics of BatchNormalization nodes.
        pixels: target statistics of the pixels, None if they are unknown.
    """

    objective: DghObjective
    pixels: BatchNormSite | None = None

    def __call__(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of a batch: a float64 scalar.

        Args:
            values: observed tensors by name, [N, ...] each; the images under ``PIXELS``.
        """
        targets = self.objective.targets
        loss = self.objective.statistics(targets.measure(values)) * len(targets.sites)
        if self.pixels is not None:
            loss = loss + self._pixels(values[PIXELS], self.pixels)
        return loss

    def _pixels(self, images: Tensor, site: BatchNormSite) -> Tensor:
        variance, mean = torch.var_mean(images.flatten(2), dim=2, correction=0)  # [N, C]
        spread = (variance + _EPSILON).sqrt() - images.new_tensor(site.variance).sqrt()
        offset = mean - images.new_tensor(site.mean)
        return (offset.square() + spread.square()).sum(1).mean().double()


class LatentRun:
    """What the batches of a job share.

    Args:
        job: the network and the settings.
        heads: tensors to observe beside the inputs of BatchNormalization nodes.

    Raises:
        SettingsError: an engine in which convolutions cannot swing.
    """

    def __init__(self, job: Job, heads: Sequence[str] = ()) -> None:
        settings, channels = job.settings, job.shape[0]
        if settings.engine != "torch":
            raise SettingsError(
                f"method {settings.method} changes what single nodes read, which only engine "
                "torch can",
                where=f"--engine {settings.engine}",
            )
        if job.ranks.count > 1 or settings.parallel_batches > 1:
            raise SettingsError(
                f"method {settings.method} makes one batch after the other",
                where=f"--method {settings.method}",
                hint="use one process, and leave out --parallel-batches",
            )
        self._shape, self._generator = job.shape, job.generator
        self.targets = SiteTargets(job.sites, job.device)
        known = pixel_site(job.preprocessing, channels) if settings.pixel_prior else None
        self._pixels = known
        low, high = standard_range(job.preprocessing, channels)
        self._low, self._high = low.to(job.device), high.to(job.device)
        self.network = job.network(heads, chunked=False)
        objective = DghObjective(
            targets=self.targets, std_weight=1.0, site_balance=settings.site_balance
        )
        self.loss = GenieLoss(objective=objective, pixels=known)
        self.iterations = settings.iterations or ITERATIONS
        self.learning_rate = settings.learning_rate or LEARNING_RATE

    def new(self, count: int) -> Latent:
        """Return ``count`` random codes and a generator with random weights."""
        seed = int(torch.randint(2**62, (1,), generator=self._generator))
        site = self._pixels
        module = ImageGenerator(
            self._shape,
            mean=None if site is None else torch.from_numpy(site.mean),
            std=None if site is None else torch.from_numpy(site.variance).sqrt(),
            seed=seed,
        )
        device = self._low.device
        codes = torch.randn((count, CODE), generator=self._generator).to(device)
        return Latent(
            generator=module.to(device),
            codes=codes.requires_grad_(),
            low=self._low,
            high=self._high,
        )

    def measure(self, latent: Latent) -> Sums:
        """Return the moments of a batch as it is."""
        with torch.no_grad():
            return measure_batch(latent.images(), self.network, self.targets)

    def finished(self, latent: Latent) -> np.ndarray:
        """Return the images of a batch as the model takes them."""
        with torch.no_grad():
            array: np.ndarray = self.network.model_input(latent.images()).cpu().numpy()
        return array

    def steps(self, latent: Latent) -> LatentSteps:
        """Return the steps that optimize codes and weights, in place.

        They raise GenerationError where the loss is not finite.
        """
        period = max(1, self.iterations // _PERIODS)
        rate = self.learning_rate
        moves = torch.optim.Adam([latent.codes], lr=10 * rate)
        learns = torch.optim.Adam(latent.weights, lr=rate)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            moves, patience=period, min_lr=min(_SLOWEST, rate)
        )
        decay = torch.optim.lr_scheduler.StepLR(learns, step_size=period, gamma=_DECAY)
        entry = swing_entry(self._generator)

        def step() -> Terms:
            moves.zero_grad()
            learns.zero_grad()
            values = observe_all(self.network, latent.images(), entry)
            loss = self.loss(values)
            value = check_finite(loss, values)
            loss.backward()  # type: ignore[no-untyped-call]
            moves.step()
            learns.step()
            plateau.step(value)
            decay.step()
            return loss_terms(value, learns.param_groups[0]["lr"])

        return LatentSteps(
            latent,
            step,
            optimizers=(moves, learns),
            schedules=(plateau, decay),
            generator=self._generator,
        )


def observe_all(
    network: Network, images: Tensor, entry: Entry | None = None
) -> dict[str, Tensor]:
    """Observe a batch of any size, also on networks that take only small ones."""
    chunks = torch.split(images, network.chunk or len(images))
    if len(chunks) == 1:
        return network.observe(images, entry=entry)
    parts = [network.observe(chunk, entry=entry) for chunk in chunks]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def check_finite(loss: Tensor, values: Mapping[str, Tensor]) -> float:
    """Return a loss as a number.

    Args:
        loss: a scalar.
        values: what it was computed from, by tensor name.

    Raises:
        GenerationError: it is not finite; names the first tensor that is not.
    """
    value = float(loss.detach())
    if not np.isfinite(value):
        raise GenerationError(
            "the loss is not finite",
            where=first_non_finite(values),
            hint="lower --learning-rate or check the weights",
        )
    return value


def loss_terms(loss: float, rate: float) -> Terms:
    """Return the terms of a step whose loss is all statistics."""
    return {
        "total": loss,
        "statistics": loss,
        "output": 0.0,
        "output_weight": 0.0,
        "learning_rate": rate,
    }


def history_of(batches: Sequence[Sequence[Terms]], first: int = 1) -> tuple[LossRecord, ...]:
    """Average the steps of all batches.

    Args:
        batches: the steps of each, equally many.
        first: number of the first one.
    """
    history = []
    for index, rows in enumerate(zip(*batches, strict=True)):
        mean = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
        history.append(LossRecord(iteration=first + index, **mean))
    return tuple(history)
