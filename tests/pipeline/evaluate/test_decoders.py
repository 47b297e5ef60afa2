from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from graph_tools.errors import ModelError, SettingsError
from pipeline.evaluate.decoders import DECODERS, load_decoder
from pipeline.evaluate.decoders.boxes import decode_boxes
from pipeline.evaluate.decoders.ssd import (
    decode_offsets,
    decode_ssd,
    ssd300_priors,
    ultraface_priors,
)
from pipeline.evaluate.decoders.yolo_fastest_v2 import decode_yolo_fastest_v2


def test_yolo_fastest_v2_cell_by_cell():
    """The formula of the data sheet, written out, on an input that is not square."""
    rng = np.random.default_rng(0)
    height, width = 64, 96
    anchors = {
        16: [(12.64, 19.39), (37.88, 51.48), (55.71, 138.31)],
        32: [(126.91, 78.23), (131.57, 214.55), (279.92, 258.87)],
    }
    grids = {s: rng.random((2, height // s, width // s, 15 + 5)) for s in (16, 32)}
    boxes, scores = decode_yolo_fastest_v2({"p5": grids[32], "p4": grids[16]}, height, width)
    expected_boxes, expected_scores = [], []
    for stride, grid in grids.items():
        for row in range(height // stride):
            for column in range(width // stride):
                cell = grid[1, row, column]
                for index, (w, h) in enumerate(anchors[stride]):
                    s = cell[4 * index : 4 * index + 4]
                    x = (2 * s[0] - 0.5 + column) * stride
                    y = (2 * s[1] - 0.5 + row) * stride
                    w, h = (2 * s[2]) ** 2 * w, (2 * s[3]) ** 2 * h
                    expected_boxes.append([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
                    expected_scores.append(cell[12 + index] * cell[15:])
    np.testing.assert_allclose(boxes[1], expected_boxes, rtol=1e-9)
    np.testing.assert_allclose(scores[1], expected_scores, rtol=1e-9)
    with pytest.raises(ModelError, match=r"p4 \[2, 4, 6, 20\]"):
        decode_yolo_fastest_v2({"p4": grids[16]}, height, width)


def test_boxes_as_they_are():
    boxes = np.array([[[0.1, 0.2, 0.5, 1.0], [0, 0, 1, 1]]], dtype=np.float32)
    logits = np.array([[[0.7, 0.2], [0.1, 0.6]]], dtype=np.float32)
    found, scores = decode_boxes({"scores": logits, "boxes": boxes}, 100, 200)
    np.testing.assert_allclose(found[0, 0], [20, 20, 100, 100], rtol=1e-6)
    assert scores.shape == (1, 2, 2)  # they do not sum to 1: independent classes
    softmax = np.array([[[0.7, 0.1, 0.2], [0.9, 0.04, 0.06]]], dtype=np.float32)
    pixels, scores = decode_boxes({"b": boxes * 50, "s": softmax}, 100, 200)
    np.testing.assert_array_equal(pixels, boxes * 50)
    np.testing.assert_array_equal(scores, softmax[..., 1:])
    single = decode_boxes({"b": boxes, "s": softmax[..., 1]}, 100, 200)[1]
    np.testing.assert_array_equal(single[..., 0], softmax[..., 1])
    four_classes = {"scores": np.full((1, 2, 4), 0.25), "boxes": boxes}
    assert decode_boxes(four_classes, 100, 200)[1].shape == (1, 2, 3)
    for outputs in (
        {"boxes": boxes},
        {"a": boxes, "b": boxes},
        {"boxes": boxes, "scores": logits[:, :1]},
        {"boxes": boxes, "scores": logits, "landmarks": logits},
    ):
        with pytest.raises(ModelError, match=r"not boxes \[N, K, 4\]"):
            decode_boxes(outputs, 100, 200)


def test_ssd_offsets_by_hand():
    priors = np.array([[0.5, 0.5, 0.2, 0.4]])
    offsets = np.array([[[1.0, -2.0, 5 * math.log(2), 0.0]]])
    boxes = decode_offsets(offsets, priors)
    # center (0.5 + 0.1 * 0.2, 0.5 - 0.2 * 0.4), width 0.4, height 0.4
    np.testing.assert_allclose(boxes[0, 0], [0.32, 0.22, 0.72, 0.62], rtol=1e-12)
    priors = ssd300_priors()
    assert priors.shape == (8732, 4)
    # cell (0, 1) of the first map: 30 and sqrt(30 * 60), then 2:1 and 1:2
    root = math.sqrt(2)
    np.testing.assert_allclose(priors[4] * 300, [12, 4, 30, 30])
    np.testing.assert_allclose(priors[5] * 300, [12, 4, math.sqrt(1800), math.sqrt(1800)])
    np.testing.assert_allclose(priors[6] * 300, [12, 4, 30 * root, 30 / root])
    np.testing.assert_allclose(priors[7] * 300, [12, 4, 30 / root, 30 * root])
    np.testing.assert_allclose(priors[-1] * 300, [150, 150, 264 / root, 300])


def test_ssd_takes_logits_and_refuses_unknown_layouts():
    offsets = np.zeros((1, 8732, 4))
    logits = np.zeros((1, 8732, 3))
    logits[0, 5] = [0, math.log(2), math.log(5)]
    boxes, scores = decode_ssd({"conf": logits, "loc": offsets}, 300, 300)
    np.testing.assert_allclose(scores[0, 5], [2 / 8, 5 / 8])
    np.testing.assert_allclose(boxes[0, 4], [-3, -11, 27, 19])
    with pytest.raises(ModelError, match=r"8731 boxes .* no known priors; .*decode_offsets"):
        decode_ssd({"conf": logits[:, 1:], "loc": offsets[:, 1:]}, 300, 300)


def test_ssd_computes_what_ultraface_computes_itself(shared_models: Path):
    """The file's own decoding is the reference: its offsets are made an output."""
    model = onnx.load(shared_models / "ultraface_rfb320.onnx")
    offsets = next(n.input[0] for n in model.graph.node if n.output[0] == "462")
    model.graph.output.add(name=offsets)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    image = np.random.default_rng(0).normal(size=(1, 3, 240, 320)).astype(np.float32)
    scores, boxes, raw = session.run(["scores", "boxes", offsets], {"input": image})
    ours = decode_ssd({"scores": scores, "offsets": raw}, 240, 320)
    theirs = decode_boxes({"scores": scores, "boxes": boxes}, 240, 320)
    assert len(ultraface_priors(240, 320)) == boxes.shape[1]
    np.testing.assert_allclose(ours[0], theirs[0], atol=1e-2)  # pixels of 320
    np.testing.assert_array_equal(ours[1], theirs[1])


def write_hook(folder: Path, body: str) -> str:
    (folder / "own.py").write_text(body)
    return f"{folder / 'own.py'}:decode"


OUTPUTS = {"y": np.zeros((2, 5, 4), dtype=np.float32)}


def test_a_hook(tmp_path: Path):
    name = write_hook(
        tmp_path,
        "def decode(outputs, height, width):\n"
        "    return outputs['y'] + width, outputs['y'][..., :1] + height\n",
    )
    boxes, scores = load_decoder(name)(OUTPUTS, 10, 20)
    assert boxes.shape == (2, 5, 4)
    assert (boxes.max(), scores.max()) == (20, 10)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("def decode(o, h, w):\n    return o['z'], 1\n", "KeyError: 'z' (line 2)"),
        ("def decode(outputs): pass", "TypeError"),
        ("def decode(*a): return 1", "TypeError"),
        ("import sys\ndef decode(*a): sys.exit(3)", "SystemExit: 3 (line 2)"),
        ("def decode(o, h, w): return o['y'][0], o['y'][0]", "returned float32 [5, 4]"),
        ("def decode(o, h, w): return o['y'], o['y'][:, 1:]", "float32 [2, 4, 4]"),
        ("def decode(o, h, w): return o['y'].astype(str), o['y']", "returned <U32 [2, 5, 4]"),
        ("def decode(o, h, w): return o['y'][:1], o['y'][:1]", "1 rows for 2 image(s)"),
    ],
)  # fmt: skip
def test_a_hook_that_fails_is_one_line(tmp_path: Path, body: str, said: str):
    decoder = load_decoder(write_hook(tmp_path, body))
    with pytest.raises(SettingsError) as caught:
        decoder(OUTPUTS, 10, 20)
    line = str(caught.value)
    assert said in line
    assert "own.py:decode" in line
    assert "boxes [N, K, 4]" in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("x = 1", "no function decode"),
        ("decode = 1", "no function decode"),
        ("def decode(:", "SyntaxError: invalid syntax (line 1)"),
        ("\n1 / 0", "ZeroDivisionError: division by zero (line 2)"),
        ("raise SystemExit(0)", "SystemExit: 0 (line 1)"),
    ],
)
def test_a_file_without_a_decoder_is_one_line(tmp_path: Path, body: str, said: str):
    with pytest.raises(SettingsError) as caught:
        load_decoder(write_hook(tmp_path, body))
    assert said in str(caught.value)


def test_decoders_by_name(tmp_path: Path):
    assert all(load_decoder(name) is DECODERS[name] for name in DECODERS)
    with pytest.raises(
        SettingsError, match=r"'yolo' is not a decoder; there are yolo-fastest"
    ):
        load_decoder("yolo")
    with pytest.raises(SettingsError, match="detection needs a decoder"):
        load_decoder("")
    with pytest.raises(SettingsError, match="no such file"):
        load_decoder(f"{tmp_path}/none.py:decode")
