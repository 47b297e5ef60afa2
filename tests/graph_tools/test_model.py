from __future__ import annotations

import functools
import os
from pathlib import Path

import numpy as np
import onnx
import onnx.reference
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from graph_tools.batchnorm import expose_inputs, find_batch_norms
from graph_tools.errors import ModelError, ZsqError
from graph_tools.model import ImageInput, Model, initializers, load, replace_proto, save

SHAPE_OPS = {
    "Shape",
    "Size",
    "Gather",
    "ConstantOfShape",
    "Cast",
    "Unsqueeze",
    "Range",
    "Expand",
}
# yolo splits channels with Gather on the data itself: these are no shape arithmetic.
DATA_GATHERS = {"yolo_fastestv2_coco": {"Gather"}}
INPUT_SHAPES = {"yunet_n_dynamic": (1, 3, 320, 320)}
ONLY_BATCH = {"yolo_fastestv2_coco": 2, "ultraface_rfb320": 1}  # what the FILE runs at
REAL = [
    "cifar10_resnet20",
    "cifar10_resnet20_folded",
    "cifar10_resnet56",
    "mcunet_cifar10_32",
    "mlperftiny_resnet8_cifar10_tf2onnx_bn",
    "mobilenet_v1_025_224_imagenet",
    "ultraface_rfb320",
    "yolo_fastestv2_coco",
    "yunet_n_dynamic",
]


@functools.cache
def load_real(path: Path) -> Model:
    return load(path, input_shape=INPUT_SHAPES.get(path.stem))


def session(model: onnx.ModelProto | Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run(model: onnx.ModelProto | Path, images: np.ndarray) -> list[np.ndarray]:
    running = session(model)
    return running.run(None, {running.get_inputs()[0].name: images})


def batch_of(model: Model, count: int, seed: int = 3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, *model.input.shape)).astype(np.float32)


def assert_close(
    actual: list[np.ndarray], expected: list[np.ndarray], tolerance: float
) -> None:
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


def weight(*shape: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed + sum(shape))
    return (rng.normal(size=shape) / 3).astype(np.float32)


def write(
    path: Path,
    nodes: list[onnx.NodeProto],
    weights: dict[str, np.ndarray],
    *,
    shape: tuple[int | str | None, ...] | None = ("N", 3, 8, 8),
    outputs: tuple[str, ...] = ("y",),
    opset: int = 17,
    ir: int = 8,
    elem_type: int = TensorProto.FLOAT,
    listed: bool = False,
    functions: tuple[onnx.FunctionProto, ...] = (),
    imports: tuple[tuple[str, int], ...] = (),
) -> Path:
    inputs = [helper.make_tensor_value_info("x", elem_type, shape)]
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    if listed:
        inputs += [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in tensors]
    graph = helper.make_graph(
        nodes,
        "net",
        inputs,
        [helper.make_tensor_value_info(name, elem_type, None) for name in outputs],
        tensors,
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", opset)]
        + [helper.make_opsetid(*entry) for entry in imports],
        ir_version=ir,
        functions=list(functions),
    )
    path.write_bytes(model.SerializeToString())
    return path


def ops(model: Model) -> list[str]:
    return [node.op_type for node in model.proto.graph.node]


def constant(name: str, value: object, dtype: type = np.int64) -> onnx.NodeProto:
    tensor = numpy_helper.from_array(np.array(value, dtype), name)
    return helper.make_node("Constant", [], [name], value=tensor)


# ------------------------------------------------------------------------- real networks


@pytest.mark.parametrize("name", REAL)
def test_real_network_equals_its_file(shared_models: Path, name: str) -> None:
    path = shared_models / f"{name}.onnx"
    model = load_real(path)
    file = onnx.load(path)
    count = sum(node.op_type == "BatchNormalization" for node in file.graph.node)
    assert len(find_batch_norms(model)) == count
    assert not (SHAPE_OPS - DATA_GATHERS.get(name, set())) & set(ops(model))
    assert model.outputs == tuple(value.name for value in file.graph.output)
    assert model.fixed_batch is None
    only = ONLY_BATCH.get(name)
    images = batch_of(model, 3 if only is None else 3 * only)
    parts = np.split(images, 1 if only is None else 3)
    expected = [np.concatenate(o) for o in zip(*(run(path, p) for p in parts), strict=True)]
    # 1e-4: the same float32 kernels, perhaps in another order of summation
    assert_close(run(model.proto, images), expected, 1e-4)


@pytest.mark.parametrize("name", REAL)
def test_normal_form_of_real_network(shared_models: Path, name: str) -> None:
    model = load_real(shared_models / f"{name}.onnx")
    proto = model.proto
    onnx.checker.check_model(proto, full_check=True)
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", 21)]
    assert proto.ir_version == 10
    assert [value.name for value in proto.graph.input] == [model.input.name]
    names = [node.name for node in proto.graph.node]
    assert all(names)
    assert len(set(names)) == len(names)
    assert not {"Constant", "Identity", "Dropout"} & set(ops(model))
    values = {v.name: v for v in (*proto.graph.value_info, *proto.graph.output)}
    for node in proto.graph.node:
        dims = values[node.output[0]].type.tensor_type.shape.dim
        assert all(dim.dim_param or dim.dim_value for dim in dims)
    for value in (*proto.graph.input, *proto.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "N"


def test_layouts_of_real_networks(shared_models: Path) -> None:
    tiny = load_real(shared_models / "mlperftiny_resnet8_cifar10_tf2onnx_bn.onnx")
    assert tiny.input.layout == "NHWC"
    assert (tiny.input.channels, tiny.input.height, tiny.input.width) == (3, 32, 32)
    face = load_real(shared_models / "ultraface_rfb320.onnx")
    assert face.input == ImageInput(name="input", shape=(3, 240, 320), layout="NCHW", batch=1)
    assert any("batch size 1" in note for note in face.notes)


# ------------------------------------------------------------------------- old and new files


def old_nodes() -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["a", "s", "b", "m", "v"], ["c"]),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("Dropout", ["d"], ["e"]),
        helper.make_node("GlobalAveragePool", ["e"], ["f"]),
        helper.make_node("Flatten", ["f"], ["g"]),
        helper.make_node("Gemm", ["g", "u", "t"], ["h"], transB=1),
        helper.make_node("Softmax", ["h"], ["y"]),
    ]
    weights = {"w": weight(4, 3, 3, 3), "s": weight(4), "b": weight(4), "m": weight(4)}
    weights |= {"v": np.abs(weight(4)) + 1, "u": weight(5, 4), "t": weight(5)}
    return nodes, weights


@pytest.mark.parametrize(
    ("opset", "ir"), [(7, 3), (8, 3), (9, 4), (10, 5), (11, 6), (13, 7), (17, 8), (21, 10)]
)
def test_every_opset_with_initializers_as_inputs(tmp_path: Path, opset: int, ir: int) -> None:
    nodes, weights = old_nodes()
    path = write(tmp_path / "old.onnx", nodes, weights, opset=opset, ir=ir, listed=True)
    model = load(path)
    assert ops(model) == [
        "Conv", "BatchNormalization", "Relu", "GlobalAveragePool", "Flatten", "Gemm", "Softmax"
    ]  # fmt: skip
    images = batch_of(model, 3)
    assert_close(run(model.proto, images), run(path, images), 1e-6)


@pytest.mark.parametrize("opset", [22, 23, 24, 25, 26])
def test_newer_opsets_are_relabelled(tmp_path: Path, opset: int) -> None:
    nodes, weights = old_nodes()
    nodes.insert(3, helper.make_node("Cast", ["d"], ["d2"], to=1))
    nodes[4].input[0] = "d2"
    path = write(tmp_path / "new.onnx", nodes, weights, opset=opset, ir=10)
    model = load(path)
    assert "Cast" not in ops(model)
    images = batch_of(model, 3)
    assert_close(run(model.proto, images), run(path, images), 1e-6)


def test_opset_beyond_onnxruntime_is_compared_with_onnx_reference(tmp_path: Path) -> None:
    nodes, weights = old_nodes()
    newest = onnx.defs.onnx_opset_version()
    path = write(tmp_path / "new.onnx", nodes, weights, opset=newest, ir=onnx.IR_VERSION)
    model = load(path)
    assert any("onnx.reference" in note for note in model.notes)
    images = batch_of(model, 1)
    expected = onnx.reference.ReferenceEvaluator(str(path)).run(None, {"x": images})
    assert_close(run(model.proto, images), [np.asarray(e) for e in expected], 1e-5)


def test_newer_operator_with_a_definition_is_expanded(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"]),
        helper.make_node("Swish", ["a"], ["y"], alpha=2.0),
    ]
    path = write(tmp_path / "swish.onnx", nodes, {"w": weight(4, 3, 1, 1)}, opset=24, ir=10)
    model = load(path)
    images = batch_of(model, 2)
    conv = np.einsum("oi,nihw->nohw", weight(4, 3, 1, 1)[:, :, 0, 0], images)
    assert "Swish" not in ops(model)
    assert_close(run(model.proto, images), [conv / (1 + np.exp(-2 * conv))], 1e-5)


@pytest.mark.parametrize(
    ("op_type", "inputs", "opset", "attributes"),
    [
        ("Swish", ["a"], 24, {}),  # a default that the inliner would lose
        ("RMSNormalization", ["a", "s"], 23, {}),  # a body that depends on a weight's type
        ("RotaryEmbedding", ["a", "c", "c"], 23, {}),
        ("Attention", ["a", "a", "x", "m"], 24, {"is_causal": 1, "softcap": 3.0}),
    ],
)
def test_newer_operators_are_written_out(
    tmp_path: Path, op_type: str, inputs: list[str], opset: int, attributes: dict[str, float]
) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"]),
        helper.make_node(op_type, inputs, ["b"], **attributes),
        helper.make_node("Relu", ["b"], ["y"]),
    ]
    weights = {
        "w": weight(3, 3, 1, 1),
        "s": weight(8),
        "c": weight(1, 8, 4),
        "m": weight(8, 8),
    }
    used = {name: value for name, value in weights.items() if name in ["w", *inputs]}
    path = write(tmp_path / "new.onnx", nodes, used, shape=(1, 3, 8, 8), opset=opset, ir=10)
    model = load(path)
    assert op_type not in ops(model)
    images = batch_of(model, 1)
    assert_close(run(model.proto, images), run(path, images), 1e-5)


def test_opset_6_is_brought_to_one_that_runs(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"]),
        helper.make_node("PRelu", ["a", "s"], ["p"]),  # one slope a channel
        helper.make_node("Add", ["p", "b"], ["y"], axis=1, broadcast=1),
    ]
    weights = {"w": weight(4, 3, 1, 1), "s": weight(4), "b": weight(4, seed=1)}
    model = load(write(tmp_path / "old.onnx", nodes, weights, opset=6, ir=3, listed=True))
    images = batch_of(model, 2)
    conv = np.einsum("oi,nihw->nohw", weights["w"][:, :, 0, 0], images)
    slope, bias = (weights[name].reshape(4, 1, 1) for name in "sb")
    assert "opset 6 converted to 21" in model.notes
    assert_close(
        run(model.proto, images), [np.where(conv < 0, slope * conv, conv) + bias], 1e-5
    )


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize(
    ("opset", "ir", "op_type", "scale"),
    [(7, 3, "Upsample", 2.0), (9, 4, "Upsample", 2.0), (10, 5, "Resize", 2.5),
     (10, 5, "Resize", 0.5)],
)  # fmt: skip
def test_old_resizing_keeps_its_sampling(
    tmp_path: Path, opset: int, ir: int, op_type: str, scale: float, mode: str
) -> None:
    scales = np.array([1, 1, scale, scale], np.float32)
    if opset == 7:
        node = helper.make_node(op_type, ["x"], ["a"], scales=scales.tolist(), mode=mode)
    else:
        node = helper.make_node(op_type, ["x", "scales"], ["a"], mode=mode)
    path = write(
        tmp_path / "up.onnx", [node, helper.make_node("Relu", ["a"], ["y"])],
        {} if opset == 7 else {"scales": scales}, opset=opset, ir=ir, listed=True,
    )  # fmt: skip
    model = load(path)
    assert ops(model) == ["Resize", "Relu"]
    images = batch_of(model, 3)
    assert_close(run(model.proto, images), run(path, images), 1e-6)


def test_softmax_of_opset_9_over_the_last_axis_stays_one_node(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        constant("zero", [0]),
        helper.make_node("Gather", ["s", "zero"], ["n"]),
        constant("rest", [3, 64]),
        helper.make_node("Concat", ["n", "rest"], ["t"], axis=0),
        helper.make_node("Reshape", ["x", "t"], ["a"]),
        helper.make_node("Softmax", ["a"], ["y"], axis=2),
    ]
    path = write(tmp_path / "softmax.onnx", nodes, {}, opset=9, ir=4)
    model = load(path)
    assert ops(model) == ["Reshape", "Softmax"]
    images = batch_of(model, 3)
    assert_close(run(model.proto, images), run(path, images), 1e-6)


# ------------------------------------------------------------------------- constants, names


def test_constants_of_every_kind(tmp_path: Path) -> None:
    sparse = helper.make_sparse_tensor(
        helper.make_tensor("", TensorProto.FLOAT, [2], [2.0, 3.0]),
        helper.make_tensor("", TensorProto.INT64, [2], [0, 2]),
        [3],
    )
    nodes = [
        helper.make_node("Constant", [], ["one"], value_float=1.5),
        helper.make_node("Constant", [], ["three"], value_floats=[1.0, 2.0, 3.0]),
        helper.make_node("Constant", [], ["axis"], value_int=-1),
        helper.make_node("Constant", [], ["shape"], value_ints=[1, 3, 1, 1]),
        helper.make_node("Constant", [], ["sparse"], sparse_value=sparse),
        constant("tensor", [0.5, 0.25, 0.125], np.float32),
        helper.make_node("Add", ["three", "sparse"], ["p"]),
        helper.make_node("Mul", ["p", "tensor"], ["q"]),
        helper.make_node("Unsqueeze", ["q", "axis"], ["q1"]),
        helper.make_node("Reshape", ["q1", "shape"], ["r"]),
        helper.make_node("Mul", ["x", "r"], ["m"]),
        helper.make_node("Add", ["m", "one"], ["y"]),
    ]
    model = load(write(tmp_path / "constants.onnx", nodes, {}))
    assert ops(model) == ["Mul", "Add"]
    expected = (np.array([3, 2, 6]) * np.array([0.5, 0.25, 0.125])).reshape(1, 3, 1, 1)
    assert np.array_equal(initializers(model.proto)["r"], expected.astype(np.float32))
    images = batch_of(model, 2)
    assert_close(run(model.proto, images), [images * expected + 1.5], 1e-6)


def test_identity_and_dropout_go_and_output_names_stay(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Identity", ["x"], ["x1"]),
        helper.make_node("Relu", ["x1"], ["a"]),
        helper.make_node("Identity", ["a"], ["y"]),
        helper.make_node("Dropout", ["a"], ["b"]),
        helper.make_node("Sigmoid", ["b"], ["b1"]),
        helper.make_node("Dropout", ["b1", "ratio", "training"], ["z"]),
    ]
    weights = {"ratio": np.array(0.5, np.float32), "training": np.array(False)}
    model = load(write(tmp_path / "names.onnx", nodes, weights, outputs=("y", "z")))
    assert ops(model) == ["Relu", "Sigmoid"]
    assert model.outputs == ("y", "z")
    assert [node.name for node in model.proto.graph.node] == ["Relu_0", "Sigmoid_0"]
    images = batch_of(model, 2)
    relu = np.maximum(images, 0)
    assert_close(run(model.proto, images), [relu, 1 / (1 + np.exp(-relu))], 1e-6)


def test_duplicate_node_names_become_unique_and_nodes_are_sorted(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Sigmoid", ["a"], ["y"], name="act"),
        helper.make_node("Relu", ["x"], ["a"], name="act"),
    ]
    model = load(write(tmp_path / "unsorted.onnx", nodes, {}))
    assert [(n.op_type, n.name) for n in model.proto.graph.node] == [
        ("Relu", "act"), ("Sigmoid", "act_0")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("elem_type", "dtype", "tolerance"),
    [(TensorProto.FLOAT16, np.float16, 1e-2), (TensorProto.DOUBLE, np.float64, 1e-5)],
)
def test_other_precisions_become_float32(
    tmp_path: Path, elem_type: int, dtype: type, tolerance: float
) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Cast", ["a"], ["b"], to=TensorProto.FLOAT),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("Cast", ["c"], ["y"], to=elem_type),
    ]
    weights = {"w": weight(4, 3, 3, 3).astype(dtype)}
    path = write(tmp_path / "half.onnx", nodes, weights, elem_type=elem_type)
    model = load(path)
    assert ops(model) == ["Conv", "Relu"]
    types = {t.data_type for t in model.proto.graph.initializer}
    values = (*model.proto.graph.input, *model.proto.graph.output)
    assert types | {v.type.tensor_type.elem_type for v in values} == {TensorProto.FLOAT}
    assert any("float32" in note for note in model.notes)
    images = batch_of(model, 2).astype(dtype)
    expected = onnx.reference.ReferenceEvaluator(str(path)).run(None, {"x": images})
    actual = run(model.proto, images.astype(np.float32))
    assert_close(actual, [np.asarray(e).astype(np.float32) for e in expected], tolerance)


def test_bounds_beyond_float32_are_clamped(tmp_path: Path) -> None:
    nodes = [helper.make_node("Clip", ["x", "low", "high"], ["y"])]
    weights = {"low": np.array(0.0), "high": np.array(np.finfo(np.float64).max)}
    path = write(tmp_path / "clip.onnx", nodes, weights, elem_type=TensorProto.DOUBLE)
    assert initializers(load(path).proto)["high"] == np.finfo(np.float32).max


def test_local_functions_are_inlined(tmp_path: Path) -> None:
    function = helper.make_function(
        "acme", "Twice", ["a"], ["b"],
        [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 17)],
    )  # fmt: skip
    nodes = [
        helper.make_node("Twice", ["x"], ["a"], domain="acme"),
        helper.make_node("Relu", ["a"], ["y"]),
    ]
    path = write(
        tmp_path / "function.onnx", nodes, {}, functions=(function,),
        imports=(("acme", 1), ("ai.onnx.ml", 2)),
    )  # fmt: skip
    model = load(path)
    assert ops(model) == ["Add", "Relu"]
    assert [(o.domain, o.version) for o in model.proto.opset_import] == [("", 21)]
    images = batch_of(model, 2)
    assert_close(run(model.proto, images), [np.maximum(2 * images, 0)], 1e-6)


def test_external_data_in_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "deep"
    folder.mkdir()
    nodes, weights = old_nodes()
    path = write(folder / "plain.onnx", nodes, weights)
    expected = load(path)
    onnx.save(
        onnx.load(path), folder / "external.onnx", save_as_external_data=True,
        location="weights.bin", size_threshold=0,
    )  # fmt: skip
    model = load(folder / "external.onnx")
    for name, value in initializers(expected.proto).items():
        assert np.array_equal(initializers(model.proto)[name], value)
    assert not any(t.external_data for t in model.proto.graph.initializer)


# ------------------------------------------------------------------------- shapes and batch


def flatten_chain() -> list[onnx.NodeProto]:
    """Return view(x.size(0), -1) as torch exports it, with a float detour."""
    return [
        helper.make_node("Shape", ["x"], ["s"]),
        constant("zero", 0),
        helper.make_node("Gather", ["s", "zero"], ["n"]),
        helper.make_node("Cast", ["n"], ["nf"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["nf"], ["ni"], to=TensorProto.INT64),
        constant("axes", [0]),
        helper.make_node("Unsqueeze", ["ni", "axes"], ["n1"]),
        constant("minus", [-1]),
        helper.make_node("Concat", ["n1", "minus"], ["t"], axis=0),
        helper.make_node("Reshape", ["x", "t"], ["y"]),
    ]


def check_chain(path: Path, expected_ops: list[str], **keywords: object) -> Model:
    model = load(path, **keywords)  # type: ignore[arg-type]
    assert ops(model) == expected_ops
    assert model.fixed_batch is None
    for count in (1, 3, 5):
        images = batch_of(model, count)
        assert_close(run(model.proto, images), run(path, images), 1e-6)
    return model


def test_reshape_chain(tmp_path: Path) -> None:
    path = write(tmp_path / "chain.onnx", flatten_chain(), {})
    model = check_chain(path, ["Reshape"])
    assert initializers(model.proto)[model.proto.graph.node[0].input[1]].tolist() == [0, 192]


def test_channel_shuffle_chain_merges_the_batch(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"], start=0, end=1),
        constant("six", [6]),
        helper.make_node("Mul", ["s", "six"], ["n3"]),
        constant("two", [2]),
        helper.make_node("Div", ["n3", "two"], ["half"]),
        constant("rest", [2, 64]),
        helper.make_node("Concat", ["half", "rest"], ["t"], axis=0),
        helper.make_node("Reshape", ["x", "t"], ["a"]),
        helper.make_node("Transpose", ["a"], ["b"], perm=[1, 0, 2]),
        helper.make_node("Concat", ["two", "s", "cs"], ["u"], axis=0),
        helper.make_node("Reshape", ["b", "u"], ["y0"]),
        helper.make_node("Transpose", ["y0"], ["y"], perm=[1, 0, 2, 3, 4]),
        constant("cs", [3, 8, 8]),
    ]
    path = write(tmp_path / "shuffle.onnx", nodes, {}, shape=("N", 6, 8, 8))
    model = check_chain(path, ["Reshape", "Transpose", "Reshape", "Transpose"])
    dims = model.proto.graph.output[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in dims] == ["N", 2, 3, 8, 8]


def test_resize_sizes_from_a_chain(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"], start=0, end=2),
        constant("up", [16, 24]),
        helper.make_node("Concat", ["s", "up"], ["t"], axis=0),
        helper.make_node("Resize", ["x", "", "", "t"], ["a"], mode="linear"),
        constant("odd", [11, 13]),
        helper.make_node("Concat", ["s", "odd"], ["u"], axis=0),
        helper.make_node("Resize", ["a", "", "", "u"], ["y"], mode="nearest"),
    ]
    path = write(tmp_path / "resize.onnx", nodes, {}, opset=18)
    model = check_chain(path, ["Resize", "Resize"])
    first, second = model.proto.graph.node
    assert initializers(model.proto)[first.input[2]].tolist() == [1, 1, 2, 3]
    assert initializers(model.proto)[second.input[3]].tolist() == [11, 13]


def test_expand_slice_and_repeated_constants(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Expand", ["x", "s"], ["a"]),
        helper.make_node("Shape", ["x"], ["n"], end=1),
        constant("start", [0]),
        helper.make_node("Slice", ["a", "start", "n", "start"], ["b"]),
        helper.make_node("ConstantOfShape", ["s"], ["c"],
                         value=helper.make_tensor("", TensorProto.FLOAT, [1], [2.0])),
        helper.make_node("Add", ["b", "c"], ["y"]),
    ]  # fmt: skip
    path = write(tmp_path / "more.onnx", nodes, {})
    check_chain(path, ["Expand", "Slice", "Add"])


def test_chain_that_cannot_be_spelled_stays(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"], end=1),
        constant("rest", [1, 8, 8]),
        helper.make_node("Concat", ["s", "rest"], ["t"], axis=0),
        helper.make_node("Expand", ["token", "t"], ["e"]),
        helper.make_node("Concat", ["x", "e"], ["y"], axis=1),
    ]
    path = write(tmp_path / "token.onnx", nodes, {"token": weight(1, 1, 8, 8)})
    check_chain(path, ["Shape", "Concat", "Expand", "Concat"])


def test_constant_condition_is_resolved(tmp_path: Path) -> None:
    """Squeeze of torch: If(dim == 1, squeeze, identity), known once the shape is."""
    value = helper.make_tensor_value_info("o", TensorProto.FLOAT, None)
    then = helper.make_graph(
        [constant("ax", [2, 3]), helper.make_node("Squeeze", ["p", "ax"], ["o"])],
        "then", [], [value],
    )  # fmt: skip
    other = helper.make_graph(
        [helper.make_node("Identity", ["p"], ["o"])], "else", [], [value]
    )
    nodes = [
        helper.make_node("GlobalAveragePool", ["x"], ["p"]),
        helper.make_node("Shape", ["p"], ["s"], start=2, end=3),
        constant("one", [1]),
        helper.make_node("Equal", ["s", "one"], ["c"]),
        helper.make_node("If", ["c"], ["q"], then_branch=then, else_branch=other),
        helper.make_node("Relu", ["q"], ["y"]),
    ]
    for opset in (13, 17):
        path = write(tmp_path / "if.onnx", nodes[:1] + _shape_before_15(opset) + nodes[2:], {},
                     opset=opset)  # fmt: skip
        check_chain(path, ["GlobalAveragePool", "Squeeze", "Relu"])


def _shape_before_15(opset: int) -> list[onnx.NodeProto]:
    if opset >= 15:
        return [helper.make_node("Shape", ["p"], ["s"], start=2, end=3)]
    return [
        helper.make_node("Shape", ["p"], ["s4"]),
        constant("two", [2]),
        helper.make_node("Gather", ["s4", "two"], ["s"]),
    ]


@pytest.mark.parametrize("batch", [1, 4])
def test_static_batch_is_generalized(tmp_path: Path, batch: int) -> None:
    nodes = [
        helper.make_node("Reshape", ["x", "grouped"], ["a"]),
        helper.make_node("Transpose", ["a"], ["b"], perm=[0, 2, 1, 3, 4]),
        helper.make_node("Reshape", ["b", "back"], ["c"]),
        helper.make_node("GlobalAveragePool", ["c"], ["d"]),
        helper.make_node("Reshape", ["d", "flat"], ["e"]),
        helper.make_node("Gemm", ["e", "w"], ["y"]),
    ]
    weights = {
        "grouped": np.array([batch, 2, 3, 8, 8]),
        "back": np.array([batch, 6, 8, 8]),
        "flat": np.array([batch, -1]),
        "w": weight(6, 5),
    }
    path = write(tmp_path / "static.onnx", nodes, weights, shape=(batch, 6, 8, 8))
    model = load(path)
    assert (model.input.batch, model.fixed_batch) == (batch, None)
    images = batch_of(model, 2 * batch)
    expected = np.concatenate([run(path, part)[0] for part in np.split(images, 2)])
    assert_close(run(model.proto, images), [expected], 1e-5)
    assert_close(run(model.proto, images[:1]), [expected[:1]], 1e-5)


def test_batch_that_cannot_be_generalized_is_fixed(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Softmax", ["x"], ["a"], axis=0),  # mixes the images of a batch
        helper.make_node("Conv", ["a", "w"], ["y"]),
    ]
    path = write(
        tmp_path / "mixing.onnx", nodes, {"w": weight(4, 3, 1, 1)}, shape=(2, 3, 8, 8)
    )
    model = load(path)
    assert (model.input.batch, model.fixed_batch) == (2, 2)
    assert any("batch size 2 only" in note for note in model.notes)
    assert model.proto.graph.output[0].type.tensor_type.shape.dim[0].dim_value == 2
    images = batch_of(model, 2)
    assert_close(run(model.proto, images), run(path, images), 1e-6)


def test_dynamic_height_and_width_with_input_shape(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("ReduceProd", ["s"], ["p"], keepdims=1),
        constant("shape", [1]),
        helper.make_node("Reshape", ["p", "shape"], ["p1"]),
        constant("zero", [0]),
        helper.make_node("Gather", ["s", "zero"], ["n"]),
        helper.make_node("Div", ["p1", "n"], ["size"]),
        helper.make_node("Concat", ["n", "size"], ["t"], axis=0),
        helper.make_node("Reshape", ["x", "t"], ["y"]),
    ]
    path = write(tmp_path / "free.onnx", nodes, {}, shape=("N", 3, "H", "W"))
    model = check_chain(path, ["Reshape"], input_shape=(1, 3, 6, 10))
    assert model.input.shape == (3, 6, 10)


@pytest.mark.parametrize("shape", [None, ("N", 3, None, None), (0, 3, -1, -1)])
def test_unknown_shapes_with_input_shape(
    tmp_path: Path, shape: tuple[int, ...] | None
) -> None:
    path = write(tmp_path / "free.onnx", [helper.make_node("Relu", ["x"], ["y"])], {},
                 shape=shape)  # fmt: skip
    model = load(path, input_shape=(1, 3, 5, 7))
    assert model.input.shape == (3, 5, 7)
    assert model.input.batch is None


# ------------------------------------------------------------------------- layout, inputs


def test_layout_follows_the_graph_then_the_shape(tmp_path: Path) -> None:
    relu = [helper.make_node("Relu", ["x"], ["y"])]
    transpose = [
        helper.make_node("Sub", ["x", "mean"], ["c"]),
        helper.make_node("Transpose", ["c"], ["t"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["t", "w"], ["y"]),
    ]
    weights = {"mean": weight(12), "w": weight(4, 12, 1, 1)}
    path = tmp_path / "layout.onnx"
    assert load(write(path, relu, {}, shape=(1, 32, 32, 3))).input.layout == "NHWC"
    assert load(write(path, relu, {}, shape=(1, 3, 32, 32))).input.layout == "NCHW"
    assert load(write(path, relu, {}, shape=(1, 3, 32, 3))).input.layout == "NCHW"
    assert load(path, layout="NHWC").input.layout == "NHWC"
    many = load(write(path, transpose, weights, shape=("N", 9, 8, 12)))
    assert (many.input.layout, many.input.channels) == ("NHWC", 12)
    assert any("NHWC" in note for note in many.notes)
    conv = [helper.make_node("Conv", ["x", "w"], ["y"])]
    narrow = load(write(path, conv, {"w": weight(4, 32, 1, 1)}, shape=("N", 32, 32, 3)))
    assert (narrow.input.layout, narrow.input.width) == ("NCHW", 3)


def test_unused_inputs_are_dropped_with_a_note(tmp_path: Path) -> None:
    path = write(tmp_path / "unused.onnx", [helper.make_node("Relu", ["x"], ["y"])], {})
    proto = onnx.load(path)
    proto.graph.input.append(helper.make_tensor_value_info("seed", TensorProto.INT64, [1]))
    onnx.save(proto, path)
    # The file itself needs a value for it, so it cannot be run beside the normal form.
    model = load(path)
    assert [value.name for value in model.proto.graph.input] == ["x"]
    assert any("seed" in note for note in model.notes)


# ------------------------------------------------------------------------- replace and save


def test_replace_proto_infers_again_and_checks(tmp_path: Path) -> None:
    nodes, weights = old_nodes()
    model = load(write(tmp_path / "net.onnx", nodes, weights))
    exposed = expose_inputs(model, find_batch_norms(model))
    assert exposed.outputs == ("y", "a")
    assert [value.name for value in exposed.proto.graph.output] == ["y", "a"]
    dims = exposed.proto.graph.output[1].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in dims] == ["N", 4, 8, 8]
    assert len(run(exposed.proto, batch_of(model, 2))) == 2
    noted = replace_proto(model, model.proto, notes=["changed"])
    assert noted.notes == (*model.notes, "changed")
    with pytest.raises(ModelError, match="no tensor is named nowhere"):
        replace_proto(model, model.proto, outputs=("nowhere",))
    broken = onnx.ModelProto()
    broken.CopyFrom(model.proto)
    broken.graph.node[0].input[0] = "nothing"
    with pytest.raises(ModelError, match="not a valid graph"):
        replace_proto(model, broken)


def test_save_is_whole_or_absent(tmp_path: Path) -> None:
    nodes, weights = old_nodes()
    model = load(write(tmp_path / "net.onnx", nodes, weights))
    target = tmp_path / "out.onnx"
    target.write_bytes(b"old")
    save(model.proto, target)
    assert onnx.load(target) == model.proto
    first = target.read_bytes()
    save(model.proto, target)
    assert target.read_bytes() == first
    with pytest.raises(ZsqError, match=r"missing.*cannot be written.*folder"):
        save(model.proto, tmp_path / "missing" / "out.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.onnx", "out.onnx"]


def test_failed_save_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes, weights = old_nodes()
    model = load(write(tmp_path / "net.onnx", nodes, weights))
    target = tmp_path / "out.onnx"
    target.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ZsqError, match="No space left"):
        save(model.proto, target)
    assert target.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.onnx", "out.onnx"]


def test_save_below_a_file(tmp_path: Path) -> None:
    nodes, weights = old_nodes()
    path = write(tmp_path / "net.onnx", nodes, weights)
    with pytest.raises(ZsqError, match="cannot be written"):
        save(load(path).proto, path / "out.onnx")


def test_load_prints_nothing(shared_models: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(shared_models / "ultraface_rfb320.onnx")
    load(shared_models / "mlperftiny_resnet8_cifar10_tf2onnx_bn.onnx")
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
