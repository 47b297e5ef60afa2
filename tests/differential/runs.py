"""The runs that are compared, each by itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime

from graph_tools.integer import FirstDifference, IntegerNetwork, first_difference

__all__ = ["Agreement", "compare", "in_onnxruntime"]


@dataclass(frozen=True)
class Agreement:
    """The interpreter against onnxruntime.

    Attributes:
        parting: where the unoptimized run parts; all integers are compared.
        steps: largest difference of each output to the optimized run, in steps.
    """

    parting: FirstDifference | None
    steps: dict[str, float]


def in_onnxruntime(
    model: onnx.ModelProto,
    images: np.ndarray,
    *,
    optimize: bool,
    integers: Iterable[str] = (),
) -> dict[str, np.ndarray]:
    """Outputs by name, and with ``integers`` these tensors, too."""
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    whole.graph.output.extend(onnx.ValueInfoProto(name=name) for name in integers)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    if optimize:
        options.add_session_config_entry("session.x64quantprecision", "1")
    else:
        level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.graph_optimization_level = level
    session = onnxruntime.InferenceSession(
        whole.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [entry.name for entry in session.get_outputs()]
    values = session.run(names, {session.get_inputs()[0].name: images})
    return dict(zip(names, values, strict=True))


def compare(model: onnx.ModelProto, images: np.ndarray) -> Agreement:
    """Run a file three ways."""
    network = IntegerNetwork(model)
    run = network.run(images)
    unoptimized = in_onnxruntime(model, images, optimize=False, integers=run.integers)
    optimized = in_onnxruntime(model, images, optimize=True)
    assert set(run.outputs) == set(optimized)  # every output is one of integers
    steps = {}
    for name, values in run.outputs.items():
        apart = np.abs(values - optimized[name])
        steps[name] = float(apart.max(initial=0) / network.graph.output_scale(name))
    return Agreement(
        parting=first_difference(network.graph, run.integers, unoptimized), steps=steps
    )
