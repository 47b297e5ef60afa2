"""Equalized networks compute the same bits; their channels are alike in the weights around them."""

from __future__ import annotations

import numpy as np
import pytest

from graph_tools.equalization import equalize_channels
from graph_tools.model import initializers, load
from graph_tools.prepare import prepare_for_quantization

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def uneven(*shape, axis=0):
    """Normal values with channels on ``axis`` that differ by up to a thousand."""
    spread = [1] * len(shape)
    spread[axis] = -1
    return normal(*shape) * np.logspace(-2, 1, shape[axis]).astype(np.float32).reshape(spread)


ARRAYS = {
    "w": uneven(8, 3, 3, 3),
    "b": uneven(8),
    "v": normal(5, 8, 3, 3),
    "grouped": normal(6, 4, 3, 3),
    "dw": uneven(16, 1, 3, 3),
    "pw": normal(4, 16, 1, 1),
    "up": normal(8, 4, 2, 2),
    "up2": normal(8, 3, 2, 2),
    "pw6": normal(4, 6, 1, 1),
    "fc": normal(6, 8),
    "wide": normal(6, 8 * 64),
    "fb": normal(6),
    "last": normal(5, 6),
    "lb": normal(5),
    "slope": normal(8, 1, 1),
    "zero": np.float32(0),
    "one": np.float32(1),
    "six": np.float32(6),
    "huge": np.float32(512),
    "pads": np.array([0, 0, 1, 0, 0, 0, 1, 2], np.int64),
    "sizes": np.array([1, 1, 2, 2], np.float32),
}
EXACT = {
    "none": "y = Conv<pads=[1,1,1,1]>(c, v)",
    "relu": "r = Relu(c) y = Conv<pads=[1,1,1,1]>(r, v)",
    "leaky relu": "r = LeakyRelu<alpha=0.1>(c) y = Conv<pads=[1,1,1,1]>(r, v)",
    "prelu": "r = PRelu(c, slope) y = Conv(r, v)",
    "relu as clip": "r = Clip(c, zero) y = Conv(r, v)",
    "grouped": "r = Relu(c) y = Conv<group=2>(r, grouped)",
    "depthwise": "r = Relu(c) d = Conv<group=8>(r, dw) s = Relu(d) y = Conv(s, pw)",
    "max pool": "r = Relu(c) m = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(r) y = Conv(m, v)",
    "average pool": (
        "r = Relu(c) m = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1],"
        " count_include_pad=1>(r) y = Conv(m, v)"
    ),
    "pad": "p = Pad(c, pads) y = Conv(p, v)",
    "reflected": 'p = Pad<mode="reflect">(c, pads) y = Conv(p, v)',
    "resize": 'e = Identity(none) p = Resize<mode="linear">(c, , sizes) y = Conv(p, v)',
    "transposed": "r = Relu(c) y = ConvTranspose(r, up)",
    "grouped transposed": (
        "r = Relu(c) t = ConvTranspose<group=2>(r, up2) s = Relu(t) y = Conv(s, pw6)"
    ),
    "two readers": "r = Relu(c) t = Conv(r, v) z = Conv<group=2>(r, grouped)"
    " y = Concat<axis=1>(t, z)",
}
VECTORS = {
    "pooled": "p = GlobalAveragePool(c) f = Flatten(p) y = Gemm<transB=1>(f, fc, fb)",
    "flattened": "r = Relu(c) f = Flatten(r) y = Gemm<transB=1>(f, wide, fb)",
    "gemm": (
        "r = Relu(c) f = Flatten(r) h = Gemm<transB=1>(f, wide, fb) i = Relu(h)"
        " y = Gemm<transB=1>(i, last, lb)"
    ),
}


def network(make_model, text, rank="float[N,k,h,l]"):
    text = text.replace("e = Identity(none) ", "")
    return prepare_for_quantization(
        make_model(
            f"g (float[N,3,8,8] x) => ({rank} y) {{ c = Conv<pads=[1,1,1,1]>(x, w, b) {text} }}",
            **ARRAYS,
        )
    )


def assert_same_bits(before, after, run_onnx):
    count = before.fixed_batch or 2
    image = RNG.normal(size=(count, *before.input.shape)).astype(np.float32)
    for exact, found in zip(
        run_onnx(before.proto, image), run_onnx(after.proto, image), strict=True
    ):
        assert np.array_equal(exact, found)  # powers of two: not one bit changes


def weights_of(model):
    constants = initializers(model.proto)
    return [
        constants[node.input[1]]
        for node in model.proto.graph.node
        if node.op_type in ("Conv", "ConvTranspose", "Gemm")
    ]


@pytest.mark.parametrize("name", [*EXACT, *VECTORS])
def test_channels_are_scaled_and_no_value_changes(make_model, run_onnx, name):
    rank = "float[N,k]" if name in VECTORS else "float[N,k,h,l]"
    model = network(make_model, {**EXACT, **VECTORS}[name], rank)
    equalized = equalize_channels(model)
    assert not np.array_equal(weights_of(model)[0], weights_of(equalized)[0])
    assert_same_bits(model, equalized, run_onnx)


def test_a_pair_ends_at_the_closed_form(make_model):
    """s = sqrt(r1 / r2), to the nearest power of two (arXiv 1906.04721, section 4.1)."""
    model = network(make_model, EXACT["relu"])
    first, second = weights_of(model)
    made = np.abs(first).max(axis=(1, 2, 3))
    read = np.abs(second).max(axis=(0, 2, 3))
    bias = np.abs(ARRAYS["b"])
    expected = np.exp2(np.rint(0.5 * np.log2(made / read)))
    least = np.exp2(np.rint(np.log2(bias / bias.max())))
    expected = np.maximum(expected, least)
    found_first, found_second = weights_of(equalize_channels(model))
    assert np.array_equal(found_first, first / expected.reshape(-1, 1, 1, 1))
    assert np.array_equal(found_second, second * expected.reshape(1, -1, 1, 1))


def test_a_triple_ends_at_the_closed_form(make_model, run_onnx):
    """The three ranges of a channel meet at their geometric mean (the appendix there)."""
    arrays = {**ARRAYS, "b": np.zeros(8, np.float32), "dw": uneven(8, 1, 3, 3)[::-1].copy()}
    model = prepare_for_quantization(
        make_model(
            "g (float[N,3,8,8] x) => (float[N,4,h,l] y) { c = Conv(x, w, b) r = Relu(c)"
            " d = Conv<group=8>(r, dw) s = Relu(d) y = Conv(s, pw8) }",
            pw8=normal(4, 8, 1, 1),
            **arrays,
        )
    )
    before = weights_of(model)
    after = weights_of(equalize_channels(model))

    def ranges(weights):
        first, middle, last = (np.abs(weight) for weight in weights)
        return np.log2(
            [first.max(axis=(1, 2, 3)), middle.max(axis=(1, 2, 3)), last.max(axis=(0, 2, 3))]
        )

    mean = ranges(before).mean(axis=0)
    assert np.abs(ranges(before) - mean).max() > 2
    # each of the two factors is off its ideal by half an exponent at most
    assert np.abs(ranges(after) - mean).max() <= 1.02


@pytest.mark.parametrize(
    ("text", "obstacle"),
    [
        ("r = Relu(c) y = Identity(r)", "output"),
        ("r = Relu(c) s = Conv<pads=[1,1,1,1]>(r, v8) y = Add(s, r)", "Add"),
        ("r = Sigmoid(c) y = Conv(r, v)", "Sigmoid"),
        ("r = HardSwish(c) y = Conv(r, v)", "HardSwish"),
        ("r = Clip(c, one, six) y = Conv(r, v)", "Clip"),
        ("r = Transpose<perm=[0,2,3,1]>(c) f = Flatten(r) y = Gemm<transB=1>(f, wide)", "T"),
    ],
)
def test_what_does_not_commute_is_left_alone_and_counted(make_model, text, obstacle):
    rank = "float[N,k]" if "Flatten" in text else "float[N,k,h,l]"
    model = prepare_for_quantization(
        make_model(
            f"g (float[N,3,8,8] x) => ({rank} y) {{ c = Conv<pads=[1,1,1,1]>(x, w, b) {text} }}",
            v8=normal(8, 8, 3, 3),
            **ARRAYS,
        )
    )
    equalized = equalize_channels(model)
    for before, after in zip(weights_of(model), weights_of(equalized), strict=True):
        assert np.array_equal(before, after)
    assert "because of" in equalized.notes[-1]
    assert obstacle in equalized.notes[-1]


def test_relu6_is_passed_only_where_its_bound_is_never_reached(make_model, run_onnx):
    """Channels 0 to 2 of the depthwise convolution stay below 8 whatever the image."""
    depthwise = np.full((8, 1, 3, 3), 0.05, np.float32) * np.logspace(-2, 1, 8).astype(
        np.float32
    ).reshape(-1, 1, 1, 1)
    model = prepare_for_quantization(
        make_model(
            "g (float[N,3,8,8] x) => (float[N,4,8,8] y) {"
            " c = Conv<pads=[1,1,1,1]>(x, w, b) r = Clip(c, zero, six)"
            " d = Conv<group=8, pads=[1,1,1,1]>(r, dw8, b8) s = Clip(d, zero, six)"
            " y = Conv(s, pw8) }",
            dw8=depthwise,
            b8=np.zeros(8, np.float32),
            pw8=4 * normal(4, 8, 1, 1),
            **{**ARRAYS, "w": 20 * ARRAYS["w"]},
        )
    )
    equalized = equalize_channels(model)
    image = 10 * normal(4, 3, 8, 8)
    assert np.array_equal(run_onnx(model.proto, image)[0], run_onnx(equalized.proto, image)[0])
    stem, middle, _ = weights_of(model)
    found_stem, found, _ = weights_of(equalized)
    assert np.array_equal(stem, found_stem)  # the image has no bound
    factor = (found / middle)[:, 0, 0, 0]
    highest = 9 * depthwise[:, 0, 0, 0] * 6
    assert (factor[highest > 6] == 1).all()
    assert (factor[highest < 1] > 1).any()
    assert (factor * highest)[factor > 1].max() <= 6.01


def test_channels_that_are_all_bias_or_dead_are_not_blown_up(make_model, run_onnx):
    arrays = {**ARRAYS, "w": ARRAYS["w"].copy(), "b": np.ones(8, np.float32)}
    arrays["w"][0] *= 1e-20
    arrays["w"][1] = 0
    arrays["b"][1] = 0
    model = prepare_for_quantization(
        make_model(
            "g (float[N,3,8,8] x) => (float[N,5,h,l] y) { c = Conv(x, w, b) r = Relu(c)"
            " y = Conv(r, v) }",
            **arrays,
        )
    )
    equalized = equalize_channels(model)
    biases = [
        initializers(equalized.proto)[node.input[2]]
        for node in equalized.proto.graph.node
        if node.op_type == "Conv"
    ]
    assert 0.25 <= biases[0][0] <= 4
    assert biases[0][1] == 0
    assert_same_bits(model, equalized, run_onnx)


@pytest.mark.parametrize(
    "name",
    [
        "cifar10_resnet20",
        "mcunet_cifar10_32",
        "mlperftiny_resnet8_cifar10_tf2onnx_bn",
        "mobilenet_v1_025_224_imagenet",
        "ultraface_rfb320",
        "yolo_fastestv2_coco",
    ],
)
def test_real_networks_keep_every_bit(shared_models, run_onnx, name):
    model = prepare_for_quantization(load(shared_models / f"{name}.onnx"))
    equalized = equalize_channels(model)
    assert any(
        not np.array_equal(a, b)
        for a, b in zip(weights_of(model), weights_of(equalized), strict=True)
    )
    assert_same_bits(model, equalized, run_onnx)


def test_equalizing_twice_changes_nothing_more(make_model):
    once = equalize_channels(network(make_model, EXACT["depthwise"]))
    twice = equalize_channels(once)
    for before, after in zip(weights_of(once), weights_of(twice), strict=True):
        ratio = np.abs(after / before)
        assert ratio.min() >= 0.5
        assert ratio.max() <= 2
