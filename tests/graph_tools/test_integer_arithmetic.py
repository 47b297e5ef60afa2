"""Integer arithmetic against Python's fractions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graph_tools.errors import IntegerOverflowError
from graph_tools.integer.arithmetic import (
    Fixed,
    add,
    bits_of,
    divide,
    from_float,
    log2_exact,
    multiply,
    requantize,
    require_bits,
    subtract,
)

MANTISSA = st.integers(-(2**31), 2**31 - 1)
EXPONENT = st.integers(-30, 10)


def fixed(mantissas, exponent, divisor=1) -> Fixed:
    return Fixed(
        mantissa=np.asarray(mantissas, np.int64),
        exponent=np.asarray(exponent, np.int64),
        divisor=np.asarray(divisor, np.int64),
    )


def exact(value: Fixed) -> list[Fraction]:
    parts = np.broadcast_arrays(value.mantissa, value.exponent, value.divisor)
    return [
        Fraction(int(m)) * Fraction(2) ** int(e) / int(d)
        for m, e, d in zip(*(part.reshape(-1) for part in parts), strict=True)
    ]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(MANTISSA, min_size=1, max_size=8),
    EXPONENT,
    EXPONENT,
    st.sampled_from([1, 1, 3, 7, 49, 64]),
    st.sampled_from([(-128, 127, 0), (0, 255, 0), (0, 255, 128), (-(2**15), 2**15 - 1, 0)]),
)
def test_requantization_rounds_half_to_even_and_saturates(
    mantissas, exponent, target, divisor, limits
):
    low, high, zero = limits
    value = fixed(mantissas, exponent, divisor)
    try:
        found = requantize(value, np.asarray(target), low=low, high=high, zero_point=zero)
    except IntegerOverflowError:
        assert divisor != 1  # shifts alone never leave 64 bits
        return
    steps = [number / Fraction(2) ** target for number in exact(value)]
    assert found.tolist() == [min(max(round(s) + zero, low), high) for s in steps]


def test_halves_go_to_even():
    found = requantize(
        fixed([-6, -5, -3, -2, -1, 1, 2, 3, 5, 6], 0), np.asarray(1), low=-128, high=127
    )
    assert found.tolist() == [-3, -2, -2, -1, 0, 0, 1, 2, 2, 3]


def test_each_channel_has_its_own_shift():
    value = Fixed(mantissa=np.array([[24, 24, 24]]), exponent=np.array([[-4, -3, 2]]))
    found = requantize(value, np.asarray(0), low=-128, high=127)
    assert found.tolist() == [[2, 3, 96]]  # 1.5 goes to 2


@settings(max_examples=60, deadline=None)
@given(MANTISSA, EXPONENT, st.integers(1, 49), MANTISSA, EXPONENT, st.integers(1, 49))
def test_operations_are_exact_or_refused(m1, e1, d1, m2, e2, d2):
    first, second = fixed([m1], e1, d1), fixed([m2], e2, d2)
    (a,), (b,) = exact(first), exact(second)
    operations = [(add, a + b), (subtract, a - b), (multiply, a * b)]
    if m2:
        operations.append((divide, a / b))
    for operation, expected in operations:
        try:
            (found,) = exact(operation(first, second))
        except IntegerOverflowError:
            continue
        assert found == expected, operation


@settings(max_examples=60, deadline=None)
@given(
    st.integers(-(2**15), 2**15),
    st.integers(-8, 0),
    st.integers(-(2**15), 2**15),
    st.integers(-8, 0),
)
def test_what_fits_is_not_refused(m1, e1, m2, e2):
    (found,) = exact(add(fixed([m1], e1), fixed([m2], e2)))
    assert found == Fraction(m1) * Fraction(2) ** e1 + Fraction(m2) * Fraction(2) ** e2


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=1))
def test_a_float_is_its_own_fraction(values):
    found = from_float(np.asarray(values, np.float32))
    assert exact(found) == [Fraction(value) for value in values]
    assert found.to_float().tolist() == values


def test_floats_share_a_power_of_two():
    found = from_float(np.float32([0.0, 6.0, -0.375]))
    assert (found.mantissa.tolist(), int(found.exponent)) == ([0, 48, -3], -3)
    assert from_float(np.zeros(2, np.float32)).mantissa.tolist() == [0, 0]


def test_floats_too_far_apart_are_refused():
    with pytest.raises(IntegerOverflowError):
        from_float(np.float32([1e30, 1e-30]))


@settings(max_examples=60, deadline=None)
@given(st.integers(-(2**40), 2**40))
def test_bits_are_those_of_twos_complement(number):
    needed = bits_of(np.asarray([number]))
    assert -(2 ** (needed - 1)) <= number < 2 ** (needed - 1)
    if needed > 1:
        assert not -(2 ** (needed - 2)) <= number < 2 ** (needed - 2)


def test_the_accumulator_ends_where_int32_ends():
    require_bits(np.array([2**31 - 1, -(2**31)]), 32)
    for beyond in (2**31, -(2**31) - 1):
        with pytest.raises(IntegerOverflowError, match="33 bits"):
            require_bits(np.array([beyond]), 32)


def test_only_powers_of_two_have_an_exponent():
    assert log2_exact(np.float32([0.25, 8.0])).tolist() == [-2, 3]
    for scale in (0.3, 0.0, -2.0, np.inf):
        assert log2_exact(np.float32(scale)) is None
