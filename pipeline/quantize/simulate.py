"""The quantized network in torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from graph_tools.quantizer import Plan, TensorQuantizer
from graph_tools.torch_graph import Step, TorchGraph

__all__ = ["fake_quantize", "simulate", "simulate_plan"]


def fake_quantize(value: torch.Tensor, quantizer: TensorQuantizer) -> torch.Tensor:
    """QuantizeLinear then DequantizeLinear: round half to even, saturate.

    Args:
        value: float32, any shape.
        quantizer: a per-tensor quantizer.

    Returns:
        Float32 of the same shape, bit-equal to onnxruntime's (the scale is a power of two).
    """
    scale = float(quantizer.scale)
    scaled = torch.round(value * (1.0 / scale))
    return scaled.clamp_(quantizer.qmin, quantizer.qmax).mul_(scale)


@torch.no_grad()
def simulate(
    graph: TorchGraph,
    steps: Sequence[Step],
    values: Mapping[str, torch.Tensor],
    tensors: Mapping[str, TensorQuantizer],
    constants: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Compute steps of the quantized network.

    Args:
        graph: the float network.
        steps: those to compute, in order.
        values: what is known before, by tensor name, quantized where that is due.
        tensors: quantizers of the tensors that the steps make.
        constants: dequantized constants.

    Returns:
        ``values`` and all that the steps make.
    """

    def quantize(name: str, value: torch.Tensor) -> torch.Tensor:
        return fake_quantize(value, tensors[name]) if name in tensors else value

    return graph.run_steps(steps, values, constants=constants, hook=quantize)


def simulate_plan(
    graph: TorchGraph, plan: Plan, images: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Compute all tensors of the network that a plan describes.

    Args:
        graph: the float network that the plan is for.
        plan: its quantizers and integers.
        images: [n, ...], in the model's own layout and normalization.
    """
    source = graph.input_names[0]
    start = fake_quantize(images, plan.tensors[source]) if source in plan.tensors else images
    constants = {
        name: torch.from_numpy(constant.values) for name, constant in plan.constants.items()
    }
    return simulate(graph, graph.steps, {source: start}, plan.tensors, constants)
