"""One choice for each item, least total error within a total size: an exact solution.

The multiple-choice knapsack. Items are added one after the other, and of the sums so far only the
Pareto front of size and error is kept, as in ZeroQ (arXiv 2001.00281, section 3.3, equation 8).
That front may grow with every item, so a sum is dropped, too, when no completion of it can be
better than a solution that is known: both bounds come from the Lagrangian relaxation, which
charges a price for each unit of size (Everett 1963; Shoham and Gersho 1988 for bits).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

__all__ = ["least_error"]

Choice = TypeVar("Choice")
Array = np.ndarray[Any, np.dtype[Any]]

_HALVINGS = 100
_SLACK = 1e-9  # sums of floats in another order


def least_error(
    items: Sequence[Mapping[Choice, tuple[int, float]]], budget: int
) -> tuple[Choice, ...]:
    """Choose for each item such that the sum of errors is least and that of sizes fits.

    Args:
        items: size (0 or more) and error (finite, 0 or more) of each choice, item by item.
        budget: largest sum of sizes.

    Returns:
        One choice an item. Of equal sums of errors, the one of least size.

    Raises:
        ValueError: not even the smallest choices fit.
    """
    sizes = [np.array([size for size, _ in item.values()], np.int64) for item in items]
    errors = [np.array([error for _, error in item.values()], np.float64) for item in items]
    if sum(int(size.min()) for size in sizes) > budget:
        raise ValueError("nothing fits")
    price, known = _relaxed(sizes, errors, budget)
    bound = known * (1 + _SLACK)
    # What the items from an index on cost at least, their sizes charged for, and their least size.
    costs = [
        float((error + price * size).min()) for size, error in zip(sizes, errors, strict=True)
    ]
    ahead = np.append(np.cumsum(costs[::-1])[::-1], 0.0)
    least = np.append(np.cumsum([size.min() for size in sizes][::-1])[::-1], 0)
    size, error = np.zeros(1, np.int64), np.zeros(1)
    origins: list[tuple[Array, Array]] = []
    for index, (more, worse) in enumerate(zip(sizes, errors, strict=True)):
        sums = (size[:, None] + more).ravel()
        totals = (error[:, None] + worse).ravel()
        reachable = totals + price * (sums - budget) + ahead[index + 1]
        kept = np.flatnonzero((sums + least[index + 1] <= budget) & (reachable <= bound))
        kept = kept[np.lexsort((totals[kept], sums[kept]))]
        before = np.minimum.accumulate(np.append(np.inf, totals[kept]))[:-1]
        kept = kept[totals[kept] < before]
        size, error = sums[kept], totals[kept]
        origins.append(np.divmod(kept, len(more)))
    chosen = []
    at = len(error) - 1  # on a front the last has the least error
    for item, (parent, choice) in zip(reversed(items), reversed(origins), strict=True):
        chosen.append(list(item)[choice[at]])
        at = parent[at]
    return tuple(reversed(chosen))


def _relaxed(
    sizes: Sequence[Array], errors: Sequence[Array], budget: int
) -> tuple[float, float]:
    """A price at which the cheapest choices fit, and the sum of their errors.

    The lowest such price, to within bisection: its solution is near the best.
    """

    def cheapest(price: float) -> tuple[int, float]:
        total, error = 0, 0.0
        for size, worse in zip(sizes, errors, strict=True):
            index = np.lexsort((size, worse + price * size))[0]
            total, error = total + int(size[index]), error + float(worse[index])
        return total, error

    low, high = 0.0, 1e-30
    if cheapest(low)[0] <= budget:
        return low, cheapest(low)[1]
    while cheapest(high)[0] > budget:
        low, high = high, 2 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if cheapest(middle)[0] <= budget else (middle, high)
    return high, cheapest(high)[1]
