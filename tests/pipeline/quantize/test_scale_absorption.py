"""Scale absorption: the same values in float, weights that powers of two suit."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from graph_tools.errors import SettingsError
from graph_tools.model import initializers, save
from graph_tools.prepare import prepare_for_quantization
from graph_tools.qdq import write_qdq
from pipeline.images import ImageWriter, open_images
from pipeline.quantize import quantize
from pipeline.quantize.thresholds import rounded_weight, weight_scales
from pipeline.run import QuantizeJob, quantize_file
from pipeline.settings import (
    GenerateSettings,
    InputSettings,
    QuantizeSettings,
    VerifySettings,
)
from pipeline.verify import verify

RNG = np.random.default_rng(5)
OFF = QuantizeSettings(weights=4)
ON = replace(OFF, scale_absorption=True)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


ARRAYS = {
    "w": normal(16, 3, 3, 3) / 5,
    "b": normal(16),
    "dw": normal(16, 1, 3, 3) / 3,
    "v": normal(8, 16, 1, 1) / 4,
    "fc": normal(5, 8),
    "wide": normal(5, 8 * 64),
    "fb": normal(5),
    "up": normal(16, 8, 1, 1) / 4,
    "zero": np.float32(0),
    "four": np.float32(4),
}
HEAD = "p = GlobalAveragePool(h) f = Flatten(p) y = Gemm<transB=1>(f, fc, fb)"
NETWORKS = {
    "relu": "r = Relu(c) d = Conv<group=16, pads=[1,1,1,1]>(r, dw) s = Relu(d) e = Conv(s, v)"
    f" h = Relu(e) {HEAD}",
    "linear": f"d = Conv<group=16, pads=[1,1,1,1]>(c, dw) h = Conv(d, v) {HEAD}",
    "flattened": "h = Conv(c, v) f = Flatten(h) y = Gemm<transB=1>(f, wide, fb)",
    "transposed": f"r = Relu(c) h = ConvTranspose(r, up) {HEAD}",
}


@pytest.fixture
def images(tmp_path):
    with ImageWriter(tmp_path / "images.npz", count=48, shape=(3, 8, 8)) as writer:
        writer.append(normal(48, 3, 8, 8))
    return open_images(tmp_path / "images.npz")


def network(make_model, text, **arrays):
    return prepare_for_quantization(
        make_model(
            "g (float[N,3,8,8] x) => (float[N,5] y) { c = Conv<pads=[1,1,1,1]>(x, w, b) "
            f"{text} }}",
            **{**ARRAYS, **arrays},
        )
    )


def weights_of(model):
    constants = initializers(model.proto)
    return {
        node.output[0]: constants[node.input[1]]
        for node in model.proto.graph.node
        if node.op_type in ("Conv", "Gemm", "ConvTranspose")
    }


def lost(weight, axis=0):
    """Relative squared rounding error with the best powers of two."""
    rounded = rounded_weight(weight, axis=axis, bits=4)
    return float(((rounded - weight) ** 2).sum() / (weight**2).sum())


def lost_with_free_scales(weight):
    scales = np.asarray(weight_scales(weight, axis=0, bits=4)).reshape(-1, 1, 1, 1)
    rounded = np.clip(np.rint(weight / scales), -8, 7) * scales
    return float(((rounded - weight) ** 2).sum() / (weight**2).sum())


@pytest.mark.parametrize("name", NETWORKS)
def test_values_stay_and_weights_round_better(make_model, run_onnx, images, name):
    model = network(make_model, NETWORKS[name])
    absorbed = quantize(model, images, ON).model
    image = next(iter(images.batches(16)))
    for exact, found in zip(
        run_onnx(model.proto, image), run_onnx(absorbed.proto, image), strict=True
    ):
        np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-4)
    before, after = weights_of(model), weights_of(absorbed)
    assert lost(after["c"]) < 0.9 * lost(before["c"])
    if name in ("relu", "linear"):
        assert lost(after["d"]) < 0.9 * lost(before["d"])
        # nearly what free scales reach, which cannot be beaten by much
        assert lost(after["d"]) < 1.15 * lost_with_free_scales(before["d"])


def test_what_a_clip_bounds_is_not_bounded_elsewhere(make_model, run_onnx, images):
    """Channels that reach the bound stay; those far below it move."""
    bias = np.where(np.arange(16) < 8, 6, 0).astype(np.float32)
    model = network(
        make_model,
        f"r = Clip(c, zero, four) h = Conv(r, v) {HEAD}",
        b=bias,
        w=ARRAYS["w"] / 3,
    )
    result = quantize(model, images, ON)
    ratio = weights_of(result.model)["c"] / weights_of(model)["c"]
    factors = ratio.reshape(16, -1).mean(axis=1)
    np.testing.assert_allclose(
        ratio.reshape(16, -1), factors[:, None].repeat(27, 1), rtol=1e-4
    )
    assert (factors[:8] == 1).all()
    assert (factors[8:] != 1).sum() >= 6
    image = next(iter(images.batches(16)))
    (exact,), (found,) = run_onnx(model.proto, image), run_onnx(result.model.proto, image)
    np.testing.assert_allclose(found, exact, rtol=1e-3, atol=1e-3)


def test_eight_bits_are_left_alone(make_model, images):
    model = network(make_model, NETWORKS["relu"])
    result = quantize(model, images, replace(ON, weights=8))
    assert result.model is model
    assert "scales absorbed behind 0 operators" in result.notes
    only = quantize(model, images, replace(ON, bits=("@first=W8",))).model
    assert np.array_equal(weights_of(only)["c"], weights_of(model)["c"])
    assert lost(weights_of(only)["d"]) < lost(weights_of(model)["d"])


def test_fewer_bits_of_activations_move_channels_less(make_model, images):
    """A channel made smaller has fewer steps of its tensor: with 4 bits that is dear."""
    model = network(make_model, NETWORKS["relu"])
    factors = {}
    for bits in (4, 8):
        moved = weights_of(quantize(model, images, replace(ON, activations=bits)).model)
        ratio = moved["c"] / weights_of(model)["c"]
        factors[bits] = ratio.reshape(16, -1).mean(axis=1)
    assert factors[4].mean() > factors[8].mean()


@pytest.mark.parametrize(
    "setting",
    [{"weight_scale": "free"}, {"weight_granularity": "tensor"}, {"target_size": "0.5x"}],
)
def test_what_leaves_nothing_to_absorb_is_refused(setting):
    with pytest.raises(SettingsError, match="--scale-absorption"):
        replace(ON, **setting)


def test_a_run_absorbs_shifts_learns_and_proves(make_model, images, tmp_path):
    model = make_model(
        "g (float[N,3,8,8] x) => (float[N,5] y) { c = Conv<pads=[1,1,1,1]>(x, w, b)"
        f" r = Clip(c, zero, four) e = Conv(r, v) h = HardSwish(e) {HEAD} }}",
        **ARRAYS,
    )
    job = QuantizeJob(
        model=model.source,
        output=tmp_path / "q.onnx",
        images=images.path,
        input=InputSettings(mean=("0.5",), std=("0.5",)),
        generation=GenerateSettings(),
        quantization=replace(
            ON, rounding="adaround", rounding_iterations=20, shift_negative=True
        ),
        verification=VerifySettings(),
    )
    result = quantize_file(job)
    assert result.proof.passed
    (note,) = (n for n in result.report["quantization"]["notes"] if "absorbed" in n)
    found = re.fullmatch(
        r"scales absorbed: (\d+) of 16 channels behind 1 of 2 operators; what their weights lose "
        r"by rounding is (0\.\d\d) of what it was",
        note,
    )
    assert found
    assert int(found[1]) > 0
    assert float(found[2]) < 1


def test_the_file_is_proven(make_model, images, tmp_path):
    result = quantize(network(make_model, NETWORKS["relu"]), images, ON)
    save(write_qdq(result.model, result.plan), tmp_path / "q.onnx")
    assert verify(tmp_path / "q.onnx", images, VerifySettings()).passed
