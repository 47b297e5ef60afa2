"""Value-preserving rewrites of a graph, one function each; the return value counts the changes.

All work in place on an onnx-graphsurgeon graph in normal form. Arithmetic on weights is done in
float64 and stored as float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

__all__ = [
    "WEIGHTED",
    "average_to_global_pool",
    "batch_norm_to_convolution",
    "constant_affine_to_convolution",
    "constant_operand",
    "drop_empty_pads",
    "fold_affine_into_weights",
    "fold_batch_norm_into_gemm",
    "is_weighted",
    "matmul_to_gemm",
    "only_consumer",
    "output_channel_axis",
    "own_weight_and_bias",
    "round_average_pools_down",
    "write_attributes_out",
]

Array = np.ndarray[Any, np.dtype[Any]]

WEIGHTED = ("Conv", "ConvTranspose", "Gemm")


def output_channel_axis(node: gs.Node) -> int:
    """Axis of the weight of a Conv, ConvTranspose or Gemm that counts output channels."""
    if node.op == "ConvTranspose":
        return 1
    if node.op == "Gemm":
        return 0 if node.attrs.get("transB", 0) else 1
    return 0


def is_weighted(node: gs.Node) -> bool:
    """Whether ``node`` is a Conv, ConvTranspose or Gemm with a constant weight and bias."""
    return (
        node.op in WEIGHTED
        and len(node.inputs) > 1
        and not node.attrs.get("transA", 0)
        and all(isinstance(tensor, gs.Constant) for tensor in node.inputs[1:] if tensor.name)
    )


def only_consumer(graph: gs.Graph, tensor: gs.Variable) -> gs.Node | None:
    """The one node that reads ``tensor``, or None if several do or it is a graph output."""
    if any(tensor is output for output in graph.outputs) or len(tensor.outputs) != 1:
        return None
    consumer: gs.Node = tensor.outputs[0]
    return consumer


def rank_of(tensor: gs.Variable) -> int | None:
    """Number of dimensions, if known."""
    return None if tensor.shape is None else len(tensor.shape)


def _constant(name: str, values: Array) -> gs.Constant:
    return gs.Constant(name, np.ascontiguousarray(values, dtype=np.float32))


def constant_operand(node: gs.Node) -> tuple[gs.Variable, Array, bool] | None:
    """(variable, constant, constant is on the right) of a binary node with one constant."""
    left, right = node.inputs
    if isinstance(right, gs.Constant) and not isinstance(left, gs.Constant):
        return left, np.asarray(right.values, np.float64), True
    if isinstance(left, gs.Constant) and not isinstance(right, gs.Constant):
        return right, np.asarray(left.values, np.float64), False
    return None


def _per_channel(values: Array, channels: int, rank: int, axis: int) -> Array | None:
    """``values`` as ``[channels]`` if it varies along ``axis`` only (or not at all)."""
    if values.size == 1:
        return np.full(channels, values.reshape(-1)[0])
    shape = (1,) * (rank - values.ndim) + values.shape
    if len(shape) != rank or shape[axis] != channels or values.size != channels:
        return None
    return values.reshape(-1)


def _batch_norm_affine(node: gs.Node) -> tuple[Array, Array]:
    """(scale, shift), each [channels], of a BatchNormalization."""
    gamma, beta, mean, var = (np.asarray(i.values, np.float64) for i in node.inputs[1:5])
    scale = gamma / np.sqrt(var + node.attrs.get("epsilon", 1e-5))
    return scale, beta - mean * scale


def _affine(node: gs.Node, channels: int, rank: int, axis: int) -> tuple[Array, Array] | None:
    """(scale, shift), each [channels], of a BatchNormalization or arithmetic by a constant."""
    if node.op == "BatchNormalization" and axis == 1:
        return _batch_norm_affine(node)
    if node.op not in ("Add", "Sub", "Mul", "Div") or len(node.inputs) != 2:
        return None
    found = constant_operand(node)
    if found is None:
        return None
    _, values, on_right = found
    vector = _per_channel(values, channels, rank, axis)
    if vector is None:
        return None
    one, zero = np.ones(channels), np.zeros(channels)
    if node.op == "Add":
        return one, vector
    if node.op == "Mul":
        return vector, zero
    if node.op == "Sub":
        return (one, -vector) if on_right else (-one, vector)
    if not on_right or not np.all(vector):
        return None
    return 1.0 / vector, zero


def matmul_to_gemm(graph: gs.Graph) -> int:
    """MatMul of a rank-2 tensor with a constant matrix becomes Gemm with a zero bias."""
    count = 0
    for node in graph.nodes:
        if node.op != "MatMul" or not isinstance(node.inputs[1], gs.Constant):
            continue
        weight = node.inputs[1].values
        if weight.ndim != 2 or rank_of(node.inputs[0]) != 2:
            continue
        node.op = "Gemm"
        node.attrs = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 1}
        node.inputs = [
            node.inputs[0],
            _constant(f"{node.name}.weight", weight.T),
            _constant(f"{node.name}.bias", np.zeros(weight.shape[1])),
        ]
        count += 1
    return count


def own_weight_and_bias(graph: gs.Graph) -> int:
    """Give each Conv, ConvTranspose and Gemm a weight and a bias that no other node reads.

    Gemm comes out with ``alpha = beta = 1``, ``transB = 1`` and a bias ``[out]``.
    """
    count = 0
    for node in graph.nodes:
        if not is_weighted(node):
            continue
        weight = node.inputs[1]
        groups = node.attrs.get("group", 1) if node.op == "ConvTranspose" else 1
        channels = weight.shape[output_channel_axis(node)] * groups
        given = node.inputs[2] if len(node.inputs) > 2 else None
        if given is None or not given.name:
            bias = np.zeros(channels)
        else:
            values = np.asarray(given.values, np.float64) * node.attrs.get("beta", 1.0)
            if values.size not in (1, channels):
                continue
            bias = np.broadcast_to(values.reshape(-1), (channels,))
        alpha = node.attrs.get("alpha", 1.0) if node.op == "Gemm" else 1.0
        flipped = node.op == "Gemm" and not node.attrs.get("transB", 0)
        if flipped or alpha != 1.0 or len(weight.outputs) > 1:
            matrix = np.asarray(weight.values, np.float64) * alpha
            name = f"{node.name}.weight" if len(weight.outputs) > 1 else weight.name
            weight = _constant(name, matrix.T if flipped else matrix)
        if node.op == "Gemm":
            node.attrs = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 1}
        bias_shared = given is None or not given.name or len(given.outputs) > 1
        bias_name = f"{node.name}.bias" if bias_shared or given is None else given.name
        node.inputs = [
            node.inputs[0],
            weight,
            _constant(bias_name, bias),
        ]
        count += 1
    return count


def scale_weights(node: gs.Node, scale: Array, shift: Array) -> None:
    """Make ``node`` compute ``scale * y + shift`` per output channel; both ``[channels]``."""
    weight = np.asarray(node.inputs[1].values, np.float64)
    axis = output_channel_axis(node)
    if node.op == "ConvTranspose" and node.attrs.get("group", 1) > 1:
        groups = node.attrs["group"]
        blocks = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
        factors = scale.reshape(groups, 1, -1, *([1] * (weight.ndim - 2)))
        weight = (blocks * factors).reshape(weight.shape)
    else:
        shape = [1] * weight.ndim
        shape[axis] = -1
        weight = weight * scale.reshape(shape)
    bias = np.asarray(node.inputs[2].values, np.float64) * scale + shift
    node.inputs[1].values = weight.astype(np.float32)
    node.inputs[2].values = bias.astype(np.float32)


def fold_affine_into_weights(graph: gs.Graph) -> int:
    """Fold per-channel constants into the weighted node before them.

    They come as Add/Sub/Mul/Div, or as BatchNormalization behind what was a MatMul.
    """
    count = 0
    for node in list(graph.nodes):
        if not is_weighted(node) or len(node.inputs) < 3:
            continue
        channels = np.asarray(node.inputs[2].values).size
        while (after := only_consumer(graph, node.outputs[0])) is not None:
            rank = rank_of(node.outputs[0])
            if rank is None:
                break
            pair = _affine(after, channels, rank, 1)
            if pair is None or rank_of(after.outputs[0]) != rank:
                break
            scale_weights(node, *pair)
            output = after.outputs[0]
            after.outputs.clear()
            after.inputs.clear()
            node.outputs = [output]
            count += 1
    return count


def _as_depthwise(node: gs.Node, x: gs.Variable, scale: Array, shift: Array) -> None:
    node.op = "Conv"
    node.attrs = {
        "dilations": [1, 1],
        "group": len(scale),
        "kernel_shape": [1, 1],
        "pads": [0, 0, 0, 0],
        "strides": [1, 1],
    }
    node.inputs = [
        x,
        _constant(f"{node.name}.weight", scale.reshape(-1, 1, 1, 1)),
        _constant(f"{node.name}.bias", shift),
    ]


def batch_norm_to_convolution(graph: gs.Graph) -> int:
    """A BatchNormalization that could not be folded becomes a depthwise 1x1 convolution."""
    count = 0
    for node in graph.nodes:
        if node.op != "BatchNormalization" or rank_of(node.inputs[0]) != 4:
            continue
        _as_depthwise(node, node.inputs[0], *_batch_norm_affine(node))
        count += 1
    return count


def fold_batch_norm_into_gemm(graph: gs.Graph) -> int:
    """Fold the BatchNormalization of a vector into the Gemm behind it."""
    count = 0
    for node in list(graph.nodes):
        if node.op != "BatchNormalization" or rank_of(node.inputs[0]) != 2:
            continue
        gemm = only_consumer(graph, node.outputs[0])
        if gemm is None or gemm.op != "Gemm" or not is_weighted(gemm) or len(gemm.inputs) < 3:
            continue
        scale, shift = _batch_norm_affine(node)
        weight = np.asarray(gemm.inputs[1].values, np.float64)  # [out, in]
        bias = np.asarray(gemm.inputs[2].values, np.float64) + weight @ shift
        gemm.inputs[1].values = (weight * scale).astype(np.float32)
        gemm.inputs[2].values = bias.astype(np.float32)
        gemm.inputs[0] = node.inputs[0]
        node.outputs.clear()
        node.inputs.clear()
        count += 1
    return count


def drop_empty_pads(graph: gs.Graph) -> int:
    """Remove Pad nodes that add nothing: old exporters write them before an AveragePool."""
    count = 0
    for node in list(graph.nodes):
        if node.op != "Pad" or not isinstance(node.inputs[1], gs.Constant):
            continue
        output = node.outputs[0]
        if np.any(node.inputs[1].values) or any(output is tensor for tensor in graph.outputs):
            continue
        for reader in list(output.outputs):
            reader.inputs = [node.inputs[0] if i is output else i for i in reader.inputs]
        node.outputs.clear()
        node.inputs.clear()
        count += 1
    return count


def constant_affine_to_convolution(graph: gs.Graph) -> int:
    """A chain of per-channel Add/Sub/Mul/Div by constants becomes a depthwise 1x1 convolution.

    It keeps each channel's own precision, where an 8-bit constant operand would not. Chains of
    scalars are left alone (activation functions are made of them), except on the graph input,
    where they are the image's normalization.
    """
    count = 0
    for node in list(graph.nodes):
        if node.op not in ("Add", "Sub", "Mul", "Div") or len(node.inputs) != 2:
            continue
        found = constant_operand(node)
        if found is None:
            continue
        x = found[0]
        if rank_of(x) != 4 or not isinstance(x.shape[1], int):
            continue
        channels, chain, vectors = x.shape[1], [node], found[1].size > 1
        pair = _affine(node, channels, 4, 1)
        if pair is None:
            continue
        scale, shift = pair
        while (after := only_consumer(graph, chain[-1].outputs[0])) is not None:
            following = _affine(after, channels, 4, 1)
            if following is None or rank_of(after.outputs[0]) != 4:
                break
            operand = constant_operand(after)
            vectors = vectors or (operand is not None and operand[1].size > 1)
            scale, shift = scale * following[0], shift * following[0] + following[1]
            chain.append(after)
        on_input = any(x is tensor for tensor in graph.inputs)
        if not (vectors or on_input):
            continue
        output = chain[-1].outputs[0]
        for absorbed in chain:
            absorbed.outputs.clear()
            absorbed.inputs.clear()
        node.outputs = [output]
        _as_depthwise(node, x, scale, shift)
        count += 1
    return count


def average_to_global_pool(graph: gs.Graph) -> int:
    """AveragePool and ReduceMean over the whole image become GlobalAveragePool."""
    count = 0
    for node in list(graph.nodes):
        x = node.inputs[0] if node.inputs else None
        if not isinstance(x, gs.Variable) or rank_of(x) != 4:
            continue
        height, width = x.shape[2:]
        if node.op == "AveragePool":
            whole = list(node.attrs.get("kernel_shape", [])) == [height, width]
            padded = any(node.attrs.get("pads", [])) or "SAME" in str(
                node.attrs.get("auto_pad", "")
            )
            if whole and not padded:
                node.op, node.attrs, count = "GlobalAveragePool", {}, count + 1
        elif node.op == "ReduceMean":
            axes = _reduced_axes(node)
            if axes is None or sorted(a % 4 for a in axes) != [2, 3]:
                continue
            keep = node.attrs.get("keepdims", 1)
            node.op, node.attrs, node.inputs = "GlobalAveragePool", {}, [x]
            count += 1
            if not keep:
                output = node.outputs[0]
                pooled = gs.Variable(f"{output.name}.pooled", np.float32, [*x.shape[:2], 1, 1])
                node.outputs = [pooled]
                graph.nodes.append(
                    gs.Node("Flatten", f"{node.name}.flatten", {"axis": 1}, [pooled], [output])
                )
    return count


def _reduced_axes(node: gs.Node) -> list[int] | None:
    if len(node.inputs) > 1 and isinstance(node.inputs[1], gs.Constant):
        return [int(axis) for axis in node.inputs[1].values]
    axes = node.attrs.get("axes")
    return None if axes is None else [int(axis) for axis in axes]


def _explicit_pads(node: gs.Node, kernel: list[int]) -> list[int] | None:
    """Pads that ``auto_pad`` stands for (ONNX Conv and pooling), or None if sizes are unknown."""
    auto = node.attrs.get("auto_pad", "NOTSET")
    if auto in ("NOTSET", ""):
        return list(node.attrs.get("pads", [0] * (2 * len(kernel))))
    if auto == "VALID":
        return [0] * (2 * len(kernel))
    sizes = (node.inputs[0].shape or [])[2:]
    if len(sizes) != len(kernel) or not all(isinstance(size, int) for size in sizes):
        return None
    strides = node.attrs.get("strides", [1] * len(kernel))
    dilations = node.attrs.get("dilations", [1] * len(kernel))
    begins, ends = [], []
    for size, k, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        total = max((-(-size // stride) - 1) * stride + (k - 1) * dilation + 1 - size, 0)
        small, large = total // 2, total - total // 2
        begins.append(small if auto == "SAME_UPPER" else large)
        ends.append(large if auto == "SAME_UPPER" else small)
    return begins + ends


def write_attributes_out(graph: gs.Graph) -> int:
    """Write strides, pads, dilations, groups and kernel shapes out: importers rely on them.

    Axes of MeanVarianceNormalization, too: onnx's shape inference fails without them.
    """
    count = 0
    for node in graph.nodes:
        if node.op == "MeanVarianceNormalization" and "axes" not in node.attrs:
            node.attrs["axes"] = [0, 2, 3]
            count += 1
        if node.op not in ("Conv", "MaxPool", "AveragePool"):
            continue
        if node.op == "Conv":
            if not isinstance(node.inputs[1], gs.Constant):
                continue
            kernel = list(node.inputs[1].shape[2:])
        else:
            kernel = list(node.attrs["kernel_shape"])
        pads = _explicit_pads(node, kernel)
        if pads is None:
            continue
        before = dict(node.attrs)
        node.attrs.pop("auto_pad", None)
        node.attrs["pads"] = pads
        defaults: dict[str, Any] = {"kernel_shape": kernel, "strides": [1] * len(kernel)}
        if node.op != "AveragePool":
            defaults["dilations"] = [1] * len(kernel)
        elif set(node.attrs.get("dilations", [1])) == {1}:
            # onnxruntime hands it on to QLinearAveragePool, which refuses it
            node.attrs.pop("dilations", None)
        if node.op == "Conv":
            defaults["group"] = 1
        else:
            defaults["ceil_mode"] = 0
        if node.op == "AveragePool":
            defaults["count_include_pad"] = 0
        for name, value in defaults.items():
            node.attrs.setdefault(name, value)
        count += node.attrs != before
    return count


def round_average_pools_down(graph: gs.Graph) -> int:
    """Write ``ceil_mode`` of AveragePool as pads that do not count.

    onnxruntime's integer kernel counts what hangs over the edge where pads count.
    """
    count = 0
    for node in list(graph.nodes):
        if node.op != "AveragePool" or not node.attrs.get("ceil_mode"):
            continue
        x, kernel, pads = node.inputs[0], node.attrs["kernel_shape"], node.attrs.get("pads")
        sizes = (x.shape or [])[2:]
        known = len(sizes) == len(kernel) and all(isinstance(size, int) for size in sizes)
        if pads is None or not known or "dilations" in node.attrs:
            continue
        begins, ends = pads[: len(kernel)], pads[len(kernel) :]
        padded = [size + a + b for size, a, b in zip(sizes, begins, ends, strict=True)]
        over = []
        for k, stride, size, end in zip(
            kernel, node.attrs["strides"], padded, ends, strict=True
        ):
            start = -(-(size - k) // stride) * stride  # of the last window
            start -= stride if start >= size - end else 0
            over.append(max(start + k - size, 0))
        node.attrs["ceil_mode"] = 0
        count += 1
        if not any(over):
            continue
        if node.attrs["count_include_pad"] and any(pads):
            amounts = np.array([0, 0, *begins, 0, 0, *ends], np.int64)
            wider = gs.Variable(f"{node.name}.padded", np.float32, [*x.shape[:2], *padded])
            inputs = [x, gs.Constant(f"{node.name}.pads", amounts)]
            graph.nodes.append(gs.Node("Pad", f"{node.name}.pad", {}, inputs, [wider]))
            node.inputs[0] = wider
            begins, ends = [0] * len(kernel), [0] * len(kernel)
        node.attrs["pads"] = [*begins, *(a + b for a, b in zip(ends, over, strict=True))]
        node.attrs["count_include_pad"] = 0
    return count
