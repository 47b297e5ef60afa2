"""What every method of making images needs: the network, where images come from, and the loop.

A method is a module with an objective, its defaults and a function that takes a `Job`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from graph_tools.batchnorm import BatchNormSite
from graph_tools.folded_taps import Tap, fold_taps
from graph_tools.model import Model
from pipeline.generate.checkpoints import Checkpoints, Stage
from pipeline.generate.defaults import default_batch_size, default_iterations
from pipeline.generate.loop import LossRecord, OnStep, OptimizeSettings, optimize
from pipeline.generate.network import PIXELS, Network, standard_range
from pipeline.generate.objective import Objective
from pipeline.generate.prior import (
    ImagePrior,
    Source,
    blur_kernel,
    default_blur,
    default_padding,
    white_noise,
)
from pipeline.generate.quantized import Quantizer
from pipeline.generate.statistics import StatisticsMatch
from pipeline.generate.step import measure_batch
from pipeline.generate.store import batch_sizes, open_store
from pipeline.images import ImageWriter
from pipeline.preprocessing import Preprocessing
from pipeline.ranks import ALONE
from pipeline.settings import GenerateSettings

__all__ = ["Job", "Made", "Make"]

_GAUSSIANS = 256  # images, enough for quantiles over many channels

Made = tuple[tuple[StatisticsMatch, ...], tuple[LossRecord, ...]]
"""How well statistics are met, and the loss of every iteration."""


class Job:
    """What the methods share: one network, one set of images to make.

    Args:
        model: the network.
        settings: ``num_images`` is known, not 0.
        sites: its BatchNormalization nodes.
        preprocessing: how pixels become the model's input.
        device: where to compute.
        quantizer: for methods that look at a quantized network.
        checkpoints: of the run; None keeps none.

    Attributes:
        ranks: the processes of the run.
        sizes: images in each batch.
        generator: source of all randomness, on the CPU.
    """

    def __init__(
        self,
        model: Model,
        settings: GenerateSettings,
        sites: tuple[BatchNormSite, ...],
        preprocessing: Preprocessing,
        device: torch.device,
        quantizer: Quantizer | None = None,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        entry = model.input
        self.model, self.settings, self.sites = model, settings, sites
        self.preprocessing, self.device = preprocessing, device
        self.quantizer = quantizer
        self._checkpoints, self._stages = checkpoints, 0
        self.ranks = ALONE if checkpoints is None else checkpoints.ranks
        self.shape = (entry.channels, entry.height, entry.width)
        batch_size = settings.batch_size or default_batch_size(
            entry.height, entry.width, settings.device
        )
        self.sizes = batch_sizes(settings.num_images, batch_size)
        self.generator = torch.Generator().manual_seed(settings.seed)

    def stage(self, unit: str = "iteration") -> Stage | None:
        """Return where the next loop's checkpoints go; None where none are kept."""
        self._stages += 1
        if self._checkpoints is None:
            return None
        return self._checkpoints.stage(f"stage{self._stages:06d}", unit)

    def scratch(self, path: Path) -> Path:
        """Return beside which file temporary ones go while the file ``path`` is made."""
        return path if self._checkpoints is None else self._checkpoints.work / path.name

    def gaussians(self) -> Iterator[Tensor]:
        """Yield batches of standard normal images, to measure what noise does."""
        for size in batch_sizes(_GAUSSIANS, self.sizes[0]):
            yield torch.randn((size, *self.shape), generator=self.generator).to(self.device)

    def optimize(
        self,
        writer: ImageWriter,
        network: Network,
        prior: ImagePrior,
        objective: Objective,
        how: OptimizeSettings,
        on_step: OnStep | None,
    ) -> Made:
        """Run the loop, write the images, and compare the statistics before and after."""
        targets = objective.targets
        with open_store(
            self.scratch(writer.path),
            sizes=self.sizes,
            canvas_shape=prior.canvas_shape,
            num_statistics=len(targets.center),
            device=self.device,
        ) as store:
            stage, ranks = self.stage(), self.ranks
            before, history = optimize(
                store, network, prior, objective, how, self.generator, on_step, stage, ranks
            )
            after = targets.zero()
            for index, size in enumerate(self.sizes):
                images = torch.empty((size, *self.shape), device=self.device)
                if ranks.owns(index):
                    canvas = store.get(index).canvas.detach()
                    images = prior.render(canvas, prior.center()).contiguous()
                images = ranks.broadcast(images, ranks.owner(index))
                after = after + measure_batch(images, network, targets)
                writer.append(network.model_input(images).cpu().numpy())
        matches = targets.match(before, after)
        return tuple(row for row in matches if row.node != PIXELS), tuple(history)

    def by_adam(
        self, learning_rate: float, *, patience: int, published: int, scope: int = 0
    ) -> OptimizeSettings:
        """Return how methods that optimize pixels by Adam do it, unless the user says otherwise.

        They take as many steps as DGH from noise.

        Args:
            learning_rate: as published; it falls to a tenth.
            patience: published steps without progress before it does.
            published: steps in all.
            scope: batches whose statistics count together; 0 for all.
        """
        settings = self.settings
        iterations = settings.iterations or default_iterations(*self.shape[1:], "noise")
        return OptimizeSettings(
            iterations=iterations,
            learning_rate=settings.learning_rate or learning_rate,
            optimizer="adam",
            patience=max(10, iterations * patience // published),
            factor=0.1,
            forgets=False,
            scope=scope,
            refresh=settings.refresh,
            parallel=settings.parallel_batches or 1,
        )

    @functools.cached_property
    def folded(self) -> tuple[Model, dict[str, Tap]]:
        """The model with BatchNormalization folded, and where its inputs are seen then."""
        exact = self.settings.precision != "bfloat16"
        return fold_taps(self.model, self.sites, largest_ratio=1e3 if exact else 8.0)

    def network(
        self,
        heads: Sequence[str],
        watched: Sequence[BatchNormSite] | None = None,
        *,
        folded: bool = False,
        chunked: bool = True,
    ) -> Network:
        """Return the network, observing ``heads`` and ``watched``, by default all ``sites``.

        Args:
            heads: tensors by name.
            watched: BatchNormalization nodes whose inputs are observed.
            folded: whether through the taps of `folded`, where there is one.
            chunked: whether ``chunk_size`` images go through it at a time.
        """
        sites = self.sites if watched is None else watched
        model, taps = self.folded if folded else (self.model, {})
        seen = [site.tensor for site in sites if site.tensor != PIXELS]
        tensors = [*(taps[t].tensor if t in taps else t for t in seen), *heads]
        settings = self.settings
        return Network(
            model,
            tensors,
            self.preprocessing,
            self.device,
            settings.engine,
            settings.precision,
            settings.chunk_size if chunked else 0,
        )

    def image_prior(
        self,
        *,
        source: Source = white_noise,
        padding: int | None = None,
        blur: float | None = None,
        flip: bool = True,
        clip: bool = True,
        moving: float = 1.0,
        crop_scale: float | None = None,
    ) -> ImagePrior:
        """Return how canvases become images.

        Args:
            source: what images are optimized from.
            padding: unless set by the user; by default by image size.
            blur: likewise.
            flip: whether views are mirrored, unless the user forbids it.
            clip: to the valid range.
            moving: share of the images that are optimized.
            crop_scale: unless set by the user; by default 1, no resized crops.
        """
        settings = self.settings
        channels, height, width = self.shape
        side = min(height, width)
        padding = default_padding(side) if padding is None else padding
        blur = default_blur(side) if blur is None else blur
        low, high = standard_range(self.preprocessing, channels)
        if not clip:
            low, high = torch.full_like(low, -torch.inf), torch.full_like(high, torch.inf)
        return ImagePrior(
            height=height,
            width=width,
            padding=padding if settings.padding is None else settings.padding,
            kernel=blur_kernel(blur if settings.blur is None else settings.blur),
            low=low.to(self.device),
            high=high.to(self.device),
            flip=flip and settings.flip,
            source=source,
            moving=moving,
            crop_scale=(crop_scale or 1.0)
            if settings.crop_scale is None
            else settings.crop_scale,
        )


Make = Callable[[Job, ImageWriter, OnStep | None], Made]
"""A method: makes the images of a job and writes them."""
