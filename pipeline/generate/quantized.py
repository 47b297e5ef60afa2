"""A quantized network as generation sees it: differentiable, with what its last layer reads.

The rounding of a plan is passed by gradients as if it were not there (straight through), its
saturation is not. Who decides the plan is the caller's business: generation gets a `Quantizer`.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from graph_tools.errors import ModelError
from graph_tools.model import Model, initializers, replace_proto
from graph_tools.quantizer import Plan, TensorQuantizer
from pipeline.generate.heads import find_heads
from pipeline.generate.network import Network
from pipeline.images import ImageSet
from pipeline.preprocessing import Preprocessing

__all__ = ["QuantizedNetwork", "Quantizer", "last_linear", "round_straight_through"]

Quantizer = Callable[[ImageSet], tuple[Model, Plan]]
"""From calibration images to the plan of a network, and the network that it is for."""


class QuantizedNetwork:
    """A network by its plan.

    Args:
        model: the network that the plan is for.
        plan: quantizers and integers.
        preprocessing: how pixels become the network's input.
        device: where to run.

    Raises:
        ModelError: the network does not end in one linear layer.
    """

    def __init__(
        self, model: Model, plan: Plan, preprocessing: Preprocessing, device: torch.device
    ) -> None:
        self._features, self._head = last_linear(model)
        self._plan = plan
        names = (self._features, self._head)
        self._network = Network(_rounded(model, plan), names, preprocessing, device)

    def observe(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the last layer reads, and what it makes: [N, ...] each.

        Args:
            images: [N, C, H, W] in standardized pixel units; any N.
        """
        network = self._network
        parts = [
            network.observe(chunk, hook=self._quantize)
            for chunk in torch.split(images, network.chunk or len(images))
        ]
        features, outputs = (
            torch.cat([part[name] for part in parts]) for name in (self._features, self._head)
        )
        return features, outputs

    def _quantize(self, name: str, values: Tensor) -> Tensor:
        quantizer = self._plan.tensors.get(name)
        return values if quantizer is None else round_straight_through(values, quantizer)


def round_straight_through(values: Tensor, quantizer: TensorQuantizer) -> Tensor:
    """Quantize and dequantize; the gradient is 1 within the range, 0 beyond.

    Args:
        values: float32, any shape.
        quantizer: a per-tensor quantizer.
    """
    scale = float(quantizer.scale)
    scaled = (values / scale).clamp(quantizer.qmin, quantizer.qmax)
    return (scaled + (torch.round(scaled) - scaled).detach()) * scale


def last_linear(model: Model) -> tuple[str, str]:
    """Return the tensors that a classifier's last linear layer reads and makes.

    Raises:
        ModelError: the network does not end in one linear layer.
    """
    heads = find_heads(model)
    fault = ModelError(
        "the network does not end in one linear layer (Gemm, MatMul, or Conv of a 1x1 map), whose "
        "gradients the images should agree on",
        where=str(model.source or "the model"),
        hint="choose another method, such as genie or dgh",
    )
    if len(heads) != 1:
        raise fault
    producers = {name: node for node in model.proto.graph.node for name in node.output}
    constants = set(initializers(model.proto))
    node = producers.get(heads[0])
    if node is not None and node.op_type == "Add":  # the bias of a MatMul
        node = next((producers[name] for name in node.input if name in producers), None)
    if node is None:
        raise fault
    weighted = node.input[1] in constants and node.input[0] not in constants
    is_product = node.op_type in ("Gemm", "MatMul")
    flat = _rank(model, heads[0]) in (None, 2)
    if weighted and ((is_product and flat) or _is_pointwise(model, node)):
        return node.input[0], heads[0]
    raise fault


def _shape(model: Model, name: str) -> list[int] | None:
    graph = model.proto.graph
    for value in (*graph.value_info, *graph.output):
        if value.name == name:
            return [dim.dim_value for dim in value.type.tensor_type.shape.dim]
    return None


def _rank(model: Model, name: str) -> int | None:
    shape = _shape(model, name)
    return None if shape is None else len(shape)


def _is_pointwise(model: Model, node: onnx.NodeProto) -> bool:
    """Whether a convolution computes one product an image."""
    if node.op_type != "Conv":
        return False
    shapes = _shape(model, node.input[0]), _shape(model, node.output[0])
    return all(shape is not None and set(shape[2:]) == {1} for shape in shapes)


def _rounded(model: Model, plan: Plan) -> Model:
    """Return the network with the values of the plan's integers in place of its constants."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    kept = [entry for entry in proto.graph.initializer if entry.name not in plan.constants]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    proto.graph.initializer.extend(
        numpy_helper.from_array(constant.values, name)
        for name, constant in plan.constants.items()
    )
    return replace_proto(model, proto)
