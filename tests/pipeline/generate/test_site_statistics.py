from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graph_tools.batchnorm import BatchNormSite
from pipeline.generate.statistics import SiteTargets, Sums, moments

CPU = torch.device("cpu")


def site(tensor: str, mean: np.ndarray, variance: np.ndarray) -> BatchNormSite:
    mean, variance = mean.astype(np.float32), variance.astype(np.float32)
    one = np.ones_like(mean)
    return BatchNormSite(
        node=f"bn_{tensor}",
        tensor=tensor,
        scale=one,
        bias=one,
        mean=mean,
        variance=variance,
        epsilon=1e-5,
    )


@pytest.mark.parametrize("shape", [(5, 3, 7, 9), (4, 6), (3, 4, 11), (40, 2, 33, 35)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_moments_are_those_of_numpy(shape: tuple[int, ...], channels_last: bool) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3 + 20
    if channels_last and len(shape) == 4:
        values = values.contiguous(memory_format=torch.channels_last)
    mean, variance = moments(values)
    axes = tuple(axis for axis in range(len(shape)) if axis != 1)
    exact = values.double().numpy()
    np.testing.assert_allclose(mean, exact.mean(axes), rtol=1e-6)
    np.testing.assert_allclose(variance, exact.var(axes), rtol=3e-6)


def test_gradient_of_moments_is_that_of_finite_differences() -> None:
    values = torch.randn(3, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(moments, values)


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_gradient_of_moments_is_that_of_var_mean(format: torch.memory_format) -> None:
    values = torch.randn(6, 4, 8, 8).contiguous(memory_format=format).requires_grad_()
    weights = torch.randn(2, 4)
    mean, variance = moments(values)
    ours = torch.autograd.grad((weights[0] * mean + weights[1] * variance).sum(), values)[0]
    variance, mean = torch.var_mean(values, dim=(0, 2, 3), correction=0)
    theirs = torch.autograd.grad((weights[0] * mean + weights[1] * variance).sum(), values)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-8)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    offset=st.floats(-1e3, 1e3),
    seed=st.integers(0, 2**31 - 1),
)
def test_batches_of_any_sizes_give_the_moments_of_one_pass(
    sizes: list[int], offset: float, seed: int
) -> None:
    """Also for values that lie ten thousand sigmas from the center."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(sum(sizes), 3, 4, 5, generator=generator, dtype=torch.float64)
    images = images * torch.tensor([0.1, 1.0, 7.0]).view(1, 3, 1, 1) + offset
    targets = SiteTargets([site("x", np.zeros(3), np.ones(3))], CPU)
    total = targets.zero()
    for batch in images.split(sizes):
        total = total + targets.measure({"x": batch})
    mean, variance = total.moments()
    variances, means = torch.var_mean(images, dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(mean, means, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(variance, variances, rtol=1e-6, atol=1e-9)


def test_many_updates_of_a_running_total_leave_no_trace() -> None:
    generator = torch.Generator().manual_seed(0)
    targets = SiteTargets([site("x", np.full(4, 30.0), np.ones(4))], CPU)

    def draw(size: int) -> torch.Tensor:
        return torch.randn(size, 4, 3, 3, generator=generator) * 2 + 31

    batches = [draw(size) for size in (8, 8, 3)]
    own = [targets.measure({"x": batch}) for batch in batches]
    total = own[0] + own[1] + own[2]
    for step in range(300):
        index = step % 3
        batches[index] = draw(len(batches[index]))
        new = targets.measure({"x": batches[index]})
        total, own[index] = total - own[index] + new, new
    mean, variance = total.moments()
    exact = torch.cat(batches).double()
    variances, means = torch.var_mean(exact, dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(mean + 30, means, rtol=1e-6, atol=0)
    torch.testing.assert_close(variance, variances, rtol=1e-6, atol=0)


def test_errors_are_in_sigmas_of_each_site() -> None:
    sites = [
        site("x", np.array([1.0, -2.0]), np.array([4.0, 9.0])),
        site("y", np.array([0.0, 0.0, 5.0]), np.array([1.0, 1.0, 100.0])),
    ]
    targets = SiteTargets(sites, CPU)
    wave = torch.tensor([-1.0, 1.0]).view(2, 1, 1)  # mean 0, variance 1
    x = wave * torch.tensor([2.0, 6.0]).view(1, 2, 1) + torch.tensor([1.0, 1.0]).view(1, 2, 1)
    y = wave * torch.tensor([1.0, 1.0, 5.0]).view(1, 3, 1) + torch.tensor([0, 0, 35.0]).view(
        1, 3, 1
    )
    errors = targets.errors(targets.measure({"x": x, "y": y}))
    expected = [(np.sqrt(1 / 2), np.sqrt(1 / 2)), (np.sqrt(9 / 3), np.sqrt(0.25 / 3))]
    np.testing.assert_allclose(errors, expected, rtol=1e-4)
    match = targets.match(targets.measure({"x": x, "y": y}), targets.measure({"x": x, "y": y}))
    assert [(row.node, row.tensor, row.channels) for row in match] == [
        ("bn_x", "x", 2),
        ("bn_y", "y", 3),
    ]


def test_two_sites_may_share_a_tensor() -> None:
    sites = [site("x", np.zeros(2), np.ones(2)), site("x", np.ones(2), np.ones(2))]
    targets = SiteTargets(sites, CPU)
    mean, _ = targets.measure({"x": torch.ones(4, 2, 3, 3)}).moments()
    np.testing.assert_allclose(mean, [1, 1, 0, 0])


def test_the_first_site_that_is_not_finite_is_found() -> None:
    sites = [site(name, np.zeros(2), np.ones(2)) for name in "xyz"]
    targets = SiteTargets(sites, CPU)
    values = {name: torch.ones(2, 2, 3, 3) for name in "xyz"}
    assert targets.first_non_finite(targets.measure(values)) is None
    values["y"][0, 1, 0, 0] = torch.nan
    values["z"][:] = torch.inf
    found = targets.first_non_finite(targets.measure(values))
    assert found is not None
    assert found.node == "bn_y"


def test_sums_are_additive() -> None:
    one = Sums(*(torch.full((2,), float(value)) for value in (1, 2, 3)))
    both = one + one - one
    assert [both.count[0].item(), both.first[0].item(), both.second[0].item()] == [1, 2, 3]


def test_moments_of_bfloat16_values_are_summed_in_float32() -> None:
    values = (
        torch.randn(7, 5, 40, 30, generator=torch.Generator().manual_seed(1)) * 3 + 2
    ).to(torch.bfloat16)
    for seen in (values, values.contiguous(memory_format=torch.channels_last)):
        mean, variance = moments(seen)
        exact = values.double()
        torch.testing.assert_close(mean, exact.mean((0, 2, 3)), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            variance, exact.var((0, 2, 3), correction=0), rtol=1e-4, atol=0
        )
    mean, variance = moments(values[:1, :, :1, :1])  # one value a channel
    torch.testing.assert_close(mean, values[0, :, 0, 0].double())
    assert not variance.any()
