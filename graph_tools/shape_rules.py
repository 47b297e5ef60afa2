"""Spell the target shapes of operators so that they hold for every batch size.

A Reshape says 0 (copy) or -1 (the rest) where the batch goes, an Expand 1, a Slice "to the
end", a Resize names scales or fewer axes, and a constant that repeats one row for each image
keeps that row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx
from onnx import helper, numpy_helper

from graph_tools.shapes import TensorType

__all__ = ["Probe", "Use", "free_constant", "rewrite", "same"]

_INT64_MAX = 2**63 - 1
_BROADCASTING = frozenset(
    "Add And Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mul Or PRelu Pow "
    "Sub Sum Where Xor".split()
)
_Shape = tuple[int, ...]


@dataclass(frozen=True)
class Probe:
    """The graph folded at one batch size."""

    constants: dict[str, np.ndarray]
    types: dict[str, TensorType]

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a tensor if all its dimensions are known."""
        return self.types[name].static if name in self.types else None


@dataclass(frozen=True)
class _Edit:
    """New inputs of a Resize: `value` at `index` alone, perhaps for some axes only."""

    index: int
    value: np.ndarray
    axes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Use:
    """A node's input whose constant value follows the batch, seen at several batch sizes."""

    node: onnx.NodeProto
    index: int
    values: tuple[np.ndarray, ...]
    probes: tuple[Probe, ...]

    def shapes(self, name: str) -> tuple[tuple[int, ...], ...] | None:
        """Return the shape of a tensor at each batch size; None unless all are known."""
        shapes = [probe.shape(name) for probe in self.probes]
        known = tuple(shape for shape in shapes if shape is not None)
        return known if len(known) == len(shapes) else None

    def stack(self) -> np.ndarray | None:
        """Return the 1-D values as rows, one for each batch size."""
        if self.values[0].ndim != 1 or len({v.shape for v in self.values}) != 1:
            return None
        return np.stack(self.values)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays are equal in type, shape and every bit."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def rewrite(graph: onnx.GraphProto, use: Use) -> bool:
    """Give `use` an input that holds for every batch size; return whether that is possible."""
    rule = _RULES.get((use.node.op_type, use.index))
    if use.node.op_type in _BROADCASTING:
        rule = _broadcast
    if rule is None or (result := rule(use)) is None:
        return False
    if isinstance(result, _Edit):
        _edit_resize(graph, use.node, result)
    else:
        _set_target(graph, use.node, use.index, result)
    return True


def _set_target(
    graph: onnx.GraphProto, node: onnx.NodeProto, index: int, value: np.ndarray
) -> None:
    node.input[index] = _add(graph, node.input[index], value)
    kept = [a for a in node.attribute if a.name != "allowzero"]  # 0 copies from here on
    del node.attribute[:]
    node.attribute.extend(kept)


def _edit_resize(graph: onnx.GraphProto, node: onnx.NodeProto, edit: _Edit) -> None:
    base = next(name for name in reversed(node.input) if name)
    del node.input[1:]
    node.input.extend([""] * (edit.index - 1))
    node.input.append(_add(graph, base, edit.value))
    if edit.axes:
        node.attribute.append(helper.make_attribute("axes", edit.axes))


def _add(graph: onnx.GraphProto, base: str, value: np.ndarray) -> str:
    used = {t.name for t in graph.initializer} | {o for n in graph.node for o in n.output}
    name, index = f"{base or 'constant'}/static", 1
    while name in used:
        name, index = f"{base or 'constant'}/static_{index}", index + 1
    graph.initializer.append(numpy_helper.from_array(value, name))
    return name


def _reshape(use: Use) -> np.ndarray | None:
    rows = use.stack()
    sources = use.shapes(use.node.input[0])
    targets = use.shapes(use.node.output[0])
    if rows is None or sources is None or targets is None:
        return None
    rows = np.array(targets)  # no -1 or 0 left in these
    result: np.ndarray = rows[0].copy()
    free = []
    for axis in np.flatnonzero((rows != rows[0]).any(axis=0)):
        copied = all(
            axis < len(source) and source[axis] == row[axis]
            for source, row in zip(sources, rows, strict=True)
        )
        if copied:
            result[axis] = 0
        else:
            free.append(axis)
    if len(free) > 1 or not rows.all():
        return None
    result[free] = -1
    return result


def _expand(use: Use) -> np.ndarray | None:
    rows, sources = use.stack(), use.shapes(use.node.input[0])
    if rows is None or sources is None:
        return None
    result: np.ndarray = rows[0].copy()
    for axis in np.flatnonzero((rows != rows[0]).any(axis=0)):
        back = axis - rows.shape[1]
        if any(
            -back > len(s) or s[back] != r[back] for s, r in zip(sources, rows, strict=True)
        ):
            return None
        result[axis] = 1
    return result


def _slice_ends(use: Use) -> np.ndarray | None:
    rows, sources = use.stack(), use.shapes(use.node.input[0])
    if rows is None or sources is None or len(use.node.input) < 4:
        return None
    axes = use.probes[0].constants.get(use.node.input[3])
    if axes is None:
        return None
    result: np.ndarray = rows[0].copy()
    for index in np.flatnonzero((rows != rows[0]).any(axis=0)):
        axis = int(axes[index])
        if any(row[index] != source[axis] for row, source in zip(rows, sources, strict=True)):
            return None
        result[index] = _INT64_MAX
    return result


def _resize_sizes(use: Use) -> np.ndarray | _Edit | None:
    rows, sources = use.stack(), use.shapes(use.node.input[0])
    if rows is None or sources is None:
        return None
    kept = np.array([all(s[i] == r[i] for s, r in zip(sources, rows, strict=True))
                     for i in range(len(sources[0]))])  # fmt: skip
    changing = (rows != rows[0]).any(axis=0)
    if (changing & ~kept).any():
        return None
    return _resize_edit(use.node, rows[0], sources[0], kept)


def _resize_edit(
    node: onnx.NodeProto, sizes: np.ndarray, source: tuple[int, ...], kept: np.ndarray
) -> _Edit | None:
    """Spell sizes without the batch: as scales if these say the same, else on fewer axes.

    onnxruntime divides sizes to scales itself, in float32. Where axes are named it fails to
    move a Transpose past the node, as graphs from TensorFlow make it try.
    """
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    policy = given.get("keep_aspect_ratio_policy", b"stretch")
    if "axes" in given or policy != b"stretch" or len(source) != len(sizes):
        return None
    lengths = np.array(source, np.float64)
    scales = (sizes / lengths).astype(np.float32)
    if (scales * lengths == sizes).all():
        return _Edit(index=2, value=scales)
    if given.get("mode", b"nearest") != b"nearest":  # which one bit may move by a pixel
        up = np.nextafter(scales, np.float32(np.inf))
        scales = np.where(scales * lengths < sizes, up, scales)
        if (np.floor(scales * lengths.astype(np.float32)) == sizes).all():
            return _Edit(index=2, value=scales)
    if given.get("coordinate_transformation_mode") == b"tf_crop_and_resize":
        return None
    axes = np.flatnonzero(~kept)
    return _Edit(index=3, value=sizes[axes].astype(np.int64), axes=tuple(axes.tolist()))


def _broadcast(use: Use) -> np.ndarray | None:
    """Keep one row of a constant that repeats it for each image of the batch."""
    outputs = use.shapes(use.node.output[0])
    others = [use.shapes(n) for i, n in enumerate(use.node.input) if i != use.index and n]
    if outputs is None or not use.values[0].ndim:
        return None
    rows = [value[:1] for value in use.values]
    repeated = all((value == value[:1]).all() for value in use.values)
    if not repeated or not all(same(row, rows[0]) for row in rows):
        return None
    back = -use.values[0].ndim
    for other in others:
        if other is not None and all(
            -back <= len(shape) and shape[back] == output[back]
            for shape, output in zip(other, outputs, strict=True)
        ):
            return np.ascontiguousarray(rows[0])
    return None


_Rule = Callable[[Use], "np.ndarray | _Edit | None"]
_RULES: dict[tuple[str, int], _Rule] = {
    ("Reshape", 1): _reshape,
    ("Expand", 1): _expand,
    ("Slice", 2): _slice_ends,
    ("Resize", 3): _resize_sizes,
}


def free_constant(
    graph: onnx.GraphProto,
    node: onnx.NodeProto,
    index: int,
    value: np.ndarray,
    shapes: tuple[_Shape, _Shape, _Shape],
) -> None:
    """Rewrite one constant target shape so that it follows the batch, if it can.

    `shapes` are those of the input at the file's batch, of the input at a larger one, and of
    the output at the file's batch.
    """
    source, grown, target = shapes
    if node.op_type == "Resize":
        edit = _resize_edit(node, value, source, np.array(target) == np.array(source))
        if edit is not None:
            _edit_resize(graph, node, edit)
        return
    changing = [axis for axis, dim in enumerate(source) if grown[axis] != dim]
    if len(changing) != 1:
        return
    rule = _free_expand if node.op_type == "Expand" else _free_reshape
    freed = rule(value, source, target, changing[0])
    if freed is not None:
        _set_target(graph, node, index, freed)


def _free_reshape(
    value: np.ndarray, source: _Shape, target: _Shape, axis: int
) -> np.ndarray | None:
    place = _place(source, target, axis)
    if place is None or not all(target):
        return None
    copied = place == axis and source[axis] == target[place]
    result = np.array(target, np.int64)
    result[place] = 0 if copied else -1
    return result


def _place(source: _Shape, target: _Shape, axis: int) -> int | None:
    """Return the axis of `target` that holds the batch, which lies in `axis` of `source`.

    In memory order the batch is where that axis begins, or, if it was merged into the axis, up
    to where it ends. A target axis of size one there is the batch of a file written for one
    image. Between two others it belongs to the second, unless that is the last: the features.
    """
    starts = [prod(target[:index]) for index in range(len(target))]
    first = prod(source[:axis])
    last = first * source[axis]
    ones = [k for k, start in enumerate(starts) if target[k] == 1 and first <= start <= last]
    if len(ones) == 1:
        return ones[0]
    place = next((k for k, start in enumerate(starts) if start == first), None)
    is_last = place is not None and 0 < place == len(target) - 1
    return len(target) - 2 if is_last else place


def _free_expand(
    value: np.ndarray, source: _Shape, target: _Shape, axis: int
) -> np.ndarray | None:
    back = axis - len(source)
    if -back > len(value) or target[back] != source[axis]:
        return None
    result: np.ndarray = value.copy()
    result[back] = 1
    return result
