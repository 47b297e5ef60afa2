"""Detection from picture files to mAP; the networks hand their input on, or a shade of it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from PIL import Image

from graph_tools.errors import DataError, SettingsError
from pipeline.cli import main
from pipeline.evaluate.box_datasets import open_box_dataset
from pipeline.evaluate.decoders import load_decoder
from pipeline.evaluate.detection import detect, evaluate_detection
from pipeline.evaluate.task import open_evaluation
from pipeline.preprocessing import Preprocessing

UNIT = Preprocessing(mean=(0.0,), std=(1.0,))
# Finds the one bright rectangle in each image: class 0 if it is red, 1 if it is green.
HOOK = """
import numpy as np

def decode(outputs, height, width):
    boxes, scores = [], []
    for image in outputs["y"]:
        rows, columns = np.nonzero(image.max(axis=0) > 0.5)
        boxes.append([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]])
        scores.append([image[:2, rows[0], columns[0]]])
    return np.array(boxes), np.array(scores)
"""
BLOCKS = ((0, (4, 8, 20, 28)), (1, (0, 0, 12, 40)), (0, (8, 4, 40, 36)))


def network(path: Path, gain: float = 1.0, batch: int | str = "N") -> Path:
    """A 1x1 convolution that scales the image."""
    weight = (gain * np.eye(3)).astype(np.float32).reshape(3, 3, 1, 1)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", 1, [batch, 3, 20, 20])],
        [helper.make_tensor_value_info("y", 1, [batch, 3, 20, 20])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """40x40 pictures of one red or green block each."""
    folder = tmp_path / "data"
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    for index, (number, (x1, y1, x2, y2)) in enumerate(BLOCKS):
        pixels = np.zeros((40, 40, 3), dtype=np.uint8)
        pixels[y1:y2, x1:x2, number] = 255
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        (folder / "images" / f"{index}.png").write_bytes(buffer.getvalue())
        shares = ((x1 + x2) / 80, (y1 + y2) / 80, (x2 - x1) / 40, (y2 - y1) / 40)
        label = " ".join(map(str, (number, *shares)))
        (folder / "labels" / f"{index}.txt").write_text(label)
    return folder


@pytest.fixture
def hook(tmp_path: Path) -> str:
    (tmp_path / "own.py").write_text(HOOK)
    return f"{tmp_path / 'own.py'}:decode"


@pytest.mark.parametrize("batch", ["N", 1, 2])
def test_everything_is_found(tmp_path: Path, data: Path, hook: str, batch: int | str):
    model = network(tmp_path / "m.onnx", batch=batch)
    rows = evaluate_detection([model], open_box_dataset(data), UNIT, load_decoder(hook))
    assert (rows[0].map50, rows[0].map50_95) == pytest.approx((100, 100))
    assert rows[0].count == 3


def test_coco_format_says_the_same_as_yolo_format(tmp_path: Path, data: Path, hook: str):
    """One label is moved, so that it is no longer found exactly; one class is wrong."""
    moved = [(0, (4, 8, 20, 22)), (0, (0, 0, 12, 40)), (0, (8, 4, 40, 36))]
    annotations = {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in range(3)],
        "categories": [{"id": 5, "name": "red"}, {"id": 6, "name": "green"}],
        "annotations": [
            {"image_id": i, "category_id": 5 + n, "bbox": [x, y, x2 - x, y2 - y]}
            for i, (n, (x, y, x2, y2)) in enumerate(moved)
        ],
    }
    for i, (n, (x, y, x2, y2)) in enumerate(moved):
        shares = ((x + x2) / 80, (y + y2) / 80, (x2 - x) / 40, (y2 - y) / 40)
        (data / "labels" / f"{i}.txt").write_text(" ".join(map(str, (n, *shares))))
    model, decoder = network(tmp_path / "m.onnx"), load_decoder(hook)
    yolo = evaluate_detection([model], open_box_dataset(data), UNIT, decoder)[0]
    (data / "instances.json").write_text(json.dumps(annotations))
    coco = evaluate_detection([model], open_box_dataset(data), UNIT, decoder)[0]
    assert (coco.map50, coco.map50_95) == pytest.approx((yolo.map50, yolo.map50_95))
    # Of three red objects two are found (overlaps 0.7 and 1), and scores tie.
    assert yolo.map50 == pytest.approx(100 * 67 / 101)
    assert 100 * 34 / 101 <= yolo.map50_95 < yolo.map50


def test_low_scores_overlaps_and_numbers_that_are_none():
    boxes = np.array([[0, 0, 10, 10], [1, 0, 10, 10], [0, 0, np.nan, 1], [50, 50, 60, 60.0]])
    scores = np.array([[0.9, 0.0005], [0.8, 0.7], [1.0, 1.0], [np.nan, 0.2]])
    found = detect(boxes, scores, min_score=0.001, overlap=0.5)
    assert found.scores.tolist() == [0.9, 0.7, 0.2]
    assert found.classes.tolist() == [0, 1, 1]
    assert found.boxes.tolist() == boxes[[0, 1, 3]].tolist()
    assert not len(detect(boxes, scores, min_score=1.0, overlap=0.5).scores)


def test_labels_that_do_not_fit(tmp_path: Path, data: Path, hook: str):
    model, decoder = network(tmp_path / "m.onnx"), load_decoder(hook)
    (data / "labels" / "1.txt").write_text("2 0.5 0.5 1 1")
    with pytest.raises(DataError, match=r"has 3 classes, but m\.onnx has 2"):
        evaluate_detection([model], open_box_dataset(data), UNIT, decoder)
    for label in (data / "labels").iterdir():
        label.write_text("")
    with pytest.raises(DataError, match="the pictures hold no objects"):
        evaluate_detection([model], open_box_dataset(data), UNIT, decoder)
    images = [{"id": i, "file_name": f"{i}.png", "width": 39, "height": 40} for i in range(3)]
    categories = [{"id": 0}]
    text = json.dumps({"images": images, "categories": categories, "annotations": []})
    (data / "instances.json").write_text(text)
    with pytest.raises(
        DataError, match=r"0\.png: is 40x40, but its annotations are for 39x40"
    ):
        evaluate_detection([model], open_box_dataset(data), UNIT, decoder)


def test_the_task_follows_from_the_data(data: Path, hook: str):
    with pytest.raises(SettingsError, match="detection needs a decoder; there are"):
        open_evaluation(data)
    evaluation = open_evaluation(data, task="classification")
    assert (evaluation.task, evaluation.resize) == ("classification", "crop")
    with pytest.raises(SettingsError, match="cropped away cannot be detected"):
        open_evaluation(data, resize="crop")


def run(capsys, *words) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_line_reports_every_model(tmp_path: Path, data: Path, hook: str, capsys):
    good, dark = network(tmp_path / "good.onnx"), network(tmp_path / "dark.onnx", 0.6)
    words = ["--data", data, "--decoder", hook, "--mean", "0", "--std", "1"]
    code, out, err = run(
        capsys, "evaluate", dark, good, *words, "--task", "detection", "--json"
    )
    assert code == 0, err
    facts = json.loads(out)
    assert facts["task"] == "detection"
    assert [row["model"] for row in facts["models"]] == [str(dark), str(good)]
    assert facts["models"][1]["mAP@0.5"] == pytest.approx(100)
    assert facts["models"][1]["mAP@0.5:0.95"] == pytest.approx(100)
    code, out, err = run(capsys, "evaluate", good, *words)
    assert code == 0, err
    assert "mAP@0.5:0.95 %" in out
    assert "100.00" in out
    code, out, err = run(capsys, "evaluate", good, *words, "--min-score", "2")
    assert (code, out) == (2, "")
    assert err.startswith("zsq: --min-score: 2.0 is not in 0..1")


def test_quantize_reports_map_before_and_after(tmp_path: Path, data: Path, hook: str, capsys):
    model = network(tmp_path / "m.onnx")
    words = ["--method", "noise", "--num-images", "8", "--mean", "0", "--std", "1"]
    words += ["--evaluate", data, "--decoder", hook]
    code, _, err = run(capsys, "quantize", model, *words, "--json")
    assert code == 0, err
    report = json.loads((tmp_path / "m.w8a8" / "report.json").read_text())
    assert [row["mAP@0.5"] for row in report["evaluation"]] == pytest.approx([100, 100])
    assert report["settings"]["resize"] == "stretch"
    page = (tmp_path / "m.w8a8" / "report.html").read_text()
    assert "mAP@0.5:0.95, %" in page
    assert page.count(">100.00<") >= 4
    code, _, err = run(capsys, "quantize", model, *words[:-1], "yolo")
    assert code == 2
    assert "'yolo' is not a decoder" in err
    assert err.count("\n") == 1
