from __future__ import annotations

import io
import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from graph_tools.errors import DataError, DynamicShapeError, ModelError, SettingsError
from graph_tools.model import ImageInput
from pipeline.evaluate.classification import evaluate_classification, ranks
from pipeline.evaluate.datasets import open_dataset
from pipeline.evaluate.sessions import open_session
from pipeline.preprocessing import Preprocessing

RAW = Preprocessing(mean=(0.0,), std=(1 / 255,))
CIFAR = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def flat_network(
    path: Path,
    *,
    dims: tuple[int | str, ...] = ("N", 1, 1, 6),
    axis: int = 1,
    kind: int = TensorProto.FLOAT,
) -> Path:
    """A network whose scores are its pixels."""
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["x"], ["y"], axis=axis)],
        "flat",
        [helper.make_tensor_value_info("x", kind, dims)],
        [helper.make_tensor_value_info("y", kind, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return path


def write_scores(path: Path, scores: list[list[int]], labels: list[int]) -> Path:
    images = np.array(scores, dtype=np.uint8).reshape(len(scores), 1, -1, 1)
    np.savez(path, images=images, labels=np.array(labels))
    return path


SCORES = [
    [9, 1, 2, 3, 4, 5],
    [9, 1, 2, 3, 4, 5],
    [7, 7, 0, 0, 0, 0],
    [7, 7, 0, 0, 0, 0],
    [0, 0, 0, 0, 0, 0],
    [5, 4, 3, 2, 1, 0],
    [1, 2, 3, 4, 5, 6],
]
LABELS = [0, 1, 0, 1, 5, 5, 1]
# Of equal scores the lowest index is first: rank = scores before the label's.
RANKS = [0, 5, 0, 1, 5, 5, 4]


def test_ranks() -> None:
    found = ranks(np.array(SCORES, dtype=np.float32), np.array(LABELS))
    assert found.tolist() == RANKS


def test_rank_0_is_what_argmax_says() -> None:
    generator = np.random.default_rng(0)
    scores = generator.integers(0, 4, (500, 7)).astype(np.float32)
    labels = generator.integers(0, 7, 500)
    np.testing.assert_array_equal(ranks(scores, labels) == 0, scores.argmax(axis=1) == labels)
    order = np.argsort(-scores, axis=1, kind="stable")
    np.testing.assert_array_equal(
        ranks(scores, labels), (order == labels[:, None]).argmax(axis=1)
    )


def test_nan_is_never_right() -> None:
    scores = np.array([[np.nan, 1.0], [np.nan, 1.0]], dtype=np.float32)
    assert ranks(scores, np.array([0, 1])).tolist() == [1, 0]


@pytest.mark.parametrize("batch", ["N", 1, 3, 7, 16])
def test_every_batch_size_a_file_may_fix(tmp_path: Path, batch: int | str) -> None:
    model = flat_network(tmp_path / "m.onnx", dims=(batch, 1, 1, 6))
    data = open_dataset(write_scores(tmp_path / "x.npz", SCORES, LABELS))
    (found,) = evaluate_classification([model], data, RAW)
    assert found.top1 == pytest.approx(100 * RANKS.count(0) / 7)
    assert found.top5 == pytest.approx(100 * sum(rank < 5 for rank in RANKS) / 7)
    assert (found.model, found.count) == (str(model), 7)
    assert found.seconds > 0
    assert found.to_dict()["top1"] == found.top1


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.DOUBLE])
def test_other_float_types(tmp_path: Path, kind: int) -> None:
    model = flat_network(tmp_path / "m.onnx", kind=kind)
    data = open_dataset(write_scores(tmp_path / "x.npz", SCORES, LABELS))
    (found,) = evaluate_classification([model], data, RAW)
    assert found.top1 == pytest.approx(100 * 2 / 7)


def test_models_of_different_inputs_in_the_order_given(tmp_path: Path) -> None:
    models = [
        flat_network(tmp_path / "a.onnx"),
        flat_network(tmp_path / "b.onnx", dims=(2, 1, 1, 8)),
        flat_network(tmp_path / "c.onnx", dims=(1, 1, 1, 6)),
    ]
    data = open_dataset(write_scores(tmp_path / "x.npz", SCORES, LABELS))
    steps: list[tuple[int, int]] = []

    def on_step(done: int, total: int, terms: Mapping[str, float]) -> None:
        steps.append((done, total))
        assert set(terms) == {"a.onnx", "b.onnx", "c.onnx"}

    found = evaluate_classification(models, data, RAW, on_step=on_step)
    assert [Path(each.model).name for each in found] == ["a.onnx", "b.onnx", "c.onnx"]
    assert found[0].top1 == found[2].top1
    assert all(each.count == 7 for each in found)
    assert steps[-1] == (21, 21)
    assert steps == sorted(steps)


def test_limit_is_the_same_draw_for_all_models(tmp_path: Path) -> None:
    models = [
        flat_network(tmp_path / "a.onnx"),
        flat_network(tmp_path / "b.onnx", dims=(1, 1, 1, 6)),
    ]
    data = open_dataset(write_scores(tmp_path / "x.npz", SCORES * 9, LABELS * 9))
    one, two = evaluate_classification(models, data, RAW, limit=20)
    assert (one.count, one.top1, one.top5) == (two.count, two.top1, two.top5)
    assert one.count == 20


def test_layout_follows_from_the_shape(tmp_path: Path) -> None:
    nhwc = open_session(flat_network(tmp_path / "a.onnx", dims=("N", 32, 32, 3)))
    nchw = open_session(flat_network(tmp_path / "b.onnx", dims=(4, 3, 32, 32)))
    assert (nhwc.input.layout, nhwc.input.batch) == ("NHWC", None)
    assert (nchw.input.layout, nchw.input.batch, nchw.batch_size) == ("NCHW", 4, 4)


def test_open_image_sizes_need_to_be_given(tmp_path: Path) -> None:
    model = flat_network(tmp_path / "m.onnx", dims=("N", 1, "H", "W"))
    data = open_dataset(write_scores(tmp_path / "x.npz", SCORES, LABELS))
    with pytest.raises(DynamicShapeError, match="give --input-shape"):
        evaluate_classification([model], data, RAW)
    given = ImageInput(name="image", shape=(1, 1, 6), layout="NCHW", batch=None)
    (found,) = evaluate_classification([model], data, RAW, model_input=given)
    assert found.top1 == pytest.approx(100 * 2 / 7)


def test_data_that_cannot_be_used(tmp_path: Path) -> None:
    model = flat_network(tmp_path / "m.onnx")
    np.savez(tmp_path / "bare.npz", images=np.zeros((2, 1, 6, 1), dtype=np.uint8))
    with pytest.raises(DataError, match="has no labels: there is no array"):
        evaluate_classification([model], open_dataset(tmp_path / "bare.npz"), RAW)
    more = open_dataset(write_scores(tmp_path / "more.npz", SCORES[:2], [0, 6]))
    with pytest.raises(DataError, match=r"has 7 classes, but m\.onnx has 6 output"):
        evaluate_classification([model], more, RAW)


def test_fewer_class_folders_than_outputs_are_worth_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b"):
        (tmp_path / "d" / name).mkdir(parents=True)
        Image.new("L", (6, 1)).save(tmp_path / "d" / name / "x.png")
    with caplog.at_level(logging.WARNING):
        evaluate_classification(
            [flat_network(tmp_path / "m.onnx")], open_dataset(tmp_path / "d"), RAW
        )
    assert "2 classes, numbered in sorted order, but m.onnx has 6 outputs" in caplog.text


def test_models_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"hello")
    (tmp_path / "empty.onnx").write_bytes(b"")
    flat_network(tmp_path / "rank.onnx", dims=("N", 6))
    flat_network(tmp_path / "int.onnx", kind=TensorProto.INT32)
    cases = {
        "absent.onnx": "no such file",
        "bad.onnx": "not an ONNX file",
        "empty.onnx": "the file is empty",
        "rank.onnx": "has 2 axes, not four",
        "int.onnx": r"tensor\(int32\), not floating point",
    }
    for name, message in cases.items():
        with pytest.raises(ModelError, match=message) as caught:
            open_session(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert name in caught.value.where
    with pytest.raises(SettingsError, match="not 0 or more"):
        open_session(tmp_path / "bad.onnx", threads=-1)


def test_an_output_without_a_row_for_each_image(tmp_path: Path) -> None:
    model = flat_network(tmp_path / "m.onnx", axis=0)
    data = open_dataset(write_scores(tmp_path / "x.npz", SCORES, LABELS))
    with pytest.raises(ModelError, match="not one row for each of 7 image"):
        evaluate_classification([model], data, RAW)


def test_shipped_networks_on_digits_as_pictures(digits_models: Path, tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    count = 200
    pixels = np.rint(digits.images[:count] * (255 / 16)).astype(np.uint8)
    with zipfile.ZipFile(tmp_path / "digits.zip", "w") as archive:
        for index, (one, label) in enumerate(zip(pixels, digits.target, strict=False)):
            buffer = io.BytesIO()
            Image.fromarray(one).save(buffer, "PNG")
            archive.writestr(f"digits/{label}/{index:04}.png", buffer.getvalue())
    path = digits_models / "digits_mobilenet.onnx"
    preprocessing = Preprocessing(mean=(0.5,), std=(0.5,))
    (found,) = evaluate_classification(
        [path], open_dataset(tmp_path / "digits.zip"), preprocessing
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs = ((pixels[:, None] / 255 - 0.5) / 0.5).astype(np.float32)
    (logits,) = session.run(None, {"image": inputs})
    expected = 100 * float((logits.argmax(axis=1) == digits.target[:count]).mean())
    assert found.top1 == pytest.approx(expected)
    assert found.count == count


def reference_top1(model: Path, archive: Path, names: list[str], preprocess: str) -> float:
    """Top-1 with nothing of ours: Pillow, numpy and onnxruntime, one image at a time."""
    classes = "airplane automobile bird cat deer dog frog horse ship truck".split()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    right = 0
    with zipfile.ZipFile(archive) as files:
        for file in names:
            picture = Image.open(io.BytesIO(files.read(file))).convert("RGB")
            image = np.asarray(picture, dtype=np.float32)
            if preprocess == "cifar":
                image = (image / 255 - np.float32([0.485, 0.456, 0.406])) / np.float32(
                    [0.229, 0.224, 0.225]
                )
                image = image.transpose(2, 0, 1)
            scores = session.run(None, {name: image[None]})[0].ravel()
            right += int(scores.argmax()) == classes.index(file.split("/")[0])
    return 100 * right / len(names)


@pytest.mark.parametrize(
    ("model", "preprocess"),
    [
        ("cifar10_resnet20.onnx", "cifar"),
        ("mlperftiny_resnet8_cifar10_tf2onnx_bn.onnx", "raw"),
    ],
)
def test_real_networks_as_an_independent_script_says(
    shared_models: Path, shared_data: Path, model: str, preprocess: str
) -> None:
    archive = shared_data / "cifar10_test_dev.zip"
    with zipfile.ZipFile(archive) as files:
        names = sorted(files.namelist())
    dataset = open_dataset(archive)
    chosen = np.random.default_rng(0).permutation(len(names))[:200]
    (found,) = evaluate_classification(
        [shared_models / model], dataset, CIFAR if preprocess == "cifar" else RAW, limit=200
    )
    expected = reference_top1(
        shared_models / model, archive, [names[index] for index in chosen], preprocess
    )
    assert found.top1 == pytest.approx(expected)


def test_exact_integers_where_default_kernels_saturate(tmp_path: Path) -> None:
    """With all weights and inputs large, 16-bit accumulation would saturate.

    Processors with VNNI pass without the option too, so the option itself is checked as well.
    """
    channels = 64
    weight = np.full((6, channels, 1, 1), 127, dtype=np.int8)
    weight[3] = 126
    constants = {
        "one": np.float32(1.0),
        "u": np.uint8(0),
        "i": np.int8(0),
        "w": weight,
        "big": np.float32(16384.0),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "u"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "one", "u"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "one", "i"], ["wd"]),
        helper.make_node("Conv", ["xd", "wd"], ["c"]),
        helper.make_node("QuantizeLinear", ["c", "big", "i"], ["cq"]),
        helper.make_node("DequantizeLinear", ["cq", "big", "i"], ["cd"]),
        helper.make_node("Flatten", ["cd"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("N", channels, 1, 1))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ("N", 6))],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "m.onnx")
    images = np.full((3, channels, 1, 1), 255, dtype=np.float32)
    given = ImageInput(name="x", shape=(channels, 1, 1), layout="NCHW", batch=None)
    session = open_session(tmp_path / "m.onnx", model_input=given)
    chosen = session._session.get_session_options()
    assert chosen.get_session_config_entry("session.x64quantprecision") == "1"
    found = session.scores(images)
    sums = images[:, :, 0, 0] @ weight[:, :, 0, 0].T.astype(np.float64)
    expected = np.clip(np.rint(sums / 16384), -128, 127) * 16384
    np.testing.assert_array_equal(found, expected)
