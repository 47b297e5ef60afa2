from __future__ import annotations

import pytest

from pipeline.generate import default_batch_size, default_iterations, default_num_images


@pytest.mark.parametrize(("side", "images"), [(8, 256), (32, 256), (128, 256), (224, 64)])
def test_large_images_are_fewer(side, images):
    assert default_num_images(side, side) == images


def test_batches_shrink_and_steps_do_not_grow_with_the_image():
    sides = (8, 32, 128, 224, 512)
    for default in (default_batch_size, default_iterations):
        values = [default(side, side) for side in sides]
        assert values == sorted(values, reverse=True)
        assert min(values) >= 1
