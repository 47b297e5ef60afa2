from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from graph_tools.model import Model, load
from graph_tools.ort_session import is_available

torch.set_num_threads(1)  # test processes run side by side

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if is_available():
        return
    for item in items:
        if item.get_closest_marker("ort"):
            reason = "needs onnxruntime-training, in an environment of its own: make test-ort"
            item.add_marker(pytest.mark.skip(reason=reason))


def _folder(path: Path) -> Path:
    if not path.is_dir():
        pytest.skip(f"{path.name}: real networks and images are not beside this checkout")
    return path


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """Real exported networks kept beside the repository."""
    return _folder(ROOT.parent / "shared" / "models")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real images kept beside the repository."""
    return _folder(ROOT.parent / "shared" / "data")


@pytest.fixture(scope="session")
def digits_models() -> Path:
    """The networks that the project ships."""
    return ROOT / "models"


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., Model]:
    """Builds and loads a model from ONNX text and arrays.

    ``make_model("g (float[N,3,8,8] x) => (float[N,4,8,8] y) { y = Relu(x) }", w=array)``; the
    arrays become initializers.
    """

    def build(text: str, **arrays: np.ndarray) -> Model:
        proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
        for name, values in arrays.items():
            proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
        path = tmp_path / "built.onnx"
        onnx.save(proto, path)
        return load(path)

    return build


@pytest.fixture(scope="session")
def run_onnx() -> Callable[..., list[np.ndarray]]:
    """Runs a model in unoptimized onnxruntime: ``run_onnx(proto, image, outputs=None)``."""

    def run(proto: onnx.ModelProto, image: np.ndarray, outputs=None) -> list[np.ndarray]:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3
        session = ort.InferenceSession(
            proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return session.run(outputs, {session.get_inputs()[0].name: image})

    return run
