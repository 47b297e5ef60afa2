"""Learned roundings and exponents, against brute force, closed forms and the plain quantizer."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from graph_tools.blocks import find_blocks
from graph_tools.errors import SettingsError
from graph_tools.model import initializers, load
from graph_tools.prepare import prepare_for_quantization
from graph_tools.qdq import write_qdq
from graph_tools.quantizer import QuantizedConstant, TensorQuantizer
from graph_tools.torch_graph import TorchGraph
from pipeline.images import ImageWriter, open_images
from pipeline.quantize import quantize
from pipeline.quantize.fisher import output_sensitivity
from pipeline.quantize.lockstep import Lockstep
from pipeline.quantize.reconstruction import tensors_by_image
from pipeline.quantize.samples import Samples
from pipeline.quantize.simulate import fake_quantize
from pipeline.quantize.soft_bias import SoftBias
from pipeline.quantize.soft_quantizer import soft_quantize
from pipeline.quantize.soft_rounding import SoftRounding
from pipeline.settings import QuantizeSettings

RNG = np.random.default_rng(0)
RESIDUAL = (
    "g (float[N,3,8,8] x) => (float[N,5] y) {"
    " c = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(c)"
    " d = Conv<pads=[1,1,1,1]>(r, w2, b) e = Relu(d) f = Conv<pads=[1,1,1,1]>(e, w3, b)"
    " a = Add(f, r) s = Relu(a) p = GlobalAveragePool(s) l = Flatten(p)"
    " y = Gemm<transB=1>(l, fc, fb) }"
)


def normal(*shape, scale=1.0):
    return (scale * RNG.normal(size=shape)).astype(np.float32)


ARRAYS = {
    "w": normal(8, 3, 3, 3, scale=0.3),
    "b": normal(8, scale=0.1),
    "w2": normal(8, 8, 3, 3, scale=0.2),
    "w3": normal(8, 8, 3, 3, scale=0.2),
    "fc": normal(5, 8),
    "fb": normal(5),
}


@pytest.fixture(autouse=True)
def same_numbers_whatever_ran_before():
    RNG.bit_generator.state = np.random.default_rng(0).bit_generator.state


def image_set(tmp_path, values):
    with ImageWriter(tmp_path / "i.npz", count=len(values), shape=values.shape[1:]) as writer:
        writer.append(values)
    return open_images(tmp_path / "i.npz")


@pytest.fixture
def residual(make_model):
    return prepare_for_quantization(make_model(RESIDUAL, **ARRAYS))


@pytest.fixture
def images(tmp_path):
    return image_set(tmp_path, normal(64, 3, 8, 8))


@pytest.fixture(scope="module")
def digits(digits_models):
    return prepare_for_quantization(load(digits_models / "digits_resnet.onnx"))


@pytest.fixture
def digit_images(tmp_path):
    pixels = load_digits().images.astype(np.float32)[:, None] / 8 - 1
    return image_set(tmp_path, pixels[:128]), pixels[1000:1200]


def constant(weight, bits, exponent):
    quantizer = TensorQuantizer(
        bits=bits, signed=True, exponent=(exponent,) * len(weight), axis=0
    )
    return QuantizedConstant(
        integers=quantizer.quantize(weight), quantizer=quantizer, role="weight", node="n"
    )


def test_soft_weight_begins_as_the_float_weight_and_hard_as_the_nearest():
    weight = normal(6, 4, 3, 3, scale=0.4)
    soft = SoftRounding(torch.from_numpy(weight), constant(weight, 4, -3))
    within = np.clip(weight, -1.0, 7 / 8)  # the range of 4 bits at 2**-3
    np.testing.assert_allclose(soft.weight().detach().numpy(), within, atol=1e-6)
    assert np.array_equal(soft.hard().integers, constant(weight, 4, -3).integers)


def test_a_bias_moves_in_standard_deviations_of_its_channel():
    output = torch.from_numpy(normal(50, 3, 4) * np.array([1.0, 10.0, 0.0], "f")[:, None])
    soft = SoftBias(torch.tensor([1.0, 2.0, 3.0]), output, 1)
    assert torch.equal(soft.value(), torch.tensor([1.0, 2.0, 3.0]))
    with torch.no_grad():
        soft.shift += 0.5
    moved = [1 + 0.5 * float(output[:, 0].std(correction=0)), 0, 3]
    moved[1] = 2 + 0.5 * float(output[:, 1].std(correction=0))
    assert soft.value().tolist() == pytest.approx(moved, rel=1e-5)


def test_learned_biases_take_up_what_roundings_shift(make_model, tmp_path, run_onnx):
    """Inputs with a large mean: errors of the weights add up to an offset."""
    model = prepare_for_quantization(
        make_model(
            "g (float[N,10,1,1] x) => (float[N,4] y) {"
            " f = Flatten(x) y = Gemm<transB=1>(f, w, b) }",
            w=normal(4, 10),
            b=normal(4),
        )
    )
    images = image_set(tmp_path, 5 + normal(256, 10, 1, 1))
    exact = run_onnx(model.proto, images.load())[0]
    offsets = {}
    for correction in ("none", "empirical"):
        settings = QuantizeSettings(
            weights=2, activations=16, rounding="adaround", bias_correction=correction
        )
        quantization = quantize(model, images, settings)
        assert ("biases" in quantization.notes[0]) == (correction == "empirical")
        (found,) = run_onnx(write_qdq(model, quantization.plan), images.load())
        offsets[correction] = float(np.abs((found - exact).mean(axis=0)).mean())
    assert offsets["empirical"] < 0.8 * offsets["none"]


def test_learning_ends_when_no_rounding_changes_any_more(residual, images, monkeypatch):
    draws = []
    draw = Samples.draw
    monkeypatch.setattr(
        Samples, "draw", lambda self, *args: draws.append(self) or draw(self, *args)
    )
    counts = []
    for rate in (3e-2, 0.0):
        monkeypatch.setattr("pipeline.quantize.reconstruction._LEARNING_RATE", rate)
        draws.clear()
        settings = QuantizeSettings(
            weights=2, rounding="brecq", learn_exponents=False, bias_correction="none"
        )
        quantize(residual, images, settings)
        counts.append(len(draws))
    steps = 100 * len(set(map(id, draws)))
    assert counts[0] > counts[1]
    assert counts[1] <= 0.3 * steps  # checked every tenth, from a fifth on


def test_regularizer_is_zero_only_where_all_is_decided():
    weight = normal(3, 2)
    soft = SoftRounding(torch.from_numpy(weight), constant(weight, 4, -2))
    assert float(soft.regularizer(2.0).detach()) > 0.1
    with torch.no_grad():
        soft.logits.copy_(torch.where(soft.logits > 0, 10.0, -10.0))
    assert float(soft.regularizer(2.0).detach()) == 0.0
    assert torch.equal(soft.weight().detach(), torch.from_numpy(soft.hard().values))


@pytest.mark.parametrize("signed", [True, False])
def test_soft_quantizer_is_the_quantizer_with_gradients_where_nothing_saturates(signed):
    quantizer = TensorQuantizer(bits=4, signed=signed, exponent=-2)
    value = torch.from_numpy(normal(200, scale=2.0)).requires_grad_()
    generator = torch.Generator()
    result = soft_quantize(value, quantizer, 0.0, generator)
    assert torch.equal(result, fake_quantize(value.detach(), quantizer))
    result.sum().backward()
    rounded = (value.detach() / 0.25).round()
    inside = (rounded >= quantizer.qmin) & (rounded <= quantizer.qmax)
    assert torch.equal(value.grad, inside.float())
    assert torch.equal(soft_quantize(value, quantizer, 1.0, generator), value)


def test_dropped_elements_stay_and_pass_all_of_the_gradient():
    quantizer = TensorQuantizer(bits=4, signed=False, exponent=-2)
    value = torch.from_numpy(normal(50, 4, 3, 5, scale=3.0))
    value = value.contiguous(memory_format=torch.channels_last).requires_grad_()
    result = soft_quantize(value, quantizer, 0.25, torch.Generator().manual_seed(0))
    result.sum().backward()
    changed = result != value
    exact = fake_quantize(value.detach(), quantizer)
    assert torch.equal(result[changed], exact[changed])
    assert float(changed.float().mean()) == pytest.approx(0.75, abs=0.04)
    assert (value.grad[~changed] == 1).all()


def test_adaround_finds_roundings_as_good_as_brute_force(make_model, tmp_path):
    """One neuron of ten weights on correlated inputs: 1024 ways to round it."""
    weight = normal(1, 10, scale=0.35)
    model = prepare_for_quantization(
        make_model(
            "g (float[N,10,1,1] x) => (float[N,1] y) {"
            " f = Flatten(x) y = Gemm<transB=1>(f, w, b) }",
            w=weight,
            b=np.zeros(1, np.float32),
        )
    )
    mixing = normal(10, 10)
    values = (normal(256, 10) @ mixing).astype(np.float32)
    images = image_set(tmp_path, values.reshape(256, 10, 1, 1))
    plans = {
        rounding: quantize(
            model,
            images,
            QuantizeSettings(
                weights=3, activations=16, rounding=rounding, bias_correction="none"
            ),
        ).plan
        for rounding in ("nearest", "adaround")
    }
    name = next(n for n, c in plans["nearest"].constants.items() if c.role == "weight")
    quantizer = plans["nearest"].constants[name].quantizer
    scale = float(quantizer.scale[0])
    exact = initializers(model.proto)[name].reshape(10).astype(np.float64)
    floor = np.floor(exact / scale)

    def error(integers):
        return float(np.square(values @ (integers * scale - exact)).mean())

    ways = [
        np.clip(floor + up, quantizer.qmin, quantizer.qmax)
        for up in itertools.product((0, 1), repeat=10)
    ]
    errors = sorted(error(way) for way in ways)
    nearest, learned = (
        error(plans[r].constants[name].integers.reshape(10)) for r in ("nearest", "adaround")
    )
    assert nearest > 2 * errors[0]  # there is something to gain
    assert learned <= errors[10]  # within the best percent


@pytest.mark.parametrize(
    "options",
    [
        {"rounding": "adaround"},
        {"rounding": "brecq"},
        {"rounding": "brecq", "reconstruction": "fisher", "rounding_iterations": 400},
        {"rounding": "brecq", "learn_exponents": False, "qdrop": 0.0},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_learned_roundings_are_more_faithful_than_the_nearest(
    digits, digit_images, run_onnx, options
):
    calibration, held_out = digit_images
    exact = run_onnx(digits.proto, held_out)[0]
    errors = []
    for chosen in ({}, options):
        settings = QuantizeSettings(weights=3, **chosen)
        plan = quantize(digits, calibration, settings).plan
        (found,) = run_onnx(write_qdq(digits, plan), held_out)
        errors.append(np.square(found - exact).mean())
    assert errors[1] < 0.75 * errors[0]


def test_learned_exponents_beat_those_of_the_histograms_at_few_bits(
    residual, images, run_onnx
):
    exact = run_onnx(residual.proto, images.load())[0]
    errors = []
    for learn in (False, True):
        settings = QuantizeSettings(
            weights=4,
            activations=4,
            rounding="brecq",
            learn_exponents=learn,
            threshold="no-clipping",
        )
        plan = quantize(residual, images, settings).plan
        (found,) = run_onnx(write_qdq(residual, plan), images.load())
        errors.append(np.square(found - exact).mean())
    assert errors[1] < errors[0]


@pytest.mark.parametrize(
    "options",
    [
        {"qdrop": 1.5},
        {"qdrop": -0.5},
        {"qdrop": math.nan},
        {"rounding_iterations": -1},
    ],
    ids=str,
)
def test_settings_outside_their_range_are_refused(options):
    flag = "--" + list(options)[-1].replace("_", "-")
    with pytest.raises(SettingsError, match=flag):
        QuantizeSettings(**options)


def test_roundings_that_do_not_beat_the_nearest_are_not_kept(residual, images, monkeypatch):
    monkeypatch.setattr("pipeline.quantize.reconstruction._LEARNING_RATE", 1e3)
    plans = [
        quantize(
            residual,
            images,
            QuantizeSettings(rounding=rounding, rounding_iterations=3, bias_correction="none"),
        ).plan
        for rounding in ("nearest", "adaround")
    ]
    for name, constant in plans[0].constants.items():
        assert np.array_equal(constant.integers, plans[1].constants[name].integers)


def test_same_seed_same_integers(residual, images):
    settings = QuantizeSettings(weights=4, rounding="brecq", rounding_iterations=20)
    plans = [quantize(residual, images, settings, seed=seed).plan for seed in (1, 1, 2)]
    same = [
        all(
            np.array_equal(c.integers, plan.constants[n].integers)
            for n, c in plans[0].constants.items()
        )
        for plan in plans
    ]
    assert same == [True, True, False]


def test_sensitivity_is_the_diagonal_of_the_fisher_information(make_model):
    """Of a softmax classifier: W^T (diag(p) - p p^T) W, by drawing many labels."""
    rng = np.random.default_rng(5)
    weight = rng.normal(size=(4, 6)).astype(np.float32) / 2
    model = prepare_for_quantization(
        make_model(
            "g (float[N,6,1,1] x) => (float[N,4] y) {"
            " r = Relu(x) f = Flatten(r) y = Gemm<transB=1>(f, w, b) }",
            w=weight,
            b=np.zeros(4, np.float32),
        )
    )
    graph = TorchGraph(model.proto)
    image = torch.from_numpy(np.abs(rng.normal(size=(1, 6, 1, 1))).astype(np.float32))
    copies = image.expand(20_000, -1, -1, -1)
    lockstep = Lockstep(graph, {}, {}, [copies])
    blocks = find_blocks(graph, [s.name for s in graph.steps if s.op_type == "Gemm"])
    first = graph.steps[0]
    lockstep.run_exact(first)
    found = output_sensitivity(lockstep, first.outputs, torch.Generator().manual_seed(0))
    p = graph(image)["y"].softmax(dim=1).double().numpy()[0]
    expected = np.diag(weight.T @ (np.diag(p) - np.outer(p, p)) @ weight)
    mean = torch.cat(found[first.outputs[0]]).double().mean(dim=0).numpy().reshape(6)
    np.testing.assert_allclose(mean, expected / expected.mean(), rtol=0.1)
    assert len(blocks) == 2


TOKENS = "c = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(c) f = Reshape(r, split)"
AWKWARD = {  # batch, outputs, body
    "several outputs": (
        "N",
        "float[N,5] y, float[N,5] z",
        "c = Conv(x, w, b) r = Relu(c) p = GlobalAveragePool(r) f = Flatten(p)"
        " y = Gemm<transB=1>(f, fc, fb) d = Conv(r, w2, b) q = GlobalAveragePool(d)"
        " g = Flatten(q) z = Gemm<transB=1>(g, fc, fb)",
    ),
    "images and tokens in one axis": (
        "N",
        "float[N,64,8] y",
        TOKENS + " t = Transpose<perm=[0,2,1]>(f) m = Reshape(t, merge) a = Gemm(m, q, b)"
        " e = Relu(a) u = Gemm(e, q2, b) y = Reshape(u, back)",
    ),
    "tokens first": (
        "N",
        "float[64,N,8] y",
        TOKENS + " t = Transpose<perm=[2,0,1]>(f) a = MatMul(t, q) e = Relu(a)"
        " y = MatMul(e, q2)",
    ),
    "one batch size only, some images over": (
        "3",
        "float[3,8,6,6] y",
        "s = Softmax<axis=0>(x) c = Conv<pads=[1,1,1,1]>(s, w, b) r = Relu(c)"
        " y = Conv(r, w2, b)",
    ),
    "one image and one number at a time": (
        "1",
        "float[1,1] y",
        "s = Softmax<axis=0>(x) c = Conv(s, w, b) r = Relu(c) p = GlobalAveragePool(r)"
        " f = Flatten(p) y = Gemm(f, one, ob)",
    ),
    "weights behind a decision": (
        "N",
        "float[N,8,6,6] y",
        "c = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(c) d = Conv<pads=[1,1,1,1]>(r, w2, b)"
        " g = Greater(d, half) z = Where(g, r, half) y = Conv(z, w2, b)",
    ),
    "infinite slopes": (
        "N",
        "float[N,64,8] y",
        TOKENS + " t = Transpose<perm=[0,2,1]>(f) a = MatMul(t, q) e = Relu(a) s = Sqrt(e)"
        " y = MatMul(s, q2)",
    ),
    "no error": (
        "N",
        "float[N,8,6,6] y",
        "c = Conv<pads=[1,1,1,1]>(x, nothing, dead) r = Relu(c) y = Conv(r, w2, b)",
    ),
}
SHAPES = {"split": [0, 8, 64], "merge": [-1, 8], "back": [-1, 64, 8]}


@pytest.mark.parametrize("reconstruction", ["mse", "fisher"])
@pytest.mark.parametrize("rounding", ["adaround", "brecq"])
@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_networks_learn_roundings_next_to_their_weights(
    make_model, images, name, rounding, reconstruction
):
    batch, outputs, body = AWKWARD[name]
    arrays = ARRAYS | {key: np.array(shape) for key, shape in SHAPES.items()}
    arrays |= {"q": normal(8, 8), "q2": normal(8, 8), "one": normal(8, 1), "ob": normal(1)}
    arrays |= {"nothing": np.zeros((8, 3, 3, 3), "f"), "dead": -np.ones(8, "f")}
    arrays |= {"half": np.array(0.5, "f")}
    text = f"g (float[{batch},3,8,8] x) => ({outputs}) {{ {body} }}"
    used = {key: array for key, array in arrays.items() if f" {key}" in body.replace("(", " ")}
    model = prepare_for_quantization(make_model(text, **used))
    assert model.fixed_batch == (3 if batch == "3" else 1 if batch == "1" else None)
    settings = QuantizeSettings(
        weights=4,
        rounding=rounding,
        reconstruction=reconstruction,
        rounding_iterations=8,
        learn_exponents=True,
    )
    plan = quantize(model, images, settings).plan
    values = initializers(model.proto)
    for key, constant in plan.constants.items():
        if constant.role == "weight":
            quantizer = constant.quantizer
            exact = values[key] / quantizer.scale_for(values[key].ndim)
            exact = np.clip(exact, quantizer.qmin, quantizer.qmax)
            assert np.abs(constant.integers - exact).max() < 1
    write_qdq(model, plan)


def test_images_are_mixed_only_where_each_has_a_row_of_its_own(make_model):
    """64 tokens and batches of 64 images look alike; one run of a single image tells."""
    model = make_model(
        "g (float[N,3,8,8] x) => (float[64,N,3] y) {"
        " f = Reshape(x, split) t = Transpose<perm=[2,0,1]>(f) y = Relu(t) }",
        split=np.array([0, 3, 64]),
    )
    graph = TorchGraph(model.proto)
    batches = [torch.zeros(64, 3, 8, 8)]
    found = tensors_by_image(Lockstep(graph, {}, {}, batches))
    flat = {name for step in graph.steps if step.op_type == "Reshape" for name in step.outputs}
    assert found == {"x", *flat}
    assert not tensors_by_image(Lockstep(graph, {}, {}, batches, whole_batches=True))


def test_drawn_rows_belong_to_the_same_image():
    ids = torch.arange(10)
    batches = {"a": list(torch.split(ids, 4)), "b": list(torch.split(10 * ids, 4))}
    for mixed in (True, False):
        samples = Samples(
            {"in": {"a": batches["a"]}, "out": {"b": batches["b"]}}, (4, 4, 2), mixed=mixed
        )
        drawn = samples.draw(8, torch.Generator().manual_seed(0))
        assert sum(len(part["in"]["a"]) for part in drawn) >= (8 if mixed else 4)
        for part in [*drawn, *samples.first(8)]:
            assert torch.equal(part["out"]["b"], 10 * part["in"]["a"])
        first = torch.cat([part["in"]["a"] for part in samples.first(8)])
        assert torch.equal(first, ids[:8])


def test_inner_tensors_of_a_block_are_freed_and_its_outputs_kept(residual, images):
    graph = TorchGraph(residual.proto)
    lockstep = Lockstep(graph, {}, {}, [torch.from_numpy(images.load())])
    gemm = graph.steps[-1]
    (block, *_) = find_blocks(graph, [gemm.name])  # all that comes before it
    lockstep.run_exact_block(block.steps, block.outputs)
    assert len(block.steps) > 5
    assert set(lockstep.exact) == {"x", *block.outputs}
