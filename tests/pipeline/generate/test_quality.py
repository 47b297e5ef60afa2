from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from graph_tools.model import Model, load
from graph_tools.torch_graph import TorchGraph
from pipeline.generate import Generated, generate
from pipeline.generate.quality import measure_quality
from pipeline.images import ImageWriter, open_images
from pipeline.preprocessing import Preprocessing
from pipeline.settings import GenerateSettings

HALF = Preprocessing(mean=(0.5,), std=(0.5,))


def run(model: Model, path: Path, **options: object) -> Generated:
    settings = {"num_images": 16, "batch_size": 16, **options}
    return generate(model, GenerateSettings(**settings), path)  # type: ignore[arg-type]


def test_measures_are_those_of_the_written_images(small: Model, tmp_path: Path) -> None:
    settings = GenerateSettings(num_images=20, iterations=3, batch_size=8)
    result = generate(small, settings, tmp_path / "x.npz", preprocessing=HALF)
    quality = result.quality
    images = torch.from_numpy(result.images.load())
    values = TorchGraph(small.proto, outputs=["f"])(images)["f"].double().numpy()
    unit = values / np.linalg.norm(values, axis=1, keepdims=True)
    cosines = unit @ unit.T
    expected = cosines[~np.eye(20, dtype=bool)].mean()
    assert quality.similarity == pytest.approx(expected, rel=1e-5)
    errors = [row.mean_error_after for row in result.statistics]
    assert quality.mean_error_after == pytest.approx(np.mean(errors))
    errors = [row.std_error_before for row in result.statistics]
    assert quality.std_error_before == pytest.approx(np.mean(errors))
    for number in (quality.mean_error_before, quality.output_range, quality.similarity):
        assert f"{number:.2f}" in quality.line


def test_synthetic_images_span_what_synthetic_images_do(small: Model, tmp_path: Path) -> None:
    """A start that hardly moves: the range is measured against images of its own kind."""
    settings = GenerateSettings(
        num_images=64, method="prior", iterations=1, learning_rate=1e-9
    )
    result = generate(small, settings, tmp_path / "x.npz", preprocessing=HALF)
    assert result.quality.output_range == pytest.approx(1, abs=0.2)
    assert result.quality.mean_error_before is None


def test_a_fixed_batch_changes_nothing(small: Model, tmp_path: Path) -> None:
    settings = GenerateSettings(num_images=7, method="noise")
    found = [
        generate(model, settings, tmp_path / "x.npz", preprocessing=HALF).quality
        for model in (small, replace(small, fixed_batch=3))
    ]
    assert found[0].similarity == pytest.approx(found[1].similarity, rel=1e-5)
    assert found[0].output_range == pytest.approx(found[1].output_range, rel=1e-5)


def test_a_run_that_went_well_gets_no_warning(digits_models: Path, tmp_path: Path) -> None:
    result = run(load(digits_models / "digits_resnet.onnx"), tmp_path / "x.npz", iterations=60)
    assert result.quality.warnings == ()


@pytest.mark.parametrize(
    "broken",
    [
        {"iterations": 1},
        {"iterations": 5, "learning_rate": 1e-6},
        {"iterations": 2, "learning_rate": 1e-6, "method": "zeroq"},
    ],
)
def test_a_run_that_got_nowhere_is_told_apart(
    digits_models: Path, tmp_path: Path, broken: dict[str, object]
) -> None:
    model = load(digits_models / "digits_resnet.onnx")
    result = run(model, tmp_path / "x.npz", num_images=8, **broken)
    assert any("hardly nearer" in text for text in result.warnings)
    assert all("--" in text for text in result.quality.warnings)


def test_images_that_are_the_same_are_told_apart(small: Model, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    one = 0.3 * rng.normal(size=(1, 3, 12, 10))
    path = tmp_path / "x.npz"
    with ImageWriter(path, count=9, shape=(3, 12, 10)) as writer:
        writer.append((one + 1e-3 * rng.normal(size=(9, 3, 12, 10))).astype(np.float32))
    images, settings = open_images(path, shape=(3, 12, 10)), GenerateSettings()
    quality = measure_quality(small, images, HALF, settings, (), ())
    assert quality.similarity is not None
    assert quality.similarity > 0.999
    assert any("nearly the same" in text for text in quality.warnings)


def test_outputs_that_collapsed_are_told_apart(
    make_model: Callable[..., Model], tmp_path: Path
) -> None:
    """A network of one convolution spans no more than its images do."""
    model = make_model(
        "g (float[N,3,8,8] x) => (float[N,2,8,8] y) { y = Conv(x, w) }",
        w=np.random.default_rng(0).normal(size=(2, 3, 1, 1)).astype(np.float32),
    )
    path = tmp_path / "x.npz"
    for size, collapsed in ((0.5, False), (0.01, True)):
        with ImageWriter(path, count=4, shape=(3, 8, 8)) as writer:
            noise = np.random.default_rng(1).normal(size=(4, 3, 8, 8))
            writer.append((size * noise).astype(np.float32))
        images, settings = open_images(path, shape=(3, 8, 8)), GenerateSettings()
        quality = measure_quality(model, images, HALF, settings, (), ())
        assert any("outputs span only" in text for text in quality.warnings) == collapsed
