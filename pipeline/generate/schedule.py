"""The learning rate falls on a plateau of the loss.

torch's ReduceLROnPlateau, which ZeroQ, DSG and IntraQ use, remembers the best loss for ever. DGH's
random views make the loss noisy, and one lucky value would then lower the rate again and again:
its published schedule forgets the best loss after each fall.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Plateau"]

_THRESHOLD, _LOWEST = 1e-4, 1e-4


@dataclass
class Plateau:
    """Learning rate of one batch.

    Args:
        rate: current learning rate.
        patience: steps without progress before the rate falls.
        factor: by which it falls.
        forgets: whether the best loss is forgotten then.
    """

    rate: float
    patience: int
    factor: float = 0.5
    forgets: bool = True
    _best: float = math.inf
    _waited: int = 0

    @property
    def state(self) -> tuple[float, float, int]:
        """What changes: the rate, the best loss, and the steps since."""
        return self.rate, self._best, self._waited

    @state.setter
    def state(self, state: tuple[float, float, int]) -> None:
        self.rate, self._best, self._waited = state

    def step(self, loss: float) -> None:
        """Take note of the loss of a step."""
        if loss < self._best - abs(self._best) * _THRESHOLD or self._best == math.inf:
            self._best, self._waited = loss, 0
            return
        self._waited += 1
        if self._waited > self.patience:
            self.rate = max(self.rate * self.factor, _LOWEST)
            self._waited = 0
            if self.forgets:
                self._best = math.inf
