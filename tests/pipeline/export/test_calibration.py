from __future__ import annotations

import json

import numpy as np
import onnx
from PIL import Image

from graph_tools.quantizer import Plan
from pipeline.cli import main
from pipeline.images import open_images


def test_the_folder_holds_what_other_quantizers_want(chain, tmp_path):
    folder = tmp_path / "out"
    assert main(["export", str(chain), "--target", "calibration", "-o", str(folder)]) == 0
    images = open_images(chain.with_suffix("") / "images.npz").load()
    assert np.array_equal(np.load(folder / "images.npy"), images)
    nhwc = np.load(folder / "images_nhwc.npy")
    assert np.array_equal(nhwc.transpose(0, 3, 1, 2), images)
    assert (folder / "model.onnx").read_bytes() == (chain.parent / "net.onnx").read_bytes()
    names = (folder / "images.txt").read_text().split()
    assert len(names) == len(images)
    pixels = np.asarray(Image.open(folder / names[3]), np.float64)
    wanted = np.clip((images[3, 0] * 0.5 + 0.5) * 255, 0, 255)
    assert np.abs(pixels - wanted).max() <= 0.5  # rounded to whole levels
    settings = json.loads((folder / "mnn.json").read_text())
    assert settings["mean"] == [127.5]
    assert settings["used_image_num"] == len(images)
    for page in ("ncnn.md", "mnn.md", "rknn.md", "onnx2tf.md", "hailo.md"):
        assert "not run" in (folder / page).read_text()


def test_scales_are_those_of_the_plan(residual, tmp_path):
    folder = tmp_path / "out"
    words = ["export", str(residual), "--target", "calibration", "-o", str(folder)]
    assert main(words) == 0
    scales = json.loads((folder / "scales.json").read_text())
    plan = Plan.load(residual.with_suffix("") / "plan.json")
    assert scales["model"] == "net.onnx"
    assert set(scales["tensors"]) == set(plan.tensors)
    for name, entry in scales["tensors"].items():
        quantizer = plan.tensors[name]
        assert entry["scale"] == float(quantizer.scale)
        assert (entry["bits"], entry["signed"]) == (quantizer.bits, quantizer.signed)
        assert entry["zero_point"] == 0
    assert set(scales["constants"]) == set(plan.constants)
    for name, entry in scales["constants"].items():
        assert entry["scales"] == plan.constants[name].quantizer.scale.reshape(-1).tolist()
        assert entry["role"] == plan.constants[name].role


def test_another_network_is_not_taken_for_the_float_one(chain, residual, tmp_path, capsys):
    other = residual.parent / "net.onnx"
    words = ["--target", "calibration", "-o", str(tmp_path / "out")]
    assert main(["export", str(chain), *words, "--float-model", str(other)]) == 2
    assert "not the network" in capsys.readouterr().err
    alone = tmp_path / "alone.onnx"
    onnx.save(onnx.load(chain), alone)
    assert main(["export", str(alone), *words]) == 2
    assert "--float-model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
