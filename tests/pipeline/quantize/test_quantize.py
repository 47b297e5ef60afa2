"""Quantizers, integers and corrections on small networks, against exact references."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch

from graph_tools.compare import compare_tensors
from graph_tools.errors import DataError, ModelError, TargetError
from graph_tools.model import initializers, save
from graph_tools.prepare import prepare_for_quantization
from graph_tools.qdq import write_qdq
from graph_tools.quantized_graph import QuantizedGraph
from graph_tools.quantizer import Plan
from graph_tools.torch_graph import TorchGraph
from pipeline.export.fake_quantized import FakeQuantized
from pipeline.images import ImageWriter, open_images
from pipeline.quantize import quantize
from pipeline.quantize.observe import observe
from pipeline.quantize.simulate import simulate_plan
from pipeline.settings import QuantizeSettings, VerifySettings
from pipeline.verify import verify
from pipeline.verify.accumulators import measure_accumulators

RNG = np.random.default_rng(0)
SMALL = (
    "g (float[N,3,8,8] x) => (float[N,5] y) {"
    " c = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(c) d = Conv<group=4, pads=[1,1,1,1]>(r, dw)"
    " s = Clip(d, zero, six) a = Add(s, r) p = GlobalAveragePool(a) f = Flatten(p)"
    " y = Gemm<transB=1>(f, fc, fb) }"
)
ARRAYS = {
    "w": RNG.normal(size=(4, 3, 3, 3)).astype(np.float32),
    "b": RNG.normal(size=4).astype(np.float32),
    "dw": RNG.normal(size=(4, 1, 3, 3)).astype(np.float32),
    "fc": RNG.normal(size=(5, 4)).astype(np.float32),
    "fb": RNG.normal(size=5).astype(np.float32),
    "zero": np.float32(0),
    "six": np.float32(6),
}


@pytest.fixture
def small(make_model):
    return prepare_for_quantization(make_model(SMALL, **ARRAYS))


@pytest.fixture
def images(tmp_path):
    values = RNG.normal(size=(48, 3, 8, 8)).astype(np.float32)
    with ImageWriter(tmp_path / "images.npz", count=48, shape=(3, 8, 8)) as writer:
        writer.append(values)
    return open_images(tmp_path / "images.npz")


def sqnr(model, plan, images):
    compared = compare_tensors(
        model.proto, write_qdq(model, plan), {"y": "y"}, images.batches(16)
    )
    return compared["y"].sqnr_db


def test_written_file_equals_the_torch_simulation(small, images, run_onnx):
    plan = quantize(small, images, QuantizeSettings()).plan
    graph = TorchGraph(small.proto)
    values = simulate_plan(graph, plan, torch.from_numpy(images.load()))
    (found,) = run_onnx(write_qdq(small, plan), images.load())
    assert np.array_equal(found, values["y"].numpy())  # scales are powers of two: exact


@pytest.mark.parametrize("metric", ["mse", "mae", "kl", "no-clipping"])
def test_every_threshold_metric_gives_a_faithful_network(small, images, metric):
    plan = quantize(small, images, QuantizeSettings(threshold=metric)).plan
    assert sqnr(small, plan, images) > 20


@pytest.mark.parametrize(
    ("weights", "activations", "least"), [(8, 16, 25), (8, 8, 22), (4, 8, 8), (8, 4, 3)]
)
def test_more_bits_are_more_faithful(small, images, weights, activations, least):
    settings = QuantizeSettings(weights=weights, activations=activations)
    plan = quantize(small, images, settings).plan
    assert sqnr(small, plan, images) > least


def test_bias_correction_removes_the_mean_error(small, images, run_onnx):
    exact = run_onnx(small.proto, images.load())[0].mean(axis=0)
    errors = {}
    for correct in ("none", "empirical"):
        settings = QuantizeSettings(weights=3, bias_correction=correct)
        plan = quantize(small, images, settings).plan
        found = run_onnx(write_qdq(small, plan), images.load())[0].mean(axis=0)
        errors[correct] = np.abs(found - exact).max()
        step = float(plan.tensors["y"].scale)
    assert errors["empirical"] < step  # rounding of the last quantizer is all that is left
    assert errors["none"] > 2 * errors["empirical"]


def test_clip_that_cannot_vanish_has_the_same_quantizer_before_and_after(small, images):
    plan = quantize(small, images, QuantizeSettings()).plan
    clip = next(n for n in small.proto.graph.node if n.op_type == "Clip")
    assert clip.name not in plan.absorbed
    assert plan.tensors[clip.input[0]] == plan.tensors[clip.output[0]]


def test_a_dead_channel_with_a_bias_fits_the_accumulator(make_model, images):
    arrays = {**ARRAYS, "w": ARRAYS["w"].copy(), "b": np.full(4, 3.0, np.float32)}
    arrays["w"][1] *= 1e-12
    model = prepare_for_quantization(make_model(SMALL, **arrays))
    plan = quantize(model, images, QuantizeSettings()).plan
    for constant in plan.constants.values():
        assert np.abs(constant.integers.astype(np.int64)).max() < 2**24
    assert sqnr(model, plan, images) > 20


def test_signed_tensors_with_several_readers_are_stored_around_the_middle(
    make_model, images, run_onnx
):
    model = prepare_for_quantization(
        make_model(
            "g (float[N,3,8,8] x) => (float[N,3,8,8] y) {"
            " c = Conv<pads=[1,1,1,1]>(x, w) d = Conv<pads=[1,1,1,1]>(c, v) y = Add(c, d) }",
            w=RNG.normal(size=(3, 3, 3, 3)).astype(np.float32),
            v=RNG.normal(size=(3, 3, 3, 3)).astype(np.float32),
        )
    )
    auto = quantize(model, images, QuantizeSettings()).plan
    zero = quantize(model, images, QuantizeSettings(zero_point="zero")).plan
    assert auto.midpoint == {"c"}
    assert not zero.midpoint
    first = run_onnx(write_qdq(model, auto), images.load())[0]
    assert np.array_equal(first, run_onnx(write_qdq(model, zero), images.load())[0])
    plain = QuantizeSettings(zero_point="below", bias_correction="none")
    below = quantize(model, images, plain).plan
    assert below.midpoint == {"x", "c", "d", "y"}
    written = write_qdq(model, below)
    values = initializers(written)
    zeros = {name: values[name] for name in values if name.endswith("_zero_point")}
    assert {int(zero) for name, zero in zeros.items() if name[0] in "xcdy"} == {126}
    assert {int(entry) for name in ("w", "v") for entry in zeros[f"{name}_zero_point"]} == {-2}
    given = torch.from_numpy(images.load())
    simulated = simulate_plan(TorchGraph(model.proto), below, given)["y"].numpy()
    assert np.array_equal(run_onnx(written, images.load())[0], simulated)
    for entry, name in zip(measure_accumulators(QuantizedGraph(written)), "wv", strict=True):
        rows = below.constants[name].integers.reshape(3, -1).astype(np.int64)
        rising, falling = np.maximum(rows, 0).sum(1), np.minimum(rows, 0).sum(1)
        assert entry.largest == max(
            (129 * rising - 126 * falling).max(), (126 * rising - 129 * falling).max()
        )
    narrow = QuantizeSettings(zero_point="below", weight_range="7bit")
    stored = initializers(write_qdq(model, quantize(model, images, narrow).plan))
    assert min(stored["w_q"].min(), stored["v_q"].min()) >= -64
    assert max(stored["w_q"].max(), stored["v_q"].max()) <= 63
    with pytest.raises(TargetError, match="no room"):
        write_qdq(model, below, container="int4")
    with pytest.raises(TargetError, match="below the middle"):
        FakeQuantized(written)


def test_histograms_do_not_depend_on_the_batch_size(small, images):
    graph = TorchGraph(small.proto)

    def histograms(size):
        return observe(
            graph, ["x", "y", "r"], lambda: map(torch.from_numpy, images.batches(size))
        )

    whole, single = histograms(48), histograms(1)
    for name in whole:
        assert (whole[name].low, whole[name].high) == pytest.approx(
            (single[name].low, single[name].high), rel=1e-5
        )
        # convolutions of one and of many images may round differently at bin edges
        moved = np.abs(whole[name].counts - single[name].counts).sum()
        assert moved <= 0.002 * whole[name].counts.sum()


def test_values_that_are_not_finite_are_refused(make_model, images):
    model = make_model("g (float[N,3,8,8] x) => (float[N,3,8,8] y) { y = Log(x) }")
    graph = TorchGraph(model.proto)
    with pytest.raises(DataError, match="tensor y"):
        observe(graph, ["y"], lambda: map(torch.from_numpy, images.batches(8)))


def test_nothing_to_quantize_is_an_error(make_model, images):
    model = make_model("g (float[N,3,8,8] x) => (float[N,3,8,8] y) { y = Relu(x) }")
    with pytest.raises(ModelError, match="nothing to quantize"):
        quantize(model, images, QuantizeSettings())


def test_scalar_operands_are_quantized_and_saved(make_model, images, run_onnx, tmp_path):
    model = prepare_for_quantization(
        make_model(
            "g (float[N,3,8,8] x) => (float[N,3,8,8] y) {"
            " c = Conv<pads=[1,1,1,1]>(x, w) r = Relu(c) m = Mul(r, half)"
            " y = Conv<pads=[1,1,1,1]>(m, w) }",
            w=RNG.normal(size=(3, 3, 3, 3)).astype(np.float32),
            half=np.float32(0.3),
        )
    )
    plan = quantize(model, images, QuantizeSettings()).plan
    assert plan.constants["half"].integers.shape == ()
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").constants["half"].integers.shape == ()
    assert sqnr(model, plan, images) > 20


def test_a_small_variance_is_not_rounded_to_zero(make_model, images):
    model = prepare_for_quantization(
        make_model(
            "g (float[N,3,8,8] x) => (float[N,3,8,8] y) {"
            " c = Conv<pads=[1,1,1,1]>(x, w) k = Mul(c, c) v = ReduceMean<axes=[1], keepdims=1>(k)"
            " e = Add(v, eps) s = Sqrt(e) n = Div(c, s) y = Conv<pads=[1,1,1,1]>(n, w) }",
            w=RNG.normal(size=(3, 3, 3, 3)).astype(np.float32),
            eps=np.float32(1e-5),
        )
    )
    plan = quantize(model, images, QuantizeSettings()).plan
    assert not {"k", "v", "e", "s"} & set(plan.tensors)
    assert sqnr(model, plan, images) > 20


def test_grouped_transposed_convolution_shares_scales_between_groups(
    make_model, images, tmp_path
):
    model = prepare_for_quantization(
        make_model(
            "g (float[N,3,8,8] x) => (float[N,4,h,w] y) {"
            " c = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(c)"
            " y = ConvTranspose<group=2, strides=[2,2]>(r, t, tb) }",
            w=ARRAYS["w"],
            b=ARRAYS["b"],
            t=RNG.normal(size=(4, 2, 3, 3)).astype(np.float32)
            * np.array([1, 10], np.float32).reshape(1, 2, 1, 1),
            tb=RNG.normal(size=4).astype(np.float32),
        )
    )
    plan = quantize(model, images, QuantizeSettings()).plan
    save(write_qdq(model, plan), tmp_path / "q.onnx")
    proof = verify(tmp_path / "q.onnx", images, VerifySettings())
    assert proof.passed, proof.failures
    assert sqnr(model, plan, images) > 20


FLOAT_OPERATORS = {  # bodies around operators for which runtimes have no integer kernels
    "GridSample": "c = Conv<pads=[1,1,1,1]>(x, two) t = Transpose<perm=[0,2,3,1]>(c) p = Tanh(t)"
    " g = GridSample(x, p) y = Conv<pads=[1,1,1,1]>(g, w)",
    "LSTM": "m = ReduceMean<axes=[2], keepdims=0>(x) t = Transpose<perm=[2,0,1]>(m)"
    " h = LSTM<hidden_size=4>(t, gates, recurrence) s = Squeeze(h, one)"
    " b = Transpose<perm=[1,0,2]>(s) y = MatMul(b, fc)",
    "normalizations": "c = Conv<pads=[1,1,1,1]>(x, w) i = InstanceNormalization(c, gain, shift)"
    ' l = LRN<size=3>(i) e = Einsum<equation="nchw,ncvw->nhv">(l, l) y = CumSum(e, one)',
    "LayerNormalization": "c = Conv<pads=[1,1,1,1]>(x, w) n = LayerNormalization(c, wide)"
    " h = HardSwish(n) y = Conv<pads=[1,1,1,1]>(h, w)",
    "ScatterND": "c = Conv<pads=[1,1,1,1]>(x, w) t = Transpose<perm=[1,0,2,3]>(c)"
    " u = Gather(t, rows) s = ScatterND(t, places, u) b = Transpose<perm=[1,0,2,3]>(s)"
    " y = Conv<pads=[1,1,1,1]>(b, w)",
}


@pytest.mark.parametrize("name", FLOAT_OPERATORS)
def test_operators_without_integer_kernels_stay_between_quantizers(
    make_model, images, tmp_path, name
):
    body = FLOAT_OPERATORS[name]
    arrays = {
        "w": RNG.normal(size=(3, 3, 3, 3)),
        "two": 0.1 * RNG.normal(size=(2, 3, 3, 3)),  # positions in the middle of tanh
        "gates": RNG.normal(size=(1, 16, 3)),
        "recurrence": RNG.normal(size=(1, 16, 4)),
        "fc": RNG.normal(size=(4, 5)),
        "gain": np.ones(3),
        "shift": np.zeros(3),
        "wide": np.ones(8),
    }
    given = {key: value.astype(np.float32) for key, value in arrays.items()}
    given |= {"one": np.array([1]), "rows": np.array([0, 2]), "places": np.array([[2], [1]])}
    used = {key: value for key, value in given.items() if f" {key}" in body}
    text = f"g (float[N,3,8,8] x) => (float[N,a,b,c] y) {{ {body} }}"
    rank3 = name in ("LSTM", "normalizations")
    model = prepare_for_quantization(
        make_model(text.replace("N,a,b,c", "N,a,b") if rank3 else text, **used)
    )
    plan = quantize(model, images, QuantizeSettings()).plan
    save(write_qdq(model, plan), tmp_path / "q.onnx")
    proof = verify(tmp_path / "q.onnx", images, VerifySettings())
    assert proof.passed, proof.failures
    assert sqnr(model, plan, images) > 20


RESIDUAL = (
    "g (float[N,3,8,8] x) => (float[N,5] y) {"
    " c = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(c) d = Conv<pads=[1,1,1,1]>(r, w2, b)"
    " a = Add(d, r) s = Relu(a) p = GlobalAveragePool(s) f = Flatten(p)"
    " y = Gemm<transB=1>(f, fc, fb) }"
)
RESIDUAL_ARRAYS = {
    **{name: ARRAYS[name] for name in ("w", "b", "fc", "fb")},
    "w2": RNG.normal(size=(4, 4, 3, 3)).astype(np.float32),
}


@pytest.fixture
def residual(make_model):
    return prepare_for_quantization(make_model(RESIDUAL, **RESIDUAL_ARRAYS))


def simulate(model, plan, values):
    """The quantized network in torch, tensors without a quantizer in float."""
    found = simulate_plan(TorchGraph(model.proto), plan, torch.from_numpy(values))
    return found["y"].numpy()


@pytest.mark.parametrize("rounding", ["nearest", "adaround", "brecq"])
def test_the_academic_file_equals_its_simulation_and_is_proved(
    residual, images, run_onnx, tmp_path, rounding
):
    settings = QuantizeSettings(
        weights=4, activations=4, scheme="academic", rounding=rounding, rounding_iterations=20
    )
    plan = quantize(residual, images, settings).plan
    assert "d" not in plan.tensors
    assert "y" not in plan.tensors
    assert {n: plan.tensors[n].bits for n in ("x", "r", "s")} == {"x": 8, "r": 8, "s": 4}
    assert [plan.constants[n].quantizer.bits for n in ("w", "w2", "fc")] == [8, 4, 8]
    assert {entry.op_type for entry in plan.float_results} == {"Conv", "Gemm"}
    path = tmp_path / "q.onnx"
    save(write_qdq(residual, plan), path)
    assert verify(path, images, VerifySettings()).passed
    (found,) = run_onnx(write_qdq(residual, plan), images.load())
    # The results are float32 sums in another order: seven digits.
    np.testing.assert_allclose(
        found, simulate(residual, plan, images.load()), rtol=1e-5, atol=1e-5
    )
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").float_results == plan.float_results


@pytest.mark.parametrize("rounding", ["nearest", "adaround", "brecq"])
def test_free_weight_scales_are_closer_and_proved_within_a_step(
    residual, images, tmp_path, rounding
):
    plans = {}
    for scale in ("pot", "free"):
        settings = QuantizeSettings(
            weights=3, weight_scale=scale, rounding=rounding, rounding_iterations=20
        )
        plans[scale] = quantize(residual, images, settings).plan
    free = plans["free"]
    assert all(quantizer.power_of_two for quantizer in free.tensors.values())
    for constant in free.constants.values():
        assert not constant.quantizer.power_of_two
    scale = free.tensors["r"].scale * free.constants["w2"].quantizer.scale
    bias = next(
        c
        for c in free.constants.values()
        if c.node == free.constants["w2"].node and c.role == "bias"
    )
    assert np.array_equal(bias.quantizer.scale, scale)
    if rounding == "nearest":
        error = {
            kind: np.square(plan.constants["w2"].values - RESIDUAL_ARRAYS["w2"]).sum()
            for kind, plan in plans.items()
        }
        assert error["free"] < error["pot"]
    path = tmp_path / "q.onnx"
    save(write_qdq(residual, free, metadata={"zsq.weight_scale": "free"}), path)
    proof = verify(path, images, VerifySettings())
    assert proof.passed, proof.failures
    assert not proof.scales.power_of_two
    assert proof.scales.not_power_of_two == ()
    assert len(proof.scales.free) == len(free.constants)
    assert any("requantization is no shift" in text for text in proof.warnings)
    save(write_qdq(residual, free), path)  # a file that does not say so
    assert any(
        "not a power of two" in t for t in verify(path, images, VerifySettings()).failures
    )
    free.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded.constants["w2"].quantizer == free.constants["w2"].quantizer


def test_16_bit_activations_are_written_run_and_proved(residual, images, tmp_path, run_onnx):
    plan = quantize(residual, images, QuantizeSettings(activations=16)).plan
    path = tmp_path / "q.onnx"
    proto = write_qdq(residual, plan)
    save(proto, path)
    types = {entry.name: entry.data_type for entry in proto.graph.initializer}
    assert types["r_zero_point"] == onnx.TensorProto.UINT16
    assert types["y_zero_point"] == onnx.TensorProto.INT16
    proof = verify(path, images, VerifySettings())
    assert proof.passed, proof.failures
    floats = {node.op_type for node in proof.kernels.floats}
    assert floats >= {"Conv", "Add", "GlobalAveragePool", "Gemm"}
    assert all("no integer kernel" in node.reason for node in proof.kernels.floats)
    assert sqnr(residual, plan, images) > sqnr(
        residual, quantize(residual, images, QuantizeSettings()).plan, images
    )
    # Worst cases are those of exact integers: inputs at the ends of their range.
    weight = plan.constants["w2"].integers.astype(object).reshape(4, -1)
    bias = next(
        c
        for c in plan.constants.values()
        if c.node == plan.constants["w2"].node and c.role == "bias"
    ).integers.astype(object)
    worst = max(
        max(
            sum(max(v, 0) for v in row) * 65535 + max(b, 0),
            -sum(min(v, 0) for v in row) * 65535 - min(b, 0),
        )
        for row, b in zip(weight, bias, strict=True)
    )
    found = next(entry for entry in proof.accumulators if entry.largest == worst)
    assert not found.simulation_exact
    assert found.input_bits == 16


def test_wider_inputs_do_not_coarsen_the_weights(make_model, images):
    """A bias in the finer steps of 16 bits needs more of them."""
    arrays = {**RESIDUAL_ARRAYS, "b": np.full(4, 30.0, np.float32)}
    model = prepare_for_quantization(make_model(RESIDUAL, **arrays))
    exponents = [
        quantize(model, images, QuantizeSettings(activations=bits))
        .plan.constants["w2"]
        .quantizer.exponent
        for bits in (8, 16)
    ]
    assert exponents[0] == exponents[1]


def test_widths_of_layers_tensors_and_operands_are_those_of_the_entries(small, images):
    settings = QuantizeSettings(bits=("@last=W2", "@depthwise=W3", "@add=A4", "@input=A16"))
    plan = quantize(small, images, settings).plan
    assert {n: plan.constants[n].quantizer.bits for n in ("w", "dw", "fc")} == {
        "w": 8,
        "dw": 3,
        "fc": 2,
    }
    assert {plan.tensors[n].bits for n in ("a",)} == {4}
    assert plan.tensors["x"].bits == 16
    assert plan.tensors["r"].bits == 8
    assert np.abs(plan.constants["fc"].integers).max() <= 2


def test_notes_say_how_many_have_other_bits(small, images):
    notes = quantize(small, images, QuantizeSettings(bits=("@first=W4A16", "@last=W2"))).notes
    assert "bits of 3 weights: 8, but 1 have 4, 1 have 2" in notes
    assert any(note.endswith("tensors: 8, but 1 have 16") for note in notes)
    assert not any("bits of" in n for n in quantize(small, images, QuantizeSettings()).notes)
