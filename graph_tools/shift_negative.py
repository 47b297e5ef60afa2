"""Shift tensors that are hardly negative, and take the shift back in the weights that read them.

SiLU, hard-swish, GELU, PReLU and the like go a little below zero, which costs a signed quantizer
half of its integers. ``Add(y, s)`` with ``s >= -min(y)`` makes the tensor unsigned, and what reads
it, ``W (y + s) + b - s sum(W)``, computes what it did before; zeros that a convolution pads become
an explicit Pad with ``s`` (shift-negative correction, HPTQ, arXiv 2109.09113).

Which tensors are shifted, and how far, is for others to decide: a shift too small is exact, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from graph_tools.model import Model, replace_proto
from graph_tools.passes import unused_name
from graph_tools.rewrites import constant_operand, is_weighted, rank_of
from graph_tools.weights import export_graph, import_graph

__all__ = ["find_shiftable", "shift_tensors"]

Array = np.ndarray[Any, np.dtype[Any]]

_NON_LINEARITIES = frozenset("Celu Elu Gelu HardSwish LeakyRelu Mish PRelu Selu Swish".split())
_GATES = frozenset("Clip Erf HardSigmoid Relu Sigmoid Softplus Tanh".split())
_SCALAR_ARITHMETIC = frozenset({"Add", "Div", "Mul", "Sub"})
_COMMUTES = frozenset(  # f(x + s) = f(x) + s; Pad and AveragePool only as `_passes` says
    "DepthToSpace Flatten GlobalAveragePool GlobalMaxPool MaxPool Reshape Slice SpaceToDepth "
    "Squeeze Transpose Unsqueeze".split()
)


def find_shiftable(model: Model) -> tuple[str, ...]:
    """Names of the tensors that may be shifted, in graph order.

    They are the outputs of non-linearities with negative values (``x * gate(x)`` included),
    and only Conv and Gemm read them, if through pooling and data movement.

    Args:
        model: prepared for quantization.
    """
    graph = import_graph(model.proto)
    return tuple(
        tensor.name
        for node in graph.nodes
        for tensor in node.outputs[:1]
        if _is_non_linearity(node) and _path(graph, tensor) is not None
    )


def shift_tensors(model: Model, shifts: Mapping[str, float]) -> tuple[Model, dict[str, str]]:
    """Shift tensors, and take the shifts back behind them; float values stay what they are.

    Args:
        model: prepared for quantization.
        shifts: what to add to tensors that `find_shiftable` names.

    Returns:
        The network, and by tensor name the name of the shifted tensor.
    """
    graph = import_graph(model.proto)
    tensors = graph.tensors()
    taken = {*tensors, *(node.name for node in graph.nodes)}
    names: dict[str, str] = {}
    for name, shift in shifts.items():
        tensor = tensors[name]
        path = _path(graph, tensor)
        if path is None:
            raise ValueError(f"tensor {name!r} cannot be shifted")
        shifted = gs.Variable(unused_name(f"{name}.shifted", taken), np.float32)
        for reader in list(tensor.outputs):
            reader.inputs = [shifted if i is tensor else i for i in reader.inputs]
        for node in path:
            _take_back(graph, node, shift, taken)
        constant = gs.Constant(
            unused_name(f"{name}.shift", taken), np.asarray(shift, np.float32)
        )
        node_name = unused_name(f"{name}.add_shift", taken)
        graph.nodes.append(gs.Node("Add", node_name, {}, [tensor, constant], [shifted]))
        names[name] = shifted.name
    graph.cleanup().toposort()
    return replace_proto(model, export_graph(graph, model.proto)), names


def _take_back(graph: gs.Graph, node: gs.Node, shift: float, taken: set[str]) -> None:
    """Let a node on the path of a shifted tensor compute what it did before."""
    if node.op == "Pad":
        if node.attrs.get("mode", "constant") == "constant":
            name = unused_name(f"{node.name}.value", taken)
            value = gs.Constant(name, np.asarray(shift, np.float32))
            node.inputs = [*node.inputs[:2], value]
        return
    if not is_weighted(node):
        return
    weight = np.asarray(node.inputs[1].values, np.float64)
    rows = weight.T if node.op == "Gemm" and not node.attrs.get("transB", 0) else weight
    bias = np.asarray(node.inputs[2].values, np.float64)
    bias = bias - shift * rows.reshape(bias.size, -1).sum(axis=1)
    node.inputs[2].values = bias.astype(np.float32)
    pads = node.attrs.get("pads", [])
    if node.op == "Conv" and any(pads):
        half = len(pads) // 2
        widths = np.array([0, 0, *pads[:half], 0, 0, *pads[half:]], np.int64)
        padded = gs.Variable(unused_name(f"{node.name}.padded", taken), np.float32)
        constants = [
            gs.Constant(unused_name(f"{node.name}.pads", taken), widths),
            gs.Constant(
                unused_name(f"{node.name}.pad_value", taken), np.asarray(shift, np.float32)
            ),
        ]
        pad_name = unused_name(f"{node.name}.pad", taken)
        graph.nodes.append(
            gs.Node(
                "Pad", pad_name, {"mode": "constant"}, [node.inputs[0], *constants], [padded]
            )
        )
        node.inputs[0] = padded
        node.attrs["pads"] = [0] * len(pads)


def _is_non_linearity(node: gs.Node) -> bool:
    """Whether ``node`` ends a smooth rectifier, in one operator or as ``x * gate(x)``."""
    while (operand := _scalar_operand(node)) is not None and node.op in ("Mul", "Div"):
        if not operand[0].inputs or operand[1] <= 0:
            return False
        node = operand[0].inputs[0]
    if node.op in _NON_LINEARITIES:
        return True
    if node.op != "Mul" or any(isinstance(i, gs.Constant) for i in node.inputs):
        return False
    left, right = (_ancestors(tensor) for tensor in node.inputs)
    gated = bool(_GATES & {op for ops in (left, right) for op in ops.values()})
    return gated and bool(left.keys() & right.keys())


def _scalar_operand(node: gs.Node) -> tuple[gs.Variable, float] | None:
    """(variable, constant) of arithmetic with a scalar; a constant is never divided."""
    if node.op not in _SCALAR_ARITHMETIC or len(node.inputs) != 2:
        return None
    found = constant_operand(node)
    if found is None:
        return None
    variable, constant, on_right = found
    if constant.size != 1 or (node.op == "Div" and not on_right):
        return None
    return variable, float(constant.reshape(-1)[0])


def _ancestors(tensor: gs.Variable) -> dict[int, str]:
    """What an elementwise chain ending in ``tensor`` passes: tensors (by id), operators before."""
    found = {id(tensor): ""}
    while tensor.inputs:
        node = tensor.inputs[0]
        operand = _scalar_operand(node)
        if operand is None and node.op not in _GATES:
            break
        found[id(tensor)] = node.op
        tensor = operand[0] if operand is not None else node.inputs[0]
        found[id(tensor)] = ""
    return found


def _path(graph: gs.Graph, tensor: gs.Variable) -> list[gs.Node] | None:
    """All nodes between ``tensor`` and the Conv and Gemm that read it, these included."""
    if any(tensor is output for output in graph.outputs) or not tensor.outputs:
        return None
    found: list[gs.Node] = []
    for node in tensor.outputs:
        if node.inputs[0] is not tensor or any(i is tensor for i in node.inputs[1:]):
            return None
        found.append(node)
        if _takes_back(node):
            continue
        further = _path(graph, node.outputs[0]) if _passes(node) else None
        if further is None:
            return None
        found.extend(further)
    return found


def _takes_back(node: gs.Node) -> bool:
    return (
        node.op in ("Conv", "Gemm")
        and is_weighted(node)
        and len(node.inputs) == 3
        and len(node.inputs[2].outputs) == 1
        and np.ndim(node.inputs[2].values) == 1
        and node.attrs.get("alpha", 1.0) == node.attrs.get("beta", 1.0) == 1.0
        and node.attrs.get("auto_pad", "NOTSET") in ("NOTSET", "VALID")
    )


def _passes(node: gs.Node) -> bool:
    if len(node.outputs) != 1:
        return False
    if node.op == "AveragePool":
        return not (any(node.attrs.get("pads", [])) and node.attrs.get("count_include_pad", 0))
    if node.op == "Pad":
        value = node.inputs[2] if len(node.inputs) > 2 else None
        is_zero = (
            value is None
            or not value.name
            or (isinstance(value, gs.Constant) and not np.any(value.values))
        )
        return is_zero and len(node.inputs) <= 3 and rank_of(node.inputs[0]) is not None
    return node.op in _COMMUTES
