"""Synthetic images have what photographs share."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.generate.synthetic import KINDS, synthetic_images, synthetic_source
from pipeline.preprocessing import Preprocessing


def make(
    count: int = 128, channels: int = 3, side: int = 32, seed: int = 0, **options: object
):
    generator = torch.Generator().manual_seed(seed)
    return synthetic_images(count, (channels, side, side), generator, **options).numpy()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_units_are_standard(kind: str, channels: int) -> None:
    images = make(512, channels, 16, kinds=(kind,))
    assert images.shape == (512, channels, 16, 16)
    assert images.dtype == np.float32
    np.testing.assert_allclose(images.mean((0, 2, 3)), 0, atol=0.1)
    np.testing.assert_allclose(images.std((0, 2, 3)), 1, atol=0.12)


def test_colors_vary_along_brightness_first() -> None:
    pixels = make().transpose(1, 0, 2, 3).reshape(3, -1)
    shares, axes = np.linalg.eigh(np.cov(pixels))
    assert shares[-1] / shares.sum() > 0.85
    np.testing.assert_allclose(np.abs(axes[:, -1]), 3**-0.5, atol=0.05)
    assert abs(axes[1, 1]) < 0.3  # then blue against yellow


@pytest.mark.parametrize("kind", KINDS)
def test_spectra_fall(kind: str) -> None:
    images = make(64, 1, 64, kinds=(kind,))[:, 0]
    power = np.square(np.abs(np.fft.fft2(images))).mean(0)
    rows, columns = np.meshgrid(np.fft.fftfreq(64), np.fft.fftfreq(64), indexing="ij")
    frequency = np.hypot(rows, columns)
    low, high = ((frequency > a) & (frequency < 2 * a) for a in (1 / 32, 1 / 5))
    falls = np.log2(power[low].mean() / power[high].mean()) / np.log2(32 / 5)
    assert 1 < falls < 4  # photographs: about 2


def test_leaves_have_edges_and_noise_has_none() -> None:
    def kurtosis(kind: str) -> float:
        steps = np.diff(make(64, 1, 64, kinds=(kind,)), axis=3).ravel()
        return float(np.mean(steps**4) / np.mean(steps**2) ** 2)

    assert kurtosis("pink") == pytest.approx(3, abs=0.3)
    assert kurtosis("leaves") > 6


def test_images_differ_in_brightness_and_contrast() -> None:
    images = make()
    assert images.mean((1, 2, 3)).std() > 0.3
    assert images.std((1, 2, 3)).std() > 0.1


def test_the_seed_decides() -> None:
    np.testing.assert_array_equal(make(8), make(8))
    assert np.abs(make(8) - make(8, seed=1)).max() > 0.1


def test_pixels_have_the_statistics_that_the_normalization_tells() -> None:
    given = Preprocessing(mean=(0.1307,), std=(0.3081,))
    source = synthetic_source(given, 1)
    images = source(512, (1, 16, 16), torch.Generator().manual_seed(0)) * 0.226 + 0.45
    assert float(images.mean()) == pytest.approx(0.1307, abs=0.03)
    assert float(images.std()) == pytest.approx(0.3081, rel=0.1)


def test_channel_order_is_the_models() -> None:
    images = {
        order: synthetic_source(Preprocessing(mean=(0.5,), std=(0.5,), channels=order), 3)(
            4, (3, 8, 8), torch.Generator().manual_seed(0)
        )
        for order in ("rgb", "bgr")
    }
    torch.testing.assert_close(images["bgr"], images["rgb"].flip(1))
