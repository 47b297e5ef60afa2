"""Defects of onnxruntime, each in the smallest file that shows it, and what the proof says of it.

A version without the defect passes, too: what must hold is that the interpreter and the unoptimized
run agree, and that the proof names the operator wherever the optimized run is wrong.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from pipeline.images import ImageWriter, open_images
from pipeline.settings import VerifySettings
from pipeline.verify import verify
from tests.differential.runs import compare, in_onnxruntime
from tests.pipeline.qdq_builder import QdqBuilder


def proof_of(model: onnx.ModelProto, images: np.ndarray, folder: Path):
    onnx.save(model, folder / "model.onnx")
    path = folder / "images.npz"
    with ImageWriter(path, count=len(images), shape=images.shape[1:]) as writer:
        writer.append(images)
    return verify(folder / "model.onnx", open_images(path), VerifySettings(threads=1))


def softmax(channels: int, dtype: type) -> onnx.ModelProto:
    g = QdqBuilder((channels, 3, 5), dtype=np.int8)
    g.quantize(g.node("Softmax", [g.image], "y", axis=1), -8, dtype, output="out")
    return g.model({"out": 4})


def images(channels: int) -> np.ndarray:
    values = np.random.default_rng(0).normal(size=(4, channels, 3, 5)) * 3
    return values.astype(np.float32)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_softmax_over_one_element_is_zero_in_onnxruntime(dtype, tmp_path):
    """QLinearSoftmax of onnxruntime 1.31 gives 0 where one element is all that is summed."""
    model = softmax(1, dtype)
    top = np.iinfo(dtype).max
    assert compare(model, images(1)).parting is None
    found = in_onnxruntime(model, images(1), optimize=True)["out"]
    assert np.all(found == 0) or np.all(found == top / 256)
    proof = proof_of(model, images(1), tmp_path)
    assert proof.passed is bool(np.all(found))
    if not proof.passed:
        assert any("Softmax softmax_y" in text for text in proof.failures)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_softmax_saturates_at_one(dtype):
    """QLinearSoftmax of onnxruntime before 1.31 wraps around in int8 (its issue 29727)."""
    g = QdqBuilder((4, 3, 5), dtype=np.int8)
    g.constants["image_scale"] = np.float32(1)
    g.quantize(g.node("Softmax", [g.image], "y", axis=1), -8, dtype, output="out")
    model = g.model({"out": 4})
    values = images(4) * 20
    exact = in_onnxruntime(model, values, optimize=False)["out"]
    assert exact.max() == np.iinfo(dtype).max / 256
    found = compare(model, values)
    assert found.parting is None
    assert found.steps["out"] <= 1
