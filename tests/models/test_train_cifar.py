from __future__ import annotations

import importlib
import io
import json
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

from pipeline.evaluate.classification import evaluate_classification
from pipeline.evaluate.datasets import open_dataset
from pipeline.preprocessing import Preprocessing

MODELS = Path(__file__).resolve().parents[2] / "models"
SHIPPED = MODELS / "cifar10_mobilenetv2.onnx"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(MODELS))
        module = importlib.import_module("train_cifar")
        patch.setattr(module, "BATCH_SIZE", 32)
        yield module
    for name in ("train_cifar", "train_digits", "architectures"):
        sys.modules.pop(name, None)
    torch.set_num_threads(threads)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A zip of 4 x 64 pictures of noise, two classes brighter than the others."""
    rng = np.random.default_rng(0)
    path = tmp_path / "pictures.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for label, name in enumerate(("ant", "bee", "cow", "dog")):
            for number in range(64):
                pixels = rng.integers(0, 60, (32, 32, 3)) + 60 * label
                file = io.BytesIO()
                Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG")
                archive.writestr(f"{name}/{number:04}.jpg", file.getvalue())
    return path


def test_the_shipped_file_keeps_its_batch_normalization() -> None:
    model = onnx.load(SHIPPED)
    operators = Counter(node.op_type for node in model.graph.node)
    assert (operators["Conv"], operators["BatchNormalization"]) == (26, 26)
    assert (operators["Clip"], operators["Add"], operators["Gemm"]) == (18, 5, 1)
    groups = [
        attribute.i
        for node in model.graph.node
        for attribute in node.attribute
        if attribute.name == "group"
    ]
    assert sum(group > 1 for group in groups) == 8  # depthwise
    assert model.opset_import[0].version == 17
    assert SHIPPED.stat().st_size < 2_000_000
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata["preprocessing"])["mean"] == [0.485, 0.456, 0.406]


def test_the_shipped_file_is_as_accurate_as_it_says(shared_data: Path) -> None:
    metadata = {e.key: e.value for e in onnx.load(SHIPPED).metadata_props}
    given = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    test = open_dataset(shared_data / "cifar10_test_dev.zip")
    (accuracy,) = evaluate_classification([SHIPPED], test, given)
    assert accuracy.top1 >= 80
    # Sums in another order may turn one or two of 5,000 decisions.
    assert accuracy.top1 == pytest.approx(float(metadata["top1_test"].split()[0]), abs=0.1)


def test_a_stopped_training_ends_like_one_that_was_not(
    script: ModuleType, pictures: Path, tmp_path: Path
) -> None:
    read = script.read_pictures(pictures)
    assert read.images.shape == (256, 32, 32, 3)
    assert np.array_equal(read.labels, np.repeat(np.arange(4), 64))
    assert [round(read.images[read.labels == i].mean(), -1) for i in range(4)] == [
        30,
        90,
        150,
        210,
    ]

    def trained(checkpoint: Path, stop: bool) -> torch.nn.Module:
        torch.manual_seed(0)
        network = script.CifarMobileNet()
        if stop:  # a run that dies in its second epoch
            save, calls = script._save, []

            def failing(*arguments: object) -> None:
                calls.append(arguments)
                if len(calls) == 2:
                    raise KeyboardInterrupt
                save(*arguments)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(script, "_save", failing)
                with pytest.raises(KeyboardInterrupt):
                    script.train(network, read, epochs=2, seed=1, checkpoint=checkpoint)
            network = script.CifarMobileNet()
        script.train(network, read, epochs=2, seed=1, checkpoint=checkpoint)
        return network

    whole = trained(tmp_path / "whole.pt", False).state_dict()
    resumed = trained(tmp_path / "resumed.pt", True).state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_script_writes_what_it_trained(
    script: ModuleType, pictures: Path, tmp_path: Path
) -> None:
    output = tmp_path / "net.onnx"
    script.main([str(pictures), str(pictures), "-o", str(output), "--epochs", "1"])
    network = script.CifarMobileNet()
    state = torch.load(tmp_path / "net.pt", weights_only=True)
    network.load_state_dict(state["network"])
    network.eval()
    images = np.random.default_rng(1).normal(size=(3, 3, 32, 32)).astype(np.float32)
    session = onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"image": images})
    with torch.no_grad():
        expected = network(torch.from_numpy(images)).numpy()
    # float32 sums in another order
    assert np.allclose(logits, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
