from __future__ import annotations

import pytest

from pipeline.generate import (
    default_batch_size,
    default_iterations,
    default_learning_rate,
    default_num_images,
)

SIDES = (8, 32, 128, 224, 512)


@pytest.mark.parametrize(("side", "images"), [(8, 256), (32, 256), (128, 256), (224, 64)])
def test_large_images_are_fewer(side, images):
    assert default_num_images(side, side) == images


def test_batches_shrink_and_steps_from_noise_do_not_grow_with_the_image():
    for values in (
        [default_batch_size(side, side) for side in SIDES],
        [default_iterations(side, side, "noise") for side in SIDES],
    ):
        assert values == sorted(values, reverse=True)
        assert min(values) >= 1


@pytest.mark.parametrize("side", SIDES)
def test_images_that_start_natural_move_less_than_noise(side):
    steps = [default_iterations(side, side, start) for start in ("natural", "noise")]
    rates = [default_learning_rate(steps[0], side, start) for start in ("natural", "noise")]
    assert steps[0] <= steps[1]
    assert rates[0] < rates[1] / 4
