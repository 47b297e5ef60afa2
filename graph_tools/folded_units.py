"""Find the nodes of a graph that may have swallowed a BatchNormalization.

A weighted node together with the per-channel Mul and Add behind it, or a Mul and Add on their own.
Weights of all operators are brought to one form, ``[C, K]``: one row an output channel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from graph_tools.model import Model, initializers
from graph_tools.shapes import ranks_of

__all__ = ["Unit", "as_rows", "find_units", "from_rows", "num_groups"]

_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A weighted node and the per-channel arithmetic behind it.

    Attributes:
        node: the first node.
        chain: the Mul and Add nodes that belong to it.
        rows: ``[C, K]``, the node's weights as stored, one row an output channel; None for a
            Mul.
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
        """Shape of the rows, for messages."""
        return "no weights" if self.rows is None else "x".join(map(str, self.rows.shape))


def find_units(model: Model) -> Iterator[Unit]:
    """Yield what may have swallowed a BatchNormalization and has none behind it."""
    graph = model.proto.graph
    constants = initializers(model.proto)
    ranks = ranks_of(graph)
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
        yield Unit(node=node, chain=tuple(chain), rows=rows, gain=gain, shift=shift)


def _attributes(node: onnx.NodeProto) -> dict[str, object]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def num_groups(node: onnx.NodeProto) -> int:
    """Return the groups of a convolution, 1 for other nodes."""
    return int(str(_attributes(node).get("group", 1)))


def _rows(node: onnx.NodeProto, constants: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Return a weighted node's constant weights, one row an output channel."""
    if any(name and name not in constants for name in node.input[1:]):
        return None
    weight = constants[node.input[1]]
    if node.op_type == "MatMul" and weight.ndim != 2:
        return None
    if node.op_type == "Gemm":
        alpha = float(str(_attributes(node).get("alpha", 1.0)))
        weight = weight if alpha == 1 else weight.astype(np.float64) * alpha
    return as_rows(weight, node)


def as_rows(weight: np.ndarray, node: onnx.NodeProto) -> np.ndarray:
    """Return ``weight``, laid out as the node has it, as ``[C, K]``: one row an output channel."""
    match node.op_type:
        case "Conv":
            return weight.reshape(len(weight), -1)
        case "ConvTranspose":  # [in, out/groups, ...]
            groups = num_groups(node)
            split = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
            swapped = split.swapaxes(1, 2)  # [groups, out/groups, in/groups, ...]
            return np.ascontiguousarray(swapped).reshape(groups * weight.shape[1], -1)
        case "Gemm" if _attributes(node).get("transB"):
            return weight
        case _:
            return weight.T


def from_rows(rows: np.ndarray, node: onnx.NodeProto, shape: tuple[int, ...]) -> np.ndarray:
    """Undo `as_rows`: weights of ``shape``."""
    match node.op_type:
        case "Conv":
            return rows.reshape(shape)
        case "ConvTranspose":
            groups = num_groups(node)
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
