"""The loss of method prior: what it rewards, and what it holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graph_tools.batchnorm import BatchNormSite
from graph_tools.model import Model
from pipeline.generate.diversity import DiversityObjective, find_features, measure_start
from pipeline.generate.network import PIXELS, Network
from pipeline.generate.statistics import SiteTargets, Sums
from pipeline.preprocessing import Preprocessing

CPU = torch.device("cpu")


def site(name: str, variance: list[float]) -> BatchNormSite:
    zeros = np.zeros(len(variance), np.float32)
    return BatchNormSite(
        node=name,
        tensor=name,
        scale=zeros + 1,
        bias=zeros,
        mean=zeros,
        variance=np.array(variance, np.float32),
        epsilon=1e-6,
    )


def sums(mean: torch.Tensor, variance: torch.Tensor) -> Sums:
    count = torch.full_like(mean, 100)
    return Sums(count, count * mean, count * (variance + mean.square()))


def objective(*sites: BatchNormSite, weight: float = 0.1) -> DiversityObjective:
    return DiversityObjective(targets=SiteTargets(sites, CPU), weight=weight, spans={"y": 2.0})


def test_loss_is_zero_at_the_start_and_quiet_channels_gain_most() -> None:
    loss = objective(site("a", [4.0, 0.25, 0.0]))
    variance = loss.targets.variance.clone().requires_grad_()
    value = loss.statistics(sums(torch.zeros(3, dtype=torch.float64), variance))
    assert value.item() == pytest.approx(0, abs=1e-12)
    (slope,) = torch.autograd.grad(value, variance)
    assert (slope < 0).all()
    assert slope[2].abs() > 100 * slope[1].abs() > 1000 * slope[0].abs()


def test_means_are_held_in_units_of_their_deviation() -> None:
    loss = objective(site("a", [4.0, 1.0]), weight=1e-9)
    mean = torch.tensor([2.0, 0.0], dtype=torch.float64)
    value = loss.statistics(sums(mean, loss.targets.variance))
    assert value.item() == pytest.approx(0.5, rel=0.01)


def test_pixels_are_held_and_not_rewarded() -> None:
    loss = objective(site(PIXELS, [1.0]))
    zero = torch.zeros(1, dtype=torch.float64)
    for factor in (0.5, 2.0):
        assert loss.statistics(sums(zero, factor * loss.targets.variance)).item() > 0.1


def test_outputs_are_stretched_up_to_their_span() -> None:
    loss = objective(site("a", [1.0]))
    values = torch.tensor([[0.0, 1.0], [0.0, 4.0], [0.0, 9.0]], requires_grad=True)
    value = loss.output({"y": values})
    assert value.item() == pytest.approx(-(1 / 4 + 1 + 1) / 3)
    (slope,) = torch.autograd.grad(value, values)
    assert slope[0].tolist() == pytest.approx([1 / 12, -1 / 12])
    assert not slope[2].any()


def test_features_are_what_weighted_nodes_compute(small: Model) -> None:
    features = find_features(small)
    assert [one.tensor for one in features] == [PIXELS, "c1", "c2", "g"]
    assert [one.channels for one in features] == [3, 8, 6, 5]


def test_the_start_is_measured_exactly(small: Model) -> None:
    given = Preprocessing(mean=(0.5,), std=(0.5,))
    network = Network(small, ["c1", "c2", "g"], given, CPU)
    images = torch.randn(7, 3, 12, 10, generator=torch.Generator().manual_seed(0))
    targets, spans = measure_start(
        torch.split(images, 3), network, find_features(small), ["g"]
    )
    with torch.no_grad():
        values = network.observe(images)
    for one in targets.sites:
        value = values[one.tensor].double()
        dims = [axis for axis in range(value.dim()) if axis != 1]
        np.testing.assert_allclose(one.mean, value.mean(dims), atol=1e-5)
        np.testing.assert_allclose(one.variance, value.var(dims, correction=0), rtol=1e-4)
    span = (values["g"].amax(1) - values["g"].amin(1)).mean()
    assert spans == {"g": pytest.approx(float(span), rel=1e-5)}
