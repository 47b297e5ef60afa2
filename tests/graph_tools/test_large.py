"""Weights beyond protobuf's limit, here with the limit brought down, and deep graphs."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from graph_tools import weights
from graph_tools.batchnorm import fold_batch_norms
from graph_tools.equivalence import run_model
from graph_tools.errors import ModelError, ZsqError
from graph_tools.model import initializers, load, save
from graph_tools.prepare import prepare_for_quantization
from graph_tools.restore import restore_batch_norms
from graph_tools.saving import data_file
from graph_tools.side_file import read_side_file
from graph_tools.torch_graph import TorchGraph
from pipeline.cli import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def networks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("large", ROOT / "benchmarks" / "large.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def little_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat some kilobytes of weights as more than fits."""
    monkeypatch.setattr(weights, "MAX_INLINE", 4096)
    monkeypatch.setattr(weights, "SMALL", 256)


@pytest.fixture
def wide(tmp_path: Path, networks: ModuleType) -> Path:
    path = tmp_path / "wide.onnx"
    networks.wide_network(path, 64, 3)
    return path


def with_batch_norm(tmp_path: Path, dtype: type[np.floating]) -> Path:
    """Conv, BatchNormalization, MatMul with a matrix computed from weights; external data."""
    rng = np.random.default_rng(1)
    arrays = {
        "w": rng.normal(size=(16, 3, 3, 3)).astype(dtype),
        "g": rng.uniform(0.5, 1, 16).astype(dtype),
        "b": rng.normal(size=16).astype(dtype),
        "m": rng.normal(size=16).astype(dtype),
        "v": rng.uniform(0.5, 1, 16).astype(dtype),
        "fc": rng.normal(size=(16, 100)).astype(dtype),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], "conv"),
        helper.make_node("BatchNormalization", ["c", "g", "b", "m", "v"], ["n"], "bn"),
        helper.make_node("GlobalAveragePool", ["n"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flat"),
        helper.make_node("Gemm", ["f", "fc"], ["y"], "gemm", alpha=0.5),
    ]
    elem_type = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", elem_type, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("y", elem_type, ["N", 100])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 12)], ir_version=7)
    path = tmp_path / "norm.onnx"
    onnx.save(model, path, save_as_external_data=True, location="norm.bin", size_threshold=0)
    return path


def test_the_same_network_comes_out_whether_its_weights_are_inside_or_not(
    wide, monkeypatch, run_onnx
):
    inside = load(wide)
    assert weights.stored_bytes(inside.proto)[1] == 0
    monkeypatch.setattr(weights, "MAX_INLINE", 4096)
    monkeypatch.setattr(weights, "SMALL", 256)
    outside = load(wide)
    assert weights.stored_bytes(outside.proto)[1] == 3 * 64 * 64 * 4
    first, second = initializers(inside.proto), initializers(outside.proto)
    assert first.keys() == second.keys()
    for name, values in first.items():
        np.testing.assert_array_equal(values, second[name])
    image = np.random.default_rng(0).normal(size=(2, 3, 2, 2)).astype(np.float32)
    expected = run_onnx(inside.proto, image)[0]
    np.testing.assert_array_equal(run_model(outside.proto, {"x": image})[0], expected)


@pytest.mark.usefixtures("little_inside")
def test_torch_and_all_arrays_share_one_mapping(wide):
    model = load(wide)
    tensor = next(t for t in model.proto.graph.initializer if t.name == "w1")
    values, again = weights.values_of(tensor), weights.values_of(tensor)
    assert np.shares_memory(values, again)
    graph = TorchGraph(model.proto)
    assert graph.constants["w1"].data_ptr() == values.ctypes.data
    assert not values.flags.writeable


@pytest.mark.usefixtures("little_inside")
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_old_opsets_and_other_types_load_fold_and_prepare(tmp_path, dtype):
    path = with_batch_norm(tmp_path, dtype)
    image = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(dtype)
    expected = run_model(onnx.load(path), {"x": image})[0].astype(np.float64)
    model = load(path)
    tolerance = 3e-2 if dtype is np.float16 else 1e-5  # half precision sums in half
    for network in (model, fold_batch_norms(model), prepare_for_quantization(model)):
        assert weights.stored_bytes(network.proto)[1] >= 16 * 100 * 4
        actual = run_model(network.proto, {"x": image.astype(np.float32)})[0]
        np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)
        run = TorchGraph(network.proto)(torch.from_numpy(image.astype(np.float32)))["y"]
        np.testing.assert_allclose(run, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("little_inside")
def test_constants_computed_from_weights_outside_are_folded(tmp_path, run_onnx):
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]>'
        "g (float[N,3,8,8] x) => (float[N,20] y) { f = Flatten(x) t = Transpose(w)"
        " s = Mul(t, half) y = MatMul(f, s) }"
    )
    w = np.random.default_rng(0).normal(size=(20, 192)).astype(np.float32)
    for name, array in (("w", w), ("half", np.array(0.5, np.float32))):
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    whole = onnx.ModelProto()
    whole.CopyFrom(proto)
    path = tmp_path / "m.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="m.bin", size_threshold=256)
    model = load(path)
    assert [node.op_type for node in model.proto.graph.node] == ["Flatten", "MatMul"]
    assert weights.stored_bytes(model.proto)[1] == w.nbytes
    image = np.random.default_rng(1).normal(size=(2, 3, 8, 8)).astype(np.float32)
    actual = run_model(model.proto, {"x": image})[0]
    np.testing.assert_allclose(actual, run_onnx(whole, image)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("little_inside")
def test_rows_outside_that_are_joined_to_each_image_follow_the_batch(tmp_path):
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]>'
        "g (float[1,3,8,8] x) => (float[1,20,4] y) {"
        " f = Flatten(x) r = Reshape(f, shape) j = Concat<axis = 1>(tokens, r)"
        " y = MatMul(j, w) }"
    )
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(1, 14, 32)).astype(np.float32)
    arrays = {
        "tokens": tokens,
        "w": rng.normal(size=(32, 4)).astype(np.float32),
        "shape": np.array([1, 6, 32]),
        "unused": np.zeros(2048, np.float32),
    }
    for name, array in arrays.items():
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    path = tmp_path / "m.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="m.bin", size_threshold=256)
    model = load(path)
    assert model.fixed_batch is None
    images = rng.normal(size=(3, 3, 8, 8)).astype(np.float32)
    joined = np.concatenate([np.repeat(tokens, 3, 0), images.reshape(3, 6, 32)], axis=1)
    actual = run_model(model.proto, {"x": images})[0]
    np.testing.assert_allclose(actual, joined @ arrays["w"], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("little_inside")
def test_statistics_come_back_to_weights_outside(tmp_path):
    kept = load(with_batch_norm(tmp_path, np.float32))
    folded = fold_batch_norms(kept)
    restored = restore_batch_norms(folded, read_side_file(kept.source)).model
    for model in (folded, restored):
        inside, outside = weights.stored_bytes(model.proto)
        assert inside < 2048
        assert outside >= (16 * 100 + 16 * 27) * 4
    image = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
    expected = run_model(kept.proto, {"x": image})[0]
    actual = run_model(restored.proto, {"x": image})[0]
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("little_inside")
def test_a_large_file_is_quantized_and_proved(wide, capsys):
    options = ["--method", "noise", "--num-images", "2", "--mean", "0", "--std", "1"]
    assert main(["quantize", str(wide), *options, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    written = wide.with_name("wide.w8a8.onnx")
    assert report["proof"]["passed"]
    assert report["proof"]["kernels"]["integer_kernels"]["QLinearConv"] == 4
    files = [written, data_file(written)]
    assert report["quantization"]["bytes"]["quantized"] == sum(f.stat().st_size for f in files)
    assert files[1].stat().st_size > 3 * 64 * 64
    assert sorted(p.name for p in wide.parent.glob(".*")) == []
    assert not list(wide.with_name("wide.w8a8").glob("*.data"))
    capsys.readouterr()
    assert main(["verify", str(written), "--json"]) == 0
    assert main(["expose", str(wide), "-o", str(wide.with_name("e.onnx"))]) == 2  # no BN


@pytest.mark.usefixtures("little_inside")
def test_what_is_saved_with_external_data_is_read_back(wide, tmp_path):
    model = load(wide)
    target = tmp_path / "out" / "saved.onnx"
    target.parent.mkdir()
    save(model.proto, target)
    assert sorted(p.name for p in target.parent.iterdir()) == [
        "saved.onnx",
        "saved.onnx.data",
    ]
    assert target.stat().st_size < 4096
    for tensor in onnx.load(target, load_external_data=False).graph.initializer:
        for entry in tensor.external_data:
            assert entry.value in ("saved.onnx.data",) or entry.key != "location"
            assert entry.key != "offset" or int(entry.value) % 4096 == 0
    read = initializers(onnx.load(target))  # by onnx itself
    for name, values in initializers(model.proto).items():
        np.testing.assert_array_equal(values, read[name])
    assert load(target).notes == ()


def test_what_fits_is_saved_as_one_file(wide, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "MAX_INLINE", 4096)
    monkeypatch.setattr(weights, "SMALL", 256)
    model = load(wide)
    monkeypatch.setattr(weights, "MAX_INLINE", 2**30)
    save(model.proto, tmp_path / "one.onnx")
    assert not data_file(tmp_path / "one.onnx").exists()
    (tmp_path / "wide.bin").unlink()
    assert onnx.load(tmp_path / "one.onnx").graph.initializer[1].raw_data


@pytest.mark.usefixtures("little_inside")
def test_nothing_is_left_when_saving_fails(wide, tmp_path, monkeypatch):
    model = load(wide)
    folder = tmp_path / "out"
    folder.mkdir()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(ZsqError, match="No space left"):
        save(model.proto, folder / "a.onnx")
    assert list(folder.iterdir()) == []


@pytest.mark.usefixtures("little_inside")
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("location", "../wide.bin", "outside the model's folder"),
        ("location", "/etc/passwd", "outside the model's folder"),
        ("location", "absent.bin", "is missing"),
        ("offset", "40000", "ends early"),
        ("length", "400", "does not fit its shape"),
        ("offset", "x", "malformed offset"),
    ],
)
def test_bad_external_data_is_one_line(wide, key, value, message):
    proto = onnx.load(wide, load_external_data=False)
    for entry in proto.graph.initializer[1].external_data:
        if entry.key == key:
            entry.value = value
    wide.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match=message) as caught:
        load(wide)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("little_inside")
def test_a_link_that_leaves_the_folder_is_refused(wide, tmp_path):
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "wide.onnx").write_bytes(wide.read_bytes())
    (inner / "wide.bin").symlink_to(tmp_path / "wide.bin")
    with pytest.raises(ModelError, match="link that leaves"):
        load(inner / "wide.onnx")


@pytest.mark.usefixtures("little_inside")
def test_damaged_weights_outside_are_found(wide):
    data = bytearray(wide.with_suffix(".bin").read_bytes())
    data[64 * 64 * 4 + 8 : 64 * 64 * 4 + 12] = np.float32(np.nan).tobytes()
    wide.with_suffix(".bin").write_bytes(data)
    with pytest.raises(ModelError, match="tensor 'w1' holds 1 NaN"):
        load(wide)


def test_the_work_does_not_grow_with_the_depth(tmp_path, networks, monkeypatch):
    """Passes over the graph, not seconds: as many for 400 nodes as for 80."""
    counts = []
    for num_nodes in (80, 400):
        calls = 0
        original = onnx.shape_inference.infer_shapes

        def counted(*args: object, _original=original, **options: object) -> onnx.ModelProto:
            nonlocal calls
            calls += 1
            return _original(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr("onnx.shape_inference.infer_shapes", counted)
            networks.deep_network(tmp_path / "deep.onnx", num_nodes)
            model = load(tmp_path / "deep.onnx")
        assert not {n.op_type for n in model.proto.graph.node} & {"Shape", "Gather", "Concat"}
        counts.append(calls)
    assert counts[0] == counts[1] > 0


@pytest.mark.slow
def test_2_gib_of_weights_are_held_once(tmp_path, networks):
    path = tmp_path / "wide.onnx"
    size = networks.wide_network(path, 8192, 9)
    assert size > 2**31
    script = ROOT / "benchmarks" / "large.py"
    done = subprocess.run(
        [sys.executable, script, "--measure", "load", "--path", path],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert json.loads(done.stdout.splitlines()[-1])["peak"] <= 1.3 * size
