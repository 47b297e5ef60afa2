"""Bring a normal-form graph into the shape that integer kernels want, without changing its values.

The result computes the same function in float (tests compare it with onnxruntime) and has:
BatchNormalization folded or written as a depthwise convolution, per-channel Mul/Add folded into
the weights before them, MatMul with a constant as Gemm, means over space as GlobalAveragePool,
bounds like ReLU6 rescaled to powers of two, one weight and one bias of its own for each
convolution and Gemm, and every attribute written out.
"""

from __future__ import annotations

from graph_tools.batchnorm import fold_batch_norms
from graph_tools.bounds import rescale_bounds
from graph_tools.model import Model, replace_proto
from graph_tools.rewrites import (
    average_to_global_pool,
    batch_norm_to_convolution,
    constant_affine_to_convolution,
    drop_empty_pads,
    fold_affine_into_weights,
    fold_batch_norm_into_gemm,
    matmul_to_gemm,
    own_weight_and_bias,
    round_average_pools_down,
    write_attributes_out,
)
from graph_tools.weights import export_graph, import_graph

__all__ = ["prepare_for_quantization"]

_REWRITES = (  # and how the notes put it; empty: nothing a user needs to know
    (drop_empty_pads, ""),
    (matmul_to_gemm, "MatMul written as Gemm"),
    (own_weight_and_bias, ""),
    (fold_affine_into_weights, "per-channel arithmetic folded into the weights before it"),
    (fold_batch_norm_into_gemm, "BatchNormalization folded into the Gemm behind it"),
    (batch_norm_to_convolution, "BatchNormalization written as depthwise convolutions"),
    (
        constant_affine_to_convolution,
        "per-channel arithmetic written as depthwise convolutions",
    ),
    (average_to_global_pool, "means over the whole image written as GlobalAveragePool"),
    (write_attributes_out, ""),
    (round_average_pools_down, ""),
    (rescale_bounds, "ReLU6-like bounds rescaled to powers of two"),
)


def prepare_for_quantization(model: Model) -> Model:
    """Rewrite ``model`` for integer kernels; same inputs, outputs and (float) values.

    Args:
        model: a loaded network, BatchNormalization nodes kept.

    Returns:
        The rewritten network; its ``notes`` say what was changed.
    """
    folded = fold_batch_norms(model)
    graph = import_graph(folded.proto)
    notes: list[str] = []
    for rewrite, effect in _REWRITES:
        count = rewrite(graph)
        if count and effect:
            notes.append(f"{effect}: {count}")
        graph.cleanup().toposort()
    return replace_proto(folded, export_graph(graph, folded.proto), notes=tuple(notes))
