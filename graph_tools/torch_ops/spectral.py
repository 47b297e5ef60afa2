"""Fourier transforms and the windows that go with them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from graph_tools.torch_ops.dtypes import torch_type
from graph_tools.torch_ops.registry import OPERATORS, Compute, Node, Operator, operator

__all__ = ["fourier_transform", "short_time_fourier_transform"]

# Coefficients of 1, cos(2 pi n / N) and cos(4 pi n / N).
_WINDOWS = {
    "HannWindow": (0.5, -0.5, 0.0),
    "HammingWindow": (25 / 46, -21 / 46, 0.0),
    "BlackmanWindow": (0.42, -0.5, 0.08),
}


def _window(coefficients: tuple[float, float, float]) -> Callable[[Node], Compute]:
    def build(node: Node) -> Compute:
        size_input, periodic = node.ints_input(0), node.flag("periodic", default=True)
        dtype = torch_type(node.integer("output_datatype", 1))

        def compute(size: torch.Tensor) -> torch.Tensor:
            (length,) = size_input(size) or (0,)
            steps = length if periodic else max(length - 1, 1)
            angle = 2 * torch.pi * torch.arange(length, dtype=torch.float64) / steps
            constant, first, second = coefficients
            return (constant + first * angle.cos() + second * (2 * angle).cos()).to(dtype)

        return compute

    return build


for _name, _coefficients in _WINDOWS.items():
    OPERATORS[_name] = Operator(build=_window(_coefficients), host=frozenset({0}))


@operator("DFT", host=(1, 2))
def fourier_transform(node: Node) -> Compute:
    """Discrete Fourier transform along an axis.

    The last axis of length 2 holds real and imaginary part, of length 1 the real part only.
    The axis to transform is an attribute before opset 20 and an input since.
    """
    length_input, axis_input = node.ints_input(1), node.ints_input(2)
    default = node.integer("axis", 1) if node.opset < 20 else -2
    inverse, onesided = node.flag("inverse"), node.flag("onesided")

    def compute(
        x: torch.Tensor,
        length: torch.Tensor | None = None,
        axis: torch.Tensor | None = None,
    ) -> torch.Tensor:
        (along,) = axis_input(axis) or (default,)
        along %= x.dim()
        (count,) = length_input(length) or (None,)
        if inverse and onesided:
            signal = torch.view_as_complex(x.contiguous())
            real: torch.Tensor = torch.fft.irfft(signal, count, along)
            return real.unsqueeze(-1)
        if x.shape[-1] == 2:
            signal = torch.view_as_complex(x.contiguous())
        else:
            signal = x.squeeze(-1)
        transform = torch.fft.ifft if inverse else torch.fft.fft
        result = torch.view_as_real(transform(signal, count, along).resolve_conj())
        return result.narrow(along, 0, result.shape[along] // 2 + 1) if onesided else result

    return compute


@operator("STFT", host=(1, 3))
def short_time_fourier_transform(node: Node) -> Compute:
    """Fourier transforms of overlapping, windowed frames of a signal ``[N, length, 1 or 2]``."""
    step_input, length_input = node.ints_input(1), node.ints_input(3)
    onesided = node.flag("onesided", default=True)

    def compute(
        x: torch.Tensor,
        step: torch.Tensor,
        window: torch.Tensor | None = None,
        length: torch.Tensor | None = None,
    ) -> torch.Tensor:
        (hop,) = step_input(step) or (1,)
        default = x.shape[1] if window is None else len(window)
        (size,) = length_input(length) or (default,)
        complex_input = x.dim() == 3 and x.shape[-1] == 2
        signal = (
            torch.view_as_complex(x.contiguous()) if complex_input else x.reshape(x.shape[:2])
        )
        frames = signal.unfold(1, size, hop)
        frames = frames if window is None else frames * window
        result = torch.view_as_real(torch.fft.fft(frames))
        return result.narrow(2, 0, size // 2 + 1) if onesided else result

    return compute
