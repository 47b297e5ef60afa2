"""Find out how pixels become a network's input: from its graph, or its BatchNormalization.

A graph that begins with a normalization of its own (Sub, Div and the like) or takes uint8 says
itself which pixels it wants. Others do not say whether they take 0..1, -1..1, 0..255 or
standardized pixels, but the statistics of the first BatchNormalization node remember it. Images
with the spectrum and the colors of natural ones (amplitude 1/f, strongly correlated channels;
Field 1987, Ruderman et al. 1998) go through the network under each usual normalization, and the
one that comes closest to the first node's statistics is taken; later nodes see shapes, too,
which noise has not, and mislead. If none comes close, a free scale and offset are fitted, so that
images at least span the range that the network was trained on.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from graph_tools.batchnorm import BatchNormSite, find_batch_norms
from graph_tools.errors import SettingsError
from graph_tools.input_affine import InputAffine, find_input_affine
from graph_tools.model import Model
from pipeline.generate.network import Network
from pipeline.generate.prior import PIXEL_MEAN, PIXEL_STD
from pipeline.generate.statistics import SiteTargets
from pipeline.generate.synthetic import colored, pink_noise
from pipeline.preprocessing import Preprocessing

if TYPE_CHECKING:
    from pipeline.preprocessing import ChannelOrder

__all__ = ["Doubt", "doubt", "guess_preprocessing", "natural_noise"]

logger = logging.getLogger(__name__)

_NUM_IMAGES = 16
_METADATA = "preprocessing"
_GOOD = 0.8  # error in sigmas up to which a guess is believed
_CLEARLY = 0.92  # another guess must be better by this factor

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_COLOR = {
    "pixels standardized by ImageNet's mean and std": (_MEAN, _STD),
    "pixels in -1..1": ((0.5,), (0.5,)),
    "pixels in 0..1": ((0.0,), (1.0,)),
    "pixels in 0..255": ((0.0,), (1 / 255,)),
    "pixels in 0..255 less ImageNet's mean": (_MEAN, (1 / 255,)),
}
_OTHER = {
    "standardized pixels": ((PIXEL_MEAN,), (PIXEL_STD,)),
    "pixels in -1..1": ((0.5,), (0.5,)),
    "pixels in 0..1": ((0.0,), (1.0,)),
    "pixels in 0..255": ((0.0,), (1 / 255,)),
}
_RANGES = ((0.0, 255.0), (0.0, 1.0), (-1.0, 1.0))
_USUAL_STD = 0.5  # between that of pixels in 0..1 and of standardized ones
_DOUBTFUL = 0.5  # error in sigmas from which a given normalization is doubted, if another one
_CLEARLY_LESS = 0.5  # has at most this share of it


def guess_preprocessing(
    model: Model, *, channels: ChannelOrder | None = None, seed: int = 0
) -> Preprocessing:
    """Find the normalization that a network expects, or guess it.

    Args:
        model: the network.
        channels: channel order, if it is known; otherwise BGR is chosen if it fits clearly
            better than RGB.
        seed: of the images that are tried.

    Returns:
        A normalization; its source is "model metadata" if the file states it (key
        "preprocessing", JSON with mean and std), begins with "read from the graph: " if that
        says it, else with "guessed: ", or with "assumed: " if the network has no
        BatchNormalization to learn from.
    """
    stated = _stated(model)
    if stated is not None:
        return stated
    sites = find_batch_norms(model)[:1]
    told = _told(model, channels)
    if told is not None:
        if sites and channels is None and model.input.channels == 3:
            told = _ordered(told, _Trial(model, sites[0], seed))
        return told
    if not sites:
        name, chosen = next(iter(_candidates(model.input.channels, channels or "rgb").items()))
        return replace(
            chosen, source=f"assumed: {name} (no BatchNormalization to learn the range from)"
        )
    trial = _Trial(model, sites[0], seed)
    name, chosen, error = _best(trial, model.input.channels, channels or "rgb")
    if channels is None and model.input.channels == 3:
        other = _best(trial, 3, "bgr")
        if other[2] < _CLEARLY * error:
            name, chosen, error = other
    if not error <= _GOOD:
        fitted = trial.fit(chosen.channels)
        if trial.error(fitted) < _CLEARLY * error:
            name, chosen = "scale and offset fitted", fitted
            error = trial.error(fitted)
    order = f", {chosen.channels.upper()} order" if model.input.channels == 3 else ""
    trust = "" if error <= _GOOD else "; a poor fit, give --mean and --std if you know them"
    logger.info("input: %s%s, error %.2f sigma", name, order, error)
    return replace(chosen, source=f"guessed: {name}{order} (error {error:.2f} sigma{trust})")


@dataclass(frozen=True, kw_only=True)
class Doubt:
    """A normalization that was given, and does not fit the network.

    Args:
        text: what speaks against it.
        better: one that fits.
    """

    text: str
    better: Preprocessing


def doubt(model: Model, given: Preprocessing, *, seed: int = 0) -> Doubt | None:
    """Say what speaks against a normalization that was given; None if nothing does.

    Args:
        model: the network.
        given: the normalization.
        seed: of the images that are tried.
    """
    sites = find_batch_norms(model)[:1]
    if not sites:
        return None
    trial = _Trial(model, sites[0], seed)
    error = trial.error(given)
    if error < _DOUBTFUL:
        return None
    name, better, least = _best(trial, model.input.channels, given.channels)
    if not least <= min(_GOOD, _CLEARLY_LESS * error):
        return None
    return Doubt(
        text="the normalization that was given contradicts the first BatchNormalization: it is "
        f"off by {error:.1f} sigma, {name} by {least:.1f}",
        better=replace(better, source=f"guessed: {name}, against what was given"),
    )


def _told(model: Model, channels: ChannelOrder | None) -> Preprocessing | None:
    """Return the normalization that follows from the graph alone, None if none does."""
    if model.input.integer:
        source = "read from the graph: uint8 input, pixels in 0..255"
        return Preprocessing.of_range(0, 255, channels=channels or "rgb", source=source)
    affine = find_input_affine(model)
    if affine is None:
        return None
    low, high = min(_RANGES, key=lambda ends: _oddness(affine, *ends))
    means = (-affine.offset / affine.scale).tolist()
    rising = len(means) == 3 and means[0] < means[1] < means[2]  # blue, green, red
    order: ChannelOrder = channels or ("bgr" if rising else "rgb")
    text = f", {order.upper()} order" if model.input.channels == 3 else ""
    return Preprocessing.of_range(
        low,
        high,
        channels=order,
        source=f"read from the graph: it normalizes itself ({', '.join(affine.operators)}), "
        f"pixels in {low:g}..{high:g}{text}",
    )


def _oddness(affine: InputAffine, low: float, high: float) -> float:
    """Return how unlike a usual normalization a graph makes natural pixels of a range."""
    mean = affine.scale * (low + PIXEL_MEAN * (high - low)) + affine.offset
    std = affine.scale * PIXEL_STD * (high - low)
    return float(np.mean(np.abs(mean) / std + np.abs(np.log(std / _USUAL_STD))))


def _ordered(told: Preprocessing, trial: _Trial) -> Preprocessing:
    """Choose the channel order that the first BatchNormalization fits clearly better."""
    other: ChannelOrder = "rgb" if told.channels == "bgr" else "bgr"
    turned = replace(told, channels=other)
    if trial.error(turned) >= _CLEARLY * trial.error(told):
        return told
    before, after = (f"{order.upper()} order" for order in (told.channels, other))
    source = told.source.replace(before, after)
    return replace(turned, source=source if after in source else f"{source}, {after}")


def _stated(model: Model) -> Preprocessing | None:
    """Return the normalization that the file's metadata states, None without one."""
    properties = {entry.key: entry.value for entry in model.proto.metadata_props}
    if _METADATA not in properties:
        return None
    try:
        stated = Preprocessing.from_dict(json.loads(properties[_METADATA]))
        stated.valid_range(model.input.channels)
    except (ValueError, TypeError, AttributeError, SettingsError) as error:
        logger.warning("metadata '%s' is not understood: %s", _METADATA, error)
        return None
    return replace(stated, source="model metadata")


def natural_noise(
    count: int, shape: tuple[int, int, int], generator: torch.Generator
) -> Tensor:
    """Return noise with the spectrum and the colors of natural images.

    Args:
        count: number of images N.
        shape: [C, H, W]; RGB if C is 3.
        generator: on the CPU.

    Returns:
        [N, C, H, W] float32, pixels in 0..1.
    """
    pink = colored(pink_noise(count, shape, generator))
    mean = torch.tensor(_MEAN if shape[0] == 3 else (PIXEL_MEAN,)).view(1, -1, 1, 1)
    return torch.clamp(mean + 0.26 * pink, 0, 1)


def _candidates(num_channels: int, order: ChannelOrder) -> dict[str, Preprocessing]:
    table = _COLOR if num_channels == 3 else _OTHER
    step = -1 if order == "bgr" else 1
    return {
        name: Preprocessing(mean=mean[::step], std=std[::step], channels=order)
        for name, (mean, std) in table.items()
    }


def _best(
    trial: _Trial, num_channels: int, order: ChannelOrder
) -> tuple[str, Preprocessing, float]:
    candidates = _candidates(num_channels, order)
    errors = {name: trial.error(candidate) for name, candidate in candidates.items()}
    logger.debug("input, %s: %s", order, errors)
    name = min(errors, key=lambda key: errors[key])
    return name, candidates[name], errors[name]


class _Trial:
    """Natural noise through a network up to its first BatchNormalization node."""

    def __init__(self, model: Model, site: BatchNormSite, seed: int) -> None:
        entry = model.input
        self._channels = entry.channels
        self._targets = SiteTargets([site], torch.device("cpu"))
        start = Preprocessing(mean=(0.0,), std=(1.0,))
        self._network = Network(model, self._targets.tensors, start, torch.device("cpu"))
        shape = (entry.channels, entry.height, entry.width)
        pixels = natural_noise(_NUM_IMAGES, shape, torch.Generator().manual_seed(seed))
        self._images = (pixels - PIXEL_MEAN) / PIXEL_STD

    def error(self, preprocessing: Preprocessing) -> float:
        """Return the root mean square error of mean and std together, in sigmas."""
        self._network.rescale(preprocessing, self._channels)
        images = self._images
        if preprocessing.channels == "bgr" and self._channels == 3:
            images = images.flip(1)
        sums = self._targets.zero()
        with torch.no_grad():
            for chunk in torch.split(images, self._network.chunk or len(images)):
                sums = sums + self._targets.measure(self._network.observe(chunk))
        error = float(np.hypot(*self._targets.errors(sums)[0]))
        return error if np.isfinite(error) else float("inf")

    def fit(self, order: ChannelOrder) -> Preprocessing:
        """Search scale and offset for the best match."""
        trials = [
            Preprocessing(mean=(mean,), std=(float(std),), channels=order)
            for std in np.geomspace(1 / 1024, 4, 25)
            for mean in (0.0, 0.25, 0.45, 0.5, 1.0)
        ]
        return min(trials, key=self.error)
