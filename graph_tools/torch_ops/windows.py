"""The sliding window that convolutions and poolings share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graph_tools.torch_ops.registry import Node

__all__ = ["Padding", "Window", "torch_pads"]

Padding = tuple[tuple[int, ...], tuple[int, ...]]


def torch_pads(begin: Sequence[int], end: Sequence[int]) -> list[int]:
    """Order pads as ``functional.pad`` wants them: last axis first, begin beside end."""
    return [pad for pair in zip(reversed(begin), reversed(end), strict=True) for pad in pair]


@dataclass(frozen=True, kw_only=True)
class Window:
    """A window over ``d`` spatial axes; every tuple has length ``d``.

    Attributes:
        kernel: extent in elements.
        strides: step in elements.
        dilations: distance of neighboring kernel elements.
        begin: explicit padding before each axis.
        end: explicit padding behind each axis.
        auto_pad: ONNX ``auto_pad``; other than ``"NOTSET"`` it overrides begin and end.
        ceil_mode: whether a last window may reach over the end.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begin: tuple[int, ...]
    end: tuple[int, ...]
    auto_pad: str
    ceil_mode: bool

    @classmethod
    def of(cls, node: Node, kernel: Sequence[int]) -> Window:
        """Read a node's attributes, with ONNX's defaults, for a kernel of known extent."""
        rank = len(kernel)
        pads = node.integers("pads") or (0,) * (2 * rank)
        return cls(
            kernel=tuple(kernel),
            strides=node.integers("strides") or (1,) * rank,
            dilations=node.integers("dilations") or (1,) * rank,
            begin=pads[:rank],
            end=pads[rank:],
            auto_pad=node.text("auto_pad", "NOTSET"),
            ceil_mode=node.flag("ceil_mode"),
        )

    @property
    def extents(self) -> tuple[int, ...]:
        """Elements that the dilated kernel spans."""
        return tuple(d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilations, strict=True))

    def padding(self, sizes: Sequence[int]) -> Padding:
        """Return the padding before and behind each axis of an input of spatial ``sizes``."""
        if self.auto_pad == "NOTSET":
            return self.begin, self.end
        if self.auto_pad == "VALID":
            zeros = (0,) * len(sizes)
            return zeros, zeros
        totals = [
            max((-(-size // stride) - 1) * stride + extent - size, 0)
            for size, stride, extent in zip(sizes, self.strides, self.extents, strict=True)
        ]
        small = tuple(total // 2 for total in totals)
        large = tuple(total - total // 2 for total in totals)
        return (large, small) if self.auto_pad == "SAME_LOWER" else (small, large)

    def output_sizes(self, sizes: Sequence[int], padding: Padding) -> tuple[int, ...]:
        """Return how many windows fit; none starts in the padding behind an axis."""
        outputs = []
        for size, extent, stride, begin, end in zip(
            sizes, self.extents, self.strides, *padding, strict=True
        ):
            room = size + begin + end - extent
            count = (-(-room // stride) if self.ceil_mode else room // stride) + 1
            if self.ceil_mode and (count - 1) * stride >= size + begin:
                count -= 1
            outputs.append(count)
        return tuple(outputs)

    def exact_padding(self, sizes: Sequence[int]) -> Padding:
        """Return padding with which floor mode yields exactly the wanted windows.

        The padding behind an axis grows where ``ceil_mode`` lets a window reach over it, and
        shrinks (below zero too) where the last elements are in no window.
        """
        begin, end = self.padding(sizes)
        outputs = self.output_sizes(sizes, (begin, end))
        needed = tuple(
            (count - 1) * stride + extent - size - before
            for count, stride, extent, size, before in zip(
                outputs, self.strides, self.extents, sizes, begin, strict=True
            )
        )
        return begin, needed
