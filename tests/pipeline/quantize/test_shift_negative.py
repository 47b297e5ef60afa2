"""Shift-negative correction from images to the written file."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from graph_tools.compare import compare_tensors
from graph_tools.model import initializers, save
from graph_tools.prepare import prepare_for_quantization
from graph_tools.qdq import write_qdq
from graph_tools.torch_graph import TorchGraph
from pipeline.images import ImageWriter, open_images
from pipeline.quantize import quantize
from pipeline.quantize.observe import Histogram
from pipeline.quantize.shift_negative import choose_shift
from pipeline.quantize.simulate import simulate_plan
from pipeline.run import QuantizeJob, quantize_file
from pipeline.settings import (
    GenerateSettings,
    InputSettings,
    QuantizeSettings,
    VerifySettings,
)
from pipeline.verify import verify

RNG = np.random.default_rng(3)
OFF = QuantizeSettings()
ON = replace(OFF, shift_negative=True)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


@pytest.fixture
def images(tmp_path):
    with ImageWriter(tmp_path / "images.npz", count=48, shape=(3, 8, 8)) as writer:
        writer.append(normal(48, 3, 8, 8))
    return open_images(tmp_path / "images.npz")


@pytest.fixture
def swish(make_model):
    return prepare_for_quantization(
        make_model(
            "g (float[N,3,8,8] x) => (float[N,5] y) {"
            " c = Conv<pads=[1,1,1,1]>(x, w, b) s = HardSwish(c)"
            " d = Conv<group=8, pads=[1,1,1,1]>(s, dw) q = Sigmoid(d) t = Mul(d, q)"
            " p = GlobalAveragePool(t) f = Flatten(p) y = Gemm<transB=1>(f, fc, fb) }",
            w=normal(8, 3, 3, 3) / 5,
            b=normal(8),
            dw=normal(8, 1, 3, 3) / 3,
            fc=normal(5, 8),
            fb=normal(5),
        )
    )


def test_the_shifted_tensor_alone_is_quantized_and_unsigned(swish, images):
    result = quantize(swish, images, ON)
    (add,) = {
        n.output[0]
        for n in result.model.proto.graph.node
        if n.op_type == "Add" and n.input[0] == "s"
    }
    assert "s" not in result.plan.tensors
    assert not result.plan.tensors[add].signed
    assert quantize(swish, images, OFF).plan.tensors["s"].signed
    shift = next(
        initializers(result.model.proto)[n.input[1]]
        for n in result.model.proto.graph.node
        if n.output[0] == add
    )
    steps = float(shift) / float(result.plan.tensors[add].scale)
    assert steps == round(steps)
    assert 0.375 <= float(shift) <= 0.375 + float(result.plan.tensors[add].scale)
    pad = next(n for n in result.model.proto.graph.node if n.op_type == "Pad")
    assert result.plan.tensors[pad.output[0]].exponent == result.plan.tensors[add].exponent
    assert result.notes[0] == "negative values shifted away: 2 tensors"


def noise_of(proto, exact, tensor, images, run_onnx):
    """Mean squared error of a dequantized tensor in the written file."""
    shown = proto.__class__()
    shown.CopyFrom(proto)
    shown.graph.output.add(name=f"{tensor}_dq")
    (found,) = run_onnx(shown, images, [f"{tensor}_dq"])
    return float(((found - exact) ** 2).mean())


@pytest.mark.parametrize("activations", [8, 4])
def test_the_shifted_tensor_has_less_error(swish, images, run_onnx, activations):
    shown = swish.proto.__class__()
    shown.CopyFrom(swish.proto)
    shown.graph.output.add(name="s")
    (exact,) = run_onnx(shown, images.load(), ["s"])
    off = quantize(swish, images, replace(OFF, activations=activations))
    on = quantize(swish, images, replace(ON, activations=activations))
    add = next(
        n for n in on.model.proto.graph.node if n.op_type == "Add" and n.input[0] == "s"
    )
    shift = initializers(on.model.proto)[add.input[1]]
    before = noise_of(write_qdq(off.model, off.plan), exact, "s", images.load(), run_onnx)
    after = noise_of(
        write_qdq(on.model, on.plan), exact + shift, add.output[0], images.load(), run_onnx
    )
    # a step half as long makes a quarter of the error; what the input adds is in both
    assert after < 0.75 * before


def test_the_written_file_equals_the_torch_simulation(swish, images, run_onnx):
    result = quantize(swish, images, ON)
    model, plan = result.model, result.plan
    values = simulate_plan(TorchGraph(model.proto), plan, torch.from_numpy(images.load()))
    (found,) = run_onnx(write_qdq(model, plan), images.load())
    steps = (found - values["y"].numpy()) / float(plan.tensors["y"].scale)
    # sigmoids of torch and onnxruntime differ in their last bits
    assert np.abs(steps).max() <= 1
    assert (steps == 0).mean() > 0.98


def test_the_file_is_proven(swish, images, tmp_path):
    result = quantize(swish, images, ON)
    save(write_qdq(result.model, result.plan), tmp_path / "q.onnx")
    assert verify(tmp_path / "q.onnx", images, VerifySettings()).passed


def test_a_run_shifts_and_equalizes_and_says_so(make_model, images, tmp_path):
    model = make_model(
        "g (float[N,3,8,8] x) => (float[N,5,4,4] y) { c = Conv(x, w) s = HardSwish(c)"
        " d = Conv(s, v) r = Relu(d) y = Conv<pads=[1,1,1,1]>(r, u) }",
        w=normal(8, 3, 3, 3),
        v=normal(6, 8, 3, 3) * np.array([1, 8, 64, 1, 8, 64], np.float32).reshape(6, 1, 1, 1),
        u=normal(5, 6, 3, 3),
    )
    job = QuantizeJob(
        model=model.source,
        output=tmp_path / "q.onnx",
        images=images.path,
        input=InputSettings(mean=("0.5",), std=("0.5",)),
        generation=GenerateSettings(),
        quantization=replace(ON, equalization=True),
        verification=VerifySettings(),
    )
    result = quantize_file(job)
    assert result.proof.passed
    notes = result.report["quantization"]["notes"]
    assert "channels equalized behind 1 of 2 operators" in notes
    assert "not equalized, because of what reads the channels: HardSwish 1" in notes
    assert "negative values shifted away: 1 tensors" in notes


def test_learned_rounding_takes_the_shifted_network(swish, images):
    settings = replace(ON, weights=4, activations=4, rounding="brecq", rounding_iterations=20)
    result = quantize(swish, images, settings)
    compared = compare_tensors(
        swish.proto, write_qdq(result.model, result.plan), {"y": "y"}, images.batches(16)
    )
    assert compared["y"].sqnr_db > 5


def test_networks_without_candidates_stay_as_they_are(make_model, images):
    model = prepare_for_quantization(
        make_model(
            "g (float[N,3,8,8] x) => (float[N,4,6,6] y) { c = Conv(x, w) y = Relu(c) }",
            w=normal(4, 3, 3, 3),
        )
    )
    result = quantize(model, images, ON)
    assert result.model is model
    assert result.plan.tensors == quantize(model, images, OFF).plan.tensors


def error_of(values, scale, low, high):
    return ((np.clip(np.rint(values / scale), low, high) * scale - values) ** 2).sum()


@pytest.mark.parametrize("lowest", [-0.01, -0.3, -2.0, -7.0])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_tensor_is_shifted_exactly_where_that_has_the_smaller_error(lowest, bits):
    values = np.concatenate([RNG.uniform(lowest, 0, 500), RNG.exponential(1.2, 500), [lowest]])
    unique, counts = np.unique(values, return_counts=True)
    histogram = Histogram(
        low=lowest, high=values.max(), centers=unique, counts=counts.astype(np.float64)
    )
    shift = choose_shift(histogram, bits, QuantizeSettings())
    scales = 2.0 ** np.arange(-20, 6)
    signed = min(error_of(values, s, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for s in scales)
    unsigned = min(error_of(values - lowest, s, 0, 2**bits - 1) for s in scales)
    if shift:
        assert shift >= -lowest
        assert unsigned < 1.1 * signed  # the shift is rounded up after the search
    else:
        assert unsigned > 0.9 * signed


def test_a_shift_is_chosen_for_the_bits_that_the_tensor_has(swish, images):
    found, eight = (
        quantize(swish, images, settings) for settings in (replace(ON, bits=("s=A4",)), ON)
    )
    narrow, wide = (result.plan.tensors["s.shifted"] for result in (found, eight))
    assert (narrow.bits, wide.bits) == (4, 8)
    shift = float(initializers(found.model.proto)["s.shift"])
    assert shift % float(narrow.scale) == 0
    assert narrow.exponent > wide.exponent


def test_learned_exponents_leave_the_grid_of_a_shift(swish, images):
    fixed = replace(ON, activations=4)
    before, after = (
        quantize(swish, images, settings).plan.tensors
        for settings in (fixed, replace(fixed, learn_exponents=True))
    )
    assert after["s.shifted"] == before["s.shifted"]
