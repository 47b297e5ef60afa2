"""What a network has to say about an image: one vector, to tell images from each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from graph_tools.model import Model
from pipeline.generate.heads import find_heads
from pipeline.generate.last_linear import find_last_linear

__all__ = ["directions", "feature_tensors"]


def feature_tensors(model: Model) -> tuple[str, ...]:
    """Return what a classifier's last linear layer reads, else the outputs (`heads`)."""
    layer = find_last_linear(model)
    return (layer.features,) if layer is not None else find_heads(model)


def directions(values: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """Return unit vectors, [N, F] float64: products of two are the images' cosine.

    Args:
        values: observed tensors by name, [N, C, ...]; averaged over all axes but two.
        names: of those to join.
    """
    vectors = [
        values[name].flatten(2).mean(2) if values[name].dim() > 2 else values[name]
        for name in names
    ]
    return torch.nn.functional.normalize(torch.cat(vectors, 1).double(), dim=1)
