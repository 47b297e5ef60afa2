"""The integer interpreter against unoptimized onnxruntime, on whole quantized networks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from graph_tools.integer import IntegerNetwork, first_difference
from pipeline.cli import main


def quantized(source: Path, folder: Path, *options: str) -> tuple[onnx.ModelProto, np.ndarray]:
    target = folder / "q.onnx"
    quick = (
        "--method",
        "noise",
        "--num-images",
        "4",
        "--verify-images",
        "1",
        "--threads",
        "1",
    )
    code = main(["quantize", str(source), "-o", str(target), "--quiet", *quick, *options])
    assert code == 0
    return onnx.load(target), np.load(folder / "q" / "images.npz")["images"]


def assert_same_integers(model: onnx.ModelProto, images: np.ndarray):
    network = IntegerNetwork(model)
    run = network.run(images.astype(np.float32))
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    types = {value.name: value for value in model.graph.value_info}
    whole.graph.output.extend(types[name] for name in run.integers)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        whole.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = list(run.integers)
    found = session.run(names, {session.get_inputs()[0].name: images.astype(np.float32)})
    by_name = dict(zip(names, found, strict=True))
    assert first_difference(network.graph, run.integers, by_name) is None
    assert len(names) > 10
    return run


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--weights", "4"), ("--activations", "4")])
def test_the_shipped_network(digits_models: Path, tmp_path: Path, options) -> None:
    source = digits_models / "digits_mobilenet.onnx"
    run = assert_same_integers(*quantized(source, tmp_path, *options))
    assert not run.float_nodes
    assert set(run.outputs) == {"logits"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "mlperftiny_resnet8_cifar10_tf2onnx_bn",
        "cifar10_resnet20",
        "mcunet_cifar10_32",
        "mobilenet_v1_025_224_imagenet",
        "yolo_fastestv2_coco",
        "ultraface_rfb320",
    ],
)
def test_real_networks(shared_models: Path, tmp_path: Path, name: str) -> None:
    model, images = quantized(shared_models / f"{name}.onnx", tmp_path)
    assert_same_integers(model, images[:1])
