"""Files as no exporter of today writes them, though ONNX allows them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx.reference
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper, parser
from onnx.external_data_helper import set_external_data

from graph_tools.batchnorm import find_batch_norms
from graph_tools.equivalence import largest_difference
from graph_tools.errors import ModelError
from graph_tools.model import Model, load
from graph_tools.torch_graph import TorchGraph
from tests.exporters.checks import equal_to_file, images_for, session

NORM = {"s", "o", "m", "v"}


def weight(*shape: int) -> np.ndarray:
    rng = np.random.default_rng(sum(shape) + len(shape))
    return (rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]) + 1)).astype(np.float32)


def network() -> dict[str, np.ndarray]:
    """Weights of a convolution with BatchNormalization."""
    values = {"w": weight(4, 3, 3, 3), "s": weight(4) + 1, "o": weight(4), "m": weight(4)}
    return values | {"v": np.abs(weight(4)) + 0.5}


def parse(text: str, *, opset: int = 17, ir: int = 8, imports: str = "") -> onnx.ModelProto:
    return parser.parse_model(
        f'<ir_version: {ir}, opset_import: ["" : {opset}{imports}]> {text}'
    )


def save(proto: onnx.ModelProto, folder: Path, **arrays: np.ndarray) -> Path:
    proto.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in arrays.items())
    path = folder / "file.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def ops(model: Model) -> list[str]:
    return [node.op_type for node in model.proto.graph.node]


# ----------------------------------------------------------------------- opset 7, IR 3


def test_oldest_file(tmp_path: Path) -> None:
    """Attributes that later became inputs, ``spatial``, and initializers among the inputs."""
    proto = parse(
        """net (float[N,3,8,8] image) => (float y) {
        p = Pad<mode="constant", pads=[0,0,1,1,0,0,1,1], value=0.5>(image)
        c = Conv<kernel_shape=[3,3]>(p, w)
        b = BatchNormalization<epsilon=0.001, momentum=0.9, spatial=1>(c, s, o, m, v)
        l = Clip<min=-1.0, max=1.5>(b)
        d = Dropout<ratio=0.5>(l)
        u = Upsample<mode="nearest", scales=[1.0,1.0,2.0,2.0]>(d)
        k = Slice<axes=[2,3], starts=[0,1], ends=[-1,9999]>(u)
        e = Mul(k, channels)
        q = ReduceMean<axes=[2,3], keepdims=1>(e)
        sq = Squeeze<axes=[2,3]>(q)
        un = Unsqueeze<axes=[1]>(sq)
        f = Flatten(un)
        g = Gemm<transB=1, beta=0.5>(f, u2, t)
        h, i = Split<axis=1, split=[2,3]>(g)
        j = Softmax(i)
        n = TopK<k=1>(j) 
        y = Concat<axis=1>(h, j) }""".replace("n = TopK<k=1>(j) \n", ""),
        opset=7,
        ir=3,
    )
    arrays = network() | {"channels": weight(4, 1, 1), "u2": weight(5, 4), "t": weight(5)}
    for name, value in arrays.items():
        proto.graph.input.append(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape)
        )
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    model = equal_to_file(save(proto, tmp_path, **arrays))
    assert len(find_batch_norms(model)) == 1
    assert "Dropout" not in ops(model)


def test_upsample_of_opset_9_with_scales_as_input(tmp_path: Path) -> None:
    proto = parse(
        """net (float[N,3,8,8] image) => (float[N,4,15,15] y) {
        c = Conv<kernel_shape=[3,3]>(image, w)
        a = Upsample<mode="linear">(c, scales)
        y = Upsample(c, scales2) }""",
        opset=9,
        ir=4,
    )
    arrays = {"w": weight(4, 3, 3, 3), "scales": np.array([1, 1, 3, 3], np.float32)}
    equal_to_file(
        save(proto, tmp_path, **arrays, scales2=np.array([1, 1, 2.5, 2.5], np.float32))
    )


# ----------------------------------------------------------------------- external data


def external(
    folder: Path, place: Callable[[int, str], tuple[str, int | None, int | None]]
) -> Path:
    """A network whose weights lie in files; `place` says (location, offset, length) of each."""
    proto = parse(
        """net (float[N,3,8,8] image) => (float[N,4,6,6] y) {
        c = Conv<kernel_shape=[3,3]>(image, w)
        y = BatchNormalization(c, s, o, m, v) }"""
    )
    for index, (name, value) in enumerate(network().items()):
        tensor = numpy_helper.from_array(value, name)
        location, offset, _ = place(index, name)
        target = folder / location
        target.parent.mkdir(exist_ok=True, parents=True)
        data = target.read_bytes() if target.exists() else b""
        data = data.ljust(offset or 0, b"\xff")
        target.write_bytes(data + tensor.raw_data)
        set_external_data(tensor, location, *place(index, name)[1:])
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        proto.graph.initializer.append(tensor)
    path = folder / "file.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


PLACES = {
    "a file each": lambda index, name: (f"{name}.bin", None, None),
    "one file with offsets": lambda index, name: ("all.bin", 4096 * index, None),
    "offsets and lengths": lambda index, name: (
        "all.bin", 4096 * index, 4 * int(np.prod(network()[name].shape)),
    ),
    "in a folder": lambda index, name: (f"weights/deep/{name}", None, None),
}  # fmt: skip


@pytest.mark.parametrize("case", ["a file each", "offsets and lengths", "in a folder"])
def test_external_data(tmp_path: Path, case: str) -> None:
    model = equal_to_file(external(tmp_path, PLACES[case]))
    assert len(find_batch_norms(model)) == 1


def test_missing_external_data(tmp_path: Path) -> None:
    path = external(tmp_path, PLACES["a file each"])
    (tmp_path / "s.bin").unlink()
    with pytest.raises(ModelError, match=r"'s\.bin' of tensor 's' is missing"):
        load(path)


@pytest.mark.parametrize("location", ["../w.bin", "/etc/hostname", "a/../../w.bin"])
def test_external_data_elsewhere(tmp_path: Path, location: str) -> None:
    path = external(tmp_path, PLACES["a file each"])
    proto = onnx.load(path, load_external_data=False)
    proto.graph.initializer[0].external_data[0].value = location
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="outside the model's folder"):
        load(path)


# ----------------------------------------------------------------------- constants


def test_constant_nodes_of_every_kind(tmp_path: Path) -> None:
    sparse = helper.make_sparse_tensor(
        helper.make_tensor("", TensorProto.FLOAT, [2], [0.5, -1.5]),
        helper.make_tensor("", TensorProto.INT64, [2], [1, 10]),
        [4, 3],
    )
    constants = [
        helper.make_node(
            "Constant", [], ["w"], value=numpy_helper.from_array(weight(4, 3, 1, 1))
        ),
        helper.make_node("Constant", [], ["f"], value_float=1.5),
        helper.make_node("Constant", [], ["fs"], value_floats=[0.5] * 8),
        helper.make_node("Constant", [], ["i"], value_int=1),
        helper.make_node("Constant", [], ["is"], value_ints=[0, 4, 64]),
        helper.make_node("Constant", [], ["text"], value_string="unused"),
        helper.make_node("Constant", [], ["texts"], value_strings=["un", "used"]),
        helper.make_node("Constant", [], ["rare"], sparse_value=sparse),
    ]
    proto = parse(
        """net (float[N,3,8,8] image) => (float[N,3,64] y) {
        c = Conv(image, w)
        d = Mul(c, f)
        e = Add(d, fs)
        g = Gather<axis=1>(e, is2)
        h = Unsqueeze(i, i0)
        r = Reshape(e, is)
        t = Transpose<perm=[0,2,1]>(r)
        k = MatMul(t, rare)
        y = Transpose<perm=[0,2,1]>(k) }"""
    )
    del proto.graph.node[3:5]
    nodes = [*constants, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    model = equal_to_file(save(proto, tmp_path))
    assert "Constant" not in ops(model)


def test_constants_that_are_computed(tmp_path: Path) -> None:
    """ConstantOfShape, Range, Cast and arithmetic on weights alone."""
    proto = parse(
        """net (float[N,3,8,8] image) => (float[N,4,8,8] y) {
        zeros = ConstantOfShape<value = float[1] {0.25}>(four)
        steps = Range(zero, end, one)
        cast = Cast<to=1>(steps)
        bias = Add(zeros, cast)
        flipped = Transpose<perm=[1,0,2,3]>(w)
        y = Conv(image, flipped, bias) }"""
    )
    scalars = {"zero": np.int64(0), "end": np.int64(4), "one": np.int64(1)}
    path = save(proto, tmp_path, four=np.array([4]), w=weight(3, 4, 1, 1), **scalars)
    assert ops(equal_to_file(path)) == ["Conv"]


# ----------------------------------------------------------------------- precisions


def test_half_precision_throughout(tmp_path: Path) -> None:
    proto = parse(
        """net (float16[N,3,8,8] image) => (float16[N,4,6,6] y) {
        c = Conv<kernel_shape=[3,3]>(image, w)
        b = BatchNormalization(c, s, o, m, v)
        y = Relu(b) }"""
    )
    arrays = {name: value.astype(np.float16) for name, value in network().items()}
    # Three digits of float16 in each of three operators.
    path = save(proto, tmp_path, **arrays)
    model = equal_to_file(path, dtype=np.float16, tolerance=5e-3)
    assert any("float16" in note for note in model.notes)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_weights_stored_in_another_precision(tmp_path: Path, dtype: type) -> None:
    """Cast to float32 before they are used: what file-size tools write."""
    proto = parse(
        """net (float[N,3,8,8] image) => (float[N,4,6,6] y) {
        wide = Cast<to=1>(w)
        c = Conv<kernel_shape=[3,3]>(image, wide)
        wide_s = Cast<to=1>(s)
        b = BatchNormalization(c, wide_s, o, m, v)
        y = Relu(b) }"""
    )
    arrays = network()
    arrays |= {name: arrays[name].astype(dtype) for name in "ws"}
    model = equal_to_file(save(proto, tmp_path, **arrays))
    assert len(find_batch_norms(model)) == 1
    assert "Cast" not in ops(model)


def test_double_throughout(tmp_path: Path) -> None:
    proto = parse(
        """net (double[N,3,8,8] image) => (double[N,4] y) {
        c = Conv<kernel_shape=[3,3]>(image, w)
        r = Relu(c)
        a = ReduceMean<axes=[2,3], keepdims=0>(r)
        y = Gemm(a, u) }"""
    )
    arrays = {"w": weight(4, 3, 3, 3).astype(float), "u": weight(4, 4).astype(float)}
    path = save(proto, tmp_path, **arrays)
    model = load(path)
    images = images_for(model, 2)
    evaluator = onnx.reference.ReferenceEvaluator(str(path))  # onnxruntime has no such Conv
    expected = evaluator.run(None, {"image": images.astype(float)})
    actual = TorchGraph(model.proto)(torch.from_numpy(images))["y"].numpy()
    assert largest_difference([actual], expected) <= 1e-5


# ----------------------------------------------------------------------- interfaces


def test_uint8_image_that_is_cast_first_becomes_a_float_one(tmp_path: Path) -> None:
    proto = parse(
        """net (uint8[N,3,8,8] image) => (float[N,4,8,8] y) {
        f = Cast<to=1>(image)
        y = Conv(f, w) }"""
    )
    path = save(proto, tmp_path, w=weight(4, 3, 1, 1))
    model = load(path)
    pixels = np.random.default_rng(1).integers(0, 256, (2, 3, 8, 8), dtype=np.uint8)
    (expected,) = session(path).run(None, {"image": pixels})
    actual = TorchGraph(model.proto)(torch.from_numpy(pixels.astype(np.float32)))["y"]
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-5, atol=1e-3)
    assert any("uint8" in note for note in model.notes)


def test_uint8_image_that_indexes_is_refused_with_what_is_needed(tmp_path: Path) -> None:
    proto = parse(
        """net (uint8[N,3,8,8] image) => (float[N,4,8,8] y) {
        i = Cast<to=7>(image)
        f = Gather(table, i)
        y = Conv(f, w) }"""
    )
    with pytest.raises(ModelError, match="no float input of rank 4") as caught:
        load(save(proto, tmp_path, w=weight(4, 3, 1, 1), table=weight(256)))
    assert "uint8" in str(caught.value)


def test_weight_and_input_as_outputs_and_an_output_twice(tmp_path: Path) -> None:
    proto = parse(
        """net (float[N,3,8,8] image) => (float[N,4,8,8] y, float[N,4,8,8] z, float[4] bias,
            float[N,3,8,8] same) {
        y = Conv(image, w, b)
        z = Identity(y)
        bias = Identity(b)
        same = Identity(image) }"""
    )
    equal_to_file(save(proto, tmp_path, w=weight(4, 3, 1, 1), b=weight(4)))


def test_weight_itself_as_an_output(tmp_path: Path) -> None:
    proto = parse(
        """net (float[N,3,8,8] image) => (float[N,4,8,8] y, float[4] b) {
        y = Conv(image, w, b) }"""
    )
    equal_to_file(save(proto, tmp_path, w=weight(4, 3, 1, 1), b=weight(4)))


def test_empty_names_and_unnamed_nodes(tmp_path: Path) -> None:
    proto = parse(
        """net (float[N,3,8,8] image) => (float[N,4,12,12] y) {
        c = Conv<kernel_shape=[3,3]>(image, w)
        d, mask = Dropout(c)
        l = Clip(d, , high)
        y = Resize<mode="linear">(l, , , sizes) }"""
    )
    for node in proto.graph.node:
        node.name = ""
    proto.graph.node[1].output[1] = ""
    path = save(
        proto,
        tmp_path,
        w=weight(4, 3, 3, 3),
        high=np.float32(0.5),
        sizes=np.array([1, 4, 12, 12]),
    )
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    path.write_bytes(proto.SerializeToString())
    model = equal_to_file(path, batches=(1,))
    assert all(node.name for node in model.proto.graph.node)


def test_names_of_any_characters(tmp_path: Path) -> None:
    names = {
        "image": "изображение:0",
        "c": "a b/c;0",
        "y": "出力 'y\"",
        "w": "",
        "r": "é\n\t{}",
    }
    names |= {"w": "%weight::0%"}
    proto = parse(
        """net (float[N,3,8,8] image) => (float[N,4,8,8] y) {
        c = Conv(image, w)
        r = Relu(c)
        y = Sigmoid(r) }"""
    )
    proto.graph.initializer.append(numpy_helper.from_array(weight(4, 3, 1, 1), "w"))
    for item in (*proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        item.name = names[item.name]
    for node in proto.graph.node:
        node.input[:] = [names[name] for name in node.input]
        node.output[:] = [names[name] for name in node.output]
        node.name = names[next(k for k, v in names.items() if v == node.output[0])] + "!"
    equal_to_file(save(proto, tmp_path))


def test_metadata_and_unused_domains(tmp_path: Path) -> None:
    proto = parse(
        "net (float[N,3,8,8] image) => (float[N,4,8,8] y) { y = Conv(image, w) }",
        imports=', "ai.onnx.ml" : 3, "com.microsoft" : 1, "ai.onnx.preview.training" : 1',
    )
    proto.doc_string, proto.graph.doc_string = "a\nnetwork", "graph"
    proto.graph.node[0].doc_string = "File net.py, line 3"
    proto.metadata_props.add(key="names", value="{0: 'cat'}")
    equal_to_file(save(proto, tmp_path, w=weight(4, 3, 1, 1)))


def test_unsorted_nodes_are_sorted_or_refused(tmp_path: Path) -> None:
    """ONNX wants them sorted; onnxruntime takes them all the same."""
    proto = parse(
        """net (float[N,3,8,8] image) => (float[N,4,8,8] y) {
        y = Relu(c)
        c = Conv(image, w) }"""
    )
    assert ops(equal_to_file(save(proto, tmp_path, w=weight(4, 3, 1, 1)))) == ["Conv", "Relu"]


def test_functions_and_conditions(tmp_path: Path) -> None:
    proto = parse(
        """net (float[N,3,8,8] image) => (float[N,4,8,8] y) {
        c = custom.block <slope = 0.3> (image, w)
        y = If (flag) <
            then_branch = then () => (a) { a = Tanh(c) },
            else_branch = other () => (b) { b = Relu(c) } > }
        <domain: "custom", opset_import: ["" : 17]>
        block <slope> (x, k) => (z) {
            conv = Conv(x, k)
            z = LeakyRelu<alpha: float = @slope>(conv) }""",
        imports=', "custom" : 1',
    )
    path = save(proto, tmp_path, w=weight(4, 3, 1, 1), flag=np.array(True))
    assert ops(equal_to_file(path)) == ["Conv", "LeakyRelu", "Tanh"]


# ----------------------------------------------------------------------- training leftovers


def test_old_training_export_is_refused_though_nobody_reads_the_statistics(
    tmp_path: Path,
) -> None:
    """Before opset 14 the outputs alone say so, and onnxruntime takes the batch's statistics."""
    proto = parse(
        """net (float[N,3,8,8] image) => (float[N,4,6,6] y) {
        c = Conv<kernel_shape=[3,3]>(image, w)
        y, mean, var, saved_mean, saved_var = BatchNormalization<momentum=0.9>(c, s, o, m, v)
        }""",
        opset=9,
        ir=4,
    )
    path, images = save(proto, tmp_path, **network()), np.ones((1, 3, 8, 8), np.float32)
    assert np.abs(session(path).run(["y"], {"image": images})[0].std(axis=(2, 3))).max() < 1e-3
    with pytest.raises(ModelError, match=r"training mode; call model\.eval\(\)"):
        load(path)


def test_dropout_with_an_unread_mask(tmp_path: Path) -> None:
    proto = parse(
        """net (float[N,3,8,8] image) => (float[N,4,6,6] y) {
        c = Conv<kernel_shape=[3,3]>(image, w)
        y, mask = Dropout<seed=1>(c, ratio, training)
        }""",
    )
    arrays = {"w": weight(4, 3, 3, 3), "ratio": np.float32(0.5)}
    path = save(proto, tmp_path, **arrays, training=np.array(False))
    assert ops(equal_to_file(path)) == ["Conv"]


# ----------------------------------------------------------------------- sequences


def test_sequences_become_slices(tmp_path: Path) -> None:
    """torch.split, chunks, list indexing and torch.cat as the dynamo exporter spells them."""
    proto = parse(
        """net (float[N,6,8,8] image) => (float y, float z, float u, int64 n) {
        equal = SplitToSequence<axis=1>(image, four)
        first = SequenceAt(equal, zero)
        rest = SequenceAt(equal, one)
        parts = SplitToSequence<axis=1>(image, sizes)
        last = SequenceAt(parts, minus)
        rows = SplitToSequence<axis=2, keepdims=0>(image)
        row = SequenceAt(rows, minus)
        list = SequenceConstruct(first, rest)
        more = SequenceInsert(list, last, one)
        y = ConcatFromSequence<axis=1>(more)
        n = SequenceLength(more)
        none = SequenceEmpty()
        single = SequenceInsert(none, last)
        twice = SequenceInsert(single, last)
        z = ConcatFromSequence<axis=-1, new_axis=1>(twice)
        u = Relu(row) }"""
    )
    for value in proto.graph.output[:3]:
        value.type.tensor_type.ClearField("shape")
    scalars = {"four": np.int64(4), "zero": np.int64(0), "one": np.int64(1)}
    path = save(proto, tmp_path, **scalars, minus=np.int64(-1), sizes=np.array([1, 2, 3]))
    model = equal_to_file(path)
    assert not [op for op in ops(model) if "Sequence" in op]


def test_piece_of_a_sequence_of_unknown_length(tmp_path: Path) -> None:
    proto = parse(
        """net (float[N,3,8,8] image) => (float y) {
        mask = Greater(image, half)
        where = NonZero(mask)
        pieces = SplitToSequence<axis=1>(where)
        piece = SequenceAt(pieces, zero)
        y = Cast<to=1>(piece) }"""
    )
    path = save(proto, tmp_path, half=np.float32(0.5), zero=np.int64(0))
    model = load(path)
    assert "SequenceAt" not in ops(model)


# ----------------------------------------------------------------------- other exporters


def test_reshape_that_takes_zero_for_zero(tmp_path: Path) -> None:
    """torch's dynamo exporter sets allowzero on every Reshape; a batch of one is generalized."""
    proto = parse(
        """net (float[1,3,8,8] image) => (float[1,4] y) {
        c = Conv<kernel_shape=[3,3]>(image, w)
        g = GlobalAveragePool(c)
        y = Reshape<allowzero=1>(g, shape) }"""
    )
    path = save(proto, tmp_path, w=weight(4, 3, 3, 3), shape=np.array([1, 4]))
    model = equal_to_file(path, batches=(1,))
    assert model.fixed_batch is None


def test_class_token_of_a_file_for_one_image(tmp_path: Path) -> None:
    """A constant joined to each image, and heads of attention merged with the batch."""
    proto = parse(
        """net (float[1,3,8,8] image) => (float[1,5,8] y) {
        c = Conv<kernel_shape=[4,4], strides=[4,4]>(image, w)
        r = Reshape(c, flat)
        t = Transpose<perm=[0,2,1]>(r)
        j = Concat<axis=1>(token, t)
        length_first = Transpose<perm=[1,0,2]>(j)
        heads = Reshape(length_first, split)
        h = Transpose<perm=[1,0,2]>(heads)
        a = Softmax(h)
        back = Transpose<perm=[1,0,2]>(a)
        rows = Reshape(back, merged)
        g = Gemm(rows, u)
        o = Reshape(g, unmerged)
        y = Transpose<perm=[1,0,2]>(o) }"""
    )
    arrays = {"w": weight(8, 3, 4, 4), "token": weight(1, 1, 8), "u": weight(8, 8)}
    shapes = {"flat": [1, 8, 4], "split": [5, 2, 4], "merged": [5, 8], "unmerged": [5, 1, 8]}
    path = save(proto, tmp_path, **arrays, **{n: np.array(s) for n, s in shapes.items()})
    model = equal_to_file(path, batches=(1,))
    assert model.fixed_batch is None
    images = images_for(model, 3)
    graph = TorchGraph(model.proto)
    with torch.no_grad():
        together = graph(torch.from_numpy(images))["y"].numpy()
        alone = [graph(torch.from_numpy(images[i : i + 1]))["y"].numpy() for i in range(3)]
    assert largest_difference([together], [np.concatenate(alone)]) <= 1e-5


def test_group_normalization_hides_no_shapes(tmp_path: Path) -> None:
    """onnx infers no type behind it; the CastLike and Expand of a bias fold all the same."""
    proto = parse(
        """net (float[N,4,8,8] image) => (float y) {
        g = GroupNormalization<num_groups=2>(image, scale, offset)
        size = Shape<start=1, end=2>(g)
        zero_like = CastLike(zero, g)
        bias = Expand(zero_like, size)
        y = Conv(g, w, bias) }""",
        opset=21,
        ir=10,
    )
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    arrays = {"scale": weight(4), "offset": weight(4), "w": weight(4, 4, 1, 1)}
    path = save(proto, tmp_path, **arrays, zero=np.float32(0))
    assert ops(equal_to_file(path)) == ["GroupNormalization", "Conv"]
