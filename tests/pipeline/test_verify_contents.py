"""Files that are not as they were written: found, named, exit code 1."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from graph_tools.digests import KEY, find_changes, stamp
from graph_tools.reading import read_proto
from pipeline.cli import main
from tests.pipeline.qdq_builder import residual_network

Damage = Callable[[onnx.ModelProto], set[str]]


def entry(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(e for e in model.graph.initializer if e.name == name)


def halve(model: onnx.ModelProto, name: str) -> set[str]:
    value = np.asarray(numpy_helper.to_array(entry(model, name)) / 2)
    entry(model, name).CopyFrom(numpy_helper.from_array(value, name))
    return {name}


def a_scale(model: onnx.ModelProto) -> set[str]:
    """Of an activation: a power of two as before, read by its Q and its DQ node alike."""
    node = [n for n in model.graph.node if n.op_type == "QuantizeLinear"][1]
    return halve(model, node.input[1])


def a_bias_scale(model: onnx.ModelProto) -> set[str]:
    conv = [n for n in model.graph.node if n.op_type == "Conv"][1]
    bias = next(n for n in model.graph.node if conv.input[2] in n.output)
    return halve(model, bias.input[1])


def a_swapped_weight(model: onnx.ModelProto) -> set[str]:
    """Two weights of one shape change places; the first channel's sign decides."""
    readers = {n.output[0]: n.input[0] for n in model.graph.node}
    shapes: dict[tuple[int, ...], str] = {}
    for node in model.graph.node:
        if node.op_type != "Conv":
            continue
        name = readers[node.input[1]]
        shape = tuple(entry(model, name).dims)
        if shape in shapes:
            first, second = entry(model, shapes[shape]), entry(model, name)
            first.raw_data, second.raw_data = second.raw_data, first.raw_data
            return {shapes[shape], name}
        shapes[shape] = name
    raise AssertionError("no two weights of one shape")


DAMAGES = [a_scale, a_bias_scale, a_swapped_weight]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """A network quantized, once."""
    folder, done = tmp_path_factory.mktemp("written"), {}

    def quantize(source: Path) -> Path:
        if source not in done:
            target = folder / f"{source.stem}.q.onnx"
            options = "--method noise --num-images 4 --verify-images 1 --threads 1 --quiet"
            code = main(["quantize", str(source), "-o", str(target), *options.split()])
            assert code == 0
            done[source] = target
        return done[source]

    return quantize


def verified(model: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict]:
    options = ["--max-images", "2", "--threads", "1", "--json"]
    code = main(["verify", str(model), *options])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("network", ["digits_resnet", "cifar10_resnet20"])
def test_damage_of_real_networks_is_named(
    written, damage: Damage, network: str, digits_models: Path, tmp_path: Path, capsys, request
):
    shipped = digits_models / f"{network}.onnx"
    source = (
        shipped
        if shipped.is_file()
        else request.getfixturevalue("shared_models") / f"{network}.onnx"
    )
    model, _ = read_proto(written(source))
    names = damage(model)
    onnx.save(model, tmp_path / "damaged.onnx")
    code, proof = verified(tmp_path / "damaged.onnx", capsys)
    assert code == 1
    assert set(proof["changes"]["tensors"]) == names
    (text,) = [text for text in proof["failures"] if "since the file was written" in text]
    assert all(name in text for name in names)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_of_a_small_network_is_named(damage: Damage, tmp_path: Path, capsys):
    model = residual_network()
    if damage is a_swapped_weight:  # its convolutions have different shapes
        weight = numpy_helper.to_array(entry(model, "c2_w_q")).copy()
        weight[[0, 1]] = weight[[1, 0]]
        stamp(model)
        entry(model, "c2_w_q").CopyFrom(numpy_helper.from_array(weight, "c2_w_q"))
        names = {"c2_w_q"}
    else:
        stamp(model)
        names = damage(model)
    onnx.save(model, tmp_path / "damaged.onnx")
    code, proof = verified(tmp_path / "damaged.onnx", capsys)
    assert code == 1
    assert set(proof["changes"]["tensors"]) == names


def test_scales_that_do_not_fit_are_found_without_digests(tmp_path: Path, capsys):
    for damage, layer in ((a_scale, "conv_c2"), (a_bias_scale, "conv_c2")):
        model = residual_network()
        damage(model)
        onnx.save(model, tmp_path / "damaged.onnx")
        code, proof = verified(tmp_path / "damaged.onnx", capsys)
        assert code == 1
        assert proof["changes"] is None
        assert any("bias scale" in text and layer in text for text in proof["failures"])


def test_rewired_and_missing_nodes_are_named():
    model = residual_network()
    stamp(model)
    assert find_changes(model).to_dict() == {"tensors": [], "nodes": [], "missing": []}
    relu = next(n for n in model.graph.node if n.name == "relu_r1")
    relu.op_type = "LeakyRelu"
    pool = next(n for n in model.graph.node if n.op_type == "MaxPool")
    pool.attribute[0].ints[0] = 3
    model.graph.initializer.remove(entry(model, "c2_b_q"))
    found = find_changes(model)
    assert set(found.nodes) == {"relu_r1", "maxpool_m1"}
    assert found.missing == ("c2_b_q",)


def test_a_file_without_digests_passes_with_a_note(tmp_path: Path, capsys):
    onnx.save(residual_network(), tmp_path / "plain.onnx")
    code = main(
        ["verify", str(tmp_path / "plain.onnx"), "--max-images", "2", "--threads", "1"]
    )
    assert code == 0
    assert "the file has no digests" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "nonsense", "[]", '{"tensors": 3, "nodes": {}}'])
def test_digests_that_cannot_be_read_are_none(text: str):
    model = residual_network()
    model.metadata_props.add(key=KEY, value=text)
    assert find_changes(model) is None


@pytest.mark.parametrize("dtype", [ml_dtypes.int4, ml_dtypes.uint4, np.int16, np.float32])
def test_a_single_value_of_any_type_is_seen(dtype, tmp_path: Path):
    model = residual_network()
    values = np.arange(6).astype(dtype)
    model.graph.initializer.append(numpy_helper.from_array(values, "more"))
    stamp(model)
    onnx.save(model, tmp_path / "m.onnx")
    model = read_proto(tmp_path / "m.onnx")[0]
    assert find_changes(model).tensors == ()
    values[5] = np.asarray(4).astype(dtype)
    entry(model, "more").CopyFrom(numpy_helper.from_array(values, "more"))
    assert find_changes(model).tensors == ("more",)


def test_digests_are_written_once_and_survive_a_file(tmp_path: Path):
    model = residual_network()
    stamp(model)
    stamp(model)
    assert [e.key for e in model.metadata_props] == [KEY]
    onnx.save(model, tmp_path / "m.onnx")
    assert not any(find_changes(read_proto(tmp_path / "m.onnx")[0]).to_dict().values())
