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

from graph_tools.errors import SettingsError
from graph_tools.model import Model, replace_proto
from graph_tools.quantizer import Plan, TensorQuantizer
from pipeline.generate.last_linear import LastLinear, find_last_linear
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
        SettingsError: the network is no classifier.
    """

    def __init__(
        self, model: Model, plan: Plan, preprocessing: Preprocessing, device: torch.device
    ) -> None:
        layer = last_linear(model)
        self._features, self._head = layer.features, layer.logits
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


def last_linear(model: Model) -> LastLinear:
    """Return a classifier's last linear layer.

    Raises:
        SettingsError: the network is no classifier.
    """
    layer = find_last_linear(model)
    if layer is None:
        raise SettingsError(
            "the network does not end in one linear layer that gives each image a vector, whose "
            "gradients sadag compares",
            where="--method sadag",
            hint="--method genie and dgh serve every network with BatchNormalization",
        )
    return layer


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
