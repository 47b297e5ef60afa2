"""Scale absorption: the same values in float, weights that powers of two suit."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from graph_tools.channel_scaling import find_channel_pairs
from graph_tools.errors import DataError, SettingsError
from graph_tools.model import initializers, save
from graph_tools.prepare import prepare_for_quantization
from graph_tools.qdq import write_qdq
from graph_tools.torch_graph import TorchGraph
from graph_tools.weights import import_graph
from pipeline.images import ImageWriter, open_images
from pipeline.quantize import quantize, scale_absorption
from pipeline.quantize.scale_absorption import absorb_scales
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
NAMES = ("Conv_0", "Conv_1", "Conv_2", "Gemm_0")
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


def moved(notes):
    (note,) = (note for note in notes if "absorbed" in note)
    return int(re.findall(r"(\d+) channels", note)[0])


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
    for name, changes in {
        "8": {"activations": 8},
        "4": {"activations": 4},
        "4 signed": {"activations": 4, "signedness": "signed"},
    }.items():
        scaled = weights_of(quantize(model, images, replace(ON, **changes)).model)
        ratio = scaled["c"] / weights_of(model)["c"]
        factors[name] = ratio.reshape(16, -1).mean()
    assert factors["8"] < factors["4"] < factors["4 signed"]


def test_what_is_absorbed_once_stays(make_model, images):
    """Factors are chosen for inputs as they are scaled by then: a second time gains nothing."""
    model = network(make_model, NETWORKS["relu"])
    once = quantize(model, images, ON)
    twice = quantize(once.model, images, ON)
    assert moved(once.notes) >= 30
    assert moved(twice.notes) <= 2


def test_a_bound_that_nothing_comes_near_is_none(make_model, images):
    quiet = {"w": ARRAYS["w"] / 50, "b": ARRAYS["b"] / 50}
    bounded = network(make_model, f"r = Clip(c, zero, four) h = Conv(r, v) {HEAD}", **quiet)
    unbounded = network(make_model, f"r = Relu(c) h = Conv(r, v) {HEAD}", **quiet)
    found, expected = (
        weights_of(quantize(model, images, ON).model)["c"] for model in (bounded, unbounded)
    )
    assert np.array_equal(found, expected)


def test_the_batches_do_not_matter(make_model, images):
    model = network(make_model, NETWORKS["relu"])
    graph = TorchGraph(model.proto)
    whole = torch.from_numpy(next(iter(images.batches(9))))
    loud = torch.cat([whole, 20 * whole[:1]])
    found = [
        absorb_scales(
            model, graph, lambda size=size: loud.split(size), dict.fromkeys(NAMES, 4), {}, ON
        )[0]
        for size in (9, 5, 1)
    ]
    for other in found[1:]:
        for name, weight in weights_of(found[0]).items():
            np.testing.assert_array_equal(weights_of(other)[name], weight)


def test_an_empty_tensor_is_named_as_without(make_model, images):
    model = prepare_for_quantization(
        make_model(
            "g (float[N,3,8,8] x) => (float[M,4] y) { t = Reshape(x, shape)"
            " s = Slice(t, none, none) c = Gemm<transB=1>(s, a) r = Relu(c)"
            " y = Gemm<transB=1>(r, d) }",
            shape=np.array([-1, 24], np.int64),
            none=np.array([0], np.int64),
            a=normal(8, 24),
            d=normal(4, 8),
        )
    )
    for settings in (OFF, ON):
        with pytest.raises(DataError, match="has no elements"):
            quantize(model, images, settings)


@pytest.mark.parametrize("kind", ["grouped", "gemm", "transposed", "dense"])
def test_rounding_errors_are_those_of_random_inputs(make_model, kind):
    """E (dw x)^2 = sum dw^2 E x^2 for independent channels, against drawn inputs."""
    arrays = {"grouped": normal(8, 3, 1, 1), "dense": normal(8, 6, 1, 1), "gemm": normal(8, 6)}
    arrays["transposed"] = normal(6, 8, 1, 1)
    op = {"grouped": "Conv<group=2>", "dense": "Conv", "gemm": "Gemm<transB=1>"}
    out = "float[N,8]" if kind == "gemm" else "float[N,8,1,1]"
    model = make_model(
        f"g (float[N,6,1,1] x) => ({out} y) {{ {'f = Flatten(x)' if kind == 'gemm' else ''}"
        f" y = {op.get(kind, 'ConvTranspose')}({'f' if kind == 'gemm' else 'x'}, w, b) }}",
        w=arrays[kind],
        b=np.zeros(8, np.float32),
    )
    node = import_graph(model.proto).nodes[-1]
    squares = np.array([0.1, 4.0, 1.0, 9.0, 0.5, 2.0])
    errors = scale_absorption._weight_errors(node, squares, 3, ON)
    axis = 1 if kind == "transposed" else 0
    drawn = RNG.normal(size=(40_000, 6)) * np.sqrt(squares)
    for index in (0, 7, 10):
        factor = 2.0 ** scale_absorption._LOG_FACTORS[index]
        weight = arrays[kind].astype(np.float64)
        lost = rounded_weight(weight * factor, axis=axis, bits=3) / factor - weight
        if kind == "grouped":
            rows = np.zeros((8, 6))
            rows[:4, :3], rows[4:, 3:] = lost[:4, :, 0, 0], lost[4:, :, 0, 0]
        else:
            rows = np.moveaxis(lost.reshape(lost.shape[:2]), axis, 0)
        expected = ((drawn @ rows.T) ** 2).mean(axis=0)
        np.testing.assert_allclose(errors[index], expected, rtol=0.05)


def test_negative_values_count_where_they_pass(make_model, images):
    """Behind a LeakyRelu a channel has both signs, and half as many steps for each."""
    model = network(make_model, f"r = LeakyRelu(c) h = Conv(r, v) {HEAD}")
    (pair, *_), _ = find_channel_pairs(import_graph(model.proto))
    value = torch.tensor([[[[-3.0]], [[2.0]]]])
    assert not scale_absorption._rectified(pair)
    assert scale_absorption._passed(pair, value).flatten().tolist() == [3.0, 2.0]
    relu = network(make_model, f"r = Relu(c) h = Conv(r, v) {HEAD}")
    (pair, *_), _ = find_channel_pairs(import_graph(relu.proto))
    assert scale_absorption._rectified(pair)
    assert scale_absorption._passed(pair, value).flatten().tolist() == [0.0, 2.0]


def test_positions_are_spread_over_both_axes():
    value = torch.arange(128 * 128.0).reshape(1, 1, 128, 128)
    sparse = scale_absorption._sparse(value)
    assert sparse.shape == (1, 1, 32, 32)
    assert len((sparse % 128).unique()) == len((sparse // 128).unique()) == 32


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
        r"scales absorbed: (\d+) channels behind 1 of 2 operators; rounding their weights costs "
        r"(0\.\d\d) of what it did, in the mean; outputs in float stay as they are to (\d+) dB",
        note,
    )
    assert found
    assert int(found[1]) > 0
    assert float(found[2]) < 1
    assert int(found[3]) > 20


def test_the_file_is_proven(make_model, images, tmp_path):
    result = quantize(network(make_model, NETWORKS["relu"]), images, ON)
    save(write_qdq(result.model, result.plan), tmp_path / "q.onnx")
    assert verify(tmp_path / "q.onnx", images, VerifySettings()).passed
