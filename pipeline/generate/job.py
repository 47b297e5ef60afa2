"""One way of making images a method: set its objective, prior and defaults, and run the loop."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graph_tools.batchnorm import BatchNormSite
from graph_tools.model import Model
from pipeline.generate.defaults import (
    default_batch_size,
    default_iterations,
    default_learning_rate,
)
from pipeline.generate.dgh import DghObjective
from pipeline.generate.diversity import (
    ITERATIONS,
    LEARNING_RATE,
    MOVING,
    DiversityObjective,
    find_features,
    measure_start,
)
from pipeline.generate.heads import find_heads
from pipeline.generate.loop import (
    LossRecord,
    Objective,
    OnStep,
    OptimizeSettings,
    measure_batch,
    optimize,
)
from pipeline.generate.network import PIXELS, Network, pixel_site, standard_range
from pipeline.generate.noise import noise_images
from pipeline.generate.prior import (
    ImagePrior,
    Source,
    blur_kernel,
    default_blur,
    default_padding,
    white_noise,
)
from pipeline.generate.statistics import SiteTargets, StatisticsMatch
from pipeline.generate.store import batch_sizes, open_store
from pipeline.generate.synthetic import synthetic_source
from pipeline.images import ImageWriter
from pipeline.preprocessing import Preprocessing
from pipeline.settings import GenerateSettings

__all__ = ["Job"]

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
    """

    def __init__(
        self,
        model: Model,
        settings: GenerateSettings,
        sites: tuple[BatchNormSite, ...],
        preprocessing: Preprocessing,
        device: torch.device,
    ) -> None:
        entry = model.input
        self.model, self.settings, self.sites = model, settings, sites
        self.preprocessing, self.device = preprocessing, device
        self.shape = (entry.channels, entry.height, entry.width)
        batch_size = settings.batch_size or default_batch_size(
            entry.height, entry.width, settings.device
        )
        self.sizes = batch_sizes(settings.num_images, batch_size)
        self.generator = torch.Generator().manual_seed(settings.seed)

    def noise(self, writer: ImageWriter) -> Made:
        """Write Gaussian noise."""
        network = self._network(())
        targets = SiteTargets(self.sites, self.device) if self.sites else None
        total = targets.zero() if targets is not None else None
        for noise in noise_images(self.sizes, self.shape, self.generator):
            images = noise.to(self.device)
            if targets is not None and total is not None:
                total = total + measure_batch(images, network, targets)
            writer.append(network.model_input(images).cpu().numpy())
        if targets is None or total is None:
            return (), ()
        return targets.match(total, total), ()

    def dgh(self, writer: ImageWriter, on_step: OnStep | None) -> Made:
        """Optimize images and write them."""
        settings = self.settings
        channels, height, width = self.shape
        heads = find_heads(self.model) if settings.output_weight != 0 else ()
        pixels = pixel_site(self.preprocessing, channels) if settings.pixel_prior else None
        watched = (*self.sites, pixels) if pixels is not None else self.sites
        targets = SiteTargets(watched, self.device)
        objective = DghObjective(
            targets=targets,
            form=settings.loss,
            std_weight=settings.std_weight,
            site_balance=settings.site_balance,
            output_range=settings.output_range,
            output_hinge=settings.output_hinge,
            heads=heads,
            last=len(self.sites) - 1,
        )
        iterations = settings.iterations or default_iterations(height, width, settings.start)
        how = OptimizeSettings(
            iterations=iterations,
            learning_rate=settings.learning_rate
            or default_learning_rate(iterations, min(height, width), settings.start),
            output_weight=settings.output_weight,
            output_ratio=settings.output_ratio,
        )
        source: Source = white_noise
        if settings.start == "natural":
            source = synthetic_source(self.preprocessing, channels)
        matches, history = self._optimize(
            writer, self._network(heads), self._prior(source=source), objective, how, on_step
        )
        return tuple(row for row in matches if row.node != PIXELS), history

    def prior(self, writer: ImageWriter, on_step: OnStep | None) -> Made:
        """Adapt synthetic images to the network and write them."""
        settings = self.settings
        heads = find_heads(self.model) if settings.output_weight != 0 else ()
        features = find_features(self.model)
        network = self._network(heads, features)
        prior = self._prior(
            source=synthetic_source(self.preprocessing, self.shape[0]),
            blur=settings.blur or 0.0,
            moving=MOVING,
        )
        state = self.generator.get_state()
        starts = (prior.start(size, self.generator).to(self.device) for size in self.sizes)
        images = (prior.render(canvas, prior.center()) for canvas in starts)
        targets, spans = measure_start(images, network, features, heads)
        self.generator.set_state(state)  # the loop makes the same images again
        objective = DiversityObjective(targets=targets, spans=spans)
        how = OptimizeSettings(
            iterations=settings.iterations or ITERATIONS,
            learning_rate=settings.learning_rate or LEARNING_RATE,
            output_weight=1.0 if settings.output_weight is None else settings.output_weight,
            output_ratio=settings.output_ratio,
        )
        _, history = self._optimize(writer, network, prior, objective, how, on_step)
        return (), history

    def _optimize(
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
            writer.path,
            sizes=self.sizes,
            canvas_shape=prior.canvas_shape,
            num_statistics=len(targets.center),
            device=self.device,
        ) as store:
            before, history = optimize(
                store, network, prior, objective, how, self.generator, on_step
            )
            after = targets.zero()
            for index in range(len(self.sizes)):
                images = prior.render(store.get(index).canvas.detach(), prior.center())
                after = after + measure_batch(images, network, targets)
                writer.append(network.model_input(images).cpu().numpy())
        return targets.match(before, after), tuple(history)

    def _network(
        self, heads: tuple[str, ...], watched: Sequence[BatchNormSite] | None = None
    ) -> Network:
        sites = self.sites if watched is None else watched
        tensors = [*(site.tensor for site in sites if site.tensor != PIXELS), *heads]
        engine = self.settings.engine
        return Network(self.model, tensors, self.preprocessing, self.device, engine)

    def _prior(
        self,
        *,
        source: Source = white_noise,
        blur: float | None = None,
        moving: float = 1.0,
    ) -> ImagePrior:
        settings = self.settings
        channels, height, width = self.shape
        side = min(height, width)
        padding = default_padding(side) if settings.padding is None else settings.padding
        if blur is None:
            blur = default_blur(side) if settings.blur is None else settings.blur
        low, high = standard_range(self.preprocessing, channels)
        return ImagePrior(
            height=height,
            width=width,
            padding=padding,
            kernel=blur_kernel(blur),
            low=low.to(self.device),
            high=high.to(self.device),
            flip=settings.flip,
            source=source,
            moving=moving,
        )
