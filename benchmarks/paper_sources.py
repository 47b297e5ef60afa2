"""Where the images of an experiment come from: a method with settings, real ones, or noise.

Written as on the command line of `papers`: ``dgh``, ``sadag[sadag_form=pixels]``, ``real``,
``augmented`` (real ones, flipped and shifted as in training), ``normal`` (N(0, 1)).
"""

from __future__ import annotations

import functools
import json
import math
import re
import shutil
import tempfile
import time
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accuracy import CASES, SHARED, Case, model_path, normal_noise

from graph_tools.model import Model, load
from pipeline.generate import generate
from pipeline.generate.statistics import StatisticsMatch
from pipeline.images import ImageSet, ImageWriter, open_images
from pipeline.run import copy_dataset, quantizer_of
from pipeline.settings import GenerateSettings, QuantizeSettings

METHODS = [
    name
    for name in typing.get_args(typing.get_type_hints(GenerateSettings)["method"])
    if name != "auto"
]
"""Whatever --method offers."""
DATA = ("real", "augmented", "normal")


def named(method: str, **settings: Any) -> str:
    """``dgh[scope=1]``: a method and what it is given, by name."""
    words = [f"{name}={json.dumps(value)}" for name, value in sorted(settings.items())]
    return f"{method}[{','.join(words)}]".replace('"', "") if words else method


def parsed(source: str) -> tuple[str, dict[str, Any]]:
    """The inverse of `named`."""
    match = re.fullmatch(r"(\w+)(?:\[(.+)\])?", source)
    if match is None or match[1] not in (*METHODS, *DATA):
        raise SystemExit(f"{source!r} is none of {', '.join((*METHODS, *DATA))}")
    settings: dict[str, Any] = {}
    for entry in match[2].split(",") if match[2] else []:
        name, _, text = entry.partition("=")
        try:
            settings[name] = json.loads(text)
        except json.JSONDecodeError:
            settings[name] = text
    return match[1], settings


def images_of(
    source: str,
    network: str,
    seed: int,
    *,
    num_images: int = 0,
    iterations: int = 0,
    keep: Path | None = None,
    quantization: QuantizeSettings | None = None,
) -> tuple[Model, ImageSet, dict[str, Any]]:
    """Make or load images.

    Args:
        source: as in the module's docstring.
        network: name of a case of `accuracy`.
        seed: of everything random.
        num_images: 0 for as many as the case has.
        iterations: 0 for the method's own.
        keep: folder of images made before; these are not made again.
        quantization: what sadag refines for.

    Returns:
        The network, the images in a temporary place or in ``keep``, and facts of the run that
        made them.
    """
    case = CASES[network]
    model, (method, settings) = load(model_path(network)), parsed(source)
    if iterations and method not in DATA:
        settings = {"iterations": iterations, **settings}
    count = num_images or case.num_images
    bits = ""
    if method == "sadag" and quantization is not None:
        bits = f".w{quantization.weights}a{quantization.activations}{quantization.rounding}"
    folder = keep if keep is not None else Path(_scratch().name)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{network}.{named(method, **settings)}{bits}.{count}.{seed}.npz"
    facts: dict[str, Any] = {}
    if not path.exists():
        work = Path(tempfile.mkdtemp(prefix=".papers.", dir=folder))
        made = work / "images.npz"
        if method in DATA:
            made = _data(method, case, model, network, work, count, seed)
        else:
            chosen = {"num_images": count, "seed": seed, **settings}
            start = time.process_time()
            generated = generate(
                model,
                GenerateSettings(method=method, **chosen),  # type: ignore[arg-type]
                made,
                preprocessing=case.preprocessing,
                quantizer=quantizer_of(model, quantization, seed=seed),
            )
            history = generated.history
            facts = {
                "generation_seconds": generated.seconds,
                "generation_cpu_seconds": time.process_time() - start,
                "statistics_error": _error(generated.statistics),
                "first_loss": history[0].statistics if history else None,
                "last_loss": history[-1].statistics if history else None,
            }
        path.with_suffix(".json").write_text(json.dumps(facts))
        made.replace(path)
        shutil.rmtree(work)
    else:
        facts = json.loads(path.with_suffix(".json").read_text())
    images = open_images(path, shape=model.input.shape)
    return model, images, facts


def _error(matches: Sequence[StatisticsMatch]) -> float | None:
    """Root mean square over the nodes of what the written images miss, in sigmas."""
    errors = [(row.mean_error_after**2 + row.std_error_after**2) for row in matches]
    return math.sqrt(sum(errors) / len(errors)) if errors else None


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder that lives as long as this run."""
    return tempfile.TemporaryDirectory(prefix="papers.")


def _data(
    method: str, case: Case, model: Model, network: str, work: Path, count: int, seed: int
) -> Path:
    """Real images, or N(0, 1)."""
    if method == "normal":
        return normal_noise(model_path(network), work, count, seed)
    path = work / "real.npz"
    data = SHARED / "data" / case.calibration
    images = copy_dataset(data, model, case.preprocessing, path, count=count, seed=seed)
    if method == "real":
        return path
    changed, rng = work / "augmented.npz", np.random.default_rng(seed)
    axes = (1, 2) if model.input.layout == "NCHW" else (0, 1)
    with ImageWriter(changed, count=images.count, shape=model.input.shape) as writer:
        for batch in images.batches(1):
            writer.append(_augmented(batch[0], axes, rng)[None])
    return changed


def _augmented(
    image: np.ndarray, axes: tuple[int, int], rng: np.random.Generator
) -> np.ndarray:
    """Mirror at random, and shift by up to an eighth over gray (the mean), as in training."""
    if rng.random() < 0.5:
        image = np.flip(image, axes[1])
    reach = [image.shape[axis] // 8 for axis in axes]
    padding = [(0, 0)] * 3
    for axis, size in zip(axes, reach, strict=True):
        padding[axis] = (size, size)
    padded = np.pad(image, padding, constant_values=float(image.mean()))
    for axis, size in zip(axes, reach, strict=True):
        start = int(rng.integers(2 * size + 1))
        padded = np.take(padded, range(start, start + image.shape[axis]), axis)
    return padded
