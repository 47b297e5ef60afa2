"""Every unusable file ends in one line that says what, where and what to do."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graph_tools.errors import (
    DynamicShapeError,
    ModelError,
    SettingsError,
    UnsupportedOperatorError,
    ZsqError,
)
from graph_tools.model import load

FLOAT = TensorProto.FLOAT


def model(
    nodes: Sequence[onnx.NodeProto],
    weights: dict[str, np.ndarray] | None = None,
    *,
    inputs: Sequence[onnx.ValueInfoProto] | None = None,
    opset: int = 17,
    ir: int = 8,
    imports: Sequence[tuple[str, int]] = (),
) -> onnx.ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "net",
        inputs or [value("x", ("N", 3, 8, 8))],
        [value("y", None)],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    imported = [helper.make_opsetid("", opset), *(helper.make_opsetid(*i) for i in imports)]
    return helper.make_model(graph, opset_imports=imported, ir_version=ir)


def value(
    name: str, shape: Sequence[int | str | None] | None, elem_type: int = FLOAT
) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, elem_type, shape)


def node(op_type: str, inputs: str, outputs: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(op_type, inputs.split(), outputs.split(), **attributes)


CONV = node("Conv", "x w", "y", name="first")
WEIGHT = np.ones((4, 3, 1, 1), np.float32)


def conv(weight: np.ndarray = WEIGHT) -> onnx.ModelProto:
    return model([CONV], {"w": weight})


def fault(path: Path, **keywords: object) -> ZsqError:
    before = sorted(path.parent.iterdir())
    with pytest.raises(ZsqError) as caught:
        load(path, **keywords)  # type: ignore[arg-type]
    line = str(caught.value)
    assert "\n" not in line
    assert "protobuf" not in line
    assert len(line) < 500
    assert line.startswith(str(path)) or isinstance(caught.value, SettingsError)
    assert sorted(path.parent.iterdir()) == before
    return caught.value


def refused(tmp_path: Path, proto: onnx.ModelProto, text: str, **keywords: object) -> ZsqError:
    path = tmp_path / "bad.onnx"
    path.write_bytes(proto.SerializeToString())
    error = fault(path, **keywords)
    assert re.search(text, str(error)), str(error)
    return error


# ------------------------------------------------------------------------- the file itself


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "the file is empty"),
        (b"\x00" * 100, "not an ONNX file"),
        (b"<!DOCTYPE html><html>404</html>", "not an ONNX file"),
        (b"PK\x03\x04 a zip archive", "not an ONNX file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (b"\x08\x08", "not an ONNX file"),
    ],
)
def test_not_an_onnx_file(tmp_path: Path, content: bytes, text: str) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    assert text in str(fault(path))


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        load(tmp_path / "missing.onnx")
    with pytest.raises(ModelError, match=r"is a folder; give the \.onnx file"):
        load(tmp_path)


def test_truncation_anywhere(tmp_path: Path) -> None:
    whole = conv().SerializeToString()
    path = tmp_path / "bad.onnx"
    for size in range(1, len(whole) - 1):
        path.write_bytes(whole[:size])
        fault(path)


def test_flipped_bytes_never_leak_another_exception(tmp_path: Path) -> None:
    """A damaged byte may leave a usable file, but must not end in a foreign exception."""
    whole = bytearray(conv().SerializeToString())
    rng = np.random.default_rng(0)
    path = tmp_path / "bad.onnx"
    for position in rng.choice(len(whole), 60, replace=False):
        damaged = bytearray(whole)
        damaged[position] ^= int(rng.integers(1, 256))
        path.write_bytes(bytes(damaged))
        with contextlib.suppress(ZsqError):
            load(path)


@pytest.mark.parametrize(("opset", "ir"), [(5, 3), (1, 3), (99, 8)])
def test_opset_outside_the_range(tmp_path: Path, opset: int, ir: int) -> None:
    refused(tmp_path, model([node("Relu", "x", "y")], opset=opset, ir=ir), f"opset {opset} is")


@pytest.mark.parametrize("ir", [2, 99])
def test_ir_version_outside_the_range(tmp_path: Path, ir: int) -> None:
    refused(tmp_path, model([node("Relu", "x", "y")], ir=ir), f"IR version {ir} is outside")


def test_no_opset(tmp_path: Path) -> None:
    proto = conv()
    del proto.opset_import[:]
    refused(tmp_path, proto, "imports no opset")


# ------------------------------------------------------------------------- external data


def external(location: str, offset: int = 0, length: int = 48) -> onnx.ModelProto:
    proto = conv()
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, entry in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(entry))
    return proto


@pytest.mark.parametrize(
    "location",
    ["../secret.bin", "/etc/passwd", "a/../../secret.bin", "C:\\secret.bin", "..\\s.bin", ""],
)
def test_external_data_outside_the_folder(tmp_path: Path, location: str) -> None:
    (tmp_path / "secret.bin").write_bytes(WEIGHT.tobytes())
    folder = tmp_path / "model"
    folder.mkdir()
    refused(folder, external(location), "tensor 'w' lies outside the model's folder")


@pytest.mark.parametrize("link_folder", [False, True])
def test_external_data_behind_a_link(tmp_path: Path, link_folder: bool) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.bin").write_bytes(WEIGHT.tobytes())
    folder = tmp_path / "model"
    folder.mkdir()
    if link_folder:
        (folder / "data").symlink_to(outside)
        location = "data/secret.bin"
    else:
        (folder / "secret.bin").symlink_to(outside / "secret.bin")
        location = "secret.bin"
    refused(folder, external(location), "is a link that leaves the model's folder")


def test_external_data_missing_or_short(tmp_path: Path) -> None:
    refused(tmp_path, external("gone.bin"), "'gone.bin' of tensor 'w' is missing")
    (tmp_path / "data.bin").write_bytes(WEIGHT.tobytes()[:-1])
    refused(tmp_path, external("data.bin"), r"ends early \(47 bytes, 48 needed\)")
    refused(tmp_path, external("data.bin", offset=40, length=8), "ends early")
    refused(tmp_path, external("data.bin", offset=-8, length=8), "ends early")
    refused(tmp_path, external("data.bin", length=12), "does not fit its shape 4x3x1x1")
    short = external("data.bin")
    short.graph.initializer[0].external_data[1].value = "many"
    refused(tmp_path, short, "malformed offset or length")


# ------------------------------------------------------------------------- weights


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_nan_and_infinite_weights(tmp_path: Path, dtype: type) -> None:
    bad = WEIGHT.astype(dtype)
    bad[1, 2] = np.nan
    refused(tmp_path, conv(bad), "tensor 'w' holds 1 NaN")
    bad[1, 2] = -np.inf
    refused(tmp_path, conv(bad), "tensor 'w' holds 1 infinite values")


def test_infinite_bounds_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "clip.onnx"
    proto = model([node("Clip", "x low", "y")], {"low": np.array(-np.inf, np.float32)})
    path.write_bytes(proto.SerializeToString())
    assert len(load(path).proto.graph.node) == 1


def test_nan_in_a_constant_node(tmp_path: Path) -> None:
    tensor = numpy_helper.from_array(np.array([np.nan], np.float32))
    nodes = [node("Constant", "", "c", value=tensor), node("Add", "x c", "y")]
    refused(tmp_path, model(nodes), "tensor 'c' holds 1 NaN")


def test_weight_whose_data_does_not_fit(tmp_path: Path) -> None:
    proto = conv()
    proto.graph.initializer[0].dims[0] = 2**40
    refused(tmp_path, proto, "tensor 'w' is malformed")


# ------------------------------------------------------------------------- operators


def test_unknown_operators_are_all_listed(tmp_path: Path) -> None:
    nodes = [
        node("Magic", "x", "a", domain="com.acme"),
        node("Wizard", "a", "b"),
        node("Normalizer", "b", "c", domain="ai.onnx.ml"),
        node("Relu", "c", "y"),
    ]
    proto = model(nodes, imports=[("com.acme", 1), ("ai.onnx.ml", 2)])
    error = refused(tmp_path, proto, "unsupported operator")
    assert isinstance(error, UnsupportedOperatorError)
    assert error.missing == ("Wizard", "ai.onnx.ml:Normalizer", "com.acme:Magic")


def test_file_that_onnxruntime_optimized(tmp_path: Path) -> None:
    proto = model(
        [node("QuickGelu", "x", "y", domain="com.microsoft")], imports=[("com.microsoft", 1)]
    )
    assert "before that" in refused(tmp_path, proto, "com.microsoft:QuickGelu").hint


def test_unknown_operator_inside_a_function(tmp_path: Path) -> None:
    body = [node("Magic", "a", "b", domain="com.acme")]
    imported = [helper.make_opsetid("", 17), helper.make_opsetid("com.acme", 1)]
    proto = model([node("F", "x", "y", domain="local")], imports=[("local", 1)])
    proto.functions.append(helper.make_function("local", "F", ["a"], ["b"], body, imported))
    error = refused(tmp_path, proto, "com.acme:Magic")
    assert isinstance(error, UnsupportedOperatorError)


def test_operator_newer_than_the_normal_form(tmp_path: Path) -> None:
    nodes = [
        node("Conv", "x w", "a"),
        node("BitCast", "a", "b", to=TensorProto.INT32),
        node("Cast", "b", "y", to=FLOAT),
    ]
    proto = model(nodes, {"w": WEIGHT}, opset=26, ir=10)
    assert isinstance(refused(tmp_path, proto, "BitCast"), UnsupportedOperatorError)


QUANTIZED = {
    "QuantizeLinear": [
        node("QuantizeLinear", "x s z", "a"), node("DequantizeLinear", "a s z", "y")
    ],
    "ConvInteger": [
        node("DynamicQuantizeLinear", "x", "a b c"), node("ConvInteger", "a k", "d"),
        node("Cast", "d", "y", to=FLOAT),
    ],
    "QLinearSoftmax": [node("QLinearSoftmax", "x", "y", domain="com.microsoft")],
}  # fmt: skip


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_already(tmp_path: Path, name: str) -> None:
    weights = {"s": np.float32(1), "z": np.uint8(0), "k": np.ones((4, 3, 1, 1), np.uint8)}
    arrays = {key: np.asarray(array) for key, array in weights.items()}
    proto = model(QUANTIZED[name], arrays, imports=[("com.microsoft", 1)])
    refused(tmp_path, proto, f"already quantized .*{name}.*give the float model")


def branch(name: str, *nodes: onnx.NodeProto) -> onnx.GraphProto:
    return helper.make_graph(list(nodes), name, [], [value("o", None)])


def test_condition_on_the_image(tmp_path: Path) -> None:
    nodes = [
        node("ReduceMax", "x", "m", keepdims=0),
        node("Constant", "", "zero", value_float=0.0),
        node("Greater", "m zero", "c"),
        node(
            "If", "c", "y", name="choose",
            then_branch=branch("t", node("Relu", "x", "o")),
            else_branch=branch("e", node("Sigmoid", "x", "o")),
        ),
    ]  # fmt: skip
    refused(
        tmp_path, model(nodes), "control flow that does not fold to constants: If 'choose'"
    )


def test_loop(tmp_path: Path) -> None:
    body = helper.make_graph(
        [node("Identity", "c", "c2"), node("Relu", "v", "v2")], "body",
        [value("i", [], TensorProto.INT64), value("c", [], TensorProto.BOOL), value("v", None)],
        [value("c2", [], TensorProto.BOOL), value("v2", None)],
    )  # fmt: skip
    nodes = [node("Loop", "count go x", "y", name="again", body=body)]
    weights = {"count": np.array(3), "go": np.array(True)}
    refused(tmp_path, model(nodes, weights), "Loop 'again'")


@pytest.mark.parametrize("opset", [9, 13, 17])
def test_batch_norm_in_training_mode(tmp_path: Path, opset: int) -> None:
    statistics = {name: np.ones(3, np.float32) for name in "sbmv"}
    if opset < 14:
        bad = node("BatchNormalization", "x s b m v", "y m1 v1 m2 v2", name="bn")
    else:
        bad = node("BatchNormalization", "x s b m v", "y m1 v1", name="bn", training_mode=1)
    refused(tmp_path, model([bad], statistics, opset=opset), "'bn' is in training mode")


def test_dropout_in_training_mode(tmp_path: Path) -> None:
    nodes = [node("Dropout", "x r t", "y", name="drop")]
    weights = {"r": np.array(0.5, np.float32), "t": np.array(True)}
    refused(tmp_path, model(nodes, weights), "node 'drop': Dropout in training mode")


def test_graph_that_breaks_the_standard(tmp_path: Path) -> None:
    refused(tmp_path, model([node("Relu", "nothing", "y")]), "not a valid graph|sorted")
    refused(tmp_path, model([node("Conv", "x", "y")]), "not a valid graph")
    cycle = [node("Add", "x b", "a"), node("Relu", "a", "b"), node("Relu", "b", "y")]
    refused(tmp_path, model(cycle), "not a valid graph|sorted")
    mismatch = model([CONV], {"w": np.ones((4, 5, 1, 1), np.float32)})
    refused(tmp_path, mismatch, "onnxruntime cannot run|differs|valid")


# ------------------------------------------------------------------------- inputs


@pytest.mark.parametrize(
    "bad",
    [
        value("x", (1, 64)),
        value("x", (3, 8, 8)),
        value("x", (1, 3, 4, 8, 8)),
        value("x", (1, 3, 8, 8), TensorProto.UINT8),
        value("x", (1, 3, 8, 8), TensorProto.INT64),
        helper.make_tensor_sequence_value_info("x", FLOAT, (1, 3, 8, 8)),
    ],
)
def test_no_image_input(tmp_path: Path, bad: onnx.ValueInfoProto) -> None:
    proto = model([node("Identity", "x", "y")], inputs=[bad])
    assert refused(tmp_path, proto, "no float input of rank 4").hint


def test_no_input_at_all(tmp_path: Path) -> None:
    proto = model([node("Identity", "c", "y")], {"c": WEIGHT})
    del proto.graph.input[:]
    refused(tmp_path, proto, "no float input of rank 4.*inputs: none")


def test_output_that_is_the_input(tmp_path: Path) -> None:
    proto = model([node("Relu", "x", "y")])
    proto.graph.output.append(proto.graph.input[0])
    error = refused(tmp_path, proto, "output 'x' is the input itself")
    assert "remove" in error.hint


def test_several_inputs(tmp_path: Path) -> None:
    inputs = [value("x", (1, 3, 8, 8)), value("im_info", (1, 2))]
    proto = model([node("Add", "x im_info", "y")], inputs=inputs)
    refused(tmp_path, proto, r"several inputs: x .*\[1,3,8,8\]\), im_info")


def test_free_height_and_width(tmp_path: Path) -> None:
    relu = [node("Relu", "x", "y")]
    proto = model(relu, inputs=[value("x", ("N", 3, "height", None))])
    error = refused(tmp_path, proto, "leaves free: height, axis 3; .*--input-shape")
    assert isinstance(error, DynamicShapeError)
    proto = model(relu, inputs=[value("x", None)])
    error = refused(tmp_path, proto, "leaves free: axis 1, axis 2, axis 3")
    assert isinstance(error, DynamicShapeError)


def test_input_shape_that_contradicts_the_file(tmp_path: Path) -> None:
    proto = model([node("Relu", "x", "y")], inputs=[value("x", (1, 3, "H", "W"))])
    refused(tmp_path, proto, "contradicts", input_shape=(1, 4, 8, 8))
    refused(tmp_path, proto, "contradicts", input_shape=(2, 3, 8, 8))


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 3, 8, 0), (1, 3, 8, -8), ()])
def test_malformed_input_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    error = refused(tmp_path, conv(), "four positive numbers", input_shape=shape)
    assert isinstance(error, SettingsError)


# ------------------------------------------------------------------------- huge tensors


def huge(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    weights = {
        "shape": np.array([1, 3, 2**20, 2**20]),
        "one": np.ones((1, 3, 1, 1), np.float32),
        "many": np.array([1, 1, 2**20, 2**20]),
        "limit": np.array(2**40),
        "zero": np.array(0),
        "step": np.array(1),
    }
    return model([*nodes], weights)


BOMBS: dict[str, Callable[[], onnx.ModelProto]] = {
    "ConstantOfShape": lambda: huge(
        node("ConstantOfShape", "shape", "h"), node("ReduceMax", "h", "m"),
        node("Add", "x m", "y"),
    ),
    "Expand": lambda: huge(
        node("Expand", "one shape", "h"), node("ReduceMax", "h", "m"), node("Add", "x m", "y")
    ),
    "Tile": lambda: huge(
        node("Tile", "one many", "h"), node("ReduceMax", "h", "m"), node("Add", "x m", "y")
    ),
    "Range": lambda: huge(
        node("Range", "zero limit step", "h"), node("ReduceMax", "h", "m"),
        node("Cast", "m", "f", to=FLOAT), node("Add", "x f", "y"),
    ),
    "of the image": lambda: huge(
        node("GlobalAveragePool", "x", "p"), node("Expand", "p shape", "h"),
        node("GlobalMaxPool", "h", "y"),
    ),
    "of its shape": lambda: huge(
        node("Shape", "x", "s"), node("Mul", "s many", "t"),
        node("ConstantOfShape", "t", "h"), node("ReduceMax", "h", "m"), node("Add", "x m", "y"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_small_file_that_asks_for_terabytes(tmp_path: Path, name: str) -> None:
    refused(tmp_path, BOMBS[name](), r"(makes a constant of|would have) \d{13,} elements")


def test_input_shape_of_terabytes(tmp_path: Path) -> None:
    proto = model([node("Relu", "x", "y")], inputs=[value("x", ("N", 3, "H", "W"))])
    refused(tmp_path, proto, "would have .* elements", input_shape=(1, 3, 2**20, 2**20))


def test_sparse_tensor_of_terabytes(tmp_path: Path) -> None:
    sparse = helper.make_sparse_tensor(
        helper.make_tensor("", FLOAT, [1], [2.0]),
        helper.make_tensor("", TensorProto.INT64, [1], [0]),
        [2**20, 2**20],
    )
    nodes = [
        node("Constant", "", "c", sparse_value=sparse),
        node("ReduceMax", "c", "m"),
        node("Add", "x m", "y"),
    ]
    refused(tmp_path, model(nodes), "too large")
