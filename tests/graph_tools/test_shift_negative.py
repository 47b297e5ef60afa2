"""Shifted tensors: every value behind the weights stays what it was, in onnxruntime."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from graph_tools.prepare import prepare_for_quantization
from graph_tools.shift_negative import find_shiftable, shift_tensors

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


ARRAYS = {
    "w": normal(4, 3, 3, 3),
    "b": normal(4),
    "v": normal(5, 4, 3, 3),
    "dw": normal(8, 1, 3, 3),
    "u": normal(4, 6, 2, 2),
    "fc": normal(6, 4),
    "wide": normal(6, 256),
    "fb": normal(6),
    "slope": np.abs(normal(4, 1, 1)) / 4,
    "zero": np.float32(0),
    "half": np.float32(0.5),
    "one": np.float32(1),
    "three": np.float32(3),
    "six": np.float32(6),
    "root": np.float32(2**0.5),
    "pads": np.array([0, 0, 1, 0, 0, 0, 1, 2], np.int64),
}
NON_LINEARITIES = {
    "hard-swish": "s = HardSwish(c)",
    "written-out hard-swish": (
        "p = Add(c, three) q = Clip(p, zero, six) r = Mul(c, q) s = Div(r, six)"
    ),
    "silu": "p = Sigmoid(c) s = Mul(c, p)",
    "gelu": ("p = Div(c, root) q = Erf(p) r = Add(q, one) h = Mul(c, half) s = Mul(h, r)"),
    "mish": "p = Softplus(c) q = Tanh(p) s = Mul(c, q)",
    "elu": "s = Elu(c)",
    "leaky": "s = LeakyRelu<alpha=0.1>(c)",
    "prelu": "s = PRelu(c, slope)",
}
READERS = {
    "convolution": "y = Conv<pads=[1,1,1,1]>(s, v)",
    "uneven pads": "y = Conv<pads=[0,1,2,1], strides=[2,1]>(s, v)",
    "depthwise": "y = Conv<group=4, pads=[1,1,1,1]>(s, dw)",
    "explicit pads": "t = Pad(s, pads) y = Conv(t, v)",
    "edge pads": 't = Pad<mode="edge">(s, pads) y = Conv(t, v)',
    "max pool": "t = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(s) y = Conv(t, v)",
    "average pool": "t = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(s) y = Conv(t, v)",
    "two readers": "t = Conv(s, v) z = Conv<group=4>(s, dw) y = Concat<axis=1>(t, z)",
}
VECTORS = {
    "pooled": "t = GlobalAveragePool(s) f = Flatten(t) y = Gemm<transB=1>(f, fc, fb)",
    "flattened": "f = Flatten(s) y = Gemm<transB=1>(f, wide, fb)",
}


def network(make_model, non_linearity, reader):
    rank = "float[N,6]" if reader in VECTORS.values() else "float[N,k,h,l]"
    return prepare_for_quantization(
        make_model(
            f"g (float[N,3,8,8] x) => ({rank} y) {{"
            f" c = Conv<pads=[1,1,1,1]>(x, w, b) {non_linearity} {reader} }}",
            **ARRAYS,
        )
    )


def assert_shifts(model, run_onnx):
    assert find_shiftable(model) == ("s",)
    moved, names = shift_tensors(model, {"s": 0.71875})
    image = normal(2, 3, 8, 8)
    (exact,), (found,) = run_onnx(model.proto, image), run_onnx(moved.proto, image)
    # sums of up to 256 products in another order, and a bias that nearly cancels
    np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-5 * np.abs(exact).max())
    outputs = [names["s"], *moved.outputs]
    shown = moved.proto.__class__()
    shown.CopyFrom(moved.proto)
    shown.graph.output.add(name=names["s"])
    shown.graph.output.add(name="s")
    _, plus, plain = run_onnx(shown, image, ["y", names["s"], "s"])
    assert np.array_equal(plus, plain + np.float32(0.71875))
    readers = Counter(i for node in moved.proto.graph.node for i in node.input)
    assert readers["s"] == 1  # the Add alone
    assert len(outputs) == 2
    return moved


@pytest.mark.parametrize("non_linearity", NON_LINEARITIES)
def test_non_linearities_are_found_and_values_stay(make_model, run_onnx, non_linearity):
    text = NON_LINEARITIES[non_linearity]
    assert_shifts(network(make_model, text, READERS["convolution"]), run_onnx)


@pytest.mark.parametrize("reader", [*READERS, *VECTORS])
def test_every_reader_takes_the_shift_back(make_model, run_onnx, reader):
    text = {**READERS, **VECTORS}[reader]
    moved = assert_shifts(network(make_model, NON_LINEARITIES["silu"], text), run_onnx)
    for node in moved.proto.graph.node:
        if node.op_type == "Conv" and node.input[0] != "x":
            assert not any(next(a.ints for a in node.attribute if a.name == "pads"))


@pytest.mark.parametrize(
    "reader",
    [
        "y = Identity(s)",  # an output
        "t = Conv<pads=[1,1,1,1], group=4>(s, dw4) y = Add(t, s)",
        "y = ConvTranspose(s, u)",  # borders see fewer taps
        "t = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad=1>(s)"
        " y = Conv(t, v)",
        "t = Relu(s) y = Conv(t, v)",
        "t = Concat<axis=1>(s, c) y = Conv(t, twice)",
    ],
)
def test_what_cannot_take_the_shift_back_is_left_alone(make_model, reader):
    model = prepare_for_quantization(
        make_model(
            "g (float[N,3,8,8] x) => (float[N,k,h,l] y) {"
            f" c = Conv<pads=[1,1,1,1]>(x, w, b) s = HardSwish(c) {reader} }}",
            dw4=normal(4, 1, 3, 3),
            twice=normal(5, 8, 3, 3),
            **ARRAYS,
        )
    )
    assert find_shiftable(model) == ()
    (tensor,) = [n.output[0] for n in model.proto.graph.node if n.op_type == "HardSwish"]
    with pytest.raises(ValueError, match="cannot be shifted"):
        shift_tensors(model, {tensor: 0.5})


@pytest.mark.parametrize(
    "text",
    [
        "s = Relu(c)",
        "s = Identity(c)",
        "p = GlobalAveragePool(c) q = Sigmoid(p) s = Mul(c, q)",  # squeeze and excitation
        "p = Elu(c) q = Neg(p) s = Identity(q)",
    ],
)
def test_other_tensors_are_no_candidates(make_model, text):
    model = network(make_model, text, READERS["convolution"])
    assert find_shiftable(model) == ()
