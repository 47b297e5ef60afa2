"""BatchNormalization in a graph: find it, expose its inputs, fold it away.

In inference mode ``y = scale * (x - mean) / sqrt(variance + epsilon) + bias`` per channel, so
behind a convolution it is a change of weights::

    factor = scale / sqrt(variance + epsilon)
    W' = factor * W            (along the output channels)
    b' = factor * (b - mean) + bias

Source: ONNX BatchNormalization-15. Folding is computed in float64 and rounded once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from graph_tools.errors import ModelError
from graph_tools.model import Model, initializers, replace_proto
from graph_tools.passes import drop_unused_initializers, unused_name
from graph_tools.shapes import ranks_of
from graph_tools.weights import is_outside, tensor_of

__all__ = [
    "AffineLeftover",
    "BatchNormSite",
    "expose_inputs",
    "find_affine_leftovers",
    "find_bare_convolutions",
    "find_batch_norms",
    "fold_batch_norms",
]

_EPSILON = 1e-5
_FOLDABLE = ("Conv", "ConvTranspose", "Gemm")


@dataclass(frozen=True, kw_only=True)
class BatchNormSite:
    """One BatchNormalization node and what it knows of the training data.

    Attributes:
        node: name of the node.
        tensor: name of its input ``[N, C, ...]``, whose distribution the statistics describe.
        scale: gamma, ``[C] float32``.
        bias: beta, ``[C] float32``.
        mean: running mean of `tensor`, ``[C] float32``.
        variance: running variance of `tensor`, ``[C] float32``.
        epsilon: added to the variance.
    """

    node: str
    tensor: str
    scale: np.ndarray
    bias: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    epsilon: float

    @property
    def channels(self) -> int:
        """Number of channels C."""
        return int(self.mean.size)


@dataclass(frozen=True, kw_only=True)
class AffineLeftover:
    """A per-channel Mul and Add: a BatchNormalization whose statistics are gone.

    Attributes:
        mul: name of the Mul node.
        add: name of the Add node.
        tensor: name of the tensor that the Mul scales.
    """

    mul: str
    add: str
    tensor: str


def find_batch_norms(model: Model) -> tuple[BatchNormSite, ...]:
    """Find the BatchNormalization nodes in graph order, with their statistics.

    Raises:
        ModelError: a node in training mode, with statistics that are not constants, or with
            a negative variance; named.
    """
    constants = initializers(model.proto)
    return tuple(
        _site(node, constants)
        for node in model.proto.graph.node
        if node.op_type == "BatchNormalization"
    )


def _site(node: onnx.NodeProto, constants: dict[str, np.ndarray]) -> BatchNormSite:
    where = f"BatchNormalization '{node.name}'"
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if attributes.get("training_mode") or any(node.output[1:]):
        raise ModelError(
            "is in training mode", where=where, hint="call model.eval() before the export"
        )
    values = [constants.get(name) for name in node.input[1:5]]
    known = [value for value in values if value is not None]
    if len(known) != 4 or len({value.shape for value in known}) != 1:
        raise ModelError(
            "has statistics that are not constants",
            where=where,
            hint="export with the running statistics as weights",
        )
    scale, bias, mean, variance = (value.astype(np.float32) for value in known)
    if (variance < 0).any():
        raise ModelError("has a negative variance", where=where, hint="is the file damaged?")
    return BatchNormSite(
        node=node.name,
        tensor=node.input[0],
        scale=scale,
        bias=bias,
        mean=mean,
        variance=variance,
        epsilon=float(attributes.get("epsilon", _EPSILON)),
    )


def find_affine_leftovers(model: Model) -> tuple[AffineLeftover, ...]:
    """Find Mul followed by Add, both with one constant per channel and nothing between.

    The channel axis is 1 for tensors of rank 3 and more, and the last one for rank 2.
    """
    graph = model.proto.graph
    constants = initializers(model.proto)
    ranks = ranks_of(graph)
    uses = Counter(name for node in graph.node for name in node.input)
    uses.update(model.outputs)
    by_input: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            by_input.setdefault(name, []).append(node)
    found = []
    for mul in graph.node:
        if mul.op_type != "Mul" or (tensor := _scaled(mul, constants, ranks)) is None:
            continue
        behind = by_input.get(mul.output[0], [])
        if uses[mul.output[0]] != 1 or not behind or behind[0].op_type != "Add":
            continue
        if _scaled(behind[0], constants, ranks) == mul.output[0]:
            found.append(AffineLeftover(mul=mul.name, add=behind[0].name, tensor=tensor))
    return tuple(found)


def find_bare_convolutions(model: Model) -> tuple[str, ...]:
    """Return the outputs of convolutions that no BatchNormalization reads, in graph order."""
    nodes = model.proto.graph.node
    normalized = {node.input[0] for node in nodes if node.op_type == "BatchNormalization"}
    return tuple(
        node.output[0]
        for node in nodes
        if node.op_type in ("Conv", "ConvTranspose") and node.output[0] not in normalized
    )


def _scaled(
    node: onnx.NodeProto, constants: dict[str, np.ndarray], ranks: dict[str, int]
) -> str | None:
    """Return the variable input of a Mul or Add whose other input is per channel."""
    variable = [name for name in node.input if name not in constants]
    constant = [constants[name] for name in node.input if name in constants]
    if len(variable) != 1 or len(constant) != 1 or variable[0] not in ranks:
        return None
    rank, value = ranks[variable[0]], constant[0]
    if value.size < 2 or not np.issubdtype(value.dtype, np.floating):
        return None
    shape = (1,) * (rank - value.ndim) + value.shape
    channel_axis = 1 if rank > 2 else rank - 1
    one_axis = all(dim == 1 for axis, dim in enumerate(shape) if axis != channel_axis)
    return variable[0] if len(shape) == rank and one_axis else None


def expose_inputs(model: Model, sites: Sequence[BatchNormSite]) -> Model:
    """Make the inputs of the `sites` graph outputs, behind the model's own and in order.

    A tensor that is an output already, or the input of two sites, is listed once.
    """
    outputs = dict.fromkeys((*model.outputs, *(site.tensor for site in sites)))
    return replace_proto(model, model.proto, outputs=tuple(outputs))


def fold_batch_norms(model: Model, *, keep: Collection[str] = ()) -> Model:
    """Fold each BatchNormalization into the Conv, ConvTranspose or Gemm before it.

    A node stays if anything but the BatchNormalization reads the tensor between them, if that
    tensor is a graph output, or if the weights are not constants, or not finite once folded.
    Weights that several nodes share are copied.

    Args:
        model: the network.
        keep: names of BatchNormalization nodes that stay in any case.

    Returns:
        A model with the same interface and, up to float32 rounding, the same outputs.

    Raises:
        ModelError: as `find_batch_norms`.
    """
    sites = {site.node: site for site in find_batch_norms(model)}
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    graph = proto.graph
    constants = initializers(proto)
    uses = Counter(name for node in graph.node for name in node.input)
    uses.update(model.outputs)
    producers = {node.output[0]: node for node in graph.node}
    taken = {t.name for t in graph.initializer} | {o for n in graph.node for o in n.output}
    outside = any(is_outside(tensor) for tensor in graph.initializer)
    folded = []
    for index, node in enumerate(graph.node):
        if node.op_type != "BatchNormalization" or node.name in keep:
            continue
        producer = producers.get(node.input[0])
        if producer is None or uses[node.input[0]] != 1:
            continue
        weights = _folded_weights(producer, sites[node.name], constants)
        if weights is None:
            continue
        names = _unused_names(producer, node, taken)
        graph.initializer.extend(
            tensor_of(value, name, outside=outside)
            for name, value in zip(names, weights, strict=True)
        )
        _read_weights(producer, names)
        constants.update(zip(names, weights, strict=True))
        producer.output[0] = node.output[0]
        producers[node.output[0]] = producer
        folded.append(index)
    for index in reversed(folded):
        del graph.node[index]
    drop_unused_initializers(graph)
    return replace_proto(model, proto)


def _folded_weights(
    node: onnx.NodeProto, site: BatchNormSite, constants: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return weight and bias of `node` with `site` folded in, float32; None if impossible."""
    given = [name for name in node.input if name]
    if node.op_type not in _FOLDABLE or any(name not in constants for name in given[1:]):
        return None
    weight = constants[node.input[1]].astype(np.float64)
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    factor = site.scale.astype(np.float64) / np.sqrt(
        site.variance.astype(np.float64) + site.epsilon
    )
    bias = np.zeros(site.channels)
    if len(given) > 2:
        bias = bias + float(attributes.get("beta", 1.0)) * constants[node.input[2]]
    if bias.shape not in ((site.channels,), (1, site.channels)):
        return None
    match node.op_type:
        case "Conv":
            spread = factor.reshape(-1, *(1,) * (weight.ndim - 1))
            channels = weight.shape[0]
        case "ConvTranspose":  # [in, out/groups, ...]: the output channels lie in two axes
            groups = int(attributes.get("group", 1))
            channels = weight.shape[1] * groups
            if channels != site.channels:
                return None
            rows = np.repeat(factor.reshape(groups, -1), weight.shape[0] // groups, axis=0)
            spread = rows.reshape(*weight.shape[:2], *(1,) * (weight.ndim - 2))
        case _:
            transposed = bool(attributes.get("transB", 0))
            spread = factor[:, None] if transposed else factor[None, :]
            channels = weight.shape[0 if transposed else 1]
    if channels != site.channels:
        return None
    bias = factor * (bias.reshape(-1) - site.mean) + site.bias
    with np.errstate(over="ignore"):
        weight, bias = (weight * spread).astype(np.float32), bias.astype(np.float32)
    return (weight, bias) if np.isfinite(weight).all() and np.isfinite(bias).all() else None


def _unused_names(
    producer: onnx.NodeProto, node: onnx.NodeProto, taken: set[str]
) -> tuple[str, str]:
    """Name new weights of `producer` after its old ones where these are free."""
    bias = producer.input[2] if len(producer.input) > 2 else ""
    return (
        unused_name(f"{producer.input[1]}/folded", taken),
        unused_name(f"{bias or node.input[2]}/folded", taken),
    )


def _read_weights(producer: onnx.NodeProto, names: tuple[str, str]) -> None:
    del producer.input[1:]
    producer.input.extend(names)
    for attribute in producer.attribute:
        if attribute.name == "beta":
            attribute.f = 1.0
