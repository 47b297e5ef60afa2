"""The published learning rate schedule: halve on a plateau, then forget the best loss.

torch's ReduceLROnPlateau remembers the best loss for ever; the random views make the loss
noisy, and one lucky value would then halve the rate again and again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Plateau"]

_FACTOR, _THRESHOLD, _LOWEST = 0.5, 1e-4, 1e-4


@dataclass
class Plateau:
    """Learning rate of one batch.

    Args:
        rate: current learning rate.
        patience: steps without progress before the rate is halved.
    """

    rate: float
    patience: int
    _best: float = math.inf
    _waited: int = 0

    def step(self, loss: float) -> None:
        """Take note of the loss of a step."""
        if loss < self._best - abs(self._best) * _THRESHOLD or self._best == math.inf:
            self._best, self._waited = loss, 0
            return
        self._waited += 1
        if self._waited > self.patience:
            self.rate = max(self.rate * _FACTOR, _LOWEST)
            self._best, self._waited = math.inf, 0
