"""Recognize folded nodes among the weights and statistics of a side file, by value.

Of a node with weights ``W'`` and bias ``b'``, a tensor whose rows are proportional gives the ratio
``r``, and statistics must explain ``r = gamma / sqrt(variance + epsilon)`` and
``b' = beta + r (b - mean)``. ``epsilon``, which a state_dict does not hold, and a bias ``b`` of the
unfolded node are found on the way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import onnx

from graph_tools.folded_units import Unit, as_rows, num_groups
from graph_tools.side_file import NormStatistics, SideFile

__all__ = ["Finder", "Found", "Match"]

_COSINE = 0.999  # of proportional rows; float16 files reach 0.999999
_RESIDUAL = 5e-3  # relative; other statistics are off by about 1
_TIED = 1e-5  # residuals up to which layers are alike
_EPSILONS = (1e-5, 1e-3, 1e-6, 1e-4, 1e-2, 1e-8, 1e-7, 1e-12, 0.0, 2e-5, 1.001e-5)

State = Literal["restored", "unchanged", "unmatched"]


@dataclass(frozen=True, kw_only=True)
class Match:
    """What was found for one node.

    Attributes:
        node: the weighted node, or a Mul on its own.
        state: "restored"; "unchanged" if the side file has the same numbers and nothing behind
            them; "unmatched".
        weight: name of the proportional tensor in the side file, empty without one.
        norm: name of the statistics, empty without any.
        cosine: worst cosine between rows of both weights; None without weights.
        ratio_residual: largest error of ``r``, relative to the largest ``r``.
        bias_residual: largest error of ``b'``, relative to the largest term in it.
        epsilon: the one used.
        reason: why there is no match.
    """

    node: str
    state: State
    weight: str = ""
    norm: str = ""
    cosine: float | None = None
    ratio_residual: float | None = None
    bias_residual: float | None = None
    epsilon: float | None = None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A match and the numbers to write.

    Attributes:
        rows: ``[C, K]``, the side file's weights as stored; None if the unit has none.
        bias: ``[C]`` of the unfolded node.
        norm: None if there is nothing to restore.
    """

    match: Match
    rows: np.ndarray | None = None
    bias: np.ndarray | None = None
    norm: NormStatistics | None = None


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    weight: str
    rows: np.ndarray | None
    cosine: float | None
    ratio: np.ndarray  # NaN where the side file's row is zero: any ratio fits


class Finder:
    """Search a side file; what is used already comes second where layers are alike."""

    def __init__(self, side: SideFile) -> None:
        self._side = side
        self._used: Counter[str] = Counter()
        self._last = -1  # place of the statistics found last: layers come in order

    def find(self, unit: Unit) -> Found:
        """Return the best match of a unit."""
        name = unit.node.name
        candidates = self._proportional(unit)
        fits: list[tuple[tuple[float, int, int, float], Found]] = []
        same: Found | None = None
        for candidate in candidates:
            for place, norm in enumerate(self._side.norms):
                if norm.channels != unit.gain.size:
                    continue
                fit = self._fit(unit, candidate, norm)
                if fit is None:
                    continue
                residual, found = fit
                rank = (
                    0.0 if residual < _TIED else residual,
                    self._used[norm.name] + self._used[candidate.weight],
                    int(place <= self._last),
                    float(place),
                )
                fits.append((rank, found))
            if same is None and self._is_same(unit, candidate):
                same = Found(
                    match=Match(
                        node=name,
                        state="unchanged",
                        weight=candidate.weight,
                        cosine=candidate.cosine,
                        reason="the same in the side file",
                    )
                )
        best = min(fits, key=lambda fit: fit[0], default=None)
        if best is not None and (same is None or not best[0][1]):
            return self._take(best[1])
        if same is not None:
            return same
        return Found(match=self._unmatched(unit, candidates))

    def _take(self, found: Found) -> Found:
        self._used.update(filter(None, (found.match.norm, found.match.weight)))
        names = [norm.name for norm in self._side.norms]
        self._last = names.index(found.match.norm)
        return found

    def _proportional(self, unit: Unit) -> list[_Candidate]:
        """Return the side file's tensors whose rows are proportional to the unit's."""
        if unit.rows is None:
            return [_Candidate(weight="", rows=None, cosine=None, ratio=unit.gain)]
        rows = unit.rows.astype(np.float64) * unit.gain[:, None]
        own = np.linalg.norm(rows, axis=1)
        longest = int(own.argmax())
        result = []
        for name, tensor in self._side.weights.items():
            if tensor.size != rows.size:
                continue
            for stored in _layouts(tensor, unit.node, rows.shape):
                if _cosine(rows[longest], stored[longest]) < _COSINE:
                    continue  # one row tells nearly all others apart
                other = stored.astype(np.float64)
                length = np.linalg.norm(other, axis=1)
                product = (rows * other).sum(1)
                with np.errstate(divide="ignore", invalid="ignore"):
                    ratio = product / np.square(length)
                    cosines = np.where(own == 0, 1.0, np.abs(product) / (own * length))
                cosine = float(np.nan_to_num(cosines, nan=0.0).min())
                if cosine >= _COSINE:
                    result.append(
                        _Candidate(weight=name, rows=stored, cosine=cosine, ratio=ratio)
                    )
                    break
        return result

    def _fit(
        self, unit: Unit, candidate: _Candidate, norm: NormStatistics
    ) -> tuple[float, Found] | None:
        """Return what some statistics make of a unit and the error that is left, if small."""
        epsilon, residual = _best_epsilon(candidate.ratio, norm)
        if not residual <= _RESIDUAL:  # nearly all end here
            return None
        factor = norm.scale / np.sqrt(norm.variance + epsilon)
        # What the unfolded node's own bias must be: nothing, or a vector of the side file.
        biases = [np.zeros(norm.channels)]
        if unit.rows is not None:
            biases += [v for v in self._side.vectors.values() if v.size == norm.channels]
        terms = (unit.shift, norm.bias, factor * norm.mean)
        size = max(1e-12, *(float(np.abs(term).max()) for term in terms))
        errors = [
            float(np.abs(norm.bias + factor * (bias - norm.mean) - unit.shift).max() / size)
            for bias in biases
        ]
        best = int(np.argmin(errors))
        if not errors[best] <= _RESIDUAL:
            return None
        match = Match(
            node=unit.node.name,
            state="restored",
            weight=candidate.weight,
            norm=norm.name,
            cosine=candidate.cosine,
            ratio_residual=residual,
            bias_residual=errors[best],
            epsilon=epsilon,
        )
        found = Found(
            match=match,
            rows=candidate.rows,
            bias=biases[best],
            norm=replace(norm, epsilon=epsilon),
        )
        return max(residual, errors[best]), found

    def _is_same(self, unit: Unit, candidate: _Candidate) -> bool:
        """Whether the node is in the side file as it is, so that it never had anything behind."""
        if unit.rows is None:
            return False
        known = candidate.ratio[~np.isnan(candidate.ratio)]
        if not np.allclose(known, 1.0, rtol=0, atol=1e-5):
            return False
        vectors = (v for v in self._side.vectors.values() if v.size == unit.shift.size)
        return any(
            np.allclose(unit.shift, v, rtol=1e-5, atol=1e-6)
            for v in (np.zeros(unit.shift.size), *vectors)
        )

    def _unmatched(self, unit: Unit, candidates: list[_Candidate]) -> Match:
        """Say how far the search came."""
        name = unit.node.name
        if candidates and unit.rows is not None:
            first = candidates[0]
            return Match(
                node=name,
                state="unmatched",
                weight=first.weight,
                cosine=first.cosine,
                reason="the weights are proportional, but no statistics explain scale and bias",
            )
        if unit.rows is None:
            reason = "no statistics explain this Mul and Add"
        elif self._proportional_to_inputs(unit):
            reason = (
                "proportional along its input channels only: a BatchNormalization in front of "
                "it was folded forward, and cannot be told from it"
            )
        else:
            reason = f"no tensor of the side file is proportional to it ({unit.weight_shape})"
        return Match(node=name, state="unmatched", reason=reason)

    def _proportional_to_inputs(self, unit: Unit) -> bool:
        assert unit.rows is not None
        rows = unit.rows.astype(np.float64)
        if unit.node.op_type == "ConvTranspose" or num_groups(unit.node) != 1:
            return False
        for tensor in self._side.weights.values():
            if tensor.size != rows.size or not tensor.size:
                continue
            inputs = tensor.shape[1]
            for stored in _layouts(tensor, unit.node, rows.shape):
                if stored.shape[1] % inputs:
                    continue
                other = stored.astype(np.float64)
                a = rows.reshape(len(rows), inputs, -1).swapaxes(0, 1).reshape(inputs, -1)
                b = other.reshape(len(rows), inputs, -1).swapaxes(0, 1).reshape(inputs, -1)
                lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
                if bool((np.abs((a * b).sum(1)) >= _COSINE * lengths).all()):
                    return True
        return False


def _layouts(
    tensor: np.ndarray, node: onnx.NodeProto, shape: tuple[int, ...]
) -> Iterator[np.ndarray]:
    """Yield a side file's tensor as rows of ``shape``, in each layout that it may have."""
    if node.op_type == "ConvTranspose":
        if tensor.ndim > 2 and len(tensor) % num_groups(node) == 0:
            rows = as_rows(tensor, node)
            if rows.shape == shape:
                yield rows
        return
    if len(tensor) == shape[0]:  # [out, in, ...]: torch, and ONNX's Conv
        yield tensor.reshape(shape)
    if tensor.shape[-1] == shape[0]:  # [..., in, out]: matrices of MatMul, kernels of Keras
        yield np.moveaxis(tensor, (-1, -2), (0, 1)).reshape(shape)
    if tensor.ndim == 4 and tensor.shape[-2] == shape[0]:  # [h, w, channels, 1]: depthwise
        yield np.moveaxis(tensor, (-2, -1), (0, 1)).reshape(shape)


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Return the cosine of the angle between two rows, its sign left out; 1 where one is zero."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    lengths = float(np.sqrt((a @ a) * (b @ b)))
    return abs(float(a @ b)) / lengths if lengths else 1.0


def _best_epsilon(ratio: np.ndarray, norm: NormStatistics) -> tuple[float, float]:
    """Return the epsilon that explains the ratios best, and the error that is left."""
    known = ~np.isnan(ratio)

    def error(epsilon: float) -> float:
        with np.errstate(divide="ignore", invalid="ignore"):
            factor = norm.scale / np.sqrt(norm.variance + epsilon)
        if not np.isfinite(factor).all():
            return float("inf")
        size = max(float(np.abs(factor).max()), 1e-12)
        return float(np.abs(factor - ratio)[known].max(initial=0.0)) / size

    if norm.epsilon is not None:
        return norm.epsilon, error(norm.epsilon)
    guesses = list(_EPSILONS)
    with np.errstate(divide="ignore", invalid="ignore"):
        solved = np.square(norm.scale / ratio) - norm.variance
    solved = solved[np.isfinite(solved) & known]
    if solved.size:
        guesses.append(max(0.0, float(np.median(solved))))
    errors = [error(epsilon) for epsilon in guesses]
    best = min(errors)
    usual = next(i for i, value in enumerate(errors) if value <= max(2 * best, 1e-6))
    return guesses[usual], errors[usual]
