"""Networks that end in decisions: ArgMax, TopK, comparisons, casts, NonMaxSuppression."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from graph_tools.compare import compare_tensors
from graph_tools.integer_tail import find_integer_tail
from graph_tools.model import load
from graph_tools.torch_ops import OPERATORS
from pipeline.cli import main
from pipeline.generate.heads import find_heads
from pipeline.verify.differences import DifferenceMeter
from pipeline.verify.findings import difference_failures
from pipeline.verify.proof import TensorProof

BACKBONE = "c = Conv<pads=[1,1,1,1]>(x, w) n = BatchNormalization(c, g, b, m, v) r = Relu(n)"
LOGITS = BACKBONE + " p = GlobalAveragePool(r) q = Flatten(p) l = Gemm(q, fc)"
BOXES = (
    BACKBONE + " bc = Conv(r, bw) sc = Conv(r, sw)"
    " br = Reshape(bc, bs) boxes = Transpose<perm=[0,2,1]>(br)"
    " sr = Reshape(sc, ss) scores = Sigmoid(sr)"
    " sel = NonMaxSuppression(boxes, scores, most, iou, threshold)"
)
PICKED = (
    " i2 = Slice(sel, s0, s1, s1) k2 = Slice(sel, s1, s2, s1) xi = Slice(sel, s2, s3, s1)"
    " cls = Squeeze(k2, s1) at = Concat<axis=1>(i2, xi) picked = GatherND(boxes, at)"
)
NETWORKS = {  # outputs, body, tail, ends, heads
    "argmax": ("int64[N] y", LOGITS + " y = ArgMax<axis=1,keepdims=0>(l)", 1, ["l"], ["l"]),
    "argmax kept": ("int64[N,1] y", LOGITS + " y = ArgMax<axis=1>(l)", 1, ["l"], ["l"]),
    "scores, too": (
        "float[N,10] s, int64[N] y",
        LOGITS + " s = Softmax<axis=1>(l) y = ArgMax<axis=1,keepdims=0>(s)",
        1,
        ["s"],
        ["l"],
    ),
    "topk": (
        "float[N,3] best, int64[N,3] y",
        LOGITS + " best, y = TopK<axis=1>(l, three)",
        1,
        ["l"],
        ["l"],
    ),
    "segments": (
        "int64[N,8,8] y",
        BACKBONE + " y = ArgMax<axis=1,keepdims=0>(r)",
        1,
        ["r"],
        ["r"],
    ),
    "cast": ("int32[N,8,8,8] y", BACKBONE + " y = Cast<to=6>(r)", 1, ["r"], ["r"]),
    "greater": ("bool[N,8,8,8] y", BACKBONE + " y = Greater(r, half)", 1, ["r"], ["r"]),
    "nms": ("int64[num,3] sel", BOXES, 1, ["boxes", "scores"], ["bc", "sc"]),
    "detections": (
        "float[k,4] picked, int64[k] cls, float[N,2,64] scores",
        BOXES + PICKED,
        7,
        ["scores", "boxes"],
        ["bc", "sc"],
    ),
    "mask inside": (
        "float[N,10] l",
        BACKBONE + " gt = Greater(r, half) z = Where(gt, r, half) p = GlobalAveragePool(z)"
        " q = Flatten(p) l = Gemm(q, fc)",
        0,
        ["l"],
        ["l"],
    ),
}


def build(name: str, path: Path, batch: str = "N") -> Path:
    rng = np.random.default_rng(0)
    shapes = {"w": (8, 3, 3, 3), "b": (8,), "m": (8,), "fc": (8, 10)}
    shapes |= {"bw": (4, 8, 1, 1), "sw": (2, 8, 1, 1)}
    arrays = {key: (0.4 * rng.normal(size=s)).astype("f") for key, s in shapes.items()}
    arrays |= {"g": np.ones(8, "f"), "v": np.ones(8, "f"), "half": np.array(0.5, "f")}
    arrays |= {"iou": np.array([0.5], "f"), "threshold": np.array([0.3], "f")}
    arrays |= {"bs": np.array([0, 4, 64]), "ss": np.array([0, 2, 64])}
    arrays |= {"most": np.array([5]), "three": np.array([3])}
    arrays |= {f"s{i}": np.array([i]) for i in range(4)}
    outputs, body = NETWORKS[name][:2]
    text = f"g (float[N,3,8,8] x) => ({outputs}) {{ {body} }}".replace("[N,", f"[{batch},")
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    for key, array in arrays.items():
        if any(key in node.input for node in proto.graph.node):
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array, key))
    onnx.save(proto, path)
    return path


@pytest.fixture(autouse=True)
def _no_suppression_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever torch could run of the tail, nobody asks it to."""
    for name in ("NonMaxSuppression", "TopK", "ArgMax", "GatherND"):
        monkeypatch.delitem(OPERATORS, name, raising=False)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_tail_ends_where_decisions_begin(tmp_path, name):
    _, _, num_tail, ends, heads = NETWORKS[name]
    model = load(build(name, tmp_path / "m.onnx"))
    tail = find_integer_tail(model.proto)
    assert (len(tail.nodes), list(tail.ends)) == (num_tail, ends)
    assert list(find_heads(model)) == heads
    assert any("decide at the end" in note for note in model.notes) == bool(num_tail)


@pytest.mark.parametrize("name", ["argmax", "topk"])
def test_agreement_stands_in_the_terminal_once(tmp_path, capsys, name):
    path = build(name, tmp_path / "m.onnx")
    assert main(["quantize", str(path), "--num-images", "6", "--iterations", "3"]) == 0
    assert capsys.readouterr().out.count("as in float") == 1


@pytest.mark.parametrize("batch", ["N", "1"])
@pytest.mark.parametrize("name", ["argmax", "topk", "greater", "detections"])
def test_such_a_network_is_quantized_up_to_there(tmp_path, capsys, name, batch):
    path = build(name, tmp_path / "m.onnx", batch)
    options = ["--num-images", "6", "--iterations", "3", "--mean", ".5", "--std", ".25"]
    assert main(["inspect", str(path), "--json"]) == 0
    capsys.readouterr()
    assert main(["quantize", str(path), *options, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    written = tmp_path / "m.w8a8.onnx"

    last = onnx.load(written).graph.node
    tail = NETWORKS[name][2]
    assert [n.op_type for n in last if "Linear" not in n.op_type][-tail:] == [
        n.op_type for n in onnx.load(path).graph.node
    ][-tail:]
    images = np.load(tmp_path / "m.w8a8" / "images.npz")["images"]
    sessions = [ort.InferenceSession(file) for file in (path, written)]
    runs = [
        [s.run(None, {"x": images[i : i + 1]}) for i in range(len(images))] for s in sessions
    ]
    kinds = {t["name"]: t["kind"] for t in report["proof"]["tensors"]}
    for index, output in enumerate(report["quantization"]["outputs"]):
        pairs = [(a[index], b[index]) for a, b in zip(*runs, strict=True)]
        if pairs[0][0].dtype == np.float32:
            assert output["agreement"] is None
            continue
        assert kinds[output["name"]] == "decision"
        assert output["sqnr_db"] is None
        if all(a.shape == b.shape for a, b in pairs):
            equal = np.concatenate([(a == b).reshape(-1) for a, b in pairs])
            assert output["agreement"] == pytest.approx(equal.mean())
    assert report["proof"]["passed"]


def test_rows_that_both_select_agree_in_any_order():
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]>'
        "g (float[N] x, int64[1] unused) => (int64[k, 1] y) { z = NonZero(x)"
        " y = Transpose(z) }"
    )
    del model.graph.input[1]
    other = onnx.ModelProto()
    other.CopyFrom(model)
    other.graph.node.insert(0, onnx.helper.make_node("Relu", ["x"], ["positive"]))
    other.graph.node[1].input[0] = "positive"
    image = np.array([1, -1, 0, 2, 3], np.float32)
    found = compare_tensors(model, other, {"y": "y"}, [image], histograms=["y"])["y"]
    assert (found.agreement, found.sqnr_db) == (3 / 4, None)


def test_a_decision_that_differs_fails_the_proof():
    meters = [
        DifferenceMeter(*pair, None)
        for pair in (("unoptimized", "optimized"), ("unoptimized", "default"))
    ]
    for meter in meters:
        meter.update(np.array([1, 2, 3]), np.array([1, 2, 4]))
    results = tuple(meter.result() for meter in meters)
    tensor = TensorProof(name="y", kind="decision", scale=None, feeds=(), differences=results)
    assert "y: 1 of 3 decisions differ" in " ".join(difference_failures([tensor]))


def test_a_network_that_names_the_class_has_the_top1_of_its_scores(tmp_path, capsys):
    for name in ("scores, too", "argmax", "argmax kept"):
        build(name, tmp_path / f"{name}.onnx".replace(", ", "_").replace(" ", "_"))
    rng = np.random.default_rng(3)
    images, labels = rng.integers(0, 256, (40, 8, 8, 3), np.uint8), np.arange(40) % 10
    np.savez(tmp_path / "data.npz", images=images, labels=labels)
    models = [
        str(tmp_path / f) for f in ("scores_too.onnx", "argmax.onnx", "argmax_kept.onnx")
    ]
    options = ["--data", str(tmp_path / "data.npz"), "--mean", "0", "--std", "1"]
    assert main(["evaluate", *models, *options, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["models"]
    assert len({row["top1"] for row in rows}) == 1
    assert rows[0]["top1"] > 0
    assert [row["top5"] is None for row in rows] == [False, True, True]
    assert main(["evaluate", *models, *options]) == 0
    assert " - " in capsys.readouterr().out
