"""IntraQ: images of a class that differ from each other (CVPR 2022, arXiv 2111.09136).

Four parts, equally weighted:

    statistics  mean over the nodes of the mean squares, over channels, of m - mean and of
                v - variance; a batch's own moments
    inception   (p_y - t)^2: an image's probability of its class y, against 1 or, for half of the
                images, a number between ``confidence`` and 1
    margins     max(low - d, 0) + max(d - high, 0): the cosine distance d of an image's features
                from the mean of those that the other images of its class last had
    views       in half of the steps every image is shown by a resized crop of its own of at least
                half its area, half of them mirrored

Features are the input of the last linear layer. As published: standard normal starts, no smoothing,
no clipping, Adam at 0.5, a tenth of it after a twentieth of the steps without progress, constants
by the number of classes (CIFAR-10, CIFAR-100, ImageNet). Published are 1000 steps for batches of
256, one group after the other; here all batches advance together, and there are as many steps as
DGH takes from noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from graph_tools.errors import SettingsError
from pipeline.generate.job import Job, Made
from pipeline.generate.last_linear import LastLinear, find_last_linear
from pipeline.generate.loop import OnStep
from pipeline.generate.objective import Objective
from pipeline.generate.statistics import SiteTargets, Sums
from pipeline.images import ImageWriter

__all__ = ["IntraqObjective", "constants", "make_intraq"]

_LEARNING_RATE, _ITERATIONS, _PATIENCE, _CROP = 0.5, 1000, 50, 0.5


@dataclass(kw_only=True)
class IntraqObjective(Objective):
    """The loss of IntraQ.

    Args:
        targets: statistics that each batch is to have.
        layer: the last linear layer.
        labels: class of every image, [images] int64.
        wanted: probability of that class to reach, [images] float32.
        low: least cosine distance from the class mean.
        high: largest.
    """

    one_by_one: ClassVar[bool] = True
    targets: SiteTargets
    layer: LastLinear
    labels: Tensor
    wanted: Tensor
    low: float
    high: float
    _features: Tensor | None = field(default=None, init=False)  # [images, F], last seen
    _seen: Tensor | None = field(default=None, init=False)  # [images] float32, 0 or 1

    def statistics(self, sums: Sums) -> Tensor:
        """Return the mean squared errors of the moments, averaged over channels and nodes."""
        offset, variance = sums.moments()
        error = offset.square() + (variance - self.targets.variance).square()
        return self.targets.mean_over_channels(error).mean()

    def images(self, values: Mapping[str, Tensor], first: int) -> Tensor:
        """Return the terms of the classes, averaged over the images."""
        logits = values[self.layer.logits].flatten(1)
        rows = slice(first, first + len(logits))
        labels, wanted = (
            table[rows].to(logits.device) for table in (self.labels, self.wanted)
        )
        chances = torch.softmax(logits, 1).gather(1, labels.unsqueeze(1)).squeeze(1)
        loss = (chances - wanted).square().mean()
        if self._features is None or self._seen is None:
            return loss
        means, known = self._class_means(labels, rows)
        features = values[self.layer.features].flatten(1)
        distance = 1 - functional.cosine_similarity(features, means, dim=1)
        outside = torch.relu(self.low - distance) + torch.relu(distance - self.high)
        return loss + (known * outside).mean()

    def remember(self, values: Mapping[str, Tensor], first: int) -> None:
        """Keep the features of these images."""
        features = values[self.layer.features].flatten(1)
        if self._features is None or self._seen is None:
            self._features = features.new_zeros(len(self.labels), features.shape[1])
            self._seen = features.new_zeros(len(self.labels))
        self._features[first : first + len(features)] = features
        self._seen[first : first + len(features)] = 1

    def state(self) -> dict[str, Tensor]:
        """Return the features last seen."""
        if self._features is None or self._seen is None:
            return {}
        return {"features": self._features, "seen": self._seen}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        if state:
            device = self.targets.center.device
            self._features, self._seen = (
                state[name].to(device) for name in ("features", "seen")
            )

    def _class_means(self, labels: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Return each image's mean of the others of its class, and whether there are any."""
        assert self._features is not None
        assert self._seen is not None
        alike = (labels.unsqueeze(1) == self.labels.to(labels.device)).to(self._seen)
        alike = alike * self._seen
        places = torch.arange(rows.start, rows.start + len(labels), device=labels.device)
        alike[torch.arange(len(labels)), places] = 0
        count = alike.sum(1, keepdim=True)
        return alike @ self._features / count.clamp_min(1), (count > 0).squeeze(1)


def constants(classes: int) -> tuple[float, float, float]:
    """Return the published confidence and margins: those of CIFAR-10, CIFAR-100, ImageNet."""
    if classes <= 10:
        return 0.95, 0.05, 0.8
    return (0.6, 0.02, 1.0) if classes <= 100 else (1.0, 0.0, 2.0)


def make_intraq(job: Job, writer: ImageWriter, on_step: OnStep | None) -> Made:
    """Optimize images by IntraQ and write them.

    Raises:
        SettingsError: the network is no classifier.
    """
    generator = job.generator
    layer = find_last_linear(job.model)
    if layer is None:
        raise SettingsError(
            "intraq makes images of classes, and this network is no classifier: it needs a single "
            "output [N, classes] behind a linear layer",
            where="--method intraq",
            hint="--method dgh serves every network with BatchNormalization",
        )
    count = sum(job.sizes)
    confidence, low, high = constants(layer.classes)
    rounds = [
        torch.randperm(layer.classes, generator=generator)
        for _ in range(-(-count // layer.classes))
    ]
    soft = confidence + (1 - confidence) * torch.rand(count, generator=generator)
    sure = torch.rand(count, generator=generator) < 0.5
    objective = IntraqObjective(
        targets=SiteTargets(job.sites, job.device),
        layer=layer,
        labels=torch.cat(rounds)[:count],
        wanted=torch.where(sure, torch.ones(()), soft),
        low=low,
        high=high,
    )
    how = job.by_adam(_LEARNING_RATE, patience=_PATIENCE, published=_ITERATIONS, scope=1)
    prior = job.image_prior(padding=0, blur=0.0, clip=False, crop_scale=_CROP)
    network = job.network((layer.logits, layer.features))
    return job.optimize(writer, network, prior, objective, how, on_step)
