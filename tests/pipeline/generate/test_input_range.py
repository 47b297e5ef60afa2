from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from graph_tools.model import Model, load
from pipeline.generate.input_range import guess_preprocessing, natural_noise

IMAGENET = "standardized by ImageNet's"


@pytest.mark.parametrize(
    ("file", "expected", "channels"),
    [
        ("cifar10_resnet20", IMAGENET, "rgb"),
        ("cifar10_resnet56", IMAGENET, "rgb"),
        ("mcunet_cifar10_32", IMAGENET, "rgb"),
        ("mlperftiny_resnet8_cifar10_tf2onnx_bn", "in 0..255,", "rgb"),
        ("mobilenet_v1_025_224_imagenet", "in -1..1", "rgb"),
        ("ultraface_rfb320", "in -1..1", "rgb"),
        ("yolo_fastestv2_coco", "in 0..1,", "bgr"),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_input_of_real_networks_is_recognized(
    shared_models: Path, file: str, expected: str, channels: str, seed: int
) -> None:
    found = guess_preprocessing(load(shared_models / f"{file}.onnx"), seed=seed)
    assert found.source.startswith("guessed: pixels ")
    assert expected in found.source
    assert found.channels == channels


@pytest.mark.parametrize("name", ["digits_resnet", "digits_mobilenet"])
def test_metadata_is_believed_and_agrees_with_the_guess(
    digits_models: Path, name: str
) -> None:
    model = load(digits_models / f"{name}.onnx")
    stated = guess_preprocessing(model)
    assert (stated.mean, stated.std, stated.source) == ((0.5,), (0.5,), "model metadata")
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    del proto.metadata_props[:]
    guessed = guess_preprocessing(replace(model, proto=proto))
    assert (guessed.mean, guessed.std) == (stated.mean, stated.std)
    assert guessed.source.startswith("guessed: pixels in -1..1")


def test_metadata_that_makes_no_sense_is_not_used(small: Model) -> None:
    proto = onnx.ModelProto()
    proto.CopyFrom(small.proto)
    for text in ("{", "[1]", '{"mean": [0.5, 0.5], "std": [0.5, 0.5]}'):
        del proto.metadata_props[:]
        onnx.helper.set_model_props(proto, {"preprocessing": text})
        assert guess_preprocessing(replace(small, proto=proto)).source != "model metadata"


def test_an_unusual_range_is_fitted(shared_models: Path) -> None:
    """A network whose first convolution expects standardized pixels times 10."""
    model = load(shared_models / "cifar10_resnet20.onnx")
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    first = next(node for node in proto.graph.node if node.op_type == "Conv")
    for tensor in proto.graph.initializer:
        if tensor.name == first.input[1]:
            values = onnx.numpy_helper.to_array(tensor) * 0.1
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    found = guess_preprocessing(replace(model, proto=proto))
    assert "fitted" in found.source
    low, high = found.valid_range(3)
    # from -21 to 23
    assert ((low > -40) & (low < -10)).all()
    assert ((high > 10) & (high < 40)).all()


def test_nothing_is_claimed_without_batch_norm(without_batch_norm: Model) -> None:
    assert guess_preprocessing(without_batch_norm).source.startswith("assumed: ")


def test_given_channel_order_is_kept(small: Model) -> None:
    assert guess_preprocessing(small, channels="bgr").channels == "bgr"


def test_natural_noise_has_the_spectrum_and_colors_of_images() -> None:
    images = natural_noise(32, (3, 64, 64), torch.Generator().manual_seed(0)).numpy()
    assert images.min() == 0
    assert images.max() == 1
    np.testing.assert_allclose(images.mean((0, 2, 3)), (0.485, 0.456, 0.406), atol=0.06)
    correlation = np.corrcoef(images.transpose(1, 0, 2, 3).reshape(3, -1))
    assert correlation.min() > 0.75
    power = (np.abs(np.fft.rfft(images.mean(1), axis=2)) ** 2).mean((0, 1))
    slope = np.polyfit(np.log(np.arange(2, 16)), np.log(power[2:16]), 1)[0]
    assert -2.2 < slope < -0.9  # power over one axis of a 1/f^2 plane falls like 1/f
