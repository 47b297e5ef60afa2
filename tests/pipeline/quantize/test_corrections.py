"""Analytic bias correction and second-moment correction, against onnxruntime and numpy."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from graph_tools.errors import SettingsError
from graph_tools.model import save
from graph_tools.prepare import prepare_for_quantization
from graph_tools.qdq import write_qdq
from pipeline.images import ImageWriter, open_images
from pipeline.quantize import quantize
from pipeline.settings import QuantizeSettings, VerifySettings
from pipeline.verify import verify

RNG = np.random.default_rng(5)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


@pytest.fixture
def images(tmp_path):
    """Channels with means far from zero."""
    values = normal(32, 4, 6, 6) + np.array([1, -2, 3, 0.5], np.float32).reshape(4, 1, 1)
    with ImageWriter(tmp_path / "images.npz", count=32, shape=(4, 6, 6)) as writer:
        writer.append(values)
    return open_images(tmp_path / "images.npz")


@pytest.fixture
def flat_images(tmp_path):
    """Each channel of an image has one value: all positions have the same mean."""
    values = normal(32, 4, 1, 1) + np.array([1, -2, 3, 0.5], np.float32).reshape(4, 1, 1)
    with ImageWriter(tmp_path / "flat.npz", count=32, shape=(4, 6, 6)) as writer:
        writer.append(np.broadcast_to(values, (32, 4, 6, 6)).copy())
    return open_images(tmp_path / "flat.npz")


LAYERS = {
    "conv": ("y = Conv(x, w, b)", (5, 4, 3, 3), 5),
    "grouped": ("y = Conv<group=2>(x, w, b)", (6, 2, 3, 3), 6),
    "depthwise": ("y = Conv<group=4, strides=[2,2]>(x, w, b)", (8, 1, 2, 2), 8),
    "transposed": ("y = ConvTranspose<strides=[2,2]>(x, w, b)", (4, 3, 2, 2), 3),
    "grouped transposed": (
        "y = ConvTranspose<strides=[2,2], group=2>(x, w, b)",
        (4, 3, 2, 2),
        6,
    ),
    "gemm": ("f = Flatten(x) y = Gemm<transB=1>(f, w, b)", (5, 144), 5),
    "matmul": ("f = Flatten(x) m = MatMul(f, w) y = Add(m, b)", (144, 5), 5),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_analytic_biases_keep_the_mean_on_the_float_input(
    make_model, flat_images, run_onnx, layer
):
    images, (text, shape, channels) = flat_images, LAYERS[layer]
    rank = "float[N,k]" if "Flatten" in text else "float[N,k,h,v]"
    model = prepare_for_quantization(
        make_model(
            f"g (float[N,4,6,6] x) => ({rank} y) {{ {text} }}",
            w=normal(*shape),
            b=normal(channels),
        )
    )
    exact = run_onnx(model.proto, images.load())[0]
    axes = tuple(axis for axis in range(exact.ndim) if axis != 1)
    errors = {}
    for correct in ("none", "analytic"):
        settings = QuantizeSettings(weights=3, bias_correction=correct)
        plan = quantize(model, images, settings).plan
        rounded = onnx.ModelProto()
        rounded.CopyFrom(model.proto)
        for tensor in rounded.graph.initializer:
            if tensor.name in plan.constants:
                value = plan.constants[tensor.name].values
                tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
        found = run_onnx(rounded, images.load())[0]
        errors[correct] = np.abs((found - exact).mean(axis=axes)).max()
    step = max(
        float(c.quantizer.scale.max()) for c in plan.constants.values() if c.role == "bias"
    )
    assert errors["analytic"] < step / 2 + 1e-5  # rounding of the bias, and of float32
    assert errors["none"] > 3 * errors["analytic"]


BRANCHES = (
    "g (float[N,4,6,6] x) => (float[N,6,h,v] y) {"
    " c = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(c) y = Conv<pads=[1,1,1,1]>(r, v, u) }"
)


@pytest.fixture
def two_layers(make_model):
    return prepare_for_quantization(
        make_model(
            BRANCHES, w=normal(8, 4, 3, 3), b=normal(8), v=normal(6, 8, 3, 3), u=normal(6)
        )
    )


def channel_moments(values):
    return values.mean(axis=(0, 2, 3)), values.std(axis=(0, 2, 3))


@pytest.mark.parametrize(("weights", "share"), [(2, 0.5), (3, 0.75), (8, 0.75)])
def test_second_moments_come_nearer_and_means_stay(
    two_layers, images, run_onnx, weights, share
):
    mean, deviation = channel_moments(run_onnx(two_layers.proto, images.load())[0])
    errors, means = {}, {}
    for correct in (False, True):
        settings = QuantizeSettings(
            weights=weights, activations=16, second_moment_correction=correct
        )
        result = quantize(two_layers, images, settings)
        found = run_onnx(write_qdq(two_layers, result.plan), images.load())[0]
        moments = channel_moments(found)
        means[correct] = np.abs(moments[0] - mean).max()
        errors[correct] = np.abs(moments[1] / deviation - 1)
    assert errors[True].mean() < share * errors[False].mean()
    assert errors[True].max() < errors[False].max()
    assert means[True] < 1e-2 * deviation.max()
    assert any("second moments" in note for note in result.notes)


def test_second_moments_give_biases_behind_16_bits_their_room(make_model, images):
    """In 22 bits, such biases would need scales with which all weights are zero."""
    model = prepare_for_quantization(
        make_model(
            "g (float[N,4,6,6] x) => (float[N,8,h,v] y) { y = Conv(x, w, b) }",
            w=normal(8, 4, 3, 3),
            b=np.full(8, 3e4, np.float32),
        )
    )
    settings = QuantizeSettings(weights=2, activations=16, second_moment_correction=True)
    notes = quantize(model, images, settings).notes
    assert not any("corrected: 0 channels" in note for note in notes)


def test_the_corrected_file_is_proven(two_layers, images, tmp_path):
    settings = QuantizeSettings(weights=4, second_moment_correction=True)
    plan = quantize(two_layers, images, settings).plan
    save(write_qdq(two_layers, plan), tmp_path / "q.onnx")
    assert verify(tmp_path / "q.onnx", images, VerifySettings()).passed


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"rounding": "adaround"}, "--rounding adaround"),
        ({"bias_correction": "none"}, "--bias-correction"),
        ({"bias_correction": "analytic"}, "--bias-correction"),
    ],
)
def test_second_moments_refuse_what_they_do_not_go_with(settings, word):
    with pytest.raises(SettingsError, match="second-moment-correction") as error:
        QuantizeSettings(second_moment_correction=True, **settings)
    assert word in str(error.value)


@pytest.mark.parametrize("value", [-1.0, 0.5, float("inf"), float("nan")])
def test_outlier_z_is_checked(value):
    with pytest.raises(SettingsError, match="outlier-z"):
        QuantizeSettings(outlier_z=value)


def test_outliers_do_not_widen_a_threshold(two_layers, tmp_path):
    values = normal(32, 4, 6, 6)
    values[0, 0, 0, 0] = 1000.0
    with ImageWriter(tmp_path / "outlier.npz", count=32, shape=(4, 6, 6)) as writer:
        writer.append(values)
    images = open_images(tmp_path / "outlier.npz")
    exponents = [
        quantize(two_layers, images, QuantizeSettings(outlier_z=z)).plan.tensors["x"].exponent
        for z in (0.0, 24.0)
    ]
    assert exponents[1] < exponents[0]
