"""Losses, which training exports leave in a graph."""

from __future__ import annotations

import torch
from torch.nn import functional

from graph_tools.torch_ops.registry import Compute, Node, operator

__all__ = ["negative_log_likelihood", "softmax_cross_entropy"]

_NOTHING = -(2**62)  # a label that no class has


def _likelihood_loss(node: Node) -> Compute:
    reduction = node.text("reduction", "mean")
    ignored = node.integer("ignore_index", _NOTHING)

    def compute(
        scores: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor | None = None
    ) -> torch.Tensor:
        return functional.nll_loss(
            scores, labels.long(), weight, ignore_index=ignored, reduction=reduction
        )

    return compute


@operator("NegativeLogLikelihoodLoss")
def negative_log_likelihood(node: Node) -> Compute:
    """Weighted negative score of the labelled class; scores ``[N, classes, ...]``."""
    return _likelihood_loss(node)


@operator("SoftmaxCrossEntropyLoss")
def softmax_cross_entropy(node: Node) -> Compute:
    """The same of the log-softmax of the scores, which is the second output, if wanted."""
    loss = _likelihood_loss(node)

    def compute(
        scores: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        logarithms = torch.log_softmax(scores, 1)
        value = loss(logarithms, labels, weight)
        assert isinstance(value, torch.Tensor)  # one output
        return value, logarithms

    return compute
