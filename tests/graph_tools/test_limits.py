"""What a small file may ask of the machine: memory, arithmetic, nodes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graph_tools import limits, reading
from graph_tools.errors import ModelError, ZsqError
from graph_tools.limits import check_file_cost, check_num_nodes, within_memory
from graph_tools.model import load
from graph_tools.reading import read_outline, read_proto

FLOAT = TensorProto.FLOAT


def value(name: str, shape: Sequence[int | str] | None, kind: int = FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def model(nodes, weights=None, *, shape=("N", 3, 8, 8)) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "net",
        [value("x", shape)],
        [value("y", None)],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in (weights or {}).items()],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


def node(op: str, inputs: str, outputs: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), outputs.split(), **attributes)


def refused(tmp_path: Path, proto: onnx.ModelProto, text: str) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(proto.SerializeToString())
    assert path.stat().st_size < 20_000
    with pytest.raises(ModelError, match=text):
        load(path)


def function(name: str, *calls: tuple[str, str, str]) -> onnx.FunctionProto:
    body = [helper.make_node(op, [a], [b], domain="local") for op, a, b in calls]
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    return helper.make_function("local", name, ["a"], ["b"], body, imports)


def doubling(levels: int) -> onnx.ModelProto:
    proto = model([helper.make_node(f"F{levels}", ["x"], ["y"], domain="local")])
    first = function("F0")
    first.node.append(node("Relu", "a", "b"))
    proto.functions.append(first)
    for level in range(1, levels + 1):
        inner = f"F{level - 1}"
        proto.functions.append(function(f"F{level}", (inner, "a", "c"), (inner, "c", "b")))
    return proto


def test_functions_that_call_each_other_twice(tmp_path: Path) -> None:
    check_num_nodes(doubling(18), where="")  # 2**18 nodes
    refused(tmp_path, doubling(30), "has 1073741824 nodes when its functions are written out")


def test_functions_that_call_themselves(tmp_path: Path) -> None:
    proto = model([helper.make_node("F", ["x"], ["y"], domain="local")])
    proto.functions.append(function("F", ("G", "a", "b")))
    proto.functions.append(function("G", ("F", "a", "b")))
    refused(tmp_path, proto, "local function '[FG]' calls itself")


def test_long_chain_of_functions() -> None:
    proto = model([helper.make_node("F2000", ["x"], ["y"], domain="local")])
    proto.functions.extend(function(f"F{i}", (f"F{i - 1}", "a", "b")) for i in range(2001))
    check_num_nodes(proto, where="")


def test_many_constants_of_a_permitted_size(tmp_path: Path) -> None:
    nodes = [node("ConstantOfShape", "s", f"c{i}") for i in range(5)]
    nodes.append(node("Sum", " ".join(f"c{i}" for i in range(5)), "sum"))
    nodes += [node("ReduceMax", "sum", "m", keepdims=0), node("Add", "x m", "y")]
    refused(tmp_path, model(nodes, {"s": np.array([2**26])}), "its constants, computed, would")


def test_endless_loop_behind_a_constant_condition(tmp_path: Path) -> None:
    body = helper.make_graph(
        [node("Identity", "c", "c2"), node("Add", "v v", "v2")], "body",
        [value("i", [], TensorProto.INT64), value("c", [], TensorProto.BOOL), value("v", [1])],
        [value("c2", [], TensorProto.BOOL), value("v2", [1])],
    )  # fmt: skip
    loop = node("Loop", "count go one", "o", name="again", body=body)
    branches = {
        name: helper.make_graph([inner], name, [], [value("o", [1])])
        for name, inner in (
            ("then_branch", loop),
            ("else_branch", node("Identity", "one", "o")),
        )
    }
    weights = {"go": np.array(True), "count": np.array(2**60), "one": np.ones(1, np.float32)}
    nodes = [node("If", "go", "q", name="choose", **branches), node("Add", "x q", "y")]
    refused(tmp_path, model(nodes, weights), "control flow that does not fold .*again")


def test_convolution_that_takes_years(tmp_path: Path) -> None:
    nodes = [node("ConstantOfShape", "s", "w"), node("Conv", "x w", "y", pads=[4000] * 4)]
    proto = model(nodes, {"s": np.array([1, 1, 8001, 8001])}, shape=(1, 1, 4096, 4096))
    with pytest.raises(ModelError, match=r"one run takes more than 1\.8e\+13 multiplications"):
        check_file_cost(proto, where="f")
    pool = node("MaxPool", "x", "y", kernel_shape=[8191] * 2, pads=[4095] * 4)
    refused(tmp_path, model([pool], shape=(1, 1, 4096, 4096)), "multiplications")


@pytest.mark.parametrize("operator", ["MatMul", "Gemm", "turned"])
def test_products_of_long_matrices_are_no_more_than_they_are(operator: str) -> None:
    """Many tokens of few channels, as in a transformer for detection."""
    shape = (64, 2**19) if operator == "turned" else (2**19, 64)
    op = "MatMul" if operator == "MatMul" else "Gemm"
    turn = {"transA": 1} if operator == "turned" else {}
    steps = [node(op, "x w", "a", **turn), node("Relu", "a", "y")]
    proto = model(steps, {"w": np.zeros((64, 256), np.float32)}, shape=shape)
    check_file_cost(proto, where="f")  # 8.6e9 multiplications


def test_tensors_that_are_alive_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "available_bytes", lambda: 100_000)
    nodes = [node("Relu", "x", "a0")]
    nodes += [node("Relu", f"a{i}", f"a{i + 1}") for i in range(30)]
    chain = [*nodes, node("Relu", "a30", "y")]
    shape = (1, 10, 25, 25)  # 25,000 bytes each
    check_file_cost(model(chain, shape=shape), where="f")  # two at a time
    kept = [*nodes, node("Sum", " ".join(f"a{i}" for i in range(31)), "y")]
    refused(tmp_path, model(kept, shape=shape), "the tensors at node .* would take 0.0 GiB")


def test_tensor_larger_than_the_memory(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(limits, "available_bytes", lambda: 2**20)
    refused(
        tmp_path, model([node("Relu", "x", "y")], shape=(1, 3, 500, 500)), "GiB can be used"
    )


def test_memory_that_runs_out_is_one_of_our_errors() -> None:
    import torch

    with (
        pytest.raises(ZsqError, match="f: needs more memory than there is"),
        within_memory("f"),
    ):
        np.empty(2**60, np.uint8)
    with pytest.raises(ZsqError, match="needs more memory"), within_memory("f"):
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="other"), within_memory("f"):
        raise RuntimeError("other")


# ------------------------------------------------------------------------- external data


def external(location: str, *, constants: int = 0) -> onnx.ModelProto:
    tensor = TensorProto(name="w", data_type=FLOAT, dims=[4, 3, 1, 1])
    tensor.data_location = TensorProto.EXTERNAL
    for key, entry in (("location", location), ("offset", "0"), ("length", "48")):
        tensor.external_data.add(key=key, value=entry)
    nodes = [node("Conv", "x w", "y")]
    nodes += [node("Constant", "", f"c{i}", value=tensor) for i in range(constants)]
    proto = model(nodes)
    proto.graph.initializer.append(tensor)
    return proto


@pytest.mark.parametrize("reader", [read_proto, read_outline])
@pytest.mark.parametrize(
    ("location", "text"),
    [
        ("circle", "cannot be found|is missing"),
        ("circle/data.bin", "cannot be found|is missing"),
        ("n" * 5000, "cannot be found|is missing"),
        ("up/secret.bin", "is a link that leaves"),
        ("in/../../secret.bin", "lies outside"),
        ("in/up/model/in/up/secret.bin", "is a link that leaves"),
        ("pipe", "is missing"),
        ("in", "is missing"),
    ],
)
def test_places_that_are_no_files_of_the_folder(
    tmp_path: Path, location, text, reader
) -> None:
    import os

    folder = tmp_path / "model"
    (folder / "in").mkdir(parents=True)
    (tmp_path / "secret.bin").write_bytes(bytes(48))
    (folder / "circle").symlink_to(folder / "circle")
    (folder / "up").symlink_to(tmp_path)
    (folder / "in" / "up").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe")
    path = folder / "bad.onnx"
    path.write_bytes(external(location).SerializeToString())
    with pytest.raises(ModelError, match=text):
        reader(path)


def test_link_that_stays_in_the_folder_is_left_to_onnx(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "real.bin").write_bytes(np.arange(12, dtype=np.float32).tobytes())
    (tmp_path / "w.bin").symlink_to("data/real.bin")
    path = tmp_path / "good.onnx"
    path.write_bytes(external("w.bin").SerializeToString())
    with pytest.raises(ModelError, match="it is a symbolic link"):
        read_proto(path)
    assert read_outline(path).graph.initializer[0].data_location == TensorProto.EXTERNAL


def test_many_tensors_that_name_the_same_bytes(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(48))
    path = tmp_path / "bad.onnx"
    path.write_bytes(external("w.bin", constants=50).SerializeToString())
    read_proto(path)
    monkeypatch.setattr(reading, "MAX_BYTES", path.stat().st_size + 30 * 48)
    with pytest.raises(ModelError, match="external data that cannot stay outside exceeds"):
        read_proto(path)


def test_a_location_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(external("w.bin").SerializeToString().replace(b"w.bin", b"w\xff\xfein"))
    with pytest.raises(ModelError, match="a name in it is not text"):
        read_proto(path)


def test_a_device_is_not_read() -> None:
    with pytest.raises(ModelError, match="is not a regular file"):
        load("/dev/zero")
