from __future__ import annotations

import numpy as np
import pytest

from graph_tools.model import load
from graph_tools.prepare import prepare_for_quantization
from graph_tools.qdq import write_qdq
from pipeline.fidelity import measure_fidelity, prior_batches
from pipeline.images import ImageWriter, open_images
from pipeline.preprocessing import Preprocessing
from pipeline.quantize import quantize
from pipeline.settings import QuantizeSettings

HALF = Preprocessing(mean=(0.5,), std=(0.5,))


@pytest.fixture
def quantized(digits_models, tmp_path):
    model = prepare_for_quantization(load(digits_models / "digits_mobilenet.onnx"))
    path = tmp_path / "images.npz"
    with ImageWriter(path, count=40, shape=(1, 8, 8)) as writer:
        for batch in prior_batches(model, HALF, 40, seed=1):
            writer.append(batch)
    images = open_images(path, shape=(1, 8, 8))
    plan = quantize(model, images, QuantizeSettings(weights=3, activations=4)).plan
    return model, images, write_qdq(model, plan)


def test_agreement_and_ratio_are_those_of_the_outputs(quantized, run_onnx):
    model, images, proto = quantized
    found = measure_fidelity(
        model.proto, proto, model.outputs, images.batches(16, limit=24), "calibration"
    )
    exact, rounded = (run_onnx(each, images.load(24))[0] for each in (model.proto, proto))
    same = exact.argmax(1) == rounded.argmax(1)
    assert 0 < same.mean() < 1
    noise = np.square(exact.astype(np.float64) - rounded).sum()
    ratio = 10 * np.log10(np.square(exact.astype(np.float64)).sum() / noise)
    assert (found.images, found.agreement) == (24, pytest.approx(same.mean()))
    assert found.sqnr_db == pytest.approx(ratio)


def test_outputs_that_are_no_class_scores_have_no_agreement(make_model):
    text = "g (float[N,1,8,8] x) => (float[N,1,8,8] y, float[N,1,1,1] z) "
    model = make_model(text + "{ y = Relu (x) z = GlobalAveragePool (x) }")
    batches = list(prior_batches(model, HALF, 4, seed=0))
    found = measure_fidelity(model.proto, model.proto, model.outputs, batches, "prior")
    assert (found.agreement, found.sqnr_db) == (None, np.inf)


def test_a_network_that_names_a_class_agrees_by_it(make_model):
    text = "g (float[N,4,1,1] x) => (int64[N] c) { f = Flatten (x) c = ArgMax "
    first, second = (
        make_model(text + f"<axis = 1, keepdims = 0, select_last_index = {last}> (f) }}")
        for last in (0, 1)
    )
    batch = np.zeros((4, 4, 1, 1), np.float32)
    batch[0, 2] = 1  # one winner; the others are ties
    found = measure_fidelity(first.proto, second.proto, ["c"], [batch], "prior")
    assert (found.agreement, found.sqnr_db) == (0.25, None)


@pytest.mark.parametrize("mean", [0.0, 0.5])
def test_prior_images_fill_the_range_and_depend_on_the_seed(make_model, mean):
    model = make_model("g (float[N,8,8,3] x) => (float[N,8,8,3] y) { y = Relu (x) }")
    model = load(model.source, layout="NHWC")
    preprocessing = Preprocessing(mean=(mean,), std=(0.25,))
    first, again, other = (
        np.concatenate(list(prior_batches(model, preprocessing, 20, seed)))
        for seed in (0, 0, 1)
    )
    assert first.shape == (20, 8, 8, 3)
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    pixels = first * 0.25 + mean
    assert pixels.min() >= -1e-6
    assert pixels.max() <= 1 + 1e-6
    assert pixels.std() > 0.15
