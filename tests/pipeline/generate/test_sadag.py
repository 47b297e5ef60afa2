"""SADAG: gradients of the last layer, neighbors, and the images that come out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from graph_tools.errors import SettingsError
from graph_tools.model import Model, load
from graph_tools.prepare import prepare_for_quantization
from graph_tools.quantizer import TensorQuantizer
from graph_tools.torch_graph import TorchGraph
from pipeline.generate import Generated, generate
from pipeline.generate.last_layer import (
    Pairs,
    Seen,
    diversity_loss,
    matching_loss,
    neighbor,
    similarities,
    similarity,
)
from pipeline.generate.quantized import QuantizedNetwork, last_linear, round_straight_through
from pipeline.images import open_images
from pipeline.preprocessing import Preprocessing
from pipeline.quantize import quantize
from pipeline.quantize.simulate import simulate_plan
from pipeline.run import quantizer_of
from pipeline.settings import GenerateSettings, QuantizeSettings

HALF = Preprocessing(mean=(0.5,), std=(0.5,))
LOW = QuantizeSettings(weights=4, activations=4)


def run(model: Model, path: Path, **options: object) -> Generated:
    settings = {"method": "sadag", "num_images": 6, "iterations": 16, "batch_size": 4}
    chosen = GenerateSettings(**{**settings, **options})  # type: ignore[arg-type]
    return generate(
        model, chosen, path, preprocessing=HALF, quantizer=quantizer_of(model, LOW)
    )


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_cosines_are_those_of_the_gradients_of_the_last_layer() -> None:
    features, target = random(5, 7, seed=1), random(5, 3, seed=2)
    weight = random(3, 7, seed=3).requires_grad_()
    gradients = []
    for row in range(5):
        loss = 0.5 * (target[row] - weight @ features[row]).square().sum()
        gradients.append(torch.autograd.grad(loss, weight)[0].flatten())
    rows = torch.nn.functional.normalize(torch.stack(gradients), dim=1)
    pairs = Pairs.of(features, target, features @ weight.detach().T)
    torch.testing.assert_close(similarities(pairs, pairs), rows @ rows.T)
    torch.testing.assert_close(similarity(pairs, pairs), torch.ones(5))


def test_images_on_which_the_networks_agree_have_no_direction() -> None:
    values = random(2, 3)
    pairs = Pairs.of(random(2, 4), values, values.clone())
    assert similarities(pairs, pairs).abs().max() == 0


def curved(points: torch.Tensor) -> Pairs:
    """Features and residuals that change direction as points move."""
    weight, other = random(12, 9, seed=4), random(12, 5, seed=5)
    return Pairs.of(torch.tanh(points @ weight), points @ other, torch.sin(points @ other))


def test_the_published_neighbor_step_has_no_gradient_and_ours_has() -> None:
    points = random(4, 12, seed=6).double().float().requires_grad_()
    own = curved(points)
    fixed = own.detach()
    (published,) = torch.autograd.grad(similarity(own, fixed).sum(), points)
    assert published.abs().max() < 1e-5

    places: list[torch.Tensor] = []
    slopes: list[torch.Tensor] = []

    def watched(moved: torch.Tensor) -> Pairs:
        if moved.requires_grad:
            moved.register_hook(slopes.append)
            places.append(moved)
        return curved(moved)

    radius, seed = 0.1, torch.Generator().manual_seed(0)
    step = neighbor(points, watched, radius=radius, generator=seed)
    assert slopes[0].flatten(1).norm(dim=1).min() > 1e-3
    assert slopes[0].abs().max() > 100 * published.abs().max()
    norms = points.detach().norm(dim=1)
    assert (step.norm(dim=1) <= radius * norms * 1.0001).all()
    start = places[0].detach() - points.detach()
    torch.testing.assert_close(start.norm(dim=1), radius / 2 * norms)
    # Farther from its own direction than the random start, for each image.
    assert (
        similarity(curved(points.detach() + step), fixed)
        < similarity(curved(places[0].detach()), fixed)
    ).all()


def test_losses_by_hand() -> None:
    eye = torch.eye(3)
    own = Pairs(eye[[0, 0, 1]], torch.tensor([[1.0], [-1.0], [1.0]]))
    assert diversity_loss(own).item() == pytest.approx(2 / 3)  # 1, 1 and 0
    others = Pairs(eye[[1]], torch.tensor([[0.5]]))
    assert diversity_loss(own, others).item() == pytest.approx((1 + 1 + 0.5) / 3)
    one = Pairs(eye[[0]], torch.ones(1, 1))
    assert diversity_loss(one).item() == 0
    turned = Pairs(eye[[0, 1, 1]], torch.ones(3, 1))
    assert matching_loss(turned, own).item() == pytest.approx(1 - (1 + 0 + 1) / 3)


def test_images_made_before_are_remembered_but_not_one_s_own() -> None:
    seen = Seen(5)
    assert seen.others(0, 2) is None
    pairs = Pairs(random(2, 4), random(2, 3, seed=1))
    seen.put(2, pairs)
    found = seen.others(0, 2)
    assert found is not None
    assert torch.equal(found.features, pairs.features)
    own = seen.others(2, 1)
    assert own is not None
    assert torch.equal(own.residuals, pairs.residuals[1:])


@pytest.mark.parametrize("signed", [True, False])
def test_rounding_is_that_of_the_quantizer_and_gradients_pass(signed: bool) -> None:
    quantizer = TensorQuantizer(bits=4, signed=signed, exponent=-2)
    values = torch.linspace(-6, 6, 97).requires_grad_()
    rounded = round_straight_through(values, quantizer)
    expected = quantizer.dequantize(quantizer.quantize(values.detach().numpy()))
    np.testing.assert_array_equal(rounded.detach().numpy(), expected)
    (slope,) = torch.autograd.grad(rounded.sum(), values)
    inside = (values > quantizer.qmin * 0.25) & (values < quantizer.qmax * 0.25)
    assert torch.equal(slope[inside], torch.ones_like(slope[inside]))
    beyond = (values < quantizer.qmin * 0.25) | (values > quantizer.qmax * 0.25)
    assert slope[beyond].abs().max() == 0


def test_the_quantized_network_is_that_of_the_plan(small: Model, tmp_path: Path) -> None:
    made = generate(
        small,
        GenerateSettings(method="noise", num_images=8),
        tmp_path / "images.npz",
        preprocessing=HALF,
    )
    images = open_images(tmp_path / "images.npz", shape=small.input.shape)
    network = prepare_for_quantization(small)
    plan = quantize(network, images, LOW).plan
    watched = QuantizedNetwork(network, plan, HALF, torch.device("cpu"))
    inputs = torch.from_numpy(made.images.load())
    pixels = watched._network.pixels(inputs)
    features, outputs = watched.observe(pixels)
    expected = simulate_plan(TorchGraph(network.proto), plan, inputs)
    layer = last_linear(network)
    torch.testing.assert_close(features, expected[layer.features])
    torch.testing.assert_close(outputs, expected[layer.logits])


@pytest.mark.parametrize("form", ["generator", "pixels"])
def test_images_are_refined_valid_and_the_same_for_a_seed(
    small: Model, tmp_path: Path, form: Literal["generator", "pixels"]
) -> None:
    digests = []
    for name, options in (("a", {}), ("b", {}), ("c", {"sadag_diversity": 0.0})):
        result = run(small, tmp_path / f"{name}.npz", sadag_form=form, **options)
        digests.append(hashlib.sha256((tmp_path / f"{name}.npz").read_bytes()).hexdigest())
    assert digests[0] == digests[1] != digests[2]
    images = result.images.load()
    assert images.shape == (6, 3, 12, 10)
    assert np.abs(images).max() <= 1 + 1e-6
    assert [record.iteration for record in result.history] == list(range(1, 27))
    assert [row.node for row in result.statistics] == ["bn1", "bn2"]
    left = sorted(path.name for path in tmp_path.iterdir() if path.name != "small.onnx")
    assert left == ["a.npz", "b.npz", "c.npz"]


@pytest.mark.parametrize("form", ["generator", "pixels"])
def test_refinement_changes_the_images_a_little(
    small: Model, tmp_path: Path, form: Literal["generator", "pixels"]
) -> None:
    method = {"generator": "genie", "pixels": "dgh"}[form]
    before = run(small, tmp_path / "a.npz", method=method).images.load()
    after = run(small, tmp_path / "b.npz", sadag_form=form).images.load()
    change = np.abs(after - before).mean()
    assert 0 < change < 0.3 * before.std()


def test_networks_without_a_last_linear_layer_are_refused(
    make_model: Callable[..., Model], tmp_path: Path
) -> None:
    ones = np.ones(4, np.float32)
    model = make_model(
        "g (float[N,3,8,8] x) => (float[N,4,8,8] y) {"
        "c = Conv<pads=[1,1,1,1], kernel_shape=[3,3]>(x, w)"
        "y = BatchNormalization(c, s, b, m, v) }",
        w=np.ones((4, 3, 3, 3), np.float32),
        s=ones,
        b=ones,
        m=ones,
        v=ones,
    )
    with pytest.raises(SettingsError, match="does not end in one linear layer"):
        run(model, tmp_path / "x.npz")
    assert not (tmp_path / "x.npz").exists()


def test_without_a_quantizer_the_error_says_so(small: Model, tmp_path: Path) -> None:
    settings = GenerateSettings(method="sadag", num_images=2)
    with pytest.raises(SettingsError, match="needs a quantized network"):
        generate(small, settings, tmp_path / "x.npz", preprocessing=HALF)


@pytest.mark.parametrize(
    "name", ["cifar10_resnet20", "mcunet_cifar10_32", "mobilenet_v1_025_224_imagenet"]
)
def test_the_last_layer_of_real_networks_is_found(shared_models: Path, name: str) -> None:
    model = load(shared_models / f"{name}.onnx")
    for network in (model, prepare_for_quantization(model)):
        layer = last_linear(network)
        assert layer.features != layer.logits
