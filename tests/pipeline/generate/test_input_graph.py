"""Networks that normalize their input themselves, or take uint8."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from graph_tools.errors import ModelError
from graph_tools.input_affine import find_input_affine
from graph_tools.model import load
from pipeline.evaluate.sessions import open_session
from pipeline.generate import generate
from pipeline.generate.input_range import doubt, guess_preprocessing
from pipeline.preprocessing import Preprocessing
from pipeline.settings import GenerateSettings

MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
STD = np.array([0.229, 0.224, 0.225], dtype=np.float32)
Step = tuple[str, np.ndarray | float]


def normalizing(
    source: Path,
    path: Path,
    steps: Sequence[Step],
    *,
    nhwc: bool = False,
    bgr: bool = False,
    uint8: bool = False,
) -> Path:
    """A network with ``steps`` in front of it."""
    model = onnx.load(source)
    graph = model.graph
    image = graph.input[0]
    first = image.name
    nodes, current = [], "pixels"
    if uint8:
        nodes.append(helper.make_node("Cast", [current], ["floats"], to=1))
        current = "floats"
    for index, (kind, value) in enumerate(steps):
        array = np.asarray(value, dtype=np.float32)
        if array.ndim == 1:
            array = array[::-1] if bgr else array
            array = array if nhwc else array.reshape(3, 1, 1)
        graph.initializer.append(numpy_helper.from_array(array.copy(), f"constant{index}"))
        nodes.append(helper.make_node(kind, [current, f"constant{index}"], [f"step{index}"]))
        current = f"step{index}"
    if bgr:
        order = numpy_helper.from_array(np.array([2, 1, 0]), "order")
        graph.initializer.append(order)
        nodes.append(helper.make_node("Gather", [current, "order"], ["turned"], axis=1))
        current = "turned"
    if nhwc:
        nodes.append(helper.make_node("Transpose", [current], ["moved"], perm=[0, 3, 1, 2]))
        current = "moved"
    for node in graph.node:
        node.input[:] = [current if name == first else name for name in node.input]
    others = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *others])
    size = [d.dim_value for d in image.type.tensor_type.shape.dim][2:]
    shape = ["N", *size, 3] if nhwc else ["N", 3, *size]
    image.CopyFrom(helper.make_tensor_value_info("pixels", 2 if uint8 else 1, shape))
    del graph.value_info[:]
    onnx.save(model, path)
    return path


@pytest.fixture
def cifar(shared_models: Path) -> Path:
    """Takes RGB pixels standardized by ImageNet's mean and std."""
    return shared_models / "cifar10_resnet20.onnx"


CASES = {
    "0..255": [("Sub", 255 * MEAN), ("Div", 255 * STD)],
    "0..255, in three": [("Mul", 1 / 255), ("Sub", MEAN), ("Div", STD)],
    "0..255, added": [("Add", -255 * MEAN), ("Mul", 1 / (255 * STD))],
    "0..1": [("Sub", MEAN), ("Div", STD)],
    "-1..1": [("Add", 1.0), ("Mul", 0.5), ("Sub", MEAN), ("Div", STD)],
}


@pytest.mark.parametrize("form", ["plain", "nhwc", "bgr", "uint8"])
@pytest.mark.parametrize("name", CASES)
def test_the_graph_says_which_pixels_it_takes(
    cifar: Path, tmp_path: Path, name: str, form: str
):
    """Pixels by what was found give the outputs that the bare network gives."""
    if form == "uint8" and not name.startswith("0..255"):
        pytest.skip("uint8 pixels are 0..255")
    flags = {} if form == "plain" else {form: True}
    path = normalizing(cifar, tmp_path / "n.onnx", CASES[name], **flags)
    model = load(path)
    found = guess_preprocessing(model)
    assert found.source.startswith("read from the graph: ")
    assert f"pixels in {name.split(',')[0]}" in found.source
    assert found.channels == ("bgr" if form == "bgr" else "rgb")
    assert (form == "uint8") == model.input.integer
    assert doubt(model, found) is None
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    bare = open_session(cifar, threads=1).scores(
        Preprocessing(mean=tuple(MEAN), std=tuple(STD)).apply(pixels, "NCHW")
    )
    whole = open_session(path, threads=1).scores(found.apply(pixels, model.input.layout))
    np.testing.assert_allclose(whole, bare, atol=2e-3)


def test_uint8_networks_compute_the_same_as_float_ones(
    cifar: Path, tmp_path: Path, run_onnx: Callable[..., list[np.ndarray]]
):
    path = normalizing(cifar, tmp_path / "n.onnx", CASES["0..255"], uint8=True, nhwc=True)
    pixels = np.random.default_rng(1).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    expected = session.run(None, {"pixels": pixels})[0]
    model = load(path)
    assert any("uint8: taken as float32" in note for note in model.notes)
    actual = run_onnx(model.proto, pixels.astype(np.float32))[0]
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_uint8_that_is_computed_with_is_refused(make_model: Callable[..., object]):
    text = "g (uint8[N,3,8,8] x) => (uint8[N,3,4,4] y) { y = MaxPool<kernel_shape=[5,5]>(x) }"
    with pytest.raises(ModelError, match="no float input of rank 4"):
        make_model(text)


def test_the_walk_ends_where_more_than_a_channel_s_scale_begins(make_model):
    """Each of these begins with something that is no normalization."""
    odd = np.arange(1, 193, dtype=np.float32).reshape(3, 8, 8)
    for text, arrays in (
        ("{ y = Mul(x, w) }", {"w": odd}),
        ("{ y = Relu(x) }", {}),
        ("{ a = Mul(x, w) y = Add(a, x) }", {"w": np.float32(2)}),  # x is read twice
        ("{ y = Div(w, x) }", {"w": np.float32(2)}),
        ("{ y = Sub(w, x) }", {"w": np.float32(2)}),  # turned around
        ("{ y = Mul(x, w) }", {"w": np.float32([1, 0, 1]).reshape(3, 1, 1)}),
    ):
        model = make_model(f"g (float[N,3,8,8] x) => (float[N,3,8,8] y) {text}", **arrays)
        assert find_input_affine(model) is None, text
    text = "g (float[N,3,8,8] x) => (float[N,3,8,8] y) { a = Add(w, x) b = Mul(a, v) y = Relu(b) }"
    found = find_input_affine(make_model(text, w=np.float32(3), v=np.float32(2)))
    assert found is not None
    assert found.operators == ("Add", "Mul")
    assert found.scale.tolist() == [2, 2, 2]
    assert found.offset.tolist() == [6, 6, 6]


@pytest.mark.parametrize(
    ("given", "doubted"),
    [
        (Preprocessing(mean=tuple(MEAN), std=tuple(STD)), False),
        (Preprocessing.of_range(-1, 1), True),
        (Preprocessing.of_range(0, 255), True),
    ],
)
def test_a_normalization_that_cannot_be_is_doubted(
    cifar: Path, given: Preprocessing, doubted: bool
):
    found = doubt(load(cifar), given)
    assert (found is not None) == doubted
    if found is not None:
        assert "ImageNet's mean and std by 0." in found.text
        assert found.better.mean == pytest.approx(MEAN.tolist())


def test_images_do_not_follow_a_normalization_that_cannot_be(cifar: Path, tmp_path: Path):
    """They are those that are made when the right one is given."""
    model = load(cifar)
    settings = GenerateSettings(num_images=4, iterations=2)
    images = []
    for given in (
        Preprocessing(mean=tuple(MEAN), std=tuple(STD)),
        Preprocessing.of_range(0, 255),
    ):
        made = generate(model, settings, tmp_path / "i.npz", preprocessing=given)
        images.append(made.images.load())
    np.testing.assert_allclose(images[1], images[0], atol=1e-4)
    assert "the images are made by the latter" in made.warnings[0]
    assert made.preprocessing.source.endswith("against what was given")
