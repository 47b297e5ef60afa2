from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from graph_tools.errors import DataError, SettingsError
from pipeline.preprocessing import Preprocessing

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (4, 5, 7, 3), dtype=np.uint8)


def test_apply_is_what_torch_computes(pixels: np.ndarray) -> None:
    ours = Preprocessing(**IMAGENET).apply(pixels, "NCHW")
    values = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(IMAGENET[key]).view(3, 1, 1) for key in ("mean", "std"))
    # float32 rounding of the reference: a few units in the last place of values up to 3.
    np.testing.assert_allclose(ours, ((values - mean) / std).numpy(), rtol=0, atol=1e-6)
    assert ours.dtype == np.float32
    assert ours.flags.c_contiguous


def test_nhwc_is_nchw_transposed(pixels: np.ndarray) -> None:
    preprocessing = Preprocessing(**IMAGENET)
    nchw = preprocessing.apply(pixels, "NCHW")
    np.testing.assert_array_equal(
        preprocessing.apply(pixels, "NHWC"), nchw.transpose(0, 2, 3, 1)
    )


def test_bgr_reverses_the_channels_before_normalizing(pixels: np.ndarray) -> None:
    bgr = Preprocessing(**IMAGENET, channels="bgr")
    expected = Preprocessing(**IMAGENET).apply(pixels[..., ::-1], "NCHW")
    np.testing.assert_array_equal(bgr.apply(pixels, "NCHW"), expected)


def test_a_model_that_takes_0_to_255_gets_whole_numbers() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    identity = Preprocessing(mean=(0.0,), std=(1 / 255,))
    np.testing.assert_array_equal(identity.apply(pixels, "NHWC"), pixels)


def test_float_pixels_are_taken_as_0_to_255(pixels: np.ndarray) -> None:
    preprocessing = Preprocessing(**IMAGENET)
    np.testing.assert_array_equal(
        preprocessing.apply(pixels.astype(np.float32), "NCHW"),
        preprocessing.apply(pixels, "NCHW"),
    )


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("channels", ["rgb", "bgr"])
@pytest.mark.parametrize("count", [1, 3])
def test_invert_gives_the_pixels_back(layout: str, channels: str, count: int) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (3, 4, 6, count), dtype=np.uint8)
    mean, std = ((0.5,), (0.25,)) if count == 1 else IMAGENET.values()
    preprocessing = Preprocessing(mean=mean, std=std, channels=channels)
    inverse = preprocessing.invert(preprocessing.apply(pixels, layout), layout)
    np.testing.assert_array_equal(inverse, pixels)


def test_invert_saturates_and_survives_nan() -> None:
    images = np.array([-9.0, 9.0, np.nan, np.inf], dtype=np.float32).reshape(1, 1, 2, 2)
    pictures = Preprocessing(mean=(0.5,), std=(0.5,)).invert(images, "NCHW")
    assert pictures.ravel().tolist() == [0, 255, 0, 255]


def test_other_channel_counts_are_shown_as_gray() -> None:
    images = np.zeros((2, 5, 4, 4), dtype=np.float32)
    images[:, 3:] = 9.0
    pictures = Preprocessing(mean=(0.2,), std=(1.0,)).invert(images, "NCHW")
    assert pictures.shape == (2, 4, 4, 1)
    assert set(pictures.ravel()) == {51}


def test_valid_range_is_what_pixels_0_and_255_become() -> None:
    preprocessing = Preprocessing(**IMAGENET)
    low, high = preprocessing.valid_range(3)
    extremes = np.array([0, 255], dtype=np.uint8)[:, None].repeat(3, axis=1)
    applied = preprocessing.apply(extremes.reshape(2, 1, 1, 3), "NHWC")
    np.testing.assert_array_equal(np.stack([low, high]), applied[:, 0, 0])
    assert low.dtype == high.dtype == np.float32


def test_one_value_serves_all_channels() -> None:
    low, high = Preprocessing(mean=(0.5,), std=(0.5,)).valid_range(4)
    assert low.tolist() == [-1.0] * 4
    assert high.tolist() == [1.0] * 4


def test_round_trip_through_json() -> None:
    one = Preprocessing(**IMAGENET, channels="bgr", source="model metadata")
    assert Preprocessing.from_dict(json.loads(json.dumps(one.to_dict()))) == one


def test_metadata_of_a_model_file() -> None:
    one = Preprocessing(**IMAGENET)
    found = Preprocessing.from_metadata({"preprocessing": json.dumps(one.to_dict())})
    assert found == Preprocessing(**IMAGENET, source="model metadata")


@pytest.mark.parametrize("text", [None, "", "resize", "[1, 2]", "3", "{}", '{"mean": 1}'])
def test_metadata_that_says_nothing(text: str | None) -> None:
    assert Preprocessing.from_metadata({} if text is None else {"preprocessing": text}) is None


@pytest.mark.parametrize(
    ("mean", "std", "where"),
    [
        ((0.5,), (0.0,), "--std"),
        ((0.5,), (-1.0,), "--std"),
        ((float("nan"),), (1.0,), "--mean"),
        ((), (1.0,), "--mean"),
        ((0.1, 0.2, 0.3), (1.0, 1.0), "--mean"),
        (("a",), (1.0,), "--mean"),
        ("0.5", (1.0,), "--mean"),
    ],
)
def test_values_that_cannot_be_used(mean: object, std: object, where: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Preprocessing(mean=mean, std=std)  # type: ignore[arg-type]
    assert caught.value.where == where


def test_wrong_number_of_channels(pixels: np.ndarray) -> None:
    with pytest.raises(SettingsError, match="3 values for an input of 1 channel"):
        Preprocessing(**IMAGENET).valid_range(1)
    with pytest.raises(DataError, match="not \\[N, H, W, C\\]"):
        Preprocessing(**IMAGENET).apply(pixels[0], "NCHW")


def test_unknown_channel_order_and_missing_keys() -> None:
    with pytest.raises(SettingsError, match="not rgb or bgr"):
        Preprocessing(mean=(0.0,), std=(1.0,), channels="gbr")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="missing"):
        Preprocessing.from_dict({"mean": [0.0]})


def test_a_range_is_what_black_and_white_become(pixels: np.ndarray) -> None:
    low, high = Preprocessing.of_range(-3, 5).valid_range(3)
    np.testing.assert_allclose(low, -3, rtol=1e-6)
    np.testing.assert_allclose(high, 5, rtol=1e-6)
    raw = Preprocessing.of_range(0, 255).apply(pixels, "NHWC")
    np.testing.assert_array_equal(raw, pixels.astype(np.float32))
    for low, high in ((1, 1), (2, 1), (0, float("nan")), (0, float("inf"))):
        with pytest.raises(SettingsError, match="--range"):
            Preprocessing.of_range(low, high)
