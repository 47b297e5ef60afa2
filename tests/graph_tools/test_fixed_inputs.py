"""Inputs other than the image become constants: the same outputs as when they are fed."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from graph_tools.errors import ModelError, SettingsError
from graph_tools.fixed_inputs import read_input
from graph_tools.model import load
from graph_tools.torch_graph import TorchGraph
from pipeline.cli import main

HEAD = '<ir_version: 8, opset_import: ["" : 17]>'
TWO = (
    HEAD + "g (float[N,3,8,8] x, float[N,2] info, float[1] factor) => (float[N,6] y) {"
    " c = Conv(x, w) s = GlobalAveragePool(c) f = Flatten(s)"
    " j = Concat<axis = 1>(f, info) y = Mul(j, factor) }"
)


@pytest.fixture
def two_inputs(tmp_path: Path) -> Path:
    proto = onnx.parser.parse_model(TWO)
    w = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    path = tmp_path / "two.onnx"
    onnx.save(proto, path)
    return path


INFO = np.array([[0.5, -2]], np.float32)
FACTOR = np.array([3], np.float32)


@pytest.mark.parametrize("count", [1, 3])
def test_fixed_inputs_give_what_feeding_them_gives(two_inputs, run_onnx, count):
    model = load(two_inputs, inputs={"info": INFO, "factor": FACTOR})
    assert (model.input.name, model.fixed_batch) == ("x", None)
    assert "input(s) fixed to the arrays given: info [1,2], factor [1]" in model.notes
    assert [value.name for value in model.proto.graph.input] == ["x"]
    x = np.random.default_rng(1).normal(size=(count, 3, 8, 8)).astype(np.float32)
    feeds = {"x": x, "info": np.repeat(INFO, count, axis=0), "factor": FACTOR}
    expected = ort.InferenceSession(two_inputs).run(None, feeds)[0]
    np.testing.assert_allclose(run_onnx(model.proto, x)[0], expected, rtol=1e-5)
    np.testing.assert_allclose(
        TorchGraph(model.proto)(torch.from_numpy(x))["y"], expected, rtol=1e-5
    )


def test_the_oldest_opset_repeats_rows_for_each_image(two_inputs, run_onnx):
    proto = onnx.load(two_inputs)
    proto.ir_version, proto.opset_import[0].version = 3, 7  # Expand came with opset 8
    proto.graph.input.add(name="w").CopyFrom(
        onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [4, 3, 3, 3])
    )
    onnx.save(proto, two_inputs)
    model = load(two_inputs, inputs={"info": INFO, "factor": FACTOR})
    assert model.fixed_batch is None
    x = np.random.default_rng(1).normal(size=(3, 3, 8, 8)).astype(np.float32)
    feeds = {"x": x, "info": np.repeat(INFO, 3, axis=0), "factor": FACTOR}
    expected = ort.InferenceSession(two_inputs).run(None, feeds)[0]
    np.testing.assert_allclose(run_onnx(model.proto, x)[0], expected, rtol=1e-5)


def test_several_inputs_name_the_options(two_inputs):
    with pytest.raises(ModelError) as caught:
        load(two_inputs)
    text = str(caught.value)
    assert "x (float [N,3,8,8]), info (float [N,2]), factor (float [1])" in text
    assert "--input info=info.npy --input factor=factor.npy" in text
    assert "--input x" not in text


def test_two_images_are_said_to_be_ambiguous(tmp_path):
    text = "g (float[1,3,8,8] a, float[1,3,8,8] b) => (float[1,3,8,8] y) { y = Add(a, b) }"
    onnx.save(onnx.parser.parse_model(HEAD + text), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"image is not clear \(a or b\)"):
        load(tmp_path / "m.onnx")
    model = load(tmp_path / "m.onnx", inputs={"a": np.ones((1, 3, 8, 8), np.float32)})
    assert model.input.name == "b"


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"inof": INFO}, "no input 'inof'.*its inputs are x, info, factor"),
        ({"info": INFO[:, :1], "factor": FACTOR}, r"the array is \[1,1\], the input \[N,2\]"),
        ({"info": INFO[0], "factor": FACTOR}, r"the array is \[2\], the input \[N,2\]"),
        ({"info": INFO.astype(np.int64), "factor": FACTOR}, "is int64, the input float"),
        ({"info": INFO * np.nan, "factor": FACTOR}, "the array holds 2 NaN"),
        (
            {"x": np.ones((1, 3, 8, 8), np.float32), "info": INFO, "factor": FACTOR},
            "none is left for the image",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_one_line(two_inputs, arrays, message):
    with pytest.raises(SettingsError, match=message) as caught:
        load(two_inputs, inputs=arrays)
    assert "\n" not in str(caught.value)


def test_integers_are_converted_when_they_fit(tmp_path):
    text = "g (float[N,3,8,8] x, int32[1] i) => (float[N,3,8,8] y)"
    text += " { f = Cast<to = 1>(i) y = Mul(x, f) }"
    onnx.save(onnx.parser.parse_model(HEAD + text), tmp_path / "m.onnx")
    assert load(tmp_path / "m.onnx", inputs={"i": np.array([7])}).input.name == "x"
    with pytest.raises(SettingsError, match="does not fit in int32"):
        load(tmp_path / "m.onnx", inputs={"i": np.array([2**40])})


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("it was unpickled",))


def test_files_that_are_no_arrays_are_refused(tmp_path):
    np.save(tmp_path / "pickled.npy", np.array([Bomb()], object), allow_pickle=True)
    (tmp_path / "raw.npy").write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "empty.npy").write_bytes(b"")
    np.savez(tmp_path / "archive.npy.npz", a=INFO)
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999,), }"
    start = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little")
    (tmp_path / "short.npy").write_bytes(start + header)
    for name in ("pickled.npy", "raw.npy", "empty.npy", "archive.npy.npz", "short.npy"):
        with pytest.raises(SettingsError, match=r"not an \.npy file of numbers"):
            read_input(tmp_path / name)
    with pytest.raises(SettingsError, match="no such file"):
        read_input(tmp_path / "absent.npy")


def test_the_command_line_takes_the_option(two_inputs, tmp_path, capsys):
    np.save(tmp_path / "info.npy", INFO)
    np.save(tmp_path / "factor.npy", FACTOR)
    given = [f"--input=info={tmp_path / 'info.npy'}", f"--input=factor={tmp_path}/factor.npy"]
    noise = ["--method", "noise", "--num-images", "4", "--mean", "0", "--std", "1"]
    assert main(["inspect", str(two_inputs), *given, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["input"]["name"] == "x"
    assert main(["quantize", str(two_inputs), *given, *noise, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert any("fixed to the arrays" in note for note in report["model"]["notes"])
    assert report["settings"]["input"] == ["info", "factor"]
    written = onnx.load(two_inputs.with_suffix(".w8a8.onnx"))
    assert [value.name for value in written.graph.input] == ["x"]
    assert str(tmp_path) not in str(written.metadata_props)
    data = tmp_path / "data.npz"
    images = np.random.default_rng(0).integers(0, 255, (6, 8, 8, 3), np.uint8)
    np.savez(data, images=images, labels=np.arange(6) % 6)
    models = [str(two_inputs), str(two_inputs.with_suffix(".w8a8.onnx"))]
    options = ["--data", str(data), *given, "--mean", "0", "--std", "1", "--json"]
    assert main(["evaluate", *models, *options]) == 0
    assert [m["count"] for m in json.loads(capsys.readouterr().out)["models"]] == [6, 6]
    assert main(["inspect", str(two_inputs), "--input", "info"]) == 2
    assert "NAME=FILE.npy" in capsys.readouterr().err
