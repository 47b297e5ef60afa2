"""Element by element comparison of two runs, summed up batch by batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Difference", "DifferenceMeter"]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far two runs are apart in one tensor.

    Attributes:
        first: name of one run.
        second: name of the other.
        elements: elements compared.
        differing: elements that are not equal (two NaN are).
        largest_steps: largest difference in steps of the tensor's scale; None without a scale.
        largest_absolute: largest absolute difference.
        largest_relative: largest difference relative to the larger magnitude of the two.
        rows: rows whose largest element was compared; 0 unless the tensor is [N, classes].
        top1_changes: rows whose largest element (the first of equals) is another one.
    """

    first: str
    second: str
    elements: int
    differing: int
    largest_steps: float | None
    largest_absolute: float
    largest_relative: float
    rows: int
    top1_changes: int

    @property
    def share(self) -> float:
        """Differing elements, as a share of all."""
        return self.differing / self.elements if self.elements else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the fields, ``share``, and ``top1_change_share`` (None without rows).

        A largest difference that is infinite is None, which JSON can hold.
        """
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in vars(self).items()
        }
        return {
            **finite,
            "share": self.share,
            "top1_change_share": self.top1_changes / self.rows if self.rows else None,
        }


class DifferenceMeter:
    """Collects the difference of two runs in one tensor.

    Args:
        first: name of one run.
        second: name of the other.
        scale: size of one step; None when the tensor has no scale.
    """

    def __init__(self, first: str, second: str, scale: float | None) -> None:
        self._first, self._second, self._scale = first, second, scale
        self._elements = self._differing = self._rows = self._changes = 0
        self._absolute = self._relative = 0.0

    def update(self, first: npt.NDArray[Any], second: npt.NDArray[Any]) -> None:
        """Add one batch of the tensor from both runs; a different shape differs everywhere."""
        if first.shape != second.shape:
            self._elements += max(first.size, second.size)
            self._differing += max(first.size, second.size)
            self._absolute = self._relative = float("inf")
            return
        self._elements += first.size
        if first.ndim == 2 and first.shape[1] > 1:
            self._rows += len(first)
            self._changes += int(np.sum(first.argmax(axis=1) != second.argmax(axis=1)))
        equal = first == second
        if np.issubdtype(first.dtype, np.inexact):
            equal |= np.isnan(first) & np.isnan(second)
        if equal.all():
            return
        a, b = (x[~equal].astype(np.float64) for x in (first, second))
        with np.errstate(invalid="ignore", divide="ignore"):
            absolute = np.abs(a - b)
            relative = absolute / np.maximum(np.abs(a), np.abs(b))
        self._differing += len(a)
        self._absolute = max(self._absolute, _largest(absolute))
        self._relative = max(self._relative, _largest(relative))

    def result(self) -> Difference:
        """Return what was collected."""
        return Difference(
            first=self._first,
            second=self._second,
            elements=self._elements,
            differing=self._differing,
            largest_steps=None if self._scale is None else self._absolute / self._scale,
            largest_absolute=self._absolute,
            largest_relative=self._relative,
            rows=self._rows,
            top1_changes=self._changes,
        )


def _largest(values: npt.NDArray[np.float64]) -> float:
    # NaN or infinity in one run only: infinitely far apart.
    return float(np.nan_to_num(values, nan=np.inf, posinf=np.inf).max())
