from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from pipeline.generate.prior import (
    ImagePrior,
    View,
    blur_kernel,
    clip_straight_through,
    default_blur,
    default_padding,
    random_crops,
)


def prior(*, sigma: float = 0.0, padding: int = 4, flip: bool = True) -> ImagePrior:
    return ImagePrior(
        height=6,
        width=5,
        padding=padding,
        kernel=blur_kernel(sigma),
        low=torch.full((1, 2, 1, 1), -2.0),
        high=torch.full((1, 2, 1, 1), 2.0),
        flip=flip,
    )


def kernel(sigma: float) -> np.ndarray:
    center, side = blur_kernel(sigma)
    return np.outer([side, center, side], [side, center, side])


@pytest.mark.parametrize("sigma", [0.0, 0.3, 1.25, 50.0])
def test_kernel_is_a_gaussian_that_sums_to_one(sigma: float) -> None:
    assert kernel(sigma).sum() == pytest.approx(1, abs=1e-12)
    if sigma:
        ratio = kernel(sigma)[0, 0] / kernel(sigma)[1, 1]
        assert ratio == pytest.approx(np.exp(-1 / sigma**2), rel=1e-9)


def test_published_kernel() -> None:
    weights = kernel(1.25)
    np.testing.assert_allclose(
        [weights[1, 1], weights[0, 1], weights[0, 0]], [0.1663, 0.1207, 0.0877], atol=1e-4
    )


def test_clip_passes_the_gradient_as_if_nothing_were_clipped() -> None:
    values = torch.tensor([-5.0, -2.0, 0.0, 2.0, 5.0], requires_grad=True)
    clipped = clip_straight_through(values, torch.tensor(-2.0), torch.tensor(2.0))
    torch.testing.assert_close(clipped.detach(), torch.tensor([-2.0, -2.0, 0.0, 2.0, 2.0]))
    (clipped * torch.arange(5.0)).sum().backward()
    torch.testing.assert_close(values.grad, torch.arange(5.0))


def test_render_flips_crops_and_clips() -> None:
    canvas = torch.randn(3, 2, 10, 9) * 3
    images = prior().render(canvas, View(flip=True, top=1, left=3))
    expected = np.clip(canvas.numpy()[:, :, :, ::-1][:, :, 1:7, 3:8], -2, 2)
    np.testing.assert_array_equal(images.numpy(), expected)


@pytest.mark.parametrize(
    "view", [View(flip=False, top=0, left=0), View(flip=True, top=2, left=4)]
)
def test_blur_and_its_gradient_are_those_of_a_convolution(view: View) -> None:
    canvas = torch.randn(2, 2, 10, 9) * 0.5
    weight = torch.from_numpy(kernel(1.25)).float().expand(2, 1, 3, 3)
    results = []
    for blur in (True, False):
        leaf = canvas.clone().requires_grad_()
        if blur:
            images = prior(sigma=1.25).render(leaf, view)
        else:
            images = prior().render(functional.conv2d(leaf, weight, padding=1, groups=2), view)
        (images * torch.arange(5.0)).sum().backward()
        assert leaf.grad is not None
        results.append((images.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_gradient_reaches_every_pixel_of_the_view_and_no_other() -> None:
    canvas = (torch.randn(2, 2, 10, 9) * 5).requires_grad_()
    prior().render(canvas, View(flip=False, top=2, left=0)).sum().backward()
    assert canvas.grad is not None
    inside = torch.zeros(10, 9)
    inside[2:8, :5] = 1
    torch.testing.assert_close(canvas.grad, inside.expand(2, 2, 10, 9))


def test_views_stay_on_the_canvas_and_reach_its_edges() -> None:
    generator = torch.Generator().manual_seed(0)
    views = [prior().draw(generator, 3) for _ in range(400)]
    assert {view.top for view in views} == {view.left for view in views} == set(range(5))
    assert {view.flip for view in views} == {False, True}
    assert not any(prior(flip=False).draw(generator, 3).flip for _ in range(20))
    assert prior().center() == View(flip=False, top=2, left=2)


def test_start_is_clipped_noise_of_the_seed() -> None:
    start = prior().start(50, torch.Generator().manual_seed(3))
    assert start.shape == (50, 2, 10, 9)
    assert start.abs().max() == 2
    assert start.std().item() == pytest.approx(0.96, abs=0.02)
    torch.testing.assert_close(start, prior().start(50, torch.Generator().manual_seed(3)))


@pytest.mark.parametrize(
    ("side", "padding"), [(8, 2), (32, 8), (64, 10), (224, 32), (352, 50)]
)
def test_canvas_grows_with_the_image(side: int, padding: int) -> None:
    assert default_padding(side) == padding


def test_small_images_are_not_blurred() -> None:
    assert [default_blur(side) for side in (8, 32, 224, 500)] == [0, 0, 1.25, 1.25]


def test_resized_crops_are_boxes_of_the_canvas() -> None:
    maps = random_crops(2000, 0.25, torch.Generator().manual_seed(0)).double()
    width, height = maps[:, 0, 0].abs(), maps[:, 1, 1]
    assert (maps[:, 0, 2].abs() + width).max() <= 1 + 1e-6
    assert (maps[:, 1, 2].abs() + height).max() <= 1 + 1e-6
    assert (maps[:, 0, 1] == 0).all()
    inner = (width < 1) & (height < 1)
    assert 0.25 - 1e-5 <= (width * height).min() < 0.27
    assert (width / height)[inner].max() == pytest.approx(4 / 3, abs=0.05)
    assert (width / height)[inner].min() == pytest.approx(3 / 4, abs=0.05)
    assert (maps[:, 0, 0] < 0).double().mean() == pytest.approx(0.5, abs=0.05)
    kept = random_crops(50, 0.25, torch.Generator().manual_seed(0), flip=False)
    assert (kept[:, 0, 0] > 0).all()


def test_a_crop_shows_its_box_mirrored_and_resized() -> None:
    """On a canvas that is linear in x and y a resized crop is exact."""
    rows, columns = torch.meshgrid(torch.arange(10.0), torch.arange(9.0), indexing="ij")
    canvas = torch.stack([rows, columns])[None] / 10
    maps = torch.tensor([[[-0.5, 0.0, 0.2], [0.0, 0.6, -0.1]]])
    view = View(flip=True, top=1, left=3, crops=maps)
    image = prior().render(canvas, view)[0].numpy() * 10
    x = -0.5 * ((np.arange(5) + 0.5) / 5 * 2 - 1) + 0.2
    y = 0.6 * ((np.arange(6) + 0.5) / 6 * 2 - 1) - 0.1
    np.testing.assert_allclose(image[0][:, 0], (y + 1) / 2 * 10 - 0.5, atol=1e-5)
    np.testing.assert_allclose(image[1][0], (x + 1) / 2 * 9 - 0.5, atol=1e-5)


def test_resized_crops_are_drawn_only_where_wanted() -> None:
    generator = torch.Generator().manual_seed(0)
    views = [replace(prior(), crop_scale=0.5).draw(generator, 3) for _ in range(200)]
    shares = [view.crops is not None for view in views]
    assert np.mean(shares) == pytest.approx(0.5, abs=0.1)
    assert all(view.crops is None for view in [prior().draw(generator, 3) for _ in range(9)])
