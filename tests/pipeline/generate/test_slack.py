from __future__ import annotations

import numpy as np
import pytest
import torch

from graph_tools.batchnorm import BatchNormSite, find_batch_norms
from graph_tools.model import Model
from pipeline.generate.dgh import DghObjective
from pipeline.generate.dsg import DsgObjective
from pipeline.generate.network import Network
from pipeline.generate.single_images import image_errors
from pipeline.generate.slack import Margins, emphasize, global_margins, image_margins
from pipeline.generate.statistics import SiteTargets
from pipeline.generate.zeroq import ZeroqObjective, near_zero
from pipeline.preprocessing import Preprocessing

CPU = torch.device("cpu")


def targets(*channels: int) -> SiteTargets:
    rng = np.random.default_rng(0)
    return SiteTargets(
        [
            BatchNormSite(
                node=f"bn{index}",
                tensor=f"x{index}",
                scale=np.ones(count, np.float32),
                bias=np.ones(count, np.float32),
                mean=rng.normal(size=count).astype(np.float32),
                variance=rng.uniform(0.5, 4, count).astype(np.float32),
                epsilon=1e-5,
            )
            for index, count in enumerate(channels)
        ],
        CPU,
    )


def values(rows: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "x0": torch.randn(rows, 3, 4, 6, generator=generator) * 2,
        "x1": torch.randn(rows, 2, 1, 1, generator=generator),
    }


def reference(
    sites: SiteTargets, observed: dict[str, torch.Tensor]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Per site [N, C]: the published formula by numpy, in float64."""
    offsets, spreads = [], []
    for site in sites.sites:
        array = observed[site.tensor].detach().numpy().astype(np.float64)
        offsets.append(array.mean((2, 3)) - site.mean)
        if array[0, 0].size == 1:
            spreads.append(np.zeros_like(offsets[-1]))
            continue
        std = np.sqrt(array.var((2, 3), ddof=1) + 1e-6)
        spreads.append(std - np.sqrt(site.variance.astype(np.float64) + 1e-6))
    return offsets, spreads


def test_errors_of_single_images_are_the_published_formula() -> None:
    sites, observed = targets(3, 2), values()
    for found, expected in zip(
        image_errors(observed, sites), reference(sites, observed), strict=True
    ):
        np.testing.assert_allclose(found.numpy(), np.concatenate(expected, 1), atol=1e-5)
    loss = ZeroqObjective(targets=sites).images(observed, 0)
    squares = sum((part**2).sum() for kind in reference(sites, observed) for part in kind)
    assert loss.item() == pytest.approx(squares / 5, rel=1e-5)


def test_zeroq_has_the_gradient_of_finite_differences() -> None:
    sites, observed = targets(3, 2), values(2)
    leaf = observed["x0"].clone().requires_grad_()
    objective = ZeroqObjective(targets=sites)
    objective.images({**observed, "x0": leaf}, 0).backward()
    assert leaf.grad is not None
    for place in [(0, 0, 0, 0), (1, 2, 3, 5), (0, 1, 2, 3)]:
        ends = []
        for step in (-1e-3, 1e-3):
            moved = observed["x0"].double().clone()
            moved[place] += step
            parts = reference(sites, {**observed, "x0": moved})
            ends.append(sum((part**2).sum() for kind in parts for part in kind) / 2)
        slope = (ends[1] - ends[0]) / 2e-3
        assert leaf.grad[place].item() == pytest.approx(slope, rel=1e-3, abs=1e-5)


def test_dsg_lets_small_errors_be_and_counts_an_images_own_node_twice() -> None:
    sites, observed = targets(3, 2), values()
    margin = (torch.tensor([0.3] * 3 + [0.6] * 2), torch.tensor([0.4] * 3 + [0.0] * 2))
    objective = DsgObjective(
        targets=sites, margins=Margins(*(part.double() for part in margin)), sites=2
    )
    expected = 0.0
    offsets, spreads = reference(sites, observed)
    for node, (delta, gamma) in enumerate(((0.3, 0.4), (0.6, 0.0))):
        excess = np.maximum(np.abs(offsets[node]) - delta, 0) ** 2
        excess += np.maximum(np.abs(spreads[node]) - gamma, 0) ** 2
        own = (np.arange(7, 12) % 2 == node)[:, None]
        expected += (excess * (1 + own)).sum() / 5
    assert objective.images(observed, 7).item() == pytest.approx(expected, rel=1e-5)


def test_margins_are_quantiles_of_what_gaussian_images_miss(small: Model) -> None:
    sites = SiteTargets(find_batch_norms(small), CPU)
    half = Preprocessing(mean=(0.5,), std=(0.5,))
    network = Network(small, sites.tensors, half, CPU)
    images = torch.randn(12, 3, 12, 10, generator=torch.Generator().manual_seed(0))
    observed = network.observe(images)
    found = image_margins(iter(images.split(5)), network, sites, 0.7)
    offsets, spreads = reference(sites, observed)
    whole = global_margins(iter(images.split(5)), network, sites, 0.7)
    begin = 0
    for site, offset, spread in zip(sites.sites, offsets, spreads, strict=True):
        rows = slice(begin, begin := begin + site.channels)
        for part, errors in ((found.mean, offset), (found.std, spread)):
            np.testing.assert_allclose(part[rows], np.quantile(np.abs(errors), 0.7), rtol=1e-4)
        array = observed[site.tensor].numpy().astype(np.float64)
        error = np.abs(array.mean((0, 2, 3)) - site.mean)
        np.testing.assert_allclose(whole.mean[rows], np.quantile(error, 0.7), rtol=1e-4)
        std = np.sqrt(array.var((0, 2, 3)) + 1e-6)
        error = np.abs(std - np.sqrt(site.variance.astype(np.float64) + 1e-6))
        np.testing.assert_allclose(whole.std[rows], np.quantile(error, 0.7), rtol=1e-4)


def test_dgh_with_margins_does_not_care_below_them() -> None:
    sites = targets(3)
    wide = Margins(torch.full((3,), 9.0).double(), torch.full((3,), 9.0).double())
    narrow = Margins(torch.full((3,), 0.1).double(), torch.full((3,), 0.2).double())
    sums = sites.measure({"x0": values()["x0"]})
    losses = [
        DghObjective(targets=sites, margins=margins, site_balance=0).statistics(sums).item()
        for margins in (wide, narrow)
    ]
    assert losses[0] == 0
    array = values()["x0"].numpy().astype(np.float64)
    mean = np.abs(array.mean((0, 2, 3)) - sites.center.numpy()) - 0.1
    std = np.sqrt(array.var((0, 2, 3)) + 1e-6) - np.sqrt(sites.variance.numpy() + 1e-6)
    excess = np.maximum(mean, 0) ** 2 + 10 * np.maximum(np.abs(std) - 0.2, 0) ** 2
    assert losses[1] == pytest.approx(excess.mean(), rel=1e-4)


def test_an_image_follows_its_own_node_twice_as_far() -> None:
    sites, observed = targets(3, 2), values(4)
    leaves = {name: value.clone().requires_grad_() for name, value in observed.items()}
    louder = emphasize(leaves, sites.sites, 3)  # images 3, 4, 5, 6
    for name, own in (("x0", [1, 2, 1, 2]), ("x1", [2, 1, 2, 1])):
        assert torch.equal(louder[name], observed[name])
        louder[name].sum().backward()
        weight = torch.tensor(own).view(-1, 1, 1, 1)
        torch.testing.assert_close(leaves[name].grad, torch.ones_like(observed[name]) * weight)


def test_zeroq_starts_near_zero() -> None:
    start = near_zero(4, (3, 16, 16), torch.Generator().manual_seed(0))
    assert start.abs().max() <= 127.5 / 5418.75
    assert start.std().item() == pytest.approx(0.0136, rel=0.05)
