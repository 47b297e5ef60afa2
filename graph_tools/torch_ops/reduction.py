"""Reductions over axes given as an input (newer opsets), as an attribute, or not at all."""

from __future__ import annotations

from collections.abc import Callable

import torch

from graph_tools.torch_ops.registry import OPERATORS, Compute, Node, Operator, operator

__all__ = ["arg_max", "arg_min", "cumulative_product", "cumulative_sum"]

Axes = tuple[int, ...]
Reduce = Callable[[torch.Tensor, Axes, bool], torch.Tensor]


def _mean(x: torch.Tensor, axes: Axes, keep: bool) -> torch.Tensor:
    if x.dtype.is_floating_point:
        return x.mean(axes, keep)
    count = x.numel() // max(x.sum(axes).numel(), 1)
    return torch.div(x.sum(axes, keep), count, rounding_mode="trunc").to(x.dtype)


def _product(x: torch.Tensor, axes: Axes, keep: bool) -> torch.Tensor:
    dtype = x.dtype
    for axis in sorted(axes, reverse=True):  # torch multiplies along one axis at a time
        x = x.prod(axis, keep, dtype=dtype)
    return x


def _extreme(x: torch.Tensor, axes: Axes, keep: bool, largest: bool) -> torch.Tensor:
    if x.numel():
        return x.amax(axes, keep) if largest else x.amin(axes, keep)
    if x.dtype.is_floating_point:
        fill: float | int = -torch.inf if largest else torch.inf
    elif x.dtype == torch.bool:
        fill = not largest
    else:
        info = torch.iinfo(x.dtype)
        fill = info.min if largest else info.max
    return torch.full_like(x.sum(axes, keep, dtype=x.dtype), fill)


_REDUCTIONS: dict[str, Reduce] = {
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keep, dtype=x.dtype),
    "ReduceL2": lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keep),
    "ReduceLogSum": lambda x, axes, keep: x.sum(axes, keep).log(),
    "ReduceLogSumExp": lambda x, axes, keep: torch.logsumexp(x, axes, keep),
    "ReduceMax": lambda x, axes, keep: _extreme(x, axes, keep, largest=True),
    "ReduceMean": _mean,
    "ReduceMin": lambda x, axes, keep: _extreme(x, axes, keep, largest=False),
    "ReduceProd": _product,
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keep, dtype=x.dtype),
    "ReduceSumSquare": lambda x, axes, keep: x.square().sum(axes, keep, dtype=x.dtype),
}


def _reduction(reduce: Reduce) -> Callable[[Node], Compute]:
    """Give a reduction ONNX's ways to name the axes."""

    def build(node: Node) -> Compute:
        axes_input, attribute = node.ints_input(1), node.integers("axes")
        keep = node.flag("keepdims", default=True)
        noop = node.flag("noop_with_empty_axes")

        def compute(x: torch.Tensor, axes: torch.Tensor | None = None) -> torch.Tensor:
            chosen = axes_input(axes) if node.has(1) else attribute
            if chosen:
                return reduce(x, chosen, keep)
            if (
                noop
            ):  # reduce over no axis: over a new one of length 1, for its elementwise part
                return reduce(x.unsqueeze(0), (0,), False)
            return (
                reduce(x, tuple(range(x.dim())), keep)
                if x.dim()
                else reduce(x[None], (0,), False)
            )

        return compute

    return build


for _name, _reduce in _REDUCTIONS.items():
    OPERATORS[_name] = Operator(build=_reduction(_reduce), host=frozenset({1}))


def _arg_extreme(
    node: Node, find: Callable[[torch.Tensor, int, bool], torch.Tensor]
) -> Compute:
    axis, keep = node.integer("axis", 0), node.flag("keepdims", default=True)
    last = node.flag("select_last_index")

    def compute(x: torch.Tensor) -> torch.Tensor:
        if not last:
            return find(x, axis, keep)
        return x.shape[axis] - 1 - find(x.flip(axis), axis, keep)

    return compute


@operator("ArgMax")
def arg_max(node: Node) -> Compute:
    """Index of the first (or last) maximum along an axis."""
    return _arg_extreme(node, torch.argmax)


@operator("ArgMin")
def arg_min(node: Node) -> Compute:
    """Index of the first (or last) minimum along an axis."""
    return _arg_extreme(node, torch.argmin)


def _cumulative(
    node: Node, run: Callable[[torch.Tensor, int], torch.Tensor], neutral: float
) -> Compute:
    """Run along an axis: from the end with ``reverse``, without the element if exclusive."""
    axis_input = node.ints_input(1)
    exclusive, reverse = node.flag("exclusive"), node.flag("reverse")

    def compute(x: torch.Tensor, axis_value: torch.Tensor) -> torch.Tensor:
        (axis,) = axis_input(axis_value) or (0,)
        x = x.flip(axis) if reverse else x
        if exclusive:
            size = x.shape[axis]
            first = torch.full_like(x.narrow(axis, 0, min(1, size)), neutral)
            x = torch.cat([first, x.narrow(axis, 0, max(size - 1, 0))], axis)
        result = run(x, axis)
        return result.flip(axis) if reverse else result

    return compute


@operator("CumSum", host=(1,))
def cumulative_sum(node: Node) -> Compute:
    """Running sum along an axis."""
    return _cumulative(node, lambda x, axis: x.cumsum(axis, dtype=x.dtype), 0)


@operator("CumProd", host=(1,))
def cumulative_product(node: Node) -> Compute:
    """Running product along an axis."""
    return _cumulative(node, lambda x, axis: x.cumprod(axis, dtype=x.dtype), 1)
