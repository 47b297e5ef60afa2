"""GENIE: swing convolutions, the generator, and the images that come out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from graph_tools.errors import NoBatchNormError, SettingsError
from graph_tools.model import Model, load
from graph_tools.torch_graph import TorchGraph
from pipeline.generate import Generated, generate
from pipeline.generate.image_generator import CODE, ImageGenerator
from pipeline.generate.swing import swing, swing_entry
from pipeline.preprocessing import Preprocessing
from pipeline.settings import GenerateSettings

HALF = Preprocessing(mean=(0.5,), std=(0.5,))


def run(model: Model, path: Path, **options: object) -> Generated:
    settings = {"method": "genie", "num_images": 6, "iterations": 5, "batch_size": 4}
    chosen = GenerateSettings(**{**settings, **options})  # type: ignore[arg-type]
    return generate(model, chosen, path, preprocessing=HALF)


def test_swing_reads_the_reflected_map_at_an_offset() -> None:
    values = torch.arange(12.0).view(1, 1, 3, 4)
    reflected = torch.tensor(
        [
            [5, 4, 5, 6, 7, 6],
            [1, 0, 1, 2, 3, 2],
            [5, 4, 5, 6, 7, 6],
            [9, 8, 9, 10, 11, 10],
            [5, 4, 5, 6, 7, 6],
        ],
        dtype=torch.float32,
    )
    for top in range(3):
        for left in range(3):
            expected = reflected[top : top + 3, left : left + 4]
            assert torch.equal(swing(values, top, left)[0, 0], expected)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 1), (2, 2)])
def test_swing_keeps_the_size_of_the_smallest_maps(size: tuple[int, int]) -> None:
    values = torch.rand(2, 3, *size)
    for top in range(3):
        shifted = swing(values, top, 2 - top)
        assert shifted.shape == values.shape
        assert torch.isin(shifted, values).all()


def test_only_strided_convolutions_swing(make_model: Callable[..., Model]) -> None:
    random = np.random.default_rng(0)
    w = random.normal(size=(2, 3, 3, 3)).astype(np.float32)
    v = random.normal(size=(4, 2, 5, 5)).astype(np.float32)  # larger than its 4 x 4 map
    model = make_model(
        "g (float[N,3,8,8] x) => (float[N,4,2,2] y, float[N,2,8,8] b) {"
        "a = Conv<strides=[2,2], pads=[1,1,1,1], kernel_shape=[3,3]>(x, w)"
        "y = Conv<strides=[2,2], pads=[2,2,2,2], kernel_shape=[5,5]>(a, v)"
        "b = Conv<pads=[1,1,1,1], kernel_shape=[3,3]>(x, w) }",
        w=w,
        v=v,
    )
    image = torch.from_numpy(random.normal(size=(2, 3, 8, 8)).astype(np.float32))
    graph = TorchGraph(model.proto, outputs=["y"])
    found = graph(image, entry=swing_entry(torch.Generator().manual_seed(3)))["y"]

    offsets = torch.Generator().manual_seed(3)
    expected = image
    for weight, pad in ((w, 1), (v, 2)):
        top, left = torch.randint(3, (2,), generator=offsets).tolist()
        padded = functional.pad(expected, (1, 1, 1, 1), mode="reflect")
        side = expected.shape[2]
        crop = padded[:, :, top : top + side, left : left + side]
        expected = functional.conv2d(crop, torch.from_numpy(weight), stride=2, padding=pad)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, graph(image)["y"])

    plain = TorchGraph(model.proto, outputs=["b"])
    entry = swing_entry(torch.Generator().manual_seed(3))
    assert torch.equal(plain(image, entry=entry)["b"], plain(image)["b"])


@pytest.mark.parametrize(
    "shape", [(3, 32, 32), (1, 8, 8), (4, 13, 30), (3, 7, 5), (2, 1, 1), (1, 6, 500)]
)
def test_the_generator_makes_images_of_any_size(shape: tuple[int, int, int]) -> None:
    module = ImageGenerator(shape, seed=1)
    images = module(torch.randn(2, CODE))
    assert images.shape == (2, *shape)
    assert torch.isfinite(images).all()
    assert max(module.sizes[0]) <= 56
    images.square().mean().backward()
    assert module.gain.grad is not None


def test_known_pixel_statistics_are_met_exactly() -> None:
    mean, std = torch.tensor([0.5, -1.0, 0.0]), torch.tensor([2.0, 0.5, 1.0])
    module = ImageGenerator((3, 16, 12), mean=mean, std=std, seed=1)
    images = module(torch.randn(8, CODE))
    spread, center = torch.std_mean(images, (0, 2, 3), correction=0)
    torch.testing.assert_close(center, mean, atol=1e-4, rtol=0)
    torch.testing.assert_close(spread, std, atol=1e-3, rtol=1e-3)
    assert not module.gain.requires_grad


def test_weights_follow_the_seed_and_leave_global_randomness_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second, third = (ImageGenerator((1, 8, 8), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first.first.weight, second.first.weight)
    assert not torch.equal(first.first.weight, third.first.weight)


def test_images_are_whole_valid_and_the_same_for_a_seed(small: Model, tmp_path: Path) -> None:
    digests = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        result = run(small, tmp_path / f"{name}.npz", seed=seed)
        digests.append(hashlib.sha256((tmp_path / f"{name}.npz").read_bytes()).hexdigest())
    assert digests[0] == digests[1] != digests[2]
    images = result.images.load()
    assert images.shape == (6, 3, 12, 10)
    assert np.abs(images).max() <= 1 + 1e-6
    assert [record.iteration for record in result.history] == [1, 2, 3, 4, 5]
    assert [row.node for row in result.statistics] == ["bn1", "bn2"]
    assert result.method == "genie"


def test_loss_falls_on_the_shipped_network(digits_models: Path, tmp_path: Path) -> None:
    model = load(digits_models / "digits_resnet.onnx")
    result = run(
        model, tmp_path / "x.npz", num_images=16, iterations=25, batch_size=16, seed=1
    )
    losses = [record.total for record in result.history]
    assert np.mean(losses[-3:]) < 0.4 * losses[0]
    before, after = (
        np.mean([getattr(row, f"mean_error_{when}") for row in result.statistics])
        for when in ("before", "after")
    )
    assert after < 0.8 * before


def test_networks_of_a_fixed_batch_see_whole_batches(small: Model, tmp_path: Path) -> None:
    fixed = replace(small, fixed_batch=2)
    whole = run(small, tmp_path / "a.npz", num_images=5, batch_size=5, iterations=1)
    parts = run(fixed, tmp_path / "b.npz", num_images=5, batch_size=5, iterations=1)
    assert parts.history[0].total != whole.history[0].total  # a swing for each part
    rows = zip(parts.statistics, whole.statistics, strict=True)
    for part, row in rows:  # before a step there is no swing
        assert part.mean_error_before == pytest.approx(row.mean_error_before, rel=1e-4)


def test_what_genie_cannot_do_is_said(
    small: Model, without_batch_norm: Model, tmp_path: Path
) -> None:
    with pytest.raises(NoBatchNormError):
        run(without_batch_norm, tmp_path / "x.npz")
    with pytest.raises(SettingsError, match="only engine torch"):
        run(small, tmp_path / "x.npz", engine="ort")
    assert not list(tmp_path.glob("x.npz"))
