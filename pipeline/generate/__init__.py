"""Make calibration images from a network alone.

`generate` is the way in. A method says what images should fulfil (`dgh`; `diversity` for method
prior, which starts from `synthetic` images) or makes them outright (`noise`); statistics, views,
store and loop are shared.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from graph_tools.batchnorm import (
    BatchNormSite,
    find_affine_leftovers,
    find_bare_convolutions,
    find_batch_norms,
)
from graph_tools.errors import NoBatchNormError
from graph_tools.model import Model
from pipeline.generate.allocator import reused_memory
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
from pipeline.generate.input_range import guess_preprocessing
from pipeline.generate.loop import (
    LossRecord,
    Objective,
    OnStep,
    OptimizeSettings,
    measure_batch,
    optimize,
)
from pipeline.generate.network import PIXELS, Network, pixel_site, standard_range, torch_device
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
from pipeline.images import ImageSet, ImageWriter, open_images
from pipeline.preprocessing import Preprocessing
from pipeline.settings import GenerateSettings

__all__ = [
    "Generated",
    "LossRecord",
    "OnStep",
    "StatisticsMatch",
    "default_batch_size",
    "default_iterations",
    "default_learning_rate",
    "default_num_images",
    "generate",
]

logger = logging.getLogger(__name__)

_RE_EXPORT = (
    "export again with BatchNormalization kept: torch.onnx.export(..., dynamo=False, "
    "training=torch.onnx.TrainingMode.PRESERVE, do_constant_folding=False) on a model in "
    "eval mode, or torch.onnx.export(..., dynamo=True, optimize=False)"
)


_NO_PROMISE = (
    "no BatchNormalization: images from an image prior; accuracy cannot be promised, calibrate "
    "with --data or give --bn-from"
)


@dataclass(frozen=True, kw_only=True)
class Generated:
    """Images and how they came about.

    Args:
        images: the images, on disk.
        method: the one used, never "auto".
        preprocessing: the one given, or what was guessed.
        history: loss of every iteration, averaged over the batches; empty for noise.
        statistics: how well each BatchNormalization node's statistics are met.
        seconds: time taken.
        notes: what the user should know.
        warnings: what the user must know before relying on the images.
    """

    images: ImageSet
    method: str
    preprocessing: Preprocessing
    history: tuple[LossRecord, ...]
    statistics: tuple[StatisticsMatch, ...]
    seconds: float
    notes: tuple[str, ...]
    warnings: tuple[str, ...] = ()


def generate(
    model: Model,
    settings: GenerateSettings,
    path: Path,
    *,
    preprocessing: Preprocessing | None = None,
    on_step: OnStep | None = None,
) -> Generated:
    """Make images for a network and write them to ``path``.

    The memory needed does not depend on their number; canvases and optimizer state are kept in
    a temporary folder beside ``path``.

    Args:
        model: the network.
        settings: method, number of images, seed and so on.
        path: the .npz file to write; whole or absent.
        preprocessing: how pixels become the model's input; guessed if None.
        on_step: called as (done, total, loss terms).

    Returns:
        The images, in the model's own layout and normalization, and the record of the run.

    Raises:
        NoBatchNormError: method dgh, and the network has no BatchNormalization.
        GenerationError: the loss or an observed tensor is not finite.
        DataError: ``path`` cannot be written.
        SettingsError: the device does not exist, or ``preprocessing`` is for other channels.
    """
    start = time.perf_counter()
    count = settings.num_images or default_num_images(model.input.height, model.input.width)
    settings = replace(settings, num_images=count)
    sites = find_batch_norms(model)
    method = settings.method
    if method == "auto":
        method = "dgh" if sites else "prior"
    if method == "dgh" and not sites:
        raise _no_batch_norm(model)
    device = torch_device(settings.device)
    notes = []
    if preprocessing is None:
        preprocessing = guess_preprocessing(model, seed=settings.seed)
        notes.append(f"input normalization {preprocessing.source}")
    if sites:
        notes.append(f"{len(sites)} BatchNormalization node(s) found and observed")
    notes += _missing_statistics(model, bool(sites))
    if model.fixed_batch is not None and sites:
        notes.append(f"the model takes only {model.fixed_batch} image(s) at a time: slow")
    job = _Job(model, settings, sites, preprocessing, device)
    with (
        _reproducible(device),
        _one_thread_if_tiny(model.input.height * model.input.width),
        reused_memory(),
        ImageWriter(path, count=settings.num_images, shape=model.input.shape) as writer,
    ):
        match method:
            case "dgh":
                statistics, history = job.dgh(writer, on_step)
            case "prior":
                statistics, history = job.prior(writer, on_step)
            case _:
                statistics, history = job.noise(writer)
    seconds = time.perf_counter() - start
    logger.info("%d images by %s in %.1f s", settings.num_images, method, seconds)
    return Generated(
        images=open_images(path, shape=model.input.shape),
        method=method,
        preprocessing=preprocessing,
        history=history,
        statistics=statistics,
        seconds=seconds,
        notes=tuple(notes),
        warnings=_warnings(method, bool(sites)),
    )


def default_batch_size(height: int, width: int, device: str = "cpu") -> int:
    """Return how many images are optimized together: 64 up to 128 x 128, 16 at 224 x 224.

    On a CPU larger batches leave the caches; a GPU takes eight times as many.
    """
    pixels = 2**20 if torch.device(device).type == "cpu" else 2**23
    most = 64 if torch.device(device).type == "cpu" else 256
    fitting = max(1, pixels // (height * width))
    return min(most, 1 << (fitting.bit_length() - 1))


def default_num_images(height: int, width: int) -> int:
    """Return how many images calibrate a network: 256 up to 128 x 128 pixels, 64 beyond.

    A large image has as many positions as many small ones, and takes as long to make.
    """
    return 256 if height * width <= 128 * 128 else 64


def default_iterations(height: int, width: int) -> int:
    """Return the steps of each batch: 300 up to 256 x 256 pixels, 200 beyond.

    By then the loss has left its steep part; the published 1000 are for GPUs.
    """
    return 300 if height * width <= 256 * 256 else 200


def default_learning_rate(iterations: int) -> float:
    """Return RAdam's learning rate: the published 16 for the published 1000 steps, else 4.

    With fewer steps there is no time to come down from 16, in large images or small ones.
    """
    return 16.0 if iterations >= 1000 else 4.0


class _Job:
    """What the methods share: one network, one set of images to make."""

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

    def noise(
        self, writer: ImageWriter
    ) -> tuple[tuple[StatisticsMatch, ...], tuple[LossRecord, ...]]:
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

    def dgh(
        self, writer: ImageWriter, on_step: OnStep | None
    ) -> tuple[tuple[StatisticsMatch, ...], tuple[LossRecord, ...]]:
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
        iterations = settings.iterations or default_iterations(height, width)
        how = OptimizeSettings(
            iterations=iterations,
            learning_rate=settings.learning_rate or default_learning_rate(iterations),
            output_weight=settings.output_weight,
            output_ratio=settings.output_ratio,
        )
        matches, history = self._optimize(
            writer, self._network(heads), self._prior(), objective, how, on_step
        )
        return tuple(row for row in matches if row.node != PIXELS), history

    def prior(
        self, writer: ImageWriter, on_step: OnStep | None
    ) -> tuple[tuple[StatisticsMatch, ...], tuple[LossRecord, ...]]:
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
    ) -> tuple[tuple[StatisticsMatch, ...], tuple[LossRecord, ...]]:
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


def _warnings(method: str, has_batch_norm: bool) -> tuple[str, ...]:
    if method != "prior":
        return ()
    if has_batch_norm:
        return (
            "images from an image prior; the network's BatchNormalization statistics, which "
            "--method dgh matches, were not used",
        )
    return (_NO_PROMISE,)


def _missing_statistics(model: Model, some: bool) -> list[str]:
    """Say which nodes may once have had statistics that images could match."""
    notes = []
    bare = sorted(set(find_bare_convolutions(model)) - set(find_heads(model)))
    if some and bare:
        notes.append(
            f"{len(bare)} convolution(s) such as '{bare[0]}' have no BatchNormalization behind "
            "them: nothing binds the images there; if it was folded, --bn-from brings it back"
        )
    leftovers = find_affine_leftovers(model)
    if leftovers:
        notes.append(
            f"{len(leftovers)} Mul and Add pair(s) such as '{leftovers[0].mul}' may be what is "
            "left of BatchNormalization: scale and shift are used, statistics are not invented"
        )
    return notes


def _no_batch_norm(model: Model) -> NoBatchNormError:
    leftovers = find_affine_leftovers(model)
    what = "no BatchNormalization to match images to"
    if leftovers:
        what += (
            f" ({len(leftovers)} Mul and Add pair(s) such as '{leftovers[0].mul}' may be what "
            "is left of it, without statistics)"
        )
    return NoBatchNormError(
        what,
        where=str(model.source or "the model"),
        hint=f"take the statistics from a state_dict or unfolded export: --bn-from FILE; or "
        f"{_RE_EXPORT}; or calibrate with real images: --data DIR; or without any statistics: "
        "--method prior, --method noise",
    )


@contextlib.contextmanager
def _one_thread_if_tiny(pixels: int) -> Iterator[None]:
    """Images of up to 16 x 16 are done sooner than a second thread is woken."""
    threads = torch.get_num_threads()
    if pixels > 16 * 16 or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _reproducible(device: torch.device) -> Iterator[None]:
    """Make convolutions on a GPU give the same bits every time."""
    if device.type != "cuda":
        yield
        return
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        yield
