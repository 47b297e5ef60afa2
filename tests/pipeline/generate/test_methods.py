"""What every method that optimizes images fulfils."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from graph_tools.errors import NoBatchNormError, SettingsError
from graph_tools.model import Model, load
from pipeline.generate import Generated, generate
from pipeline.generate.methods import METHODS
from pipeline.preprocessing import Preprocessing
from pipeline.settings import GenerateSettings

PUBLISHED = ("zeroq", "dsg", "intraq")
VARIANTS = {
    "slack": {"slack": 0.5},
    "layer enhancement": {"layer_enhancement": True},
    "crops": {"crop_scale": 0.5},
    "scope": {"scope": 1},
}


def run(model: Model, path: Path, **options: object) -> Generated:
    settings = {"num_images": 10, "iterations": 12, "batch_size": 4}
    return generate(
        model,
        GenerateSettings(**{**settings, **options}),  # type: ignore[arg-type]
        path,
        preprocessing=Preprocessing(mean=(0.5,), std=(0.5,)),
    )


@pytest.mark.parametrize("method", PUBLISHED)
def test_a_method_lowers_its_loss(digits_models: Path, tmp_path: Path, method: str) -> None:
    model = load(digits_models / "digits_resnet.onnx")
    result = run(model, tmp_path / "x.npz", method=method, num_images=8, iterations=25)
    assert result.method == method
    assert result.images.load().shape == (8, *model.input.shape)
    losses = [record.total for record in result.history]
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])
    assert result.statistics[0].mean_error_before > 0


@pytest.mark.parametrize("method", PUBLISHED)
def test_the_seed_decides(small: Model, tmp_path: Path, method: str) -> None:
    a, b, c = (
        run(small, tmp_path / "x.npz", method=method, seed=seed).images.load()
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).mean() > 0.1 * a.std()


@pytest.mark.parametrize("method", PUBLISHED)
@pytest.mark.parametrize("chunk", [1, 3])
def test_batches_of_a_fixed_size_give_the_same_images(
    small: Model, tmp_path: Path, method: str, chunk: int
) -> None:
    options = {"method": method, "iterations": 4, "num_images": 6, "learning_rate": 0.1}
    whole = run(small, tmp_path / "a.npz", **options)
    parts = run(replace(small, fixed_batch=chunk), tmp_path / "b.npz", **options)
    near = np.isclose(parts.images.load(), whole.images.load(), atol=5e-3)
    assert near.mean() > 0.99  # Adam follows the sign of gradients of any size
    for one, other in zip(whole.history, parts.history, strict=True):
        assert one.total == pytest.approx(other.total, rel=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_setting_of_dgh_changes_the_images_and_the_loss_falls(
    small: Model, tmp_path: Path, variant: str
) -> None:
    options = {"start": "noise", "learning_rate": 1.0, "iterations": 30}
    plain = run(small, tmp_path / "a.npz", **options)
    result = run(small, tmp_path / "b.npz", **options, **VARIANTS[variant])
    assert not np.array_equal(plain.images.load(), result.images.load())
    losses = [record.statistics for record in result.history]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:3])


def test_margins_are_refused_with_the_papers_loss() -> None:
    with pytest.raises(SettingsError, match="--slack"):
        GenerateSettings(slack=0.9, loss="paper")


@pytest.mark.parametrize("method", ["dgh", *PUBLISHED])
def test_methods_that_match_statistics_need_some(
    without_batch_norm: Model, tmp_path: Path, method: str
) -> None:
    with pytest.raises(NoBatchNormError):
        run(without_batch_norm, tmp_path / "x.npz", method=method)


def test_every_method_can_be_asked_for() -> None:
    for method in METHODS:
        assert GenerateSettings(method=method).method == method  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "options", "unused"),
    [
        ("zeroq", {"slack": 0.5, "scope": 1}, {"slack", "scope"}),
        ("zeroq", {"padding": 2, "learning_rate": 0.1}, set()),
        ("dgh", {"slack": 0.5, "scope": 1, "std_weight": 3.0}, set()),
        ("dgh", {"std_weight": 3.0, "sadag_matching": 2.0}, {"sadag-matching"}),
        ("noise", {"loss": "paper"}, {"loss", "iterations"}),
    ],
)
def test_settings_that_a_method_has_no_use_for_are_named(
    small: Model, tmp_path: Path, method: str, options: dict[str, object], unused: set[str]
) -> None:
    notes = run(small, tmp_path / "x.npz", method=method, **options).notes
    said = {note.split()[0].removeprefix("--") for note in notes if "means nothing" in note}
    assert said == unused
