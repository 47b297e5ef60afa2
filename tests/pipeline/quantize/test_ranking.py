"""What tensors cost alone: against onnxruntime, cut in two at the tensor or with other weights."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from graph_tools.compare import with_outputs
from graph_tools.model import load
from graph_tools.prepare import prepare_for_quantization
from graph_tools.qdq import write_qdq
from pipeline.images import ImageWriter, open_images
from pipeline.quantize import quantize, ranking
from pipeline.quantize.ranking import rank_tensors
from pipeline.settings import QuantizeSettings

SETTINGS = QuantizeSettings(weights=4, bias_correction="none")


@pytest.fixture(scope="module")
def found(digits_models, tmp_path_factory):
    """A quantized network, its images and its ranking."""
    model = prepare_for_quantization(load(digits_models / "digits_resnet.onnx"))
    path = tmp_path_factory.mktemp("images") / "images.npz"
    with ImageWriter(path, count=20, shape=(1, 8, 8)) as writer:
        writer.append(np.random.default_rng(0).normal(size=(20, 1, 8, 8)).astype(np.float32))
    images = open_images(path, shape=(1, 8, 8))
    quantization = quantize(model, images, SETTINGS)
    return quantization, images, rank_tensors(quantization, images, correct_biases=False)


def relative(exact, other) -> float:
    exact = exact.astype(np.float64)
    return float(np.sqrt(np.square(exact - other).sum() / np.square(exact).sum()))


def replaced(proto: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """A copy whose nodes read the tensor ``name`` from a second input."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for node in copy.graph.node:
        for index, tensor in enumerate(node.input):
            if tensor == name:
                node.input[index] = "(rounded)"
    copy.graph.input.append(onnx.helper.make_tensor_value_info("(rounded)", 1, None))
    return copy


def test_activations_cost_what_onnxruntime_says(found, run_onnx):
    import onnxruntime as ort

    quantization, images, result = found
    proto, plan = quantization.model.proto, quantization.plan
    batch = images.load(16)
    (exact,) = run_onnx(proto, batch)
    costs = {cost.name: cost for cost in result.costs if cost.kind == "activation"}
    alone = [
        n for n in costs if n not in {*plan.shares.values(), *quantization.roots.values()}
    ]
    assert len(alone) > 5
    for name in alone:
        quantizer = plan.tensors[name]
        value = batch if name == "image" else None
        if value is None:
            (value,) = run_onnx(with_outputs(proto, [name]), batch)
        rounded = quantizer.dequantize(quantizer.quantize(value))
        if name in quantization.model.outputs:
            expected = relative(exact, rounded)
        else:
            session = ort.InferenceSession(replaced(proto, name).SerializeToString())
            fed = {"(rounded)": rounded, proto.graph.input[0].name: batch}
            expected = relative(exact, session.run(None, fed)[0])
        assert costs[name].error == pytest.approx(expected, rel=1e-3), name
        assert costs[name].flag == f"{name}=A16"


def test_weights_cost_what_onnxruntime_says(found, run_onnx):
    quantization, images, result = found
    batch = images.load(16)
    (exact,) = run_onnx(quantization.model.proto, batch)
    costs = [cost for cost in result.costs if cost.kind == "weight"]
    assert len(costs) == len(quantization.weighted)
    for cost in costs:
        proto = onnx.ModelProto()
        proto.CopyFrom(quantization.model.proto)
        for tensor in proto.graph.initializer:
            if tensor.name == cost.name:
                values = quantization.plan.constants[cost.name].values
                tensor.CopyFrom(numpy_helper.from_array(values, cost.name))
        (other,) = run_onnx(proto, batch)
        assert cost.error == pytest.approx(relative(exact, other), rel=1e-3)
        assert cost.flag == f"{cost.node}=W8"


def test_worst_come_first_and_widening_them_is_measured(found, run_onnx):
    quantization, images, result = found
    errors = [cost.error for cost in result.costs]
    assert errors == sorted(errors, reverse=True)
    assert result.widened == tuple(cost.name for cost in result.costs[:3])
    batch = images.load(16)
    model, plan = quantization.model, quantization.plan
    (exact,) = run_onnx(model.proto, batch)
    (rounded,) = run_onnx(write_qdq(model, plan), batch)
    assert result.error == pytest.approx(relative(exact, rounded), rel=1e-4)
    tensors, constants = dict(plan.tensors), dict(plan.constants)
    known = {t.name: numpy_helper.to_array(t) for t in model.proto.graph.initializer}
    for name in result.widened:
        if name in constants:
            quantizer = constants[name].quantizer
            wide = dataclasses.replace(
                quantizer, bits=8, exponent=tuple(e - 4 for e in quantizer.exponent)
            )
            constants[name] = dataclasses.replace(
                constants[name], quantizer=wide, integers=wide.quantize(known[name])
            )
        for tensor in tensors:
            if quantization.roots.get(tensor, tensor) == name:
                quantizer = tensors[tensor]
                tensors[tensor] = dataclasses.replace(
                    quantizer, bits=16, exponent=quantizer.exponent - 8
                )
    biases = {n: c for n, c in constants.items() if c.role == "bias"}
    for name, bias in biases.items():  # finer weights or inputs: a bias of the old values
        if not any(c.node == bias.node and n in result.widened for n, c in constants.items()):
            continue
        exponent = tuple(e - 4 for e in bias.quantizer.exponent)
        constants[name] = dataclasses.replace(
            bias,
            quantizer=dataclasses.replace(bias.quantizer, exponent=exponent),
            integers=bias.integers * 16,
        )
    assert not any(name in tensors for name in result.widened), "biases follow inputs, too"
    wider = dataclasses.replace(plan, tensors=tensors, constants=constants)
    (other,) = run_onnx(write_qdq(model, wider), batch)
    assert result.widened_error == pytest.approx(relative(exact, other), rel=1e-4)
    assert result.widened_error < result.error


def test_large_networks_are_measured_in_part(found, monkeypatch):
    quantization, images, everything = found
    monkeypatch.setattr(ranking, "BUDGET", 1.0)
    result = rank_tensors(quantization, images, correct_biases=False)
    assert (result.images, len(result.costs)) == (4, 3)
    assert result.unmeasured == len(everything.costs) - 3


def test_what_has_the_most_bits_is_not_widened(digits_models, found):
    _, images, _ = found
    model = prepare_for_quantization(load(digits_models / "digits_resnet.onnx"))
    quantization = quantize(model, images, QuantizeSettings(activations=16))
    result = rank_tensors(quantization, images, correct_biases=True)
    assert result.widened == ()
    assert result.widened_error is None
    assert all(cost.flag is None for cost in result.costs)
