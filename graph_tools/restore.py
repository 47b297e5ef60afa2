"""Put BatchNormalization back where an exporter folded it away.

Folding leaves a weighted node with ``W' = r W`` (row by row, one row an output channel) and
``b' = beta + r (b - mean)``, ``r = gamma / sqrt(variance + epsilon)``. The folded numbers alone do
not tell the five vectors apart, but beside the weights and statistics of the same network they
are recognized by value, whatever anything is called:

    1. a tensor of the side file whose rows are proportional to the node's gives ``r``;
    2. of the statistics with as many channels, those that reproduce both ``r`` and ``b'`` are
       the node's. ``epsilon``, which a state_dict does not hold, and a bias of the unfolded
       node are found on the way.

A per-channel Mul or Add behind the node counts as part of it, so BatchNormalization written as
arithmetic is found, too; so is a Mul and Add on their own. A BatchNormalization in front of a
weighted node that was folded forward cannot be told from the node and stays folded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import onnx
from onnx import helper, numpy_helper

from graph_tools.equivalence import largest_difference, run_model
from graph_tools.errors import ModelError
from graph_tools.model import Model, initializers, replace_proto
from graph_tools.side_file import NormStatistics, SideFile

__all__ = ["Match", "Restoration", "restore_batch_norms"]

_COSINE = 0.999  # of proportional rows; float16 files reach 0.999999
_RESIDUAL = 5e-3  # relative; other statistics are off by about 1
_TIED = 1e-5  # residuals up to which layers are alike
_EPSILONS = (1e-5, 1e-3, 1e-6, 1e-4, 1e-2, 1e-8, 1e-7, 1e-12, 0.0, 2e-5, 1.001e-5)
_TOLERANCE = 1e-2  # of the outputs, where float16 weights were rounded; usually 1e-6
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")

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
class Restoration:
    """A network with its BatchNormalization back, and how that came about.

    Attributes:
        model: the network; its notes say how many nodes were restored.
        matches: one a node that could have lost a BatchNormalization, in graph order.
        difference: of the outputs to those of the folded network, relative to the largest.
    """

    model: Model
    matches: tuple[Match, ...]
    difference: float

    @property
    def restored(self) -> int:
        """How many nodes have their BatchNormalization back."""
        return sum(match.state == "restored" for match in self.matches)

    @property
    def candidates(self) -> int:
        """How many nodes could have lost one: those that are not the same in the side file."""
        return sum(match.state != "unchanged" for match in self.matches)


def restore_batch_norms(model: Model, side: SideFile) -> Restoration:
    """Unfold the BatchNormalization of a network with the help of a side file.

    Args:
        model: a network, some or all of its BatchNormalization folded.
        side: weights and statistics of the same trained network.

    Returns:
        The network with the weights and statistics of the side file; its outputs are those of
        ``model`` up to rounding, which was checked in onnxruntime. Nodes without a match stay.

    Raises:
        ModelError: nothing in the file belongs to this network, or the outputs differ.
    """
    units = list(_units(model))
    finder = _Finder(side)
    found = [finder.find(unit) for unit in units]
    matches = tuple(result.match for result in found)
    count = sum(match.state == "restored" for match in matches)
    if units and not any(match.state != "unmatched" for match in matches):
        raise _nothing(units, matches, side)
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    for unit, result in zip(units, found, strict=True):
        if result.norm is not None:
            _unfold(proto, unit, result, result.norm)
    candidates = sum(match.state != "unchanged" for match in matches)
    note = (
        f"BatchNormalization of {count} of {candidates} node(s) restored from {side.path.name}"
    )
    _drop_unused(proto.graph)
    restored = replace_proto(model, proto, notes=(note,))
    difference = _difference(model, restored)
    if not difference <= _TOLERANCE:
        raise ModelError(
            f"the statistics do not reproduce the network: outputs differ by {difference:.1e}",
            where=str(side.path),
            hint="give the file that this network was exported from",
        )
    return Restoration(model=restored, matches=matches, difference=difference)


@dataclass(frozen=True, kw_only=True)
class _Unit:
    """A weighted node and the per-channel arithmetic behind it.

    Attributes:
        node: the first node.
        chain: the Mul and Add nodes that belong to it.
        rows: ``[C, K] float64``, the node's weights, one row an output channel; None for a Mul.
        gain: ``[C] float64`` of the chain.
        shift: ``[C] float64``, the bias of all of it.
    """

    node: onnx.NodeProto
    chain: tuple[onnx.NodeProto, ...]
    rows: np.ndarray | None
    gain: np.ndarray
    shift: np.ndarray

    @property
    def output(self) -> str:
        """The last tensor of the unit."""
        last = self.chain[-1] if self.chain else self.node
        return str(last.output[0])

    @property
    def weight_shape(self) -> str:
        """For messages."""
        return "no weights" if self.rows is None else "x".join(map(str, self.rows.shape))


def _units(model: Model) -> Iterator[_Unit]:
    """Yield what may have swallowed a BatchNormalization and has none behind it."""
    graph = model.proto.graph
    constants = initializers(model.proto)
    ranks = {
        value.name: len(value.type.tensor_type.shape.dim)
        for value in (*graph.input, *graph.value_info, *graph.output)
        if value.type.tensor_type.HasField("shape")
    }
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    taken: set[str] = set()
    for node in graph.node:
        if node.output[0] in taken:
            continue
        weighted = node.op_type in _WEIGHTED
        if not weighted and node.op_type != "Mul":
            continue
        rank = ranks.get(node.output[0], 0)
        rows = _rows(node, constants) if weighted else None
        if weighted and (rows is None or (node.op_type == "MatMul" and rank != 2)):
            continue
        if rows is not None:
            gain, shift = np.ones(len(rows)), _bias(node, constants, len(rows))
        else:
            own = _per_channel(node, constants, rank, None)
            if own is None:
                continue
            gain, shift = own, np.zeros(own.size)
        chain: list[onnx.NodeProto] = []
        output = node.output[0]
        while output not in model.outputs and len(behind := readers.get(output, [])) == 1:
            follower = behind[0]
            value = _per_channel(follower, constants, rank, gain.size)
            if value is None or follower.op_type not in ("Mul", "Add"):
                break
            if follower.op_type == "Mul":
                gain, shift = gain * value, shift * value
            else:
                shift = shift + value
            chain.append(follower)
            output = follower.output[0]
        if rows is None and not chain:
            continue  # a Mul alone is no BatchNormalization
        if any(reader.op_type == "BatchNormalization" for reader in readers.get(output, [])):
            continue
        taken.update(follower.output[0] for follower in chain)
        yield _Unit(node=node, chain=tuple(chain), rows=rows, gain=gain, shift=shift)


def _attributes(node: onnx.NodeProto) -> dict[str, object]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _groups(node: onnx.NodeProto) -> int:
    return int(str(_attributes(node).get("group", 1)))


def _rows(node: onnx.NodeProto, constants: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Return a weighted node's constant weights, one row an output channel."""
    if any(name and name not in constants for name in node.input[1:]):
        return None
    weight = constants[node.input[1]].astype(np.float64)
    if node.op_type == "MatMul" and weight.ndim != 2:
        return None
    if node.op_type == "Gemm":
        alpha = float(str(_attributes(node).get("alpha", 1.0)))
        weight = weight * alpha
    return _as_rows(weight, node)


def _as_rows(weight: np.ndarray, node: onnx.NodeProto) -> np.ndarray:
    match node.op_type:
        case "Conv":
            return weight.reshape(len(weight), -1)
        case "ConvTranspose":  # [in, out/groups, ...]
            groups = _groups(node)
            split = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
            swapped = split.swapaxes(1, 2)  # [groups, out/groups, in/groups, ...]
            return np.ascontiguousarray(swapped).reshape(groups * weight.shape[1], -1)
        case "Gemm" if _attributes(node).get("transB"):
            return weight
        case _:
            return weight.T


def _from_rows(rows: np.ndarray, node: onnx.NodeProto, shape: tuple[int, ...]) -> np.ndarray:
    """Undo `_as_rows`: weights of ``shape``."""
    match node.op_type:
        case "Conv":
            return rows.reshape(shape)
        case "ConvTranspose":
            groups = _groups(node)
            swapped = rows.reshape(groups, shape[1], shape[0] // groups, *shape[2:])
            return swapped.swapaxes(1, 2).reshape(shape)
        case "Gemm" if _attributes(node).get("transB"):
            return rows
        case _:
            return rows.T


def _bias(
    node: onnx.NodeProto, constants: Mapping[str, np.ndarray], channels: int
) -> np.ndarray:
    if len(node.input) < 3 or not node.input[2]:
        return np.zeros(channels)
    beta = float(str(_attributes(node).get("beta", 1.0))) if node.op_type == "Gemm" else 1.0
    values = constants[node.input[2]].astype(np.float64).reshape(-1)
    return np.array(np.broadcast_to(beta * values, (channels,)))


def _per_channel(
    node: onnx.NodeProto,
    constants: Mapping[str, np.ndarray],
    rank: int,
    channels: int | None,
) -> np.ndarray | None:
    """Return the constant of a Mul or Add with one value a channel, ``[C] float64``.

    ``channels`` None takes any number of them above 1.
    """
    if node.op_type not in ("Mul", "Add") or rank < 2:
        return None
    values = [constants[name] for name in node.input if name in constants]
    if len(values) != 1 or not np.issubdtype(values[0].dtype, np.floating):
        return None
    value = values[0]
    if value.size == 1 and channels is not None:
        return np.full(channels, float(value.reshape(())), dtype=np.float64)
    shape = (1,) * (rank - value.ndim) + value.shape
    axis = 1 if rank > 2 else rank - 1
    if value.size < 2 or len(shape) != rank or shape[axis] != value.size:
        return None
    if channels is not None and value.size != channels:
        return None
    return value.astype(np.float64).reshape(-1)


@dataclass(frozen=True, kw_only=True)
class _Found:
    """A match and the numbers to write.

    Attributes:
        rows: ``[C, K]``, the side file's weights; None if the unit has none.
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


class _Finder:
    """Search a side file; what is used already comes second where layers are alike."""

    def __init__(self, side: SideFile) -> None:
        self._side = side
        self._used: Counter[str] = Counter()
        self._last = -1  # place of the statistics found last: layers come in order

    def find(self, unit: _Unit) -> _Found:
        """Return the best match of a unit."""
        name = unit.node.name
        candidates = self._proportional(unit)
        fits: list[tuple[tuple[float, int, int, float], _Found]] = []
        same: _Found | None = None
        for candidate in candidates:
            for place, norm in enumerate(self._side.norms):
                if norm.channels != unit.gain.size:
                    continue
                found = self._fit(unit, candidate, norm)
                residual = max(
                    found.match.ratio_residual or 0.0, found.match.bias_residual or 0.0
                )
                if not residual <= _RESIDUAL:
                    continue
                rank = (
                    0.0 if residual < _TIED else residual,
                    self._used[norm.name] + self._used[candidate.weight],
                    int(place <= self._last),
                    float(place),
                )
                fits.append((rank, found))
            if same is None and self._is_same(unit, candidate):
                same = _Found(
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
        return _Found(match=self._unmatched(unit, candidates))

    def _take(self, found: _Found) -> _Found:
        self._used.update(filter(None, (found.match.norm, found.match.weight)))
        names = [norm.name for norm in self._side.norms]
        self._last = names.index(found.match.norm)
        return found

    def _proportional(self, unit: _Unit) -> list[_Candidate]:
        """Return the side file's tensors whose rows are proportional to the unit's."""
        if unit.rows is None:
            return [_Candidate(weight="", rows=None, cosine=None, ratio=unit.gain)]
        rows = unit.rows * unit.gain[:, None]
        own = np.linalg.norm(rows, axis=1)
        result = []
        for name, tensor in self._side.weights.items():
            if tensor.size != rows.size:
                continue
            for other in _layouts(tensor, unit.node, rows.shape):
                length = np.linalg.norm(other, axis=1)
                product = (rows * other).sum(1)
                with np.errstate(divide="ignore", invalid="ignore"):
                    ratio = product / np.square(length)
                    cosines = np.where(own == 0, 1.0, np.abs(product) / (own * length))
                cosine = float(np.nan_to_num(cosines, nan=0.0).min())
                if cosine >= _COSINE:
                    result.append(
                        _Candidate(weight=name, rows=other, cosine=cosine, ratio=ratio)
                    )
                    break
        return result

    def _fit(self, unit: _Unit, candidate: _Candidate, norm: NormStatistics) -> _Found:
        """Measure how well some statistics explain a unit."""
        epsilon, residual = _best_epsilon(candidate.ratio, norm)
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
        return _Found(
            match=match,
            rows=candidate.rows,
            bias=biases[best],
            norm=replace(norm, epsilon=epsilon),
        )

    def _is_same(self, unit: _Unit, candidate: _Candidate) -> bool:
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

    def _unmatched(self, unit: _Unit, candidates: list[_Candidate]) -> Match:
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

    def _proportional_to_inputs(self, unit: _Unit) -> bool:
        rows = unit.rows
        assert rows is not None
        if unit.node.op_type == "ConvTranspose" or _groups(unit.node) != 1:
            return False
        for tensor in self._side.weights.values():
            if tensor.size != rows.size or not tensor.size:
                continue
            inputs = tensor.shape[1]
            for other in _layouts(tensor, unit.node, rows.shape):
                if other.shape[1] % inputs:
                    continue
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
    values = tensor.astype(np.float64)
    if node.op_type == "ConvTranspose":
        if values.ndim > 2 and len(values) % _groups(node) == 0:
            rows = _as_rows(values, node)
            if rows.shape == shape:
                yield rows
        return
    if len(values) == shape[0]:  # [out, in, ...]: torch, and ONNX's Conv
        yield values.reshape(shape)
    if values.shape[-1] == shape[0]:  # [..., in, out]: matrices of MatMul, kernels of Keras
        yield np.moveaxis(values, (-1, -2), (0, 1)).reshape(shape)
    if values.ndim == 4 and values.shape[-2] == shape[0]:  # [h, w, channels, 1]: depthwise
        yield np.moveaxis(values, (-2, -1), (0, 1)).reshape(shape)


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


def _unfold(proto: onnx.ModelProto, unit: _Unit, found: _Found, norm: NormStatistics) -> None:
    """Write the side file's node and BatchNormalization in place of a unit."""
    graph = proto.graph
    taken = {t.name for t in graph.initializer} | {o for n in graph.node for o in n.output}
    node = next(n for n in graph.node if n.output[0] == unit.node.output[0])
    output = unit.output

    def add(name: str, values: np.ndarray) -> str:
        index, unique = 0, name
        while unique in taken:
            index += 1
            unique = f"{name}_{index}"
        taken.add(unique)
        graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), unique))
        return unique

    prefix = f"{node.name}/restored"
    vectors = {
        "scale": norm.scale,
        "bias": norm.bias,
        "mean": norm.mean,
        "variance": norm.variance,
    }
    names = [add(f"{prefix}/{key}", values) for key, values in vectors.items()]
    place = list(graph.node).index(node)
    if found.rows is not None:
        assert found.bias is not None
        shape = tuple(next(t for t in graph.initializer if t.name == node.input[1]).dims)
        weight = add(f"{prefix}/weight", _from_rows(found.rows, node, shape))
        source = f"{prefix}/input"
        del node.input[1:]
        node.input.append(weight)
        if found.bias.any():  # a MatMul has no place for one: the mean takes it
            if node.op_type == "MatMul":
                mean = next(t for t in graph.initializer if t.name == names[2])
                shifted = (norm.mean - found.bias).astype(np.float32)
                mean.CopyFrom(numpy_helper.from_array(shifted, names[2]))
            else:
                node.input.append(add(f"{prefix}/own_bias", found.bias))
        for attribute in node.attribute:
            if attribute.name in ("alpha", "beta"):
                attribute.f = 1.0
        node.output[0] = source
        place += 1
    else:
        source = next(n for n in node.input if n not in {t.name for t in graph.initializer})
        graph.node.remove(node)
    gone = {follower.output[0] for follower in unit.chain}
    for follower in [n for n in graph.node if n.output[0] in gone]:
        graph.node.remove(follower)
    graph.node.insert(
        place,
        helper.make_node(
            "BatchNormalization",
            [source, *names],
            [output],
            name=f"{unit.node.name}/BatchNormalization",
            epsilon=norm.epsilon,
        ),
    )


def _drop_unused(graph: onnx.GraphProto) -> None:
    used = {name for node in graph.node for name in node.input}
    for tensor in [t for t in graph.initializer if t.name not in used]:
        graph.initializer.remove(tensor)


def _difference(model: Model, restored: Model) -> float:
    """Run both on the same random images."""
    batch = model.fixed_batch or 2
    shape = (batch, *model.input.shape)
    images = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    feeds = {model.input.name: images}
    try:
        return largest_difference(
            run_model(restored.proto, feeds), run_model(model.proto, feeds)
        )
    except RuntimeError as error:
        raise ModelError(
            f"the restored network does not run ({error})", where=str(model.source or "")
        ) from error


def _nothing(units: list[_Unit], matches: tuple[Match, ...], side: SideFile) -> ModelError:
    partly = [match for match in matches if match.weight]
    closest = (
        f"; closest: '{partly[0].node}' is proportional to '{partly[0].weight}', but no "
        "statistics explain its scale and bias"
        if partly
        else ""
    )
    return ModelError(
        f"nothing in it belongs to this network: compared {len(units)} node(s), the first of "
        f"{units[0].weight_shape}, with {len(side.weights)} weight tensor(s) and "
        f"{len(side.norms)} BatchNormalization(s) by value{closest}",
        where=str(side.path),
        hint="give the file that this network was exported from, of the same training run",
    )
