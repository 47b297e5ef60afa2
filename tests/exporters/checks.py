"""Compare what `load` and `TorchGraph` make of a file with the file itself in onnxruntime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from graph_tools.equivalence import largest_difference
from graph_tools.model import Model, load
from graph_tools.torch_graph import TorchGraph

__all__ = ["TOLERANCE", "equal_to_file", "images_for", "session"]

TOLERANCE = 1e-4
"""Of the largest output: float32 kernels that sum in another order, tens of layers deep."""


def session(path: Path) -> onnxruntime.InferenceSession:
    """Open the original file, without optimizations."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def images_for(model: Model, count: int) -> np.ndarray:
    """Return ``[count, *shape] float32``, other images than `load` compares with."""
    rng = np.random.default_rng(11)
    return rng.normal(size=(count, *model.input.shape)).astype(np.float32)


def equal_to_file(
    path: Path,
    *,
    batches: Sequence[int] = (1, 3),
    input_shape: tuple[int, ...] | None = None,
    dtype: type = np.float32,
    tolerance: float = TOLERANCE,
) -> Model:
    """Load a file, run it in torch and onnxruntime, and assert that the outputs are equal.

    Args:
        path: the file.
        batches: batch sizes to run at.
        input_shape: for `load`.
        dtype: element type of the file's input.
        tolerance: relative to the largest value of each output.
    """
    model = load(path, input_shape=input_shape)
    running, graph = session(path), TorchGraph(model.proto)
    names = [output.name for output in running.get_outputs()]
    assert model.outputs == tuple(names)
    for count in batches:
        images = images_for(model, count)
        expected = running.run(None, {model.input.name: images.astype(dtype)})
        with torch.no_grad():
            outputs = graph(torch.from_numpy(images))
        actual = [outputs[name].numpy() for name in names]
        assert any(np.abs(np.asarray(e, np.float64)).max() > 0 for e in expected)
        assert largest_difference(actual, expected) <= tolerance
    return model
