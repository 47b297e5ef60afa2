"""Scales of weights by the error of the outputs, against brute force and the operators."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from graph_tools.prepare import prepare_for_quantization
from graph_tools.qdq import write_qdq
from graph_tools.quantizer import QuantizedConstant, TensorQuantizer
from graph_tools.torch_graph import TorchGraph
from pipeline.images import ImageWriter, open_images
from pipeline.quantize import quantize
from pipeline.quantize.output_error import fit_scales
from pipeline.quantize.placement import Weighted
from pipeline.quantize.thresholds import weight_exponents
from pipeline.quantize.weights import scale_candidates
from pipeline.settings import QuantizeSettings

GEMM = "g (float[N,9,1,1] x) => (float[N,O] y) { f = Flatten(x) y = Gemm<transB=1>(f, w, b) }"
CONVOLUTIONS = [
    "Conv<pads=[1,1,1,1]>",
    "Conv<strides=[2,2], pads=[0,1,1,0]>",
    "Conv<dilations=[2,1], group=2>",
    "Conv<group=4, pads=[1,1,1,1]>",
]


def fitted(model, x, bits, *, centered=True, shared=False):
    """The weight w of a one-node graph before and after."""
    graph = TorchGraph(model.proto)
    (step,) = [step for step in graph.steps if "w" in step.inputs]
    weight = graph.constants["w"].numpy()
    exponents = weight_exponents(weight, axis=0, bits=bits)
    if shared:
        exponents = (max(exponents),) * len(exponents)
    quantizer = TensorQuantizer(bits=bits, signed=True, exponent=exponents, axis=0)
    before = QuantizedConstant(
        integers=quantizer.quantize(weight), quantizer=quantizer, role="weight", node="n"
    )
    site = Weighted(
        node="n",
        input=step.inputs[0],
        output="y",
        weight="w",
        bias="b",
        axis=0,
        channel_axis=1,
    )
    after = fit_scales(
        graph,
        step,
        site,
        [torch.from_numpy(part) for part in np.array_split(x, 2)],
        before,
        scale_candidates(quantizer, graph.constants["b"].numpy(), -7, 22),
        torch.Generator().manual_seed(0),
        centered=centered,
        shared=shared,
    )
    return before, after


def best_error(row, quantizer, channel, moments):
    """The smallest d'Hd of a row over all ways to round its weights up or down."""
    scale = 2.0 ** quantizer.exponent[channel]
    low = np.floor(row / scale)
    ways = np.array(list(itertools.product((0, 1), repeat=len(row))))
    change = np.clip(low + ways, quantizer.qmin, quantizer.qmax) * scale - row
    return ((change @ moments) * change).sum(1).min()


def gemm(make_model, rng, channels=6, size=9):
    weight = rng.normal(size=(channels, size)).astype(np.float32)
    return make_model(GEMM, w=weight, b=np.zeros(channels, np.float32)), weight


@pytest.mark.parametrize(("bits", "share"), [(2, 0.9), (3, 0.92), (4, 0.96)])
@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_chosen_scales_can_be_rounded_better_than_those_of_the_weights(
    make_model, bits, share, offset
):
    """Windows of smooth images; brute force over all roundings is the judge."""
    places = np.array([(i // 3, i % 3) for i in range(9)])
    moments = 0.9 ** np.abs(places[:, None] - places[None]).sum(-1)
    root = np.linalg.cholesky(9 * moments).T  # 18 windows with exactly these moments
    x = (np.concatenate([root, -root]) + offset).astype(np.float32)
    model, weight = gemm(make_model, np.random.default_rng(bits), channels=100)
    if not offset:
        before, after = fitted(model, x, bits, centered=False)
    else:  # a mean error, which costs nothing
        before, after = fitted(model, x, bits, centered=True)
    rows = weight.astype(np.float64)
    old, new = (
        np.array([best_error(row, c.quantizer, i, moments) for i, row in enumerate(rows)])
        for c in (before, after)
    )
    candidates = scale_candidates(before.quantizer, None, -7, 22)
    least = np.array(
        [[best_error(row, q, i, moments) for i, row in enumerate(rows)] for q in candidates]
    ).min(0)
    assert new.mean() < share * old.mean()
    assert new.mean() < 1.1 * least.mean()


def test_without_correlation_the_scales_of_the_weights_stay(make_model):
    rng = np.random.default_rng(0)
    model, _ = gemm(make_model, rng)
    x = np.concatenate([np.eye(9), -np.eye(9)]).astype(np.float32)
    before, after = fitted(model, x, 4)
    assert after.quantizer == before.quantizer
    assert np.array_equal(after.integers, before.integers)


@pytest.mark.parametrize("operator", CONVOLUTIONS)
def test_windows_are_those_of_the_convolution(make_model, operator):
    """On inputs that make all other weights irrelevant, a channel's scale follows those it uses."""
    rng = np.random.default_rng(1)
    groups = 4 if "group=4" in operator else 2 if "group=2" in operator else 1
    weight = rng.normal(size=(8, 4 // groups, 3, 3)).astype(np.float32)
    weight[:, 0] *= 0.05  # fine weights beside coarse ones, where there are several channels
    x = rng.normal(size=(40, 4, 9, 9)).astype(np.float32)
    x[:, np.arange(4) % (4 // groups) != 0] = 0
    model = make_model(
        f"g (float[N,4,9,9] x) => (float[N,8,H,W] y) {{ y = {operator}(x, w, b) }}",
        w=weight,
        b=np.zeros(8, np.float32),
    )
    graph = TorchGraph(model.proto)
    before, after = fitted(model, x, 4)

    def error(constant):
        values = {"x": torch.from_numpy(x), "w": torch.from_numpy(constant.values)}
        with torch.no_grad():
            exact = graph.run_step(graph.steps[0], {"x": values["x"]})[0]
            return float((graph.run_step(graph.steps[0], values)[0] - exact).square().mean())

    if groups == 4:
        assert error(after) <= 1.2 * error(before)
    else:
        assert error(after) < 0.6 * error(before)


def test_silent_and_infinite_inputs_keep_the_scales(make_model):
    model, _ = gemm(make_model, np.random.default_rng(2))
    for x in (np.zeros((20, 9), np.float32), np.full((20, 9), np.inf, np.float32)):
        before, after = fitted(model, x, 2)
        assert after.quantizer == before.quantizer


def test_constant_inputs_keep_the_scales(make_model):
    """Their covariance is rounding errors, which may have no Cholesky factor."""
    rng = np.random.default_rng(0)
    model, _ = gemm(make_model, rng)
    for _ in range(20):
        x = np.repeat(rng.normal(size=(1, 9)).astype(np.float32), 300, 0)
        before, after = fitted(model, x, 2)
        assert np.isfinite(after.quantizer.scale).all()
        assert after.quantizer == before.quantizer


def test_a_shared_scale_stays_shared(make_model):
    rng = np.random.default_rng(3)
    model, _ = gemm(make_model, rng)
    x = (rng.normal(size=(500, 9)) @ rng.normal(size=(9, 9))).astype(np.float32)
    _, after = fitted(model, x, 2, shared=True)
    assert len(set(after.quantizer.exponent)) == 1


def test_candidates_leave_room_for_the_bias():
    quantizer = TensorQuantizer(bits=4, signed=True, exponent=(-9, -9), axis=0)
    bias = np.array([2.0**5, 2.0**-3], np.float32)  # 2**22 steps of 2**-16 are 2**6
    found = scale_candidates(quantizer, bias, -7, 22)
    assert {q.exponent for q in found} == {(-9, -9), (-10, -10), (-8, -8), (-10, -11)}
    free = replace(quantizer, scales=(2.0**-9, 2.0**-9))
    smallest = np.min([q.scales for q in scale_candidates(free, bias, -7, 22)], axis=0)
    assert smallest[0] == 2.0**-10
    assert smallest[1] < 2.0**-10


@pytest.mark.parametrize(("scale", "share"), [("pot", 0.9), ("free", 0.97)])
def test_a_network_is_more_faithful_and_the_flag_turns_it_off(
    make_model, tmp_path, run_onnx, scale, share
):
    rng = np.random.default_rng(4)
    weight = rng.normal(size=(8, 3, 3, 3)).astype(np.float32)
    model = prepare_for_quantization(
        make_model(
            "g (float[N,3,8,8] x) => (float[N,8,8,8] y) { y = Conv<pads=[1,1,1,1]>(x, w, b) }",
            w=weight,
            b=np.zeros(8, np.float32),
        )
    )
    x = np.cumsum(np.cumsum(rng.normal(size=(64, 1, 8, 8)), axis=3), axis=2).astype(np.float32)
    x = np.concatenate([x, 0.9 * x, -x], axis=1)  # smooth images of little color
    with ImageWriter(tmp_path / "i.npz", count=64, shape=(3, 8, 8)) as writer:
        writer.append(x)
    images = open_images(tmp_path / "i.npz")
    (exact,) = run_onnx(model.proto, x)
    errors = {}
    for by in ("weights", "outputs"):
        settings = QuantizeSettings(
            weights=2, activations=16, rounding="adaround", weight_error=by, weight_scale=scale
        )
        plan = quantize(model, images, settings).plan
        (found,) = run_onnx(write_qdq(model, plan), x)
        errors[by] = float(np.square(found - exact).mean())
        if by == "weights" and scale == "pot":
            kept = plan.constants["w"].quantizer.exponent
            assert kept == weight_exponents(weight, axis=0, bits=2)
    assert errors["outputs"] < share * errors["weights"]
