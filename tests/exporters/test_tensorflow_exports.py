"""Graphs as converters from TensorFlow leave them: NHWC, int32 shapes, no BatchNormalization.

Written by hand after what tf2onnx and Keras make of common layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper, parser

from graph_tools.batchnorm import find_affine_leftovers, find_batch_norms
from graph_tools.equivalence import largest_difference
from graph_tools.model import Model
from tests.exporters.checks import TOLERANCE, equal_to_file, images_for, session

TO_NCHW, TO_NHWC = "perm=[0,3,1,2]", "perm=[0,2,3,1]"


def weight(*shape: int) -> np.ndarray:
    rng = np.random.default_rng(sum(shape))
    return (rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]) + 1)).astype(np.float32)


def write(
    folder: Path,
    body: str,
    *,
    opset: int = 13,
    shape: Sequence[int | str] = ("N", 16, 16, 3),
    outputs: str = "float y",
    **arrays: np.ndarray,
) -> Path:
    dims = ",".join(map(str, shape))
    head = f'<ir_version: 7, opset_import: ["" : {opset}]>'
    proto = parser.parse_model(f"{head} net (float[{dims}] image) => ({outputs}) {{ {body} }}")
    for value in proto.graph.output:  # of unknown shape, as tf2onnx often leaves them
        value.type.tensor_type.ClearField("shape")
    proto.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in arrays.items())
    path = folder / "net.onnx"
    onnx.save(proto, path)
    return path


def ops(model: Model) -> list[str]:
    return [node.op_type for node in model.proto.graph.node]


def ints(*values: int, dtype: type = np.int64) -> np.ndarray:
    return np.array(values, dtype)


def test_pad_relu6_and_affine_batch_norm(tmp_path: Path) -> None:
    """SAME padding of a strided convolution: all of it at the bottom and the right."""
    path = write(
        tmp_path,
        f"""t = Transpose<{TO_NCHW}>(image)
        p = Pad(t, pads)
        a = Conv<strides=[2,2], kernel_shape=[3,3]>(p, w)
        b = Mul(a, gamma)
        c = Add(b, beta)
        d = Max(c, zero)
        e = Min(d, six)
        f = ReduceMean<axes=[2,3], keepdims=0>(e)
        g = MatMul(f, u)
        h = Add(g, v)
        y = Softmax<axis=1>(h)""",
        pads=ints(0, 0, 0, 0, 0, 0, 1, 1),
        w=weight(8, 3, 3, 3),
        gamma=weight(1, 8, 1, 1) + 1,
        beta=weight(1, 8, 1, 1),
        zero=np.float32(0),
        six=np.float32(6),
        u=weight(8, 5),
        v=weight(5),
    )
    model = equal_to_file(path)
    assert model.input.layout == "NHWC"
    assert not find_batch_norms(model)
    assert len(find_affine_leftovers(model)) == 1


def test_transposes_pushed_through_the_graph(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        f"""scaled = Mul(image, factor)
        shifted = Sub(scaled, mean)
        t = Transpose<{TO_NCHW}>(shifted)
        a = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(t, w, b)
        n = BatchNormalization(a, s, o, m, v)
        back = Transpose<{TO_NHWC}>(n)
        act = Relu(back)
        forth = Transpose<{TO_NCHW}>(act)
        pooled = MaxPool<auto_pad="SAME_UPPER", kernel_shape=[3,3], strides=[2,2]>(forth)
        mean_pooled = AveragePool<auto_pad="SAME_LOWER", kernel_shape=[2,2]>(pooled)
        y = Transpose<{TO_NHWC}>(mean_pooled)""",
        factor=np.float32(2),
        mean=weight(3),
        w=weight(8, 3, 3, 3),
        b=weight(8),
        s=weight(8) + 1,
        o=weight(8),
        m=weight(8),
        v=np.abs(weight(8)) + 1,
    )
    model = equal_to_file(path)
    assert model.input.layout == "NHWC"
    assert len(find_batch_norms(model)) == 1


@pytest.mark.parametrize("batch", ["N", 1])
def test_shape_strided_slice_pack_reshape(tmp_path: Path, batch: int | str) -> None:
    """``tf.reshape(x, [tf.shape(x)[0], -1, 4])``, computed in int32."""
    path = write(
        tmp_path,
        f"""t = Transpose<{TO_NCHW}>(image)
        a = Conv<strides=[2,2], kernel_shape=[1,1]>(t, w)
        n = Transpose<{TO_NHWC}>(a)
        shape64 = Shape(n)
        shape = Cast<to=6>(shape64)
        sliced = Slice(shape, begin, end, axes)
        size = Squeeze(sliced, axes)
        size_1d = Unsqueeze(size, axes)
        packed = Concat<axis=0>(size_1d, minus_one, four)
        target = Cast<to=7>(packed)
        y = Reshape(n, target)""",
        shape=(batch, 16, 16, 3),
        w=weight(8, 3, 1, 1),
        begin=ints(0),
        end=ints(1),
        axes=ints(0),
        minus_one=ints(-1, dtype=np.int32),
        four=ints(4, dtype=np.int32),
    )
    model = equal_to_file(path, batches=(1, 3) if batch == "N" else (1,))
    assert "Shape" not in ops(model)
    assert model.fixed_batch is None


def test_depthwise_weights_reshaped_at_run_time(tmp_path: Path) -> None:
    """[H, W, C, M] turned to [C * M, 1, H, W] by nodes."""
    path = write(
        tmp_path,
        f"""t = Transpose<{TO_NCHW}>(image)
        moved = Transpose<perm=[3,2,0,1]>(w)
        kernel = Reshape(moved, kernel_shape)
        a = Conv<group=3, auto_pad="SAME_UPPER", strides=[2,2]>(t, kernel)
        b = Add(a, bias)
        c = Clip(b, low, high)
        d = Conv(c, pointwise)
        e = Transpose<{TO_NHWC}>(d)
        y = Reshape(e, flat)""",
        w=weight(3, 3, 3, 1),
        kernel_shape=ints(3, 1, 3, 3),
        bias=weight(3, 1, 1),
        low=np.float32(0),
        high=np.float32(6),
        pointwise=weight(4, 3, 1, 1),
        flat=ints(-1, 256),
    )
    model = equal_to_file(path)
    assert ops(model).count("Transpose") == 2


def test_squeeze_tail_and_logits_as_convolution(tmp_path: Path) -> None:
    """MobileNetV1 of Keras: GlobalAveragePool, 1x1 convolution, Reshape to classes."""
    path = write(
        tmp_path,
        f"""t = Transpose<{TO_NCHW}>(image)
        a = Conv<kernel_shape=[3,3]>(t, w)
        r = LeakyRelu<alpha=0.2>(a)
        g = GlobalAveragePool(r)
        c = Conv(g, u, v)
        n = Transpose<{TO_NHWC}>(c)
        y = Squeeze(n, axes)
        z = ArgMax<axis=1, keepdims=0>(y)""",
        outputs="float y, int64 z",
        w=weight(8, 3, 3, 3),
        u=weight(5, 8, 1, 1),
        v=weight(5),
        axes=ints(1, 2),
    )
    equal_to_file(path)


@pytest.mark.parametrize("opset", [11, 13, 18])
def test_resize_in_the_mode_that_opset_13_removed(tmp_path: Path, opset: int) -> None:
    """tf.image.resize by nearest neighbor, enlarging and shrinking."""
    mode = 'mode="nearest", nearest_mode="floor"'
    removed = f'coordinate_transformation_mode="tf_half_pixel_for_nn", {mode}'
    path = write(
        tmp_path,
        f"""t = Transpose<{TO_NCHW}>(image)
        a = Conv(t, w)
        b = Resize<{removed}>(a, none, scales)
        c = Resize<{removed}>(b, none, none, sizes)
        y = Transpose<{TO_NHWC}>(c)""",
        opset=opset,
        w=weight(4, 3, 1, 1),
        none=np.zeros(0, np.float32),
        scales=np.array([1, 1, 2, 1.5], np.float32),
        sizes=ints(1, 4, 12, 20),
        shape=(1, 16, 16, 3),
    )
    model = equal_to_file(path, batches=(1,))
    text = str(model.proto)
    assert "tf_half_pixel_for_nn" not in text


@pytest.mark.parametrize("mode", ["linear", "nearest"])
def test_resize_to_odd_sizes_between_transposes(tmp_path: Path, mode: str) -> None:
    """onnxruntime moves Transposes past a Resize, and fails where that names its axes."""
    path = write(
        tmp_path,
        f"""t = Transpose<{TO_NCHW}>(image)
        a = Conv(t, w)
        n = Transpose<{TO_NHWC}>(a)
        b = Sigmoid(n)
        c = Transpose<{TO_NCHW}>(b)
        full = Shape(c)
        head = Slice(full, zero, two)
        sizes = Concat<axis=0>(head, space)
        d = Resize<mode="{mode}">(c, none, none, sizes)
        y = Transpose<{TO_NHWC}>(d)""",
        w=weight(8, 3, 1, 1),
        none=np.zeros(0, np.float32),
        zero=ints(0),
        two=ints(2),
        space=ints(24, 37),
    )
    model = equal_to_file(path)
    assert "Shape" not in ops(model)
    if mode == "linear":  # a nearest pixel may depend on the last bit of the scale
        optimized = onnxruntime.InferenceSession(model.proto.SerializeToString())
        images = images_for(model, 2)
        expected = session(path).run(None, {"image": images})
        actual = optimized.run(None, {"image": images})
        assert largest_difference(actual, expected) <= TOLERANCE


def test_space_to_batch_of_a_dilated_convolution(tmp_path: Path) -> None:
    """Kept as reshapes that move pixels into the batch and back."""
    path = write(
        tmp_path,
        f"""s1 = Reshape(image, split)
        s2 = Transpose<perm=[2,4,0,1,3,5]>(s1)
        s3 = Reshape(s2, batches)
        t = Transpose<{TO_NCHW}>(s3)
        a = Conv<pads=[1,1,1,1]>(t, w)
        n = Transpose<{TO_NHWC}>(a)
        b1 = Reshape(n, unsplit)
        b2 = Transpose<perm=[2,3,0,4,1,5]>(b1)
        y = Reshape(b2, whole)""",
        w=weight(4, 3, 3, 3),
        split=ints(-1, 8, 2, 8, 2, 3),
        batches=ints(-1, 8, 8, 3),
        unsplit=ints(2, 2, -1, 8, 8, 4),
        whole=ints(-1, 16, 16, 4),
    )
    equal_to_file(path)
