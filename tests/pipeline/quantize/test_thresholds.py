from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.quantize.thresholds import (
    FLOOR,
    activation_exponent,
    ceil_log2,
    weight_exponents,
    weight_scales,
    without_outliers,
)


@pytest.mark.parametrize("metric", ["mse", "no-clipping"])
def test_a_lifted_range_is_searched_as_it_is(metric):
    """-127 steps are out of its reach, 129 are not."""
    for value, more in ((-127.0, 1), (129.0, 0)):
        counts, centers = np.ones(2), np.array(sorted((value, 1.0)))
        kwargs = {"bits": 8, "signed": True, "metric": "no-clipping", "lifted": True}
        assert activation_exponent(centers, counts, **kwargs) == more
    weight = np.array([[-127.0, 127.0, 3.0]], np.float32)
    found = weight_exponents(weight, axis=0, bits=8, metric=metric, lifted=True)
    assert found == ((1,) if metric == "no-clipping" else (0,))


def brute_force(values, bits, signed, power=2):
    """The exponent with the least error of all, the larger on ties."""
    best, best_error = None, np.inf
    for exponent in range(24, -40, -1):
        low = -(2 ** (bits - 1)) if signed else 0
        high = 2 ** (bits - signed) - 1
        quantized = np.clip(np.rint(values / 2.0**exponent), low, high) * 2.0**exponent
        error = (np.abs(quantized - values) ** power).sum()
        if error < best_error:
            best, best_error = exponent, error
    return best


@pytest.mark.parametrize(("value", "expected"), [(1, 0), (1.01, 1), (0.5, -1), (8, 3), (6, 3)])
def test_ceil_log2(value, expected):
    assert ceil_log2(value) == expected


@given(st.integers(0, 2**31), st.sampled_from([2, 4, 8]), st.booleans(), st.floats(1e-3, 1e3))
def test_activation_search_finds_the_brute_force_minimum(seed, bits, signed, spread):
    values = np.random.default_rng(seed).standard_t(3, 300) * spread
    values = values if signed else np.abs(values)
    unique, counts = np.unique(values, return_counts=True)
    found = activation_exponent(unique, counts, bits=bits, signed=signed)
    assert found == brute_force(values, bits, signed)


@given(st.integers(0, 2**31), st.sampled_from([2, 3, 4, 8]), st.sampled_from(["mse", "mae"]))
def test_weight_search_finds_the_brute_force_minimum_of_each_channel(seed, bits, metric):
    weight = np.random.default_rng(seed).normal(size=(4, 3, 3, 3)) * np.array(
        [1.0, 0.01, 30.0, 0.3]
    ).reshape(4, 1, 1, 1)
    found = weight_exponents(weight, axis=0, bits=bits, metric=metric)
    power = 2 if metric == "mse" else 1
    assert found == tuple(brute_force(row, bits, True, power) for row in weight)


def test_no_clipping_takes_the_smallest_scale_that_clips_nothing():
    counts = np.ones(2)
    for high, expected in ((1.0, -7), (127 / 128, -7), (0.99, -7), (255 / 256, -8)):
        exponent = activation_exponent(
            np.array([0.0, high]), counts, bits=8, signed=False, metric="no-clipping"
        )
        assert 2.0**exponent * 255 >= high
        assert 2.0 ** (exponent - 1) * 255 < high
        assert exponent == expected or high in (127 / 128, 0.99)


def test_a_far_outlier_is_clipped_by_mse_and_kept_without_clipping():
    values = np.append(np.random.default_rng(0).normal(size=100_000), 40.0)
    unique, counts = np.unique(values, return_counts=True)
    by_mse = activation_exponent(unique, counts, bits=4, signed=True)
    kept = activation_exponent(unique, counts, bits=4, signed=True, metric="no-clipping")
    assert by_mse < kept


def test_kl_clips_a_far_outlier_and_keeps_a_uniform_tensor():
    normal = np.append(np.random.default_rng(0).normal(size=100_000), 40.0)
    uniform = np.random.default_rng(0).uniform(-1, 1, 100_000)
    for values, expected in ((normal, -1), (uniform, -2)):
        counts, edges = np.histogram(values, 4096)
        centers = (edges[1:] + edges[:-1]) / 2
        found = activation_exponent(centers, counts, bits=4, signed=True, metric="kl")
        assert found == expected


def test_zero_tensors_have_the_floor():
    weight = np.zeros((2, 3))
    assert weight_exponents(weight, axis=0, bits=8) == (ceil_log2(FLOOR) - 6,) * 2
    assert activation_exponent(np.zeros(1), np.zeros(1), bits=8, signed=False) == -24


def test_single_negative_tensor_needs_a_signed_quantizer_of_its_magnitude():
    found = activation_exponent(np.array([-1.0]), np.ones(1), bits=8, signed=True)
    assert -(2**7) * 2.0**found <= -1.0


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_free_scales_are_those_of_a_dense_search(bits):
    weight = np.random.default_rng(bits).standard_t(4, (6, 40)).astype(np.float32)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def error(row, scale):
        return np.square(np.clip(np.rint(row / scale), low, high) * scale - row).sum()

    found = weight_scales(weight, axis=0, bits=bits)
    exponents = weight_exponents(weight, axis=0, bits=bits)
    for row, scale, exponent in zip(weight.astype(np.float64), found, exponents, strict=True):
        largest = np.abs(row).max() / high
        best = min(error(row, s) for s in np.linspace(0.05, 1.3, 3000) * largest)
        # The search has 101 candidates, not 3000, and errors at 8 bits are jagged.
        assert error(row, scale) <= (1.03 if bits < 8 else 1.25) * best
        assert error(row, scale) <= error(row, 2.0**exponent)
        assert np.float32(scale) == scale


def test_a_free_scale_of_a_channel_of_zeros_is_a_number():
    assert np.all(np.array(weight_scales(np.zeros((2, 3), np.float32), axis=0, bits=4)) > 0)


def test_outliers_are_those_of_the_values_themselves():
    values = np.append(np.random.default_rng(0).normal(3, 2, size=10_000), [60.0, -50.0])
    for z in (1.0, 3.0, 24.0, 30.0):
        unique, counts = np.unique(values, return_counts=True)
        kept = unique[without_outliers(unique, counts, z) > 0]
        near = np.abs(values - values.mean()) <= z * values.std()
        assert np.array_equal(kept, np.unique(values[near]))
    assert len(kept) == len(unique)  # of 30 deviations nothing is further


def test_without_outliers_the_smallest_scale_shrinks():
    values = np.append(np.random.default_rng(0).normal(size=10_000), 100.0)
    unique, counts = np.unique(values, return_counts=True)
    for metric in ("no-clipping", "mse"):
        clean = activation_exponent(
            unique, without_outliers(unique, counts, 24.0), bits=8, signed=True, metric=metric
        )
        assert clean == activation_exponent(
            unique[:-1], counts[:-1], bits=8, signed=True, metric=metric
        )


@pytest.mark.parametrize("value", [0.0, 1 / 3, 1e6])
def test_a_constant_tensor_has_no_outliers(value):
    assert without_outliers(np.array([value, 2e6]), np.array([7.0, 0.0]), 1.0).sum() == 7
    assert without_outliers(np.array([value]), np.zeros(1), 24.0).sum() == 0
