from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graph_tools.model import Model, load
from pipeline.generate.quality import UNMEASURED


def build(path: Path, *, batch_norm: bool = True, scale: float = 1.0, seed: int = 0) -> Path:
    """Conv-BN-Relu-Conv-BN-GlobalAveragePool-Gemm on [N, 3, 12, 10] pixels times ``scale``."""
    rng = np.random.default_rng(seed)

    def values(name: str, array: np.ndarray) -> onnx.TensorProto:
        return numpy_helper.from_array(array.astype(np.float32), name)

    weights = [
        values("w1", rng.normal(size=(8, 3, 3, 3)) / (5 * scale)),
        values("w2", rng.normal(size=(6, 8, 3, 3)) / 8),
        values("w3", rng.normal(size=(6, 5))),
        values("b3", rng.normal(size=5)),
    ]
    nodes = [
        helper.make_node("Conv", ["image", "w1"], ["c1"], "conv1", pads=[1] * 4),
        helper.make_node("Relu", ["n1"], ["r1"], "relu"),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], "conv2", strides=[2, 2]),
        helper.make_node("GlobalAveragePool", ["n2"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["g"], "gemm"),
        helper.make_node("Softmax", ["g"], ["probabilities"], "softmax", axis=1),
    ]
    for index, channels in ((1, 8), (2, 6)):
        if not batch_norm:
            nodes.append(
                helper.make_node("Relu", [f"c{index}"], [f"n{index}"], f"plain{index}")
            )
            continue
        names = [f"{part}{index}" for part in ("gamma", "beta", "mean", "variance")]
        arrays = [
            rng.uniform(0.5, 1.5, channels),
            rng.normal(size=channels),
            rng.normal(size=channels) * 0.3,
            rng.uniform(0.3, 1.0, channels),
        ]
        weights += [values(name, array) for name, array in zip(names, arrays, strict=True)]
        node = helper.make_node(
            "BatchNormalization", [f"c{index}", *names], [f"n{index}"], f"bn{index}"
        )
        nodes.append(node)
    order = ["conv1", "bn1", "plain1", "relu", "conv2", "bn2", "plain2"]
    nodes.sort(key=lambda node: order.index(node.name) if node.name in order else 99)
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, 12, 10])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", 5])],
        weights,
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    return path


@pytest.fixture
def small(tmp_path: Path) -> Model:
    """A small network with two BatchNormalization nodes and a Softmax at its end."""
    return load(build(tmp_path / "small.onnx"))


@pytest.fixture
def without_batch_norm(tmp_path: Path) -> Model:
    return load(build(tmp_path / "plain.onnx", batch_norm=False))


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out what takes most of the time of small runs: looks at the images and the input."""
    monkeypatch.setattr("pipeline.generate.doubt", lambda *args, **kwargs: None)
    monkeypatch.setattr("pipeline.generate.measure_quality", lambda *args: UNMEASURED)
