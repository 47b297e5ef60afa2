"""Exact numbers on integers: a mantissa, a power of two, and a divisor where means are taken.

Every finite float32 is one, so bounds and constants of a graph are exact, too. Integers are 64
bits wide while an operator computes, and each result is checked against the accumulator (32 bits
unless told otherwise) by whoever runs the operator: nothing wraps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from graph_tools.errors import IntegerOverflowError

__all__ = [
    "Fixed",
    "Integers",
    "add",
    "align",
    "bits_of",
    "divide",
    "from_float",
    "log2_exact",
    "multiply",
    "requantize",
    "require_bits",
    "subtract",
]

Integers = npt.NDArray[np.int64]

_WIDE = 62  # bits that an intermediate in int64 may take
_ONE = np.asarray(1, np.int64)


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """The tensor ``mantissa * 2**exponent / divisor``, exactly.

    Attributes:
        mantissa: int64, in the tensor's shape.
        exponent: int64, a scalar or of the mantissa's rank, to broadcast against it.
        divisor: positive, as ``exponent``; 1 unless a mean or a quotient was taken.
        span: smallest and largest mantissa that the tensor's type can hold; None when unknown.
    """

    mantissa: Integers
    exponent: Integers
    divisor: Integers = field(default_factory=lambda: _ONE)
    span: tuple[int, int] | None = None

    def moved(self, move: Callable[[Integers], Integers]) -> Fixed:
        """The tensor with its elements moved; ``move`` takes and returns an array."""
        exponent, divisor = (
            values if values.ndim == 0 else move(np.broadcast_to(values, self.shape))
            for values in (self.exponent, self.divisor)
        )
        return replace(self, mantissa=move(self.mantissa), exponent=exponent, divisor=divisor)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return self.mantissa.shape

    def to_float(self) -> npt.NDArray[np.float32]:
        """The values, rounded to float32 where 24 bits do not hold them."""
        exact = np.ldexp(self.mantissa.astype(np.float64), self.exponent.astype(np.int32))
        return np.asarray(exact / self.divisor, np.float32)


def from_float(values: npt.ArrayLike) -> Fixed:
    """Finite float32 values, exactly, over their smallest power of two.

    Raises:
        IntegerOverflowError: they are too far apart for 62 bits.
    """
    array = np.asarray(values, np.float64)
    fraction, exponent = np.frexp(array)
    mantissa = np.ldexp(fraction, 24).astype(np.int64)
    exponent = exponent.astype(np.int64) - 24
    lowest = mantissa & -mantissa
    trailing = np.where(mantissa == 0, 0, np.frexp(lowest.astype(np.float64))[1] - 1)
    mantissa >>= trailing
    exponent = np.where(mantissa == 0, np.iinfo(np.int64).max, exponent + trailing)
    least = int(exponent.min(initial=np.iinfo(np.int64).max))
    if least == np.iinfo(np.int64).max:
        return Fixed(mantissa=np.zeros(array.shape, np.int64), exponent=np.asarray(0))
    shift = np.where(mantissa == 0, 0, exponent - least)
    return Fixed(mantissa=_up(mantissa, shift), exponent=np.asarray(least, np.int64))


def bits_of(values: Integers) -> int:
    """Width of the two's complement that holds all of ``values``."""
    high, low = int(values.max(initial=0)), int(values.min(initial=0))
    return 1 + max(high.bit_length(), (-low - 1).bit_length() if low < 0 else 0)


def require_bits(values: Integers, bits: int) -> None:
    """Refuse integers that do not fit.

    Raises:
        IntegerOverflowError: with the bits that are needed.
    """
    if (needed := bits_of(values)) > bits:
        raise IntegerOverflowError(f"needs {needed} bits, the accumulator has {bits}")


def _up(values: Integers, shift: Integers) -> Integers:
    """``values << shift``, checked."""
    if np.any(shift):
        most = int(np.max(np.where(values == 0, 0, shift), initial=0))
        if most and bits_of(values) + most > _WIDE:  # perhaps: look at each
            each = np.frexp(np.abs(values).astype(np.float64))[1] + shift
            if int(np.max(np.where(values == 0, 0, each))) >= _WIDE:
                raise IntegerOverflowError(f"a shift by {most} bits leaves 64 bits")
        return np.where(values == 0, 0, values << np.minimum(shift, _WIDE))
    return values


def _times(first: Integers, second: Integers) -> Integers:
    if bits_of(first) + bits_of(second) > _WIDE:
        raise IntegerOverflowError("a product leaves 64 bits")
    return first * second


def align(first: Fixed, second: Fixed) -> tuple[Integers, Integers, Integers, Integers]:
    """Both mantissas over one power of two and one divisor: ``first, second, exponent, divisor``.

    Raises:
        IntegerOverflowError: 64 bits do not hold them.
    """
    exponent = np.minimum(first.exponent, second.exponent)
    a = _up(first.mantissa, first.exponent - exponent)
    b = _up(second.mantissa, second.exponent - exponent)
    if np.array_equal(first.divisor, second.divisor):
        return a, b, exponent, first.divisor
    divisor = _times(first.divisor, second.divisor)
    return _times(a, second.divisor), _times(b, first.divisor), exponent, divisor


def add(first: Fixed, second: Fixed) -> Fixed:
    """Sum; scalars broadcast as in ONNX."""
    a, b, exponent, divisor = align(first, second)
    return Fixed(mantissa=a + b, exponent=exponent, divisor=divisor)


def subtract(first: Fixed, second: Fixed) -> Fixed:
    """Difference."""
    return add(first, replace(second, mantissa=-second.mantissa))


def multiply(first: Fixed, second: Fixed) -> Fixed:
    """Product."""
    return Fixed(
        mantissa=_times(first.mantissa, second.mantissa),
        exponent=first.exponent + second.exponent,
        divisor=_times(first.divisor, second.divisor),
    )


def divide(first: Fixed, second: Fixed) -> Fixed:
    """Quotient, as a divisor.

    Raises:
        ZeroDivisionError: an element of ``second`` is 0.
    """
    if not np.all(second.mantissa):
        raise ZeroDivisionError
    sign = np.sign(second.mantissa)
    return Fixed(
        mantissa=_times(first.mantissa, sign * second.divisor),
        exponent=first.exponent - second.exponent,
        divisor=_times(first.divisor, np.abs(second.mantissa)),
    )


def requantize(
    value: Fixed, exponent: Integers, *, low: int, high: int, zero_point: int = 0
) -> Integers:
    """Integers over ``2**exponent``: shift, round half to even, add the zero point, saturate.

    QuantizeLinear of ONNX. Without a divisor it is a shift alone; with one, one integer division.

    Args:
        value: the tensor.
        exponent: of the scale.
        low: smallest integer, zero point included.
        high: largest.
        zero_point: added after rounding.
    """
    shift = value.exponent - exponent
    limit = np.int64(max(abs(low), abs(high)) + abs(zero_point) + 1)
    down = np.minimum(np.maximum(-shift, 0), _WIDE)
    up = np.minimum(np.maximum(shift, 0), 40)
    if np.all(value.divisor == 1):
        # What saturates may be cut off before it is shifted up.
        raised = np.where(shift > 0, np.clip(value.mantissa, -limit, limit), value.mantissa)
        rounded = _shift_down(raised << up, down)
    else:
        numerator = _up(value.mantissa, up)
        # 2**62 in the divisor rounds all that it is for to zero, as any larger one does.
        wide = np.log2(value.divisor.astype(np.float64)) + down
        if float(np.max(wide)) >= _WIDE:
            raise IntegerOverflowError("a quotient leaves 64 bits")
        rounded = _round_quotient(numerator, value.divisor << down)
    rounded = np.asarray(rounded)  # sums of a single number are none
    found: Integers = np.clip(rounded, low - zero_point, high - zero_point, out=rounded)
    return np.add(found, zero_point, out=found)


def _shift_down(values: Integers, shift: Integers) -> Integers:
    """``values / 2**shift``, round half to even."""
    if not np.any(shift):
        return values.copy()
    # Just less than a half is added, and one more where the floor is odd.
    odd = values >> shift
    odd &= shift > 0
    odd += np.where(shift > 0, (_ONE << np.maximum(shift - 1, 0)) - 1, 0)
    odd += values
    odd >>= shift
    return odd


def _round_quotient(numerator: Integers, divisor: Integers) -> Integers:
    """``numerator / divisor``, round half to even; the divisor is positive."""
    floor = numerator // divisor
    rest = numerator - floor * divisor
    other = divisor - rest
    up = (rest > other) | ((rest == other) & (floor & 1 == 1))
    result: Integers = floor + up
    return result


def log2_exact(scale: npt.NDArray[Any]) -> Integers | None:
    """Exponents of scales; None when one is no power of two."""
    fraction, exponent = np.frexp(np.asarray(scale, np.float64))
    if not np.all(fraction == 0.5):
        return None
    return np.asarray(exponent, np.int64) - 1
