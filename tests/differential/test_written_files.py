"""Files that the project writes: random networks, quantized, run in three ways."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from graph_tools.model import load
from graph_tools.prepare import prepare_for_quantization
from graph_tools.qdq import write_qdq
from graph_tools.quantized_graph import QuantizedGraph
from pipeline.images import ImageWriter, open_images
from pipeline.quantize import quantize
from pipeline.settings import QuantizeSettings
from pipeline.verify.accumulators import measure_accumulators
from tests.differential.random_graphs import chooser
from tests.differential.random_networks import random_network
from tests.differential.runs import compare

_APPROXIMATE = frozenset({"HardSwish", "Sigmoid", "Softmax", "Tanh"})

SETTINGS = [
    QuantizeSettings(),
    QuantizeSettings(weights=4),
    QuantizeSettings(weight_range="7bit"),
    QuantizeSettings(zero_point="zero"),
    QuantizeSettings(activations=4),
    QuantizeSettings(zero_point="below"),
    QuantizeSettings(zero_point="below", weights=4),
]


def written(seed: int, folder: Path, settings: QuantizeSettings):
    onnx.save(random_network(chooser(seed)), folder / "network.onnx")
    values = np.random.default_rng(seed).normal(size=(4, 3, 12, 12)).astype(np.float32)
    with ImageWriter(folder / "images.npz", count=4, shape=(3, 12, 12)) as writer:
        writer.append(values)
    network = prepare_for_quantization(load(folder / "network.onnx"))
    found = quantize(network, open_images(folder / "images.npz"), settings)
    return write_qdq(found.model, found.plan), values


def assert_agreement(seed: int, folder: Path) -> None:
    settings = SETTINGS[seed % len(SETTINGS)]
    model, images = written(seed, folder, settings)
    assert all(entry.simulation_exact for entry in measure_accumulators(QuantizedGraph(model)))
    found = compare(model, images)
    operators = sorted({n.op_type for n in model.graph.node})
    assert found.parting is None, (seed, settings, operators)
    if _APPROXIMATE.isdisjoint(operators):
        assert set(found.steps.values()) == {0.0}, (seed, settings, operators)


@pytest.mark.parametrize("seed", range(20))
def test_files_of_random_networks(seed: int, tmp_path: Path) -> None:
    assert_agreement(seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(20, 420, 40))
def test_files_of_hundreds_of_random_networks(first: int, tmp_path: Path) -> None:
    for seed in range(first, first + 40):
        assert_agreement(seed, tmp_path)
