"""Images by both engines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from graph_tools.errors import SettingsError
from graph_tools.model import load
from pipeline.cli import main
from pipeline.generate import generate
from pipeline.settings import GenerateSettings

pytestmark = pytest.mark.ort


def _images(model_path: Path, folder: Path, **settings) -> dict[str, np.ndarray]:
    model = load(model_path)
    results = {}
    for engine in ("torch", "ort"):
        made = generate(
            model,
            GenerateSettings(engine=engine, **settings),
            folder / f"{engine}.npz",
        )
        with np.load(folder / f"{engine}.npz") as archive:
            results[engine] = archive["images"]
        results[f"{engine} losses"] = np.array([record.total for record in made.history])
    return results


def test_engines_make_the_same_images(digits_models: Path, tmp_path: Path) -> None:
    """Two batches of different sizes, the last one smaller."""
    results = _images(
        digits_models / "digits_resnet.onnx",
        tmp_path,
        num_images=24,
        batch_size=16,
        iterations=20,
        learning_rate=0.25,
    )
    np.testing.assert_allclose(results["ort"], results["torch"], rtol=0, atol=1e-2)
    np.testing.assert_allclose(results["ort losses"], results["torch losses"], rtol=1e-4)


@pytest.mark.parametrize(
    ("start", "learning_rate", "largest", "typical"),
    [("natural", 0.1, 5e-2, 1e-3), ("noise", 0.25, 1e-2, 1e-3), ("noise", 1.0, 0.2, 1e-2)],
)
def test_engines_stay_close_on_resnet20(
    shared_models: Path,
    tmp_path: Path,
    start: str,
    learning_rate: float,
    largest: float,
    typical: float,
) -> None:
    """Within 1e-2 after 20 steps while steps are small; the losses hardly differ.

    The largest difference grows with the learning rate, as it does between two runs of torch on
    inputs that differ by 1e-7: a Relu that switches, and a pixel whose gradient is nearly 0.
    Images that start natural have plain regions, where many Relus switch together.
    """
    results = _images(
        shared_models / "cifar10_resnet20.onnx",
        tmp_path,
        num_images=16,
        batch_size=16,
        iterations=20,
        start=start,
        learning_rate=learning_rate,
    )
    difference = np.abs(results["ort"] - results["torch"])
    assert difference.max() < largest
    assert np.sqrt(np.square(difference).mean()) < typical
    np.testing.assert_allclose(results["ort losses"], results["torch losses"], rtol=1e-3)


def test_quantize_from_end_to_end(digits_models: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "q.onnx"
    words = "--engine ort --num-images 32 --iterations 5 --mean 0.5 --std 0.5 --quiet".split()
    code = main(
        ["quantize", str(digits_models / "digits_resnet.onnx"), "-o", str(output), *words]
    )
    assert code == 0, capsys.readouterr().err
    assert output.exists()
    assert '"engine": "ort"' in (tmp_path / "q" / "run.json").read_text()


def test_another_device_is_refused(digits_models: Path, tmp_path: Path) -> None:
    with pytest.raises(
        SettingsError, match=r"--device: 'meta' cannot be used with --engine ort"
    ):
        generate(
            load(digits_models / "digits_resnet.onnx"),
            GenerateSettings(engine="ort", device="meta", num_images=4),
            tmp_path / "images.npz",
        )
    assert not list(tmp_path.iterdir())
