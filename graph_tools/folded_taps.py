"""Fold BatchNormalization away without losing sight of what it reads.

Behind a convolution with folded weights lies what BatchNormalization would have put out,

    y = scale (x - mean) / sigma + bias,      sigma = sqrt(variance + epsilon),

channel by channel, so the moments of its input follow from those of ``y``:

    mean(x) = mean + gain (mean(y) - bias),   variance(x) = gain^2 variance(y)

with gain = sigma / scale.

A pass over every activation is saved, forward and backward. Channels whose scale is next to nothing
cannot be inverted: a node with one stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graph_tools.batchnorm import BatchNormSite, find_batch_norms, fold_batch_norms
from graph_tools.model import Model

__all__ = ["Tap", "fold_taps"]


@dataclass(frozen=True, kw_only=True)
class Tap:
    """Where the input of a folded BatchNormalization is seen.

    Attributes:
        tensor: the output of the folded node, ``[N, C, ...]``.
        gain: sigma / scale, ``[C] float64``.
        center: value of ``tensor`` where the input is at its stored mean, ``[C] float64``.
    """

    tensor: str
    gain: np.ndarray
    center: np.ndarray


def fold_taps(
    model: Model, sites: Sequence[BatchNormSite], *, largest_ratio: float = 1e3
) -> tuple[Model, dict[str, Tap]]:
    """Fold the BatchNormalization nodes that can be, and say where their inputs are seen now.

    Args:
        model: the network.
        sites: nodes whose inputs are to be seen.
        largest_ratio: of |bias| to |scale|, by which the rounding of ``y`` grows on the way to
            ``x``; a node with a larger one stays.

    Returns:
        A model with, up to float32 rounding, the same outputs; and by name of each input that it
        has no longer, its tap.
    """
    outputs = {node.name: node.output[0] for node in model.proto.graph.node}
    every = find_batch_norms(model)
    behind_others = {outputs[site.node] for site in every}
    kept = [
        site.node
        for site in every
        if bool(np.any(np.abs(site.bias) > largest_ratio * np.abs(site.scale)))
        or not np.all(site.scale)
        or site.tensor in behind_others
    ]
    folded = fold_batch_norms(model, keep=kept)
    left = {node.name for node in folded.proto.graph.node}
    taps = {}
    for site in sites:
        if site.node not in left:
            sigma = np.sqrt(site.variance.astype(np.float64) + site.epsilon)
            taps[site.tensor] = Tap(
                tensor=outputs[site.node],
                gain=sigma / site.scale.astype(np.float64),
                center=site.bias.astype(np.float64),
            )
    return folded, taps
