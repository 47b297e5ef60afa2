"""What a network does to its input before anything else: the normalization left in the graph.

Followed from the input on, as long as a single node reads the tensor: Sub, Add, Mul and Div by
constants of one value a channel, and Transpose, Cast and Identity between them. Together they
are ``y = scale * x + offset``, channel by channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from graph_tools.model import Model, initializers

__all__ = ["InputAffine", "find_input_affine"]

_MOVING = frozenset(("Cast", "Identity", "Transpose"))
_ARITHMETIC = frozenset(("Add", "Sub", "Mul", "Div"))


@dataclass(frozen=True, kw_only=True, eq=False)
class InputAffine:
    """``y = scale * x + offset``.

    Attributes:
        scale: [C] float64.
        offset: [C] float64.
        operators: types of the nodes, in order; without those that only move data.
    """

    scale: np.ndarray
    offset: np.ndarray
    operators: tuple[str, ...]


def find_input_affine(model: Model) -> InputAffine | None:
    """Return what the first nodes do to each channel of the input, None if that is nothing."""
    graph, constants = model.proto.graph, initializers(model.proto)
    channels = model.input.channels
    scale, offset = np.ones(channels), np.zeros(channels)
    operators: list[str] = []
    tensor, axis = model.input.name, 1 if model.input.layout == "NCHW" else 3
    outputs = {value.name for value in graph.output}
    while tensor not in outputs:
        readers = [node for node in graph.node if tensor in node.input]
        if len(readers) != 1:
            break
        node = readers[0]
        if node.op_type in _MOVING:
            if node.op_type == "Transpose":
                perm = next(tuple(a.ints) for a in node.attribute if a.name == "perm")
                axis = perm.index(axis)
        else:
            change = _change(node, tensor, constants, axis, channels)
            if change is None:
                break
            scale, offset = scale * change[0], offset * change[0] + change[1]
            operators.append(node.op_type)
        tensor = node.output[0]
    usable = np.isfinite(scale).all() and np.isfinite(offset).all() and (scale > 0).all()
    if not operators or not usable:
        return None
    return InputAffine(scale=scale, offset=offset, operators=tuple(operators))


def _change(
    node: onnx.NodeProto,
    tensor: str,
    constants: Mapping[str, np.ndarray],
    axis: int,
    channels: int,
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return scale and offset of one node, None if it is of another kind."""
    if node.op_type not in _ARITHMETIC:
        return None
    position = list(node.input).index(tensor)
    other = constants.get(node.input[1 - position])
    value = None if other is None else _per_channel(other, axis, channels)
    if value is None or (position == 1 and node.op_type == "Div"):
        return None
    one, none = np.ones(channels), np.zeros(channels)
    with np.errstate(divide="ignore"):
        return {
            "Add": (one, value),
            "Sub": (one, -value) if position == 0 else (-one, value),
            "Mul": (value, none),
            "Div": (1 / value, none),
        }[node.op_type]


def _per_channel(value: np.ndarray, axis: int, channels: int) -> np.ndarray | None:
    """Return a constant that broadcasts to [N, ...] as one value a channel, else None."""
    if value.ndim > 4:
        return None
    shape = (1,) * (4 - value.ndim) + value.shape
    if any(size != 1 for index, size in enumerate(shape) if index != axis):
        return None
    if shape[axis] not in (1, channels):
        return None
    flat = value.astype(np.float64).reshape(-1)
    return np.broadcast_to(flat, (channels,)).copy()
