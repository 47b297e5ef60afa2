"""One test a row of the placement table."""

from __future__ import annotations

import numpy as np
import pytest

from graph_tools.prepare import prepare_for_quantization
from graph_tools.torch_graph import TorchGraph
from pipeline.quantize.placement import place

W = np.ones((3, 3, 3, 3), np.float32)
FC = np.ones((5, 192), np.float32)


@pytest.fixture
def placed(make_model):
    def run(
        body: str,
        outputs: str = "float[N,3,8,8] y",
        scheme: str = "full",
        fused: bool = False,
        **arrays,
    ):
        model = make_model(f"g (float[N,3,8,8] x) => ({outputs}) {{ {body} }}", **arrays)
        model = prepare_for_quantization(model)
        return place(model, TorchGraph(model.proto).steps, scheme=scheme, fused_sums=fused)

    return run


CONV = "Conv<pads=[1,1,1,1]>"


def test_input_and_outputs_always_have_one(placed):
    placement = placed(f"y = {CONV}(x, w)", w=W)
    assert placement.roots == ("x", "y")
    assert not placement.float_nodes


def test_relu_behind_a_convolution_vanishes_into_its_quantizer(placed):
    placement = placed(f"c = {CONV}(x, w) r = Relu(c) y = {CONV}(r, v)", w=W, v=W)
    assert placement.roots == ("x", "r", "y")
    assert list(placement.activations.values()) == [("c", "r")]
    assert "r" in placement.nonnegative
    assert "y" not in placement.nonnegative


def test_relu_behind_an_add_vanishes_too(placed):
    placement = placed(f"c = {CONV}(x, w) a = Add(c, x) y = Relu(a)", w=W)
    assert placement.roots == ("x", "c", "y")


def test_both_inputs_of_an_add_have_one(placed):
    placement = placed(
        f"a = {CONV}(x, w) b = {CONV}(x, v) s = Add(a, b) y = {CONV}(s, u)", w=W, v=W, u=W
    )
    assert placement.roots == ("x", "a", "b", "s", "y")


def test_a_convolution_that_others_read_keeps_one_before_its_relu(placed):
    placement = placed(f"c = {CONV}(x, w) r = Relu(c) y = Add(r, c)", w=W)
    assert placement.roots == ("x", "c", "r", "y")
    assert not placement.activations


def test_other_activations_have_one_on_either_side(placed):
    placement = placed(f"c = {CONV}(x, w) s = HardSwish(c) y = {CONV}(s, v)", w=W, v=W)
    assert placement.roots == ("x", "c", "s", "y")


def test_sigmoid_is_never_negative_and_at_most_one(placed):
    placement = placed(f"c = {CONV}(x, w) s = Sigmoid(c) y = Mul(c, s)", w=W)
    assert "s" in placement.nonnegative & placement.unit_range
    assert "y" not in placement.nonnegative


@pytest.mark.parametrize(
    ("body", "arrays"),
    [
        ("m = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(r)", {}),
        ("m = Transpose<perm=[0,1,3,2]>(r)", {}),
        ("m = Reshape(r, s)", {"s": np.array([-1, 3, 8, 8])}),
        ("m = Pad(r, s)", {"s": np.zeros(8, np.int64)}),
        ("m = Gather<axis=1>(r, s)", {"s": np.array([2, 0, 1])}),
        (
            "q = Slice(r, b, e, a) m = Resize(q, , , s)",
            {
                "b": np.array([0]),
                "e": np.array([4]),
                "a": np.array([3]),
                "s": np.array([0, 3, 8, 8]),
            },
        ),
    ],
)
def test_data_movement_shares(placed, body, arrays):
    if "Resize" in body:
        body, arrays = (
            'm = Resize<mode="nearest">(r, , s)',
            {"s": np.array([1, 1, 1, 1], np.float32)},
        )
    placement = placed(
        f"c = {CONV}(x, w) r = Relu(c) {body} y = {CONV}(m, v)", w=W, v=W, **arrays
    )
    if "m" in placement.shares:
        assert placement.shares["m"] == "r"
        assert "m" in placement.nonnegative
    assert placement.roots == ("x", "r", "y")


def test_padding_with_another_value_has_its_own(placed):
    placement = placed(
        f"c = {CONV}(x, w) r = Relu(c) m = Pad(r, s, one) y = {CONV}(m, v)",
        outputs="float[N,3,h,w] y",
        w=W,
        v=W,
        s=np.array([0, 0, 1, 1, 0, 0, 1, 1]),
        one=np.float32(1),
    )
    assert "m" in placement.roots


def test_concat_shares_only_what_agrees(placed):
    body = (
        f"c = {CONV}(x, w) r = Relu(c) d = {CONV}(r, v)"
        " a = Concat<axis=1>(r, d) b = Concat<axis=1>(r, r) y = Concat<axis=1>(a, b)"
    )
    placement = placed(body, outputs="float[N,12,8,8] y", w=W, v=W)
    assert placement.shares == {"b": "r"}
    assert {"a", "d", "y"} <= set(placement.roots)


def test_decoding_behind_the_last_weights_stays_in_float(placed):
    body = (
        f"c = {CONV}(x, w) f = Flatten(c) m = Mul(f, k) e = Exp(m) y = Add(e, k)"
        " z = Softmax<axis=1>(f)"
    )
    placement = placed(body, outputs="float[N,192] y, float[N,192] z", w=W, k=np.float32(0.1))
    assert [f.op_type for f in placement.float_nodes] == ["Mul", "Exp", "Add"]
    assert all(f.reason for f in placement.float_nodes)
    assert placement.roots == ("x", "c", "z")
    assert not placement.operands


def test_the_same_arithmetic_before_weights_is_quantized(placed):
    placement = placed(
        f"s = Sigmoid(x) m = Mul(s, k) y = {CONV}(m, w)", w=W, k=np.float32(0.1)
    )
    assert not placement.float_nodes
    assert list(placement.operands) == ["k"]


def test_integers_and_shapes_have_none(placed):
    placement = placed(
        f"c = {CONV}(x, w) y = Relu(c) f = Flatten(c) i = ArgMax<axis=1>(f)",
        outputs="float[N,3,8,8] y, int64[N,1] i",
        w=W,
    )
    assert "i" not in {*placement.roots, *placement.shares}


def test_gemm_weights_are_per_output(placed):
    placement = placed(
        "f = Flatten(x) y = Gemm<transB=1>(f, w, b)",
        outputs="float[N,5] y",
        w=FC,
        b=np.zeros(5, np.float32),
    )
    (site,) = placement.weighted.values()
    assert (site.axis, site.channel_axis, site.input) == (0, 1, "f")
    assert placement.shares == {"f": "x"}


def test_what_leads_to_a_divisor_has_none(placed):
    placement = placed(
        f"c = {CONV}(x, w) m = ReduceMean<axes=[1], keepdims=1>(c) d = Sub(c, m) s = Mul(d, d)"
        " v = ReduceMean<axes=[1], keepdims=1>(s) e = Add(v, eps) r = Sqrt(e) n = Div(d, r)"
        f" y = {CONV}(n, w)",
        w=W,
        eps=np.float32(1e-5),
    )
    assert placement.roots == ("x", "c", "m", "d", "n", "y")
    assert "eps" not in placement.operands


def test_what_leads_to_a_position_has_none(placed):
    placement = placed(
        "p = GlobalAveragePool(x) f = Flatten(p) t = Gemm(f, w, b) s = Mul(t, t)"
        f" m = Reshape(s, shape) r = GridSample(x, m) y = {CONV}(r, v)",
        w=np.ones((3, 128), np.float32),
        b=np.ones(128, np.float32),
        shape=np.array([-1, 8, 8, 2]),
        v=W,
    )
    assert placement.roots == ("x", "p", "t", "r", "y")
    assert placement.shares == {"f": "p"}


def test_a_position_that_only_moves_behind_its_quantizer_shares_it(placed):
    placement = placed(
        "p = GlobalAveragePool(x) f = Flatten(p) t = Gemm(f, w, b)"
        f" m = Reshape(t, shape) r = GridSample(x, m) y = {CONV}(r, v)",
        w=np.ones((3, 128), np.float32),
        b=np.ones(128, np.float32),
        shape=np.array([-1, 8, 8, 2]),
        v=W,
    )
    assert placement.roots == ("x", "p", "t", "r", "y")
    assert placement.shares == {"f": "p", "m": "t"}


@pytest.mark.parametrize("activation", ["Relu(c)", "Clip(c, half, one)"])
def test_an_activation_before_a_divisor_is_not_absorbed(placed, activation):
    placement = placed(
        f"c = {CONV}(x, w) r = {activation} e = Add(r, one) q = Div(x, e) y = {CONV}(q, v)",
        w=W,
        v=W,
        half=np.float32(0.5),
        one=np.float32(1),
    )
    assert placement.roots == ("x", "c", "q", "y")
    assert not placement.activations


def test_reading_a_tensor_twice_counts_twice(placed):
    placement = placed(f"c = {CONV}(x, w) a = Add(c, c) y = {CONV}(a, v)", w=W, v=W)
    assert placement.num_readers["c"] == 2
    assert placement.num_readers["a"] == 1


RESIDUAL = (
    f"c = {CONV}(x, w) r = Relu(c) d = {CONV}(r, v) a = Add(d, r) s = Relu(a)"
    " f = Flatten(s) g = Gemm<transB=1>(f, fc) y = Softmax(g)"
)


@pytest.mark.parametrize("scheme", ["full", "academic"])
def test_the_academic_scheme_rounds_a_residual_branch_once_and_no_result(placed, scheme):
    placement = placed(RESIDUAL, "float[N,5] y", scheme=scheme, w=W, v=W, fc=FC)
    if scheme == "full":
        assert placement.roots == ("x", "r", "d", "s", "g", "y")
        assert not placement.float_results
    else:
        assert placement.roots == ("x", "r", "s")
        assert [entry.op_type for entry in placement.float_nodes] == ["Softmax"]
        assert [entry.op_type for entry in placement.float_results] == ["Conv", "Gemm"]
    assert len(placement.weighted) == 3


@pytest.mark.parametrize("op", ["Add", "Sub", "Sum"])
@pytest.mark.parametrize("relu", [False, True])
def test_with_fused_sums_a_convolutions_branch_is_rounded_behind_the_sum(placed, op, relu):
    body = f"c = {CONV}(x, w) r = Relu(c) d = {CONV}(r, v) e = Relu(d) "
    body += f"s = {op}({'e' if relu else 'd'}, r) y = {CONV}(s, u)"
    placement = placed(body, fused=True, w=W, v=W, u=W)
    assert placement.roots == ("x", "r", "s", "y")
    expected = ["Conv", "Relu"] if relu else ["Conv"]
    assert [entry.op_type for entry in placement.float_results] == expected
    assert not placed(body, w=W, v=W, u=W).float_results


@pytest.mark.parametrize(
    "body",
    [
        f"c = {CONV}(x, w) d = {CONV}(c, v) a = Add(d, c) y = {CONV}(a, d)",  # two readers of d
        f"c = {CONV}(x, w) d = {CONV}(c, v) y = Mul(d, c)",
        f"c = {CONV}(x, w) d = {CONV}(c, v) a = Add(d, k) y = {CONV}(a, u)",
        f"c = {CONV}(x, w) d = {CONV}(c, v) a = Add(d, c) e = Exp(a) y = Div(c, e)",
    ],
)
def test_fused_sums_leave_other_convolutions_as_they_are(placed, body):
    arrays = {"k": np.ones((1, 3, 1, 1), np.float32)} if "k)" in body else {}
    arrays |= {"u": W} if ", u)" in body else {}
    placement = placed(body, fused=True, w=W, v=W, **arrays)
    assert placement == placed(body, w=W, v=W, **arrays)


def test_a_branch_that_others_read_is_rounded_in_the_academic_scheme_too(placed):
    body = f"c = {CONV}(x, w) d = {CONV}(c, v) a = Add(d, c) y = {CONV}(a, u)"
    placement = placed(body, scheme="academic", w=W, v=W, u=W)
    assert placement.roots == ("x", "c", "a")
