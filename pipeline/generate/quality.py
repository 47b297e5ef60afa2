"""How good images are, as far as that can be told without data.

Three measures: how far BatchNormalization statistics are off, how far the outputs are spread, and
how alike the images are. The last two are compared with synthetic natural images
(`pipeline.generate.synthetic`), which drive every network about as photographs do and are the same
for all methods.

A warning says what to change. The bounds lie between runs of all methods that were let run and runs
that were cut short (one step) or held (learning rate 1e-6) on the shipped digit networks; see
tests/pipeline/generate/test_quality.py.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from graph_tools.errors import UnsupportedOperatorError
from graph_tools.model import Model
from pipeline.generate.features import directions, feature_tensors
from pipeline.generate.heads import find_heads
from pipeline.generate.loop import LossRecord
from pipeline.generate.network import Network, standard_range
from pipeline.generate.statistics import StatisticsMatch
from pipeline.generate.stretch import ranges
from pipeline.generate.synthetic import synthetic_source
from pipeline.images import ImageSet
from pipeline.preprocessing import Preprocessing
from pipeline.settings import GenerateSettings

__all__ = ["UNMEASURED", "Quality", "measure_quality"]

logger = logging.getLogger(__name__)

_IMAGES, _BATCH = 256, 16
_HARDLY = 0.9  # of the error at the start: more is no progress
_NEAR = 0.2  # sigma: images that start nearer need not improve
_NARROW = 0.4  # of the range of synthetic images
_ALIKE = 0.98  # cosine


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Measures of a set of images; None where a measure does not apply.

    Args:
        mean_error_before: see `StatisticsMatch`, averaged over the nodes.
        mean_error_after: likewise.
        std_error_before: likewise.
        std_error_after: likewise.
        output_range: range of each image's outputs, against that of synthetic images.
        similarity: mean cosine between the features of two images.
        reference_similarity: that of synthetic images.
        line: all of it in words.
        warnings: what is poor, and what to change.
    """

    mean_error_before: float | None
    mean_error_after: float | None
    std_error_before: float | None
    std_error_after: float | None
    output_range: float | None
    similarity: float | None
    reference_similarity: float | None
    line: str
    warnings: tuple[str, ...]


UNMEASURED = Quality(
    mean_error_before=None,
    mean_error_after=None,
    std_error_before=None,
    std_error_after=None,
    output_range=None,
    similarity=None,
    reference_similarity=None,
    line="not measured",
    warnings=(),
)


def measure_quality(
    model: Model,
    images: ImageSet,
    preprocessing: Preprocessing,
    settings: GenerateSettings,
    statistics: Sequence[StatisticsMatch],
    history: Sequence[LossRecord],
) -> Quality:
    """Measure images that a method made.

    Args:
        model: the network.
        images: as written.
        preprocessing: how pixels become the model's input.
        settings: of which seed, device and engine matter.
        statistics: how well each node's statistics are met.
        history: loss of every iteration.
    """
    device = torch.device(settings.device)
    count = min(images.count, _IMAGES)
    found = reference = _Measures((), None)
    try:
        probe = _Probe(model, preprocessing, device, settings.engine)
    except UnsupportedOperatorError as error:  # behind all that the method needed
        logger.warning("outputs and features are not measured: %s", error)
    else:
        batches = images.batches(_BATCH, limit=count)
        found = probe.measure(torch.from_numpy(batch).to(device) for batch in batches)
        reference = probe.measure(probe.synthetic(min(count, 64), settings.seed))
    pairs = zip(found.ranges, reference.ranges, strict=True)
    spans = [own / other for own, other in pairs if other > 0]
    output_range = sum(spans) / len(spans) if spans else None
    errors = [
        sum(getattr(row, f"{kind}_error_{when}") for row in statistics) / len(statistics)
        if statistics
        else None
        for kind in ("mean", "std")
        for when in ("before", "after")
    ]
    return Quality(
        mean_error_before=errors[0],
        mean_error_after=errors[1],
        std_error_before=errors[2],
        std_error_after=errors[3],
        output_range=output_range,
        similarity=found.similarity,
        reference_similarity=reference.similarity,
        line=_line(errors, output_range, found.similarity, reference.similarity),
        warnings=tuple(
            _warnings(errors, output_range, found.similarity, reference.similarity, history)
        ),
    )


@dataclass(frozen=True)
class _Measures:
    ranges: tuple[float, ...]
    similarity: float | None


class _Probe:
    """A network, observed at its outputs and at what tells images from each other."""

    def __init__(
        self,
        model: Model,
        preprocessing: Preprocessing,
        device: torch.device,
        engine: Literal["torch", "ort"],
    ) -> None:
        self._heads, self._features = find_heads(model), feature_tensors(model)
        names = [*self._heads, *self._features]
        self._network = Network(model, names, preprocessing, device, engine)
        self._model, self._preprocessing = model, preprocessing

    def synthetic(self, count: int, seed: int) -> Iterable[Tensor]:
        """Yield synthetic images as the model's input."""
        entry = self._model.input
        generator = torch.Generator().manual_seed(seed)
        source = synthetic_source(self._preprocessing, entry.channels)
        low, high = standard_range(self._preprocessing, entry.channels)
        shape = (entry.channels, entry.height, entry.width)
        for start in range(0, count, _BATCH):
            images = source(min(_BATCH, count - start), shape, generator)
            images = torch.clamp(images, low, high).to(self._network.device)
            yield self._network.model_input(images)

    def measure(self, batches: Iterable[Tensor]) -> _Measures:
        """Run images, [N, ...] as the model takes them."""
        spans, total, count = [0.0] * len(self._heads), None, 0
        with torch.no_grad():
            for batch in batches:
                for chunk in torch.split(batch, self._network.chunk or len(batch)):
                    values = self._network.run(chunk)
                    for place, name in enumerate(self._heads):
                        spans[place] += float(ranges(values[name]).double().sum())
                    unit = directions(values, self._features).sum(0)
                    total = unit if total is None else total + unit
                    count += len(chunk)
        similarity = None
        if total is not None and count > 1:
            similarity = (float(total.square().sum()) - count) / (count * (count - 1))
        return _Measures(tuple(span / count for span in spans), similarity)


def _line(
    errors: Sequence[float | None],
    output_range: float | None,
    similarity: float | None,
    reference: float | None,
) -> str:
    words = []
    if errors[0] is not None:
        words.append(
            f"BatchNormalization statistics off by {errors[0]:.2f} -> {errors[1]:.2f} sigma "
            f"(means) and {errors[2]:.2f} -> {errors[3]:.2f} (deviations)"
        )
    if output_range is not None:
        words.append(f"outputs span {output_range:.2f} times what synthetic images' do")
    if similarity is not None:
        words.append(f"features of two images alike to {similarity:.2f}")
        if reference is not None:
            words[-1] += f" (synthetic {reference:.2f})"
    return "; ".join(words)


def _warnings(
    errors: Sequence[float | None],
    output_range: float | None,
    similarity: float | None,
    reference: float | None,
    history: Sequence[LossRecord],
) -> Iterable[str]:
    before, after = (
        math.hypot(*(e for e in errors[when::2] if e is not None)) for when in (0, 1)
    )
    if errors[0] is not None and history and after > max(_HARDLY * before, _NEAR):
        yield (
            f"the images' statistics are hardly nearer to the network's than at the start "
            f"({before:.2f} -> {after:.2f} sigma): raise --iterations or --learning-rate"
        )
    elif len(history) > 1 and history[-1].total >= history[0].total > 0:
        yield (
            f"the loss never fell ({history[0].total:.3g} -> {history[-1].total:.3g}): lower "
            "--learning-rate, or raise --iterations"
        )
    if output_range is not None and output_range < _NARROW:
        yield (
            f"the outputs span only {output_range:.2f} of what synthetic images' do, so that "
            "thresholds there will clip: use --method dgh, or raise --output-ratio"
        )
    if similarity is not None and similarity > max(_ALIKE, reference or 0.0):
        yield (
            f"the images are nearly the same to the network (similarity {similarity:.3f}): give "
            "other --method or --start, or fewer --iterations"
        )
