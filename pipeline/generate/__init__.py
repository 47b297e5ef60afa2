"""Make calibration images from a network alone.

`generate` is the way in. A method (`methods`) says what images should fulfil (`dgh`; `diversity`
for method prior, which starts from `synthetic` images) or makes them outright (`noise`); `job`
gives it what it needs; statistics, views, store and loop are shared.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from graph_tools.batchnorm import (
    find_affine_leftovers,
    find_bare_convolutions,
    find_batch_norms,
)
from graph_tools.errors import NoBatchNormError, SettingsError
from graph_tools.model import Model
from pipeline.generate.allocator import reused_memory
from pipeline.generate.checkpoints import checkpoint_folder, remove_checkpoints
from pipeline.generate.defaults import (
    default_batch_size,
    default_iterations,
    default_learning_rate,
    default_num_images,
)
from pipeline.generate.heads import find_heads
from pipeline.generate.input_range import doubt, guess_preprocessing
from pipeline.generate.job import Job, Made
from pipeline.generate.keeping import identity_of, keeping, with_smaller_batches
from pipeline.generate.loop import LossRecord, OnStep
from pipeline.generate.methods import METHODS, NEEDS_BATCH_NORM
from pipeline.generate.network import torch_device
from pipeline.generate.quality import UNMEASURED, Quality, measure_quality
from pipeline.generate.quantized import Quantizer
from pipeline.generate.selection import keep_least_alike
from pipeline.generate.statistics import StatisticsMatch
from pipeline.generate.store import temporary_folder
from pipeline.generate.unread import Watched
from pipeline.images import ImageSet, ImageWriter, open_images
from pipeline.preprocessing import Preprocessing
from pipeline.ranks import ALONE, Ranks
from pipeline.settings import CheckpointSettings, GenerateSettings

__all__ = [
    "Generated",
    "LossRecord",
    "OnStep",
    "Quality",
    "Quantizer",
    "StatisticsMatch",
    "checkpoint_folder",
    "default_batch_size",
    "default_iterations",
    "default_learning_rate",
    "default_num_images",
    "generate",
    "remove_checkpoints",
    "with_lanes",
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
        quality: how good the images are, as far as can be told without data.
        seconds: time taken.
        notes: what the user should know.
        warnings: what the user must know before relying on the images.
    """

    images: ImageSet
    method: str
    preprocessing: Preprocessing
    history: tuple[LossRecord, ...]
    statistics: tuple[StatisticsMatch, ...]
    quality: Quality
    seconds: float
    notes: tuple[str, ...]
    warnings: tuple[str, ...] = ()


def generate(
    model: Model,
    settings: GenerateSettings,
    path: Path,
    *,
    preprocessing: Preprocessing | None = None,
    quantizer: Quantizer | None = None,
    on_step: OnStep | None = None,
    checkpoints: CheckpointSettings | None = None,
    output: Path | None = None,
    purpose: Mapping[str, Any] | None = None,
    ranks: Ranks = ALONE,
) -> Generated:
    """Make images for a network and write them to ``path``.

    The memory needed does not depend on their number; canvases and optimizer state are kept in
    a temporary folder. Where a batch does not fit into memory, all starts anew with batches of half
    the size.

    Args:
        model: the network.
        settings: method, number of images, seed and so on.
        path: the .npz file to write; whole or absent.
        preprocessing: how pixels become the model's input; guessed if None, or if it was given
            and the first BatchNormalization contradicts it, with a warning.
        quantizer: quantizes the network; for method sadag.
        on_step: called as (done, total, loss terms).
        checkpoints: when to write them, and whether to go on from one.
        output: what the images are made for: checkpoints and temporary files lie beside it, and
            checkpoints are left for `remove_checkpoints`; by default ``path``, and none is left.
        purpose: settings of the quantizer, which a checkpoint must agree with, too.
        ranks: the processes of the run, all of which call this; the first one's checkpoints
            count, and each writes the same images to a ``path`` of its own.

    Returns:
        The images, in the model's own layout and normalization, and the record of the run.

    Raises:
        NoBatchNormError: the method matches BatchNormalization, and the network has none.
        GenerationError: the loss or an observed tensor is not finite.
        DataError: ``path`` cannot be written.
        SettingsError: the device does not exist, ``preprocessing`` is for other channels, the
            method is for classifiers, and the network is none, or the checkpoint is of another run.
        Interrupted: SIGINT or SIGTERM; there is a checkpoint.
    """
    start = time.perf_counter()
    count = settings.num_images or default_num_images(model.input.height, model.input.width)
    settings = given = with_lanes(settings, ranks)
    settings = replace(settings, num_images=math.ceil(count * settings.oversample))
    sites = find_batch_norms(model)
    method = settings.method
    if method == "auto":
        method = "dgh" if sites else "prior"
    if method in NEEDS_BATCH_NORM and not sites:
        raise _no_batch_norm(model)
    device = ranks.device(torch_device(settings.device))
    notes = []
    if preprocessing is None:
        preprocessing = guess_preprocessing(model, seed=settings.seed)
        notes.append(f"input normalization {preprocessing.source}")
    doubts: tuple[str, ...] = ()
    if preprocessing.source == "given":
        found = doubt(model, preprocessing, seed=settings.seed)
        if found is not None and method == "noise":  # looks at no statistics
            doubts = (found.text,)
        elif found is not None:
            preprocessing = found.better
            doubts = (f"{found.text}; the images are made by the latter",)
    if sites:
        notes.append(f"{len(sites)} BatchNormalization node(s) found and observed")
    notes += _missing_statistics(model, bool(sites))
    watched = Watched(settings)
    if model.fixed_batch is not None and sites:
        notes.append(f"the model takes only {model.fixed_batch} image(s) at a time: slow")
    with (
        keeping(
            output or path,
            checkpoints or CheckpointSettings(),
            identity_of(model, given, preprocessing, purpose),
            ranks,
        ) as kept,
        _reproducible(device),
        _one_thread_if_tiny(model.input.height * model.input.width),
        reused_memory(),
    ):

        def make(batch_size: int) -> Made:
            nonlocal watched
            watched = Watched(replace(settings, batch_size=batch_size))
            job = Job(
                model,
                watched.as_settings,
                sites,
                preprocessing,
                device,
                quantizer,
                kept,
            )
            with ImageWriter(path, count=count, shape=model.input.shape) as writer:
                made = _make(job, method, writer, on_step, count)
                ranks.barrier()  # nobody leaves while another one waits for its images
                return made

        statistics, history = with_smaller_batches(make, settings, model.input, kept)
        notes += [
            f"--{name.replace('_', '-')} means nothing to method {method} and was not used"
            for name in watched.unread()
        ]
        images = open_images(path, shape=model.input.shape)
        quality = UNMEASURED
        if ranks.rank == 0:
            quality = measure_quality(
                model, images, preprocessing, settings, statistics, history
            )
        if output is None:
            kept.clear()
    seconds = time.perf_counter() - start
    logger.info("%d images by %s in %.1f s", count, method, seconds)
    return Generated(
        images=images,
        method=method,
        preprocessing=preprocessing,
        history=history,
        statistics=statistics,
        quality=quality,
        seconds=seconds,
        notes=(*notes, *kept.notes),
        warnings=(*doubts, *kept.warnings, *_warnings(method, bool(sites)), *quality.warnings),
    )


def with_lanes(settings: GenerateSettings, ranks: Ranks) -> GenerateSettings:
    """Return the settings with the number of batches that advance at the same time.

    Raises:
        SettingsError: the processes cannot share them out evenly.
    """
    lanes = settings.parallel_batches or ranks.count
    if lanes % ranks.count:
        raise SettingsError(
            f"{lanes} batches cannot be shared out evenly among {ranks.count} processes",
            where=f"--parallel-batches {lanes}",
            hint=f"give a multiple of {ranks.count}",
        )
    return replace(settings, parallel_batches=lanes)


def _make(
    job: Job, method: str, writer: ImageWriter, on_step: OnStep | None, count: int
) -> Made:
    """Make images and write ``count`` of them."""
    more, shape = job.settings.num_images, job.model.input.shape
    if more == count:
        return METHODS[method](job, writer, on_step)
    with temporary_folder(job.scratch(writer.path)) as folder:
        with ImageWriter(folder / "all.npz", count=more, shape=shape) as everything:
            statistics, history = METHODS[method](job, everything, on_step)
        made = open_images(everything.path, shape=shape)
        kept = keep_least_alike(
            job.model,
            made,
            writer,
            job.sites,
            job.preprocessing,
            job.settings,
            count,
            statistics,
        )
    return kept, history


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
