"""Make more images than are wanted, and keep those least like each other.

Of the two images whose features have the largest cosine, the one that is more like the rest goes;
then again, until as many are left as are wanted. (SADAG, ICML 2024, asks for samples that differ;
here they are chosen, which costs nothing but their making.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from graph_tools.batchnorm import BatchNormSite
from graph_tools.model import Model
from pipeline.generate.features import directions, feature_tensors
from pipeline.generate.network import Network
from pipeline.generate.statistics import SiteTargets, StatisticsMatch
from pipeline.images import ImageSet, ImageWriter
from pipeline.preprocessing import Preprocessing
from pipeline.settings import GenerateSettings

__all__ = ["keep_least_alike", "least_alike"]

_BATCH = 16


def least_alike(vectors: npt.NDArray[np.floating], count: int) -> list[int]:
    """Return the places of ``count`` vectors that are little like each other, in order.

    Args:
        vectors: [N, F], unit vectors.
        count: at most N.
    """
    alike = vectors @ vectors.T
    np.fill_diagonal(alike, -np.inf)
    sums = np.where(np.isfinite(alike), alike, 0).sum(1)
    left = np.ones(len(vectors), dtype=bool)
    for _ in range(len(vectors) - count):
        first, second = np.unravel_index(int(np.argmax(alike)), alike.shape)
        gone = int(first if sums[first] >= sums[second] else second)
        sums -= np.where(np.isfinite(alike[gone]), alike[gone], 0)
        alike[gone], alike[:, gone] = -np.inf, -np.inf
        left[gone] = False
    return [int(place) for place in np.flatnonzero(left)]


def keep_least_alike(
    model: Model,
    images: ImageSet,
    writer: ImageWriter,
    sites: Sequence[BatchNormSite],
    preprocessing: Preprocessing,
    settings: GenerateSettings,
    count: int,
    statistics: Sequence[StatisticsMatch],
) -> tuple[StatisticsMatch, ...]:
    """Write ``count`` of the images.

    Args:
        model: the network.
        images: all that were made.
        writer: takes those that are kept.
        sites: BatchNormalization nodes.
        preprocessing: how pixels become the model's input.
        settings: of which device and engine matter.
        count: how many to keep.
        statistics: how well all images meet the statistics.

    Returns:
        How well those that are kept do.
    """
    device, names = torch.device(settings.device), feature_tensors(model)
    tensors = [*names, *(site.tensor for site in sites)]
    network = Network(model, tensors, preprocessing, device, settings.engine)
    size = network.chunk or _BATCH
    vectors = []
    with torch.no_grad():
        for batch in images.batches(size):
            values = network.run(torch.from_numpy(batch).to(device))
            vectors.append(directions(values, names).cpu().numpy())
        kept = set(least_alike(np.concatenate(vectors), count))
        targets = SiteTargets(sites, device) if statistics else None
        sums = targets.zero() if targets is not None else None
        for place, batch in enumerate(images.batches(size)):
            chosen = batch[[place * size + row in kept for row in range(len(batch))]]
            if not len(chosen):
                continue
            writer.append(chosen)
            if targets is not None and sums is not None:
                values = network.run(torch.from_numpy(chosen).to(device))
                sums = sums + targets.measure(values)
    if targets is None or sums is None:
        return tuple(statistics)
    after = {row.node: row for row in targets.match(sums, sums)}
    return tuple(
        replace(
            row,
            mean_error_after=after[row.node].mean_error_after,
            std_error_after=after[row.node].std_error_after,
        )
        for row in statistics
    )
