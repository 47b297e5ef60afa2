from __future__ import annotations

import numpy as np
import pytest
import torch

from graph_tools.batchnorm import BatchNormSite
from pipeline.generate.dgh import DghObjective
from pipeline.generate.statistics import SiteTargets, Sums

CPU = torch.device("cpu")


def targets(*channels: int, seed: int = 0) -> SiteTargets:
    rng = np.random.default_rng(seed)
    sites = [
        BatchNormSite(
            node=f"bn{index}",
            tensor=f"x{index}",
            scale=np.ones(count, dtype=np.float32),
            bias=np.ones(count, dtype=np.float32),
            mean=rng.normal(size=count).astype(np.float32),
            variance=rng.uniform(0.5, 4, count).astype(np.float32),
            epsilon=1e-5,
        )
        for index, count in enumerate(channels)
    ]
    return SiteTargets(sites, CPU)


def sums(sites: SiteTargets, mean: torch.Tensor, variance: torch.Tensor) -> Sums:
    count = torch.full_like(sites.center, 10.0)
    offset = mean - sites.center
    return Sums(count, count * offset, count * (variance + offset.square()))


@pytest.mark.parametrize("form", ["code", "paper"])
def test_loss_is_zero_at_the_targets(form: str) -> None:
    sites = targets(3, 5)
    objective = DghObjective(targets=sites, form=form)  # type: ignore[arg-type]
    loss = objective.statistics(sums(sites, sites.center, sites.variance))
    assert loss.item() == pytest.approx(0, abs=1e-12)


def test_loss_of_gaussian_activations_of_known_moments_is_zero() -> None:
    sites = targets(4)
    noise = torch.randn(2000, 4, 10, 10, generator=torch.Generator().manual_seed(0)).double()
    noise = (noise - noise.mean((0, 2, 3), keepdim=True)) / noise.std(
        (0, 2, 3), keepdim=True, correction=0
    )
    shape = (1, -1, 1, 1)
    values = noise * sites.variance.sqrt().view(shape) + sites.center.view(shape)
    loss = DghObjective(targets=sites).statistics(sites.measure({"x0": values}))
    assert loss.item() == pytest.approx(0, abs=1e-12)


def test_code_form_is_the_published_formula() -> None:
    sites = targets(3, 5)
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(8, generator=generator).double()
    variance = torch.rand(8, generator=generator).double() + 0.1
    expected = 0.0
    for rows in (slice(0, 3), slice(3, 8)):
        std = (variance[rows] + 1e-6).sqrt() - (sites.variance[rows] + 1e-6).sqrt()
        error = (mean[rows] - sites.center[rows]).square().mean() + 10 * std.square().mean()
        expected += error.item() / 2
    objective = DghObjective(targets=sites, std_weight=10, site_balance=0)
    loss = objective.statistics(sums(sites, mean, variance))
    assert loss.item() == pytest.approx(expected, rel=1e-9)


def test_paper_form_is_equation_4() -> None:
    sites = targets(3, 5)
    mean, variance = torch.zeros(8).double(), torch.ones(8).double()
    expected = sites.center.square().sum() + (1 - sites.variance).square().sum()
    objective = DghObjective(targets=sites, form="paper")
    loss = objective.statistics(sums(sites, mean, variance))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)


def test_full_balance_makes_the_loss_independent_of_a_sites_units() -> None:
    losses = []
    for unit in (1.0, 255.0):
        sites = targets(3)
        sites.center, sites.variance = sites.center * unit, sites.variance * unit**2
        objective = DghObjective(targets=sites, site_balance=1)
        mean = torch.tensor([0.0, 1.0, -1.0]).double() * unit
        losses.append(objective.statistics(sums(sites, mean, mean.square() + unit**2)).item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_output_loss_is_the_range() -> None:
    logits = torch.tensor([[0.0, 3.0, -1.0], [5.0, 5.0, 4.0]])
    linear = DghObjective(targets=targets(1), heads=["y"])
    assert linear.output({"y": logits}).item() == pytest.approx(-(4 + 1) / 2)
    squared = DghObjective(targets=targets(1), heads=["y"], output_range="squared")
    assert squared.output({"y": logits}).item() == pytest.approx(-(16 + 1) / 2)


def test_several_outputs_count_alike() -> None:
    small = torch.tensor([[0.0, 1.0], [0.0, 3.0]], requires_grad=True)
    large = (torch.tensor([[0.0, 1.0], [0.0, 3.0]]) * 1000).requires_grad_()
    objective = DghObjective(targets=targets(1), heads=["a", "b"])
    objective.output({"a": small, "b": large}).backward()
    assert small.grad is not None
    assert large.grad is not None
    torch.testing.assert_close(small.grad * 2, large.grad * 2000)


def test_of_many_elements_more_than_two_are_stretched() -> None:
    values = torch.randn(2, 5000, generator=torch.Generator().manual_seed(0)).requires_grad_()
    objective = DghObjective(targets=targets(1), heads=["y"])
    loss = objective.output({"y": values})
    ordered = values.detach().sort(1).values
    expected = -(ordered[:, -5:].mean(1) - ordered[:, :5].mean(1)).mean()
    torch.testing.assert_close(loss.detach(), expected)
    loss.backward()
    assert values.grad is not None
    assert (values.grad != 0).sum() == 20


def test_hinges_watch_each_image_at_the_last_site() -> None:
    sites = targets(3, 2)
    deviation = sites.variance[3:].sqrt().view(1, 2, 1, 1)
    wave = torch.tensor([-1.0, 1.0]).view(1, 1, 1, 2)
    within = (wave * deviation + sites.center[3:].view(1, 2, 1, 1)).float()
    values = {"x1": torch.cat([within, within + 2]), "y": torch.zeros(2, 3)}
    objective = DghObjective(targets=sites, heads=["y"], output_hinge=0.5)
    # The second image is off by 2 in both channels: 4 - delta, averaged over two images.
    assert objective.output(values).item() == pytest.approx(3.5 / 2, rel=1e-4)
