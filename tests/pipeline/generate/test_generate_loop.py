from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graph_tools.batchnorm import find_batch_norms
from graph_tools.folded_taps import fold_taps
from graph_tools.model import Model
from pipeline.generate import generate
from pipeline.generate.dgh import DghObjective
from pipeline.generate.loop import OptimizeSettings, optimize
from pipeline.generate.network import Network
from pipeline.generate.objective import Objective
from pipeline.generate.prior import ImagePrior, blur_kernel
from pipeline.generate.statistics import SiteTargets, Sums
from pipeline.generate.step import Step, measure_batch
from pipeline.generate.store import Batch, open_store
from pipeline.images import open_images
from pipeline.preprocessing import Preprocessing
from pipeline.settings import GenerateSettings

CPU = torch.device("cpu")
HEADS = ("g",)


class Setup:
    def __init__(self, model: Model) -> None:
        self.targets = SiteTargets(find_batch_norms(model), CPU)
        preprocessing = Preprocessing(mean=(0.5,), std=(0.5,))
        self.network = Network(model, [*self.targets.tensors, *HEADS], preprocessing, CPU)
        self.objective: Objective = DghObjective(
            targets=self.targets, heads=HEADS, output_hinge=0.1
        )
        bound = torch.full((1, 3, 1, 1), 2.0)
        self.prior = ImagePrior(
            height=12, width=10, padding=4, kernel=blur_kernel(0.8), low=-bound, high=bound
        )

    def batch(self, size: int, seed: int) -> Batch:
        canvas = self.prior.start(size, torch.Generator().manual_seed(seed)) * 1.5
        zeros = torch.zeros_like(canvas)
        sums = self.targets.zero()
        return Batch(canvas.requires_grad_(), zeros, zeros.clone(), sums)

    def full_loss(self, images: torch.Tensor, mine: slice, weight: float) -> torch.Tensor:
        """The loss by plain torch, over all images in one pass."""
        values = self.network.observe(images)
        errors = []
        for site in self.targets.sites:
            variance, mean = torch.var_mean(
                values[site.tensor].double(), (0, 2, 3), correction=0
            )
            std = (variance + 1e-6).sqrt() - (torch.from_numpy(site.variance) + 1e-6).sqrt()
            error = (mean - torch.from_numpy(site.mean)).square() + 10 * std.square()
            errors.append(error.mean() / (float(site.variance.mean()) + 1e-6) ** 0.5)
        loss = torch.stack(errors).mean()
        if not weight:
            return loss
        own = {name: value[mine] for name, value in values.items()}
        return loss + weight * self.objective.output(own)


@pytest.mark.parametrize("chunk", [None, 1, 3])
@pytest.mark.parametrize("others", [0, 6])
def test_gradient_of_a_step_is_that_of_the_loss_over_all_images(
    small: Model, chunk: int | None, others: int
) -> None:
    setup = Setup(replace(small, fixed_batch=chunk))
    reference = Setup(small)
    batch, rest = setup.batch(5, seed=1), setup.batch(max(others, 1), seed=2)
    view = setup.prior.draw(torch.Generator().manual_seed(4), 5)
    rest_images = setup.prior.render(rest.canvas.detach(), view)[:others]
    known = setup.targets.zero()
    if others:
        known = measure_batch(rest_images, setup.network, setup.targets)
    step = Step(batch, view, known, setup.network, setup.prior, setup.objective)
    own, terms = step.backward(0.01)

    canvas = batch.canvas.detach().clone().requires_grad_()
    images = torch.cat([setup.prior.render(canvas, view), rest_images])
    loss = reference.full_loss(images, slice(0, 5), 0.01)
    loss.backward()
    assert canvas.grad is not None
    assert batch.canvas.grad is not None
    assert terms["total"] == pytest.approx(loss.item(), rel=1e-5)
    scale = canvas.grad.abs().max().item()
    torch.testing.assert_close(batch.canvas.grad, canvas.grad, rtol=1e-4, atol=1e-5 * scale)
    mean, variance = (known + own).moments()
    whole = measure_batch(images.detach(), reference.network, setup.targets).moments()
    torch.testing.assert_close(mean, whole[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(variance, whole[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["dgh", "zeroq"])
def test_chunks_save_memory_and_change_nothing_but_last_digits(
    small: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    found, seen, observe = [], set(), Network.observe

    def watched(network: Network, images: torch.Tensor, **changes: Any) -> dict[str, Any]:
        if torch.is_grad_enabled():
            seen.add(len(images))
        return observe(network, images, **changes)

    monkeypatch.setattr(Network, "observe", watched)
    for chunk_size in (0, 3):  # 8 images: 3, 3 and 2
        settings = GenerateSettings(
            method=method, num_images=8, batch_size=8, iterations=2, chunk_size=chunk_size
        )
        path = tmp_path / f"{chunk_size}.npz"
        generate(small, settings, path, preprocessing=Preprocessing(mean=(0.5,), std=(0.5,)))
        found.append(open_images(path).load())
    np.testing.assert_allclose(found[0], found[1], atol=2e-3)
    assert seen == {8, 3, 2}


@pytest.mark.parametrize("chunk", [None, 2])
def test_gradient_ratio_is_the_quotient_of_the_norms(small: Model, chunk: int | None) -> None:
    setup = Setup(replace(small, fixed_batch=chunk))
    batch = setup.batch(4, seed=1)
    view = setup.prior.center()
    zero = setup.targets.zero()
    step = Step(batch, view, zero, setup.network, setup.prior, setup.objective)
    ratio = step.gradient_ratio()
    norms = []
    for weight in (0.0, 1.0):
        step = Step(batch, view, zero, setup.network, setup.prior, setup.objective)
        step.backward(weight)
        assert batch.canvas.grad is not None
        norms.append(batch.canvas.grad.clone())
    expected = norms[0].norm() / (norms[1] - norms[0]).norm()
    assert ratio == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize("chunk", [None, 2])
def test_a_step_whose_ratio_was_measured_is_the_same_step(
    small: Model, chunk: int | None
) -> None:
    setup = Setup(replace(small, fixed_batch=chunk))
    batch, view, zero = setup.batch(4, seed=1), setup.prior.center(), setup.targets.zero()
    found = []
    for measured in (False, True):
        step = Step(batch, view, zero, setup.network, setup.prior, setup.objective)
        if measured:
            step.gradient_ratio()
        own, terms = step.backward(0.3)
        assert batch.canvas.grad is not None
        found.append((batch.canvas.grad.clone(), own.first, terms))
    scale = found[0][0].abs().max().item()
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-5 * scale)
    torch.testing.assert_close(found[1][1], found[0][1])
    assert found[1][2] == pytest.approx(found[0][2], rel=1e-5)


def test_folded_batch_normalization_gives_the_same_gradient(small: Model) -> None:
    setup = Setup(small)
    folded, taps = fold_taps(small, setup.targets.sites)
    assert len(taps) == 2
    through = SiteTargets(setup.targets.sites, CPU, taps)
    network = Network(
        folded, [*through.tensors, *HEADS], Preprocessing(mean=(0.5,), std=(0.5,)), CPU
    )
    batch, view, zero = setup.batch(4, seed=1), setup.prior.center(), setup.targets.zero()
    found = []
    for seen, targets in ((setup.network, setup.targets), (network, through)):
        objective = DghObjective(targets=targets, heads=HEADS)
        step = Step(batch, view, zero, seen, setup.prior, objective)
        own, terms = step.backward(0.3)
        assert batch.canvas.grad is not None
        found.append((batch.canvas.grad.clone(), own, terms))
    scale = found[0][0].abs().max().item()
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-5 * scale)
    for part in ("count", "first", "second"):
        one, other = (getattr(own, part) for _, own, _ in found)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * one.abs().max().item())
    assert found[1][2] == pytest.approx(found[0][2], rel=1e-5)


def test_bfloat16_steps_point_where_float32_steps_do(small: Model) -> None:
    setup = Setup(small)
    low = Network(
        small,
        [*setup.targets.tensors, *HEADS],
        Preprocessing(mean=(0.5,), std=(0.5,)),
        CPU,
        precision="bfloat16",
    )
    batch, view, zero = setup.batch(4, seed=1), setup.prior.center(), setup.targets.zero()
    found = []
    for network in (setup.network, low):
        step = Step(batch, view, zero, network, setup.prior, setup.objective)
        found.append((step.backward(0.3), batch.canvas.grad))
    (exact, gradient), (rough, other) = found
    assert gradient is not None
    assert other is not None
    assert float(torch.cosine_similarity(gradient.flatten(), other.flatten(), dim=0)) > 0.99
    assert rough[1]["total"] == pytest.approx(exact[1]["total"], rel=0.02)
    assert rough[0].first.dtype == torch.float64
    assert not torch.equal(gradient, other)


def run(
    model: Model,
    folder: Path,
    sizes: tuple[int, ...],
    iterations: int,
    objective: Objective | None = None,
    **options: Any,
) -> list[torch.Tensor]:
    setup = Setup(model)
    if objective is not None:
        setup.objective = objective
    how = {"learning_rate": 4.0, "output_weight": None, "output_ratio": 0.2, **options}
    with open_store(
        folder / "x",
        sizes=sizes,
        canvas_shape=setup.prior.canvas_shape,
        num_statistics=len(setup.targets.center),
        device=CPU,
    ) as store:
        generator = torch.Generator().manual_seed(0)
        settings = OptimizeSettings(iterations=iterations, **how)
        optimize(store, setup.network, setup.prior, setup.objective, settings, generator)
        return [store.get(index).canvas.detach().clone() for index in range(len(sizes))]


def test_radam_state_travels_with_the_batch(small: Model, tmp_path: Path) -> None:
    """With one batch the loop must do what torch's RAdam does on a tensor that stays."""
    setup = Setup(small)
    generator = torch.Generator().manual_seed(0)
    canvas = setup.prior.start(6, generator).requires_grad_()
    optimizer = torch.optim.RAdam([canvas], lr=4.0)
    weight = None
    for iteration in range(12):
        torch.randperm(1, generator=generator)
        view = setup.prior.draw(generator, 6)
        zeros = torch.zeros_like(canvas)
        batch = Batch(canvas, zeros, zeros, setup.targets.zero())
        zero = setup.targets.zero()
        step = Step(batch, view, zero, setup.network, setup.prior, setup.objective)
        if iteration % 10 == 0:
            new = 0.2 * step.gradient_ratio()
            weight = new if weight is None else (weight + new) / 2
        assert weight is not None
        step.backward(weight)
        optimizer.step()
    found = run(small, tmp_path, (6,), 12)[0]
    torch.testing.assert_close(found, canvas.detach(), rtol=1e-5, atol=1e-5)


def test_every_batch_is_optimized(small: Model, tmp_path: Path) -> None:
    start, end = run(small, tmp_path, (4, 4, 3), 0), run(small, tmp_path, (4, 4, 3), 8)
    assert [len(canvas) for canvas in end] == [4, 4, 3]
    for before, after in zip(start, end, strict=True):
        assert ((before - after).abs() > 1e-3).float().mean() > 0.9


def test_a_batch_alone_is_optimized_as_if_there_were_no_other(
    small: Model, tmp_path: Path
) -> None:
    """With a scope of one batch the first batch's path does not depend on the second one's."""

    class Still(DghObjective):
        """No gradient from the images of the second batch."""

        def measure(self, values: Mapping[str, torch.Tensor], first: int) -> Sums:
            sums = super().measure(values, first)
            return sums if first == 0 else sums.detach()

        def images(self, values: Mapping[str, torch.Tensor], first: int) -> torch.Tensor:
            return 0 * values["c1"].sum()

    for scope, alike in ((1, True), (0, False)):
        ends = []
        for kind in (DghObjective, Still):
            objective = kind(targets=Setup(small).targets)
            ends.append(run(small, tmp_path, (4, 4), 6, objective, scope=scope)[0])
        assert torch.equal(*ends) == alike


@pytest.mark.parametrize(("refresh", "exact"), [(1, True), (0, False)])
def test_refreshed_statistics_give_the_gradient_of_all_images_at_once(
    small: Model, tmp_path: Path, refresh: int, exact: bool
) -> None:
    """After a first step Adam's running mean is a tenth of the gradient that it saw."""
    setup, sizes = Setup(small), (4, 2, 3)
    objective = DghObjective(targets=setup.targets)
    settings = OptimizeSettings(
        iterations=1, learning_rate=1e-9, optimizer="adam", refresh=refresh
    )
    with open_store(
        tmp_path / "x",
        sizes=sizes,
        canvas_shape=setup.prior.canvas_shape,
        num_statistics=len(setup.targets.center),
        device=CPU,
    ) as store:
        generator = torch.Generator().manual_seed(0)
        optimize(store, setup.network, setup.prior, objective, settings, generator)
        found = [store.get(index).first_moment.clone() * 10 for index in range(len(sizes))]

    generator = torch.Generator().manual_seed(0)
    canvases = [setup.prior.start(size, generator).requires_grad_() for size in sizes]
    order = torch.randperm(len(sizes), generator=generator).tolist()
    images = {}
    for index in order:
        view = setup.prior.draw(generator, sizes[index])
        images[index] = setup.prior.render(canvases[index], view)
    everything = torch.cat([images[index] for index in range(len(sizes))])
    setup.objective = objective
    setup.full_loss(everything, slice(0), 0.0).backward()
    close = []
    for gradient, canvas in zip(found, canvases, strict=True):
        assert canvas.grad is not None
        scale = canvas.grad.abs().max().item()
        close.append(torch.allclose(gradient, canvas.grad, rtol=1e-3, atol=1e-3 * scale))
    assert all(close) == exact


class Pull(Objective):
    """Every image has its own value for the mean of the first convolution's output."""

    def __init__(self, model: Model) -> None:
        self.targets = Setup(model).targets
        self.seen: list[int] = []

    def images(self, values: Mapping[str, torch.Tensor], first: int) -> torch.Tensor:
        means = values["c1"].mean((1, 2, 3))
        return (means - first - torch.arange(len(means))).square().mean()

    def remember(self, values: Mapping[str, torch.Tensor], first: int) -> None:
        assert not values["c1"].requires_grad
        self.seen += range(first, first + len(values["c1"]))


@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_terms_of_single_images_know_their_image(small: Model, chunk: int | None) -> None:
    setup = Setup(replace(small, fixed_batch=chunk))
    batch, view = setup.batch(5, seed=1), setup.prior.center()
    pull = Pull(small)
    zero = setup.targets.zero()
    step = Step(batch, view, zero, setup.network, setup.prior, pull, first=7)
    _, terms = step.backward(0.0)
    canvas = batch.canvas.detach().clone().requires_grad_()
    images = setup.prior.render(canvas, view)
    means = Setup(small).network.observe(images)["c1"].mean((1, 2, 3))
    loss = (means - torch.arange(7, 12)).square().mean()
    loss.backward()
    assert terms["statistics"] == pytest.approx(loss.item(), rel=1e-5)
    assert canvas.grad is not None
    torch.testing.assert_close(batch.canvas.grad, canvas.grad, rtol=1e-4, atol=1e-6)
    assert pull.seen == [7, 8, 9, 10, 11]


def test_adam_moves_as_torchs_adam_does(small: Model, tmp_path: Path) -> None:
    setup = Setup(small)
    generator = torch.Generator().manual_seed(0)
    canvas = setup.prior.start(3, generator).requires_grad_()
    optimizer = torch.optim.Adam([canvas], lr=0.5)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1, min_lr=1e-4)
    for _ in range(12):
        torch.randperm(1, generator=generator)
        view = setup.prior.draw(generator, 3)
        optimizer.zero_grad()
        values = setup.network.observe(setup.prior.render(canvas, view))
        loss = Pull(small).images(values, 0)
        loss.backward()
        optimizer.step()
        schedule.step(loss.item())
    options = {"optimizer": "adam", "learning_rate": 0.5, "patience": 1}
    found = run(small, tmp_path, (3,), 12, Pull(small), factor=0.1, forgets=False, **options)
    torch.testing.assert_close(found[0], canvas.detach(), rtol=1e-5, atol=1e-5)
    assert optimizer.param_groups[0]["lr"] < 0.5
