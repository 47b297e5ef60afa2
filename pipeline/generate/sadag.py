"""SADAG: images on which a quantized network generalizes, by the gradients of its last layer.

Three stages (ICML 2024, arXiv 2510.07018): images as GENIE makes them; a network quantized with
these; and a refinement of the images by

    L = statistics + matching * L_GM + diversity * L_div

L_GM asks each image's gradient to be like its neighbor's, L_div asks it to be unlike that of every
other image, in its own batch or another (`pipeline.generate.last_layer`). Swings stop.

Form ``pixels`` does the same without a generator: the images are those of DGH, and DGH's loop goes
on with the two terms beside its own loss (which averages over nodes, so both are divided by them).

The published refinement takes 500 of 4000 steps, its weights with a rate that has all but vanished
after 100. Here it takes an eighth of the steps of the first stage, too, and may move ten times as
far.
The published neighbor step is 0 but for rounding: see `last_layer.neighbor`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from graph_tools.errors import DataError, SettingsError
from pipeline.generate.checkpoints import Stage
from pipeline.generate.dgh import DghObjective, dgh_parts, make_dgh
from pipeline.generate.genie import (
    Latent,
    LatentRun,
    check_finite,
    counted,
    history_of,
    loss_terms,
    observe_all,
)
from pipeline.generate.job import Job, Made
from pipeline.generate.last_layer import (
    Pairs,
    Seen,
    diversity_loss,
    matching_loss,
    neighbor,
)
from pipeline.generate.latent_steps import LatentSteps, Terms
from pipeline.generate.loop import OnStep
from pipeline.generate.network import PIXELS, Network
from pipeline.generate.prior import Source, blur_kernel
from pipeline.generate.quantized import QuantizedNetwork, last_linear
from pipeline.generate.store import temporary_folder
from pipeline.images import ImageSet, ImageWriter, open_images

__all__ = ["Agreement", "SadagObjective", "make_sadag"]

_SHARE, _FEWEST = 8, 10
"""The first stage has eight times the steps of the refinement, but that has at least ten."""
_RADIUS = (
    1 / 16
)  # of the neighborhood, as a share of the norm; published: 1 where codes have 16
_CODE_REACH, _WEIGHT_REACH = 5e-2, 2e-2
"""Sum of the rates of all steps: ten times the published 500 * 1e-5 and 1e-4 / (1 - 0.95). In so
few steps those leave more of the terms (benchmarks/refinement.py)."""
_PIXEL_RATE = 0.02
"""RAdam's, in standardized pixel units."""


def make_sadag(job: Job, writer: ImageWriter, on_step: OnStep | None) -> Made:
    """Make images by SADAG and write them."""
    last_linear(job.model)  # refuses what it cannot do before anything is computed
    if job.quantizer is None:
        raise SettingsError(
            "method sadag needs a quantized network, and none is given",
            where="--method sadag",
            hint="use zsq generate or zsq quantize, or pass a quantizer",
        )
    if job.settings.sadag_form == "pixels":
        return _pixels(job, writer, on_step)
    return _generators(job, writer, on_step)


class Agreement:
    """The two terms of the last layer.

    Args:
        network: the float network; observes ``head``.
        quantized: the quantized one.
        head: the outputs of the last linear layer in the float network.
        count: images that there will be.
        matching: weight of L_GM; 0 saves the neighbors.
        diversity: weight of L_div.
        generator: of the neighbors, on the CPU.

    Attributes:
        seen: the images so far.
    """

    def __init__(
        self,
        network: Network,
        quantized: QuantizedNetwork,
        head: str,
        *,
        count: int,
        matching: float,
        diversity: float,
        generator: torch.Generator,
    ) -> None:
        self._network, self._quantized, self._head = network, quantized, head
        self._matching, self._diversity = matching, diversity
        self._generator = generator
        self.seen = Seen(count)

    def __call__(
        self,
        points: Tensor,
        images_of: Callable[[Tensor], Tensor],
        values: Mapping[str, Tensor],
        first: int,
    ) -> Tensor:
        """Return the weighted terms of some images.

        Args:
            points: [N, ...]: their codes, or the images themselves.
            images_of: from points to images.
            values: observed of these images; the images under ``PIXELS``.
            first: index of the first one.
        """
        own = self._pairs(values[PIXELS], values[self._head])
        loss = own.features.new_zeros(())
        if self._matching:
            step = neighbor(
                points,
                lambda places: self._look(images_of(places)),
                radius=_RADIUS,
                generator=self._generator,
            )
            loss = self._matching * matching_loss(self._look(images_of(points + step)), own)
        if self._diversity:
            others = self.seen.others(first, len(own.features))
            loss = loss + self._diversity * diversity_loss(own, others)
            self.seen.put(first, own)
        return loss.double()

    def _look(self, images: Tensor) -> Pairs:
        return self._pairs(images, observe_all(self._network, images)[self._head])

    def _pairs(self, images: Tensor, outputs: Tensor) -> Pairs:
        return Pairs.of(*_with(outputs, self._quantized.observe(images)))


def _with(outputs: Tensor, quantized: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return quantized[0], outputs, quantized[1]


@dataclass(frozen=True, kw_only=True)
class SadagObjective(DghObjective):
    """DGH's loss and the terms of the last layer.

    Args:
        agreement: these terms.
    """

    one_by_one: ClassVar[bool] = True
    agreement: Agreement

    def images(self, values: Mapping[str, Tensor], first: int) -> Tensor:
        """Return the terms of the last layer."""
        images = values[PIXELS]
        terms = self.agreement(images, lambda points: points, values, first)
        return terms / len(self.targets.sites)

    def state(self) -> dict[str, Tensor]:
        """Return the directions of all images."""
        return self.agreement.seen.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        self.agreement.seen.load_state(state, self.targets.center.device)


def _agreement(job: Job, network: Network, head: str, images: ImageSet) -> Agreement:
    assert job.quantizer is not None
    model, plan = job.quantizer(images)
    return Agreement(
        network,
        QuantizedNetwork(model, plan, job.preprocessing, job.device),
        head,
        count=job.settings.num_images,
        matching=job.settings.sadag_matching,
        diversity=job.settings.sadag_diversity,
        generator=job.generator,
    )


def _generators(job: Job, writer: ImageWriter, on_step: OnStep | None) -> Made:
    head = last_linear(job.model).logits
    run = LatentRun(job, [head])
    steps = max(_FEWEST, run.iterations // _SHARE)
    told = counted(on_step, (run.iterations + steps) * len(job.sizes))

    def stage(what: str, index: int) -> Stage | None:
        return job.stage(f"{what} of batch {index + 1} of {len(job.sizes)}, step")

    before, after = run.targets.zero(), run.targets.zero()
    warm, refined = [], []
    with temporary_folder(job.scratch(writer.path)) as folder:
        path = folder / "images.npz"
        with ImageWriter(path, count=sum(job.sizes), shape=job.model.input.shape) as first:
            for index, size in enumerate(job.sizes):
                latent = run.new(size)
                before = before + run.measure(latent)
                steps_of = run.steps(latent)
                warm.append(steps_of.run(run.iterations, stage("making", index), told))
                first.append(run.finished(latent))
                _save(latent, folder / f"{index}.safetensors")
        images = open_images(path, shape=job.model.input.shape)
        agreement = _agreement(job, run.network, head, images)
        for index, size in enumerate(job.sizes):
            latent = _load(run.new(size), folder / f"{index}.safetensors")
            start = sum(job.sizes[:index])
            steps_of = _refinement(run, latent, agreement, start, steps, job.generator)
            refined.append(steps_of.run(steps, stage("refinement", index), told))
            after = after + run.measure(latent)
            writer.append(run.finished(latent))
    history = history_of(warm) + history_of(refined, run.iterations + 1)
    return run.targets.match(before, after), history


def _refinement(
    run: LatentRun,
    latent: Latent,
    agreement: Agreement,
    first: int,
    steps: int,
    generator: torch.Generator,
) -> LatentSteps:
    """Return the steps that refine a batch through its generator."""
    rate = _WEIGHT_REACH / steps
    optimizer = torch.optim.Adam(
        [
            {"params": [latent.codes], "lr": _CODE_REACH / steps},
            {"params": latent.weights, "lr": rate},
        ]
    )

    def step() -> Terms:
        optimizer.zero_grad()
        values = observe_all(run.network, latent.images())
        loss = run.loss(values) + agreement(latent.codes, latent.images, values, first)
        value = check_finite(loss, values)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss_terms(value, rate)

    return LatentSteps(
        latent, step, optimizers=(optimizer,), generator=generator, seen=agreement.seen
    )


def _pixels(job: Job, writer: ImageWriter, on_step: OnStep | None) -> Made:
    head = last_linear(job.model).logits
    with temporary_folder(job.scratch(writer.path)) as folder:
        path = folder / "images.npz"
        with ImageWriter(path, count=sum(job.sizes), shape=job.model.input.shape) as first:
            before, warm = make_dgh(job, first, on_step)
        images = open_images(path, shape=job.model.input.shape)
        objective, how = dgh_parts(job)
        network = job.network(
            list(dict.fromkeys([*objective.heads, head])),
            folded=bool(objective.targets.taps),
            chunked=False,
        )
        refined = SadagObjective(
            **vars(objective), agreement=_agreement(job, network, head, images)
        )
        how = replace(
            how, iterations=max(_FEWEST, how.iterations // _SHARE), learning_rate=_PIXEL_RATE
        )
        prior = replace(
            job.image_prior(source=_made(images, network)), padding=0, kernel=blur_kernel(0)
        )
        after, history = job.optimize(writer, network, prior, refined, how, on_step)
    matches = tuple(
        replace(
            row,
            mean_error_before=old.mean_error_before,
            std_error_before=old.std_error_before,
        )
        for row, old in zip(after, before, strict=True)
    )
    later = tuple(replace(row, iteration=row.iteration + len(warm)) for row in history)
    return matches, warm + later


def _made(images: ImageSet, network: Network) -> Source:
    """A source that gives images already made, batch after batch."""
    rows = iter(images.batches(1))

    def source(count: int, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
        batch = np.concatenate([next(rows) for _ in range(count)])
        return network.pixels(torch.from_numpy(batch)).cpu()

    return source


def _save(latent: Latent, path: Path) -> None:
    state = {name: value.contiguous() for name, value in latent.generator.state_dict().items()}
    try:
        save_file({**state, "codes": latent.codes.detach().contiguous()}, str(path))
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"temporary file cannot be written ({error})",
            where=str(path),
            hint="free some space, or make fewer images",
        ) from error


def _load(latent: Latent, path: Path) -> Latent:
    state = load_file(str(path), device=str(latent.codes.device))
    latent.codes.detach().copy_(state.pop("codes"))
    latent.generator.load_state_dict(state)
    return latent
