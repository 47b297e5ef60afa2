"""Find the one image input of a graph, its shape and its layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import onnx

from graph_tools.errors import DynamicShapeError, ModelError, SettingsError
from graph_tools.passes import FLOAT_TYPES

__all__ = ["ImageInput", "Layout", "find_image_input"]

Layout = Literal["NCHW", "NHWC"]

_MAX_IMAGE_CHANNELS = 4
_TO_NCHW = (0, 3, 1, 2)
# Exporters put the normalization of pixels before the Transpose or the first convolution.
_ELEMENTWISE = frozenset("Add Cast Clip Div Identity Mul Sub".split())
_CHANNELS_FIRST = frozenset(
    "AveragePool BatchNormalization Conv ConvTranspose DepthToSpace GlobalAveragePool "
    "GlobalMaxPool InstanceNormalization MaxPool SpaceToDepth".split()
)


@dataclass(frozen=True, kw_only=True)
class ImageInput:
    """The image input of a network.

    Attributes:
        name: of the graph input.
        shape: of one image, in the model's own layout.
        layout: NCHW or NHWC.
        batch: the batch size that the file declares; None if it is dynamic.
        integer: whether the file itself takes uint8, pixels in 0..255.
    """

    name: str
    shape: tuple[int, int, int]
    layout: Layout
    batch: int | None
    integer: bool = False

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.shape[0] if self.layout == "NCHW" else self.shape[2]

    @property
    def height(self) -> int:
        """Height in pixels."""
        return self.shape[1] if self.layout == "NCHW" else self.shape[0]

    @property
    def width(self) -> int:
        """Width in pixels."""
        return self.shape[2] if self.layout == "NCHW" else self.shape[1]


def find_image_input(
    graph: onnx.GraphProto,
    *,
    input_shape: tuple[int, ...] | None,
    layout: Layout | None,
    where: str,
) -> tuple[ImageInput, list[str]]:
    """Find the image input; write its full shape into the graph, drop unused inputs.

    Args:
        graph: initializers are no longer among its inputs, element types are float32.
        input_shape: four numbers for the dimensions that the file leaves free.
        layout: overrides the layout detected.
        where: the file, for messages.

    Returns:
        The input, and notes for the user.

    Raises:
        ModelError: not exactly one float input of rank 4, or a contradicting `input_shape`.
        DynamicShapeError: free dimensions without `input_shape`.
        SettingsError: an `input_shape` that is not four positive numbers.
    """
    notes = []
    used = {name for node in graph.node for name in node.input}
    used |= {value.name for value in graph.output}
    unused = [value for value in graph.input if value.name not in used]
    if unused and len(unused) < len(graph.input):
        notes.append(f"unused input(s) dropped: {', '.join(v.name for v in unused)}")
        for value in unused:
            graph.input.remove(value)
    described = ", ".join(f"{v.name}{_describe(v)}" for v in graph.input) or "none"
    if len(graph.input) > 1:
        raise ModelError(
            f"several inputs: {described}",
            where=where,
            hint=_which(graph),
        )
    if not graph.input or not _is_image(graph.input[0]):
        raise ModelError(
            f"no float input of rank 4 (NCHW or NHWC); inputs: {described}",
            where=where,
            hint="export the network with one float image batch as its input",
        )
    value = graph.input[0]
    if any(output.name == value.name for output in graph.output):
        raise ModelError(
            f"output {value.name!r} is the input itself",
            where=where,
            hint="remove it from the outputs",
        )
    shape, batch = _full_shape(value, input_shape, where=where)
    found, reason = _detect_layout(graph, value.name, shape)
    if layout is not None and layout != found:
        notes.append(f"layout {layout} as given; the graph looks like {found}")
    elif layout is None and found == "NHWC":
        notes.append(f"input layout NHWC: {reason}")
    dims = value.type.tensor_type.shape.dim
    del dims[:]
    for size in (batch, *shape):
        dims.add(**({"dim_value": size} if size else {"dim_param": "N"}))
    image = ImageInput(name=value.name, shape=shape, layout=layout or found, batch=batch)
    return image, notes


def _which(graph: onnx.GraphProto) -> str:
    """Say how to fix all inputs but the image."""
    images = [value for value in graph.input if _is_image(value)]
    options = (f"--input {v.name}={v.name.split('/')[-1]}.npy" for v in graph.input)
    if len(images) == 1:
        options = (o for o, v in zip(options, graph.input, strict=True) if v != images[0])
        return f"give the others' values: {' '.join(options)}"
    several = " or ".join(value.name for value in images) or "none has rank 4"
    return f"which is the image is not clear ({several}); fix the others: {' '.join(options)}"


def _is_image(value: onnx.ValueInfoProto) -> bool:
    tensor = value.type.tensor_type
    if value.type.WhichOneof("value") != "tensor_type" or tensor.elem_type not in FLOAT_TYPES:
        return False
    return not tensor.HasField("shape") or len(tensor.shape.dim) == 4


def _describe(value: onnx.ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    known = tensor.elem_type in onnx.TensorProto.DataType.values()
    type_name = onnx.TensorProto.DataType.Name(tensor.elem_type).lower() if known else "?"
    if not tensor.HasField("shape"):
        return f" ({type_name}, any shape)"
    dims = ",".join(str(d.dim_value or d.dim_param or "?") for d in tensor.shape.dim)
    return f" ({type_name} [{dims}])"


def _full_shape(
    value: onnx.ValueInfoProto, given: tuple[int, ...] | None, *, where: str
) -> tuple[tuple[int, int, int], int | None]:
    if given is not None and (len(given) != 4 or any(size < 1 for size in given)):
        raise SettingsError(
            f"--input-shape needs four positive numbers, got {','.join(map(str, given))}",
            hint="for instance --input-shape 1,3,224,224",
        )
    dims = value.type.tensor_type.shape.dim
    names = [d.dim_param for d in dims] or [""] * 4
    sizes = [d.dim_value if d.dim_value > 0 else None for d in dims] or [None] * 4
    free = [names[axis] or f"axis {axis}" for axis in (1, 2, 3) if sizes[axis] is None]
    if given is None:
        if free:
            shown = ",".join(
                str(size or name or "?") for size, name in zip(sizes, names, strict=True)
            )
            raise DynamicShapeError(
                f"input '{value.name}' [{shown}] leaves free: {', '.join(free)}",
                where=where,
                hint="fix it with --input-shape, for instance --input-shape 1,3,224,224",
            )
        given = (1, *(size or 0 for size in sizes[1:]))
    elif any(size is not None and size != g for size, g in zip(sizes, given, strict=True)):
        declared = ",".join(str(size or name) for size, name in zip(sizes, names, strict=True))
        raise ModelError(
            f"--input-shape {','.join(map(str, given))} contradicts input '{value.name}' "
            f"[{declared}]",
            where=where,
        )
    _, first, second, third = given
    return (first, second, third), sizes[0]


def _detect_layout(
    graph: onnx.GraphProto, name: str, shape: tuple[int, int, int]
) -> tuple[Layout, str]:
    """Return the layout and why: what reads the image decides, then its shape."""
    names, seen = [name], {name}
    while names:
        current = names.pop(0)
        for node in graph.node:
            if current not in node.input:
                continue
            perm = next((tuple(a.ints) for a in node.attribute if a.name == "perm"), ())
            if node.op_type == "Transpose" and perm == _TO_NCHW:
                return "NHWC", "a Transpose to NCHW follows"
            if node.op_type in _CHANNELS_FIRST:
                return "NCHW", f"{node.op_type} reads it"
            new = [o for o in node.output if o not in seen]
            if node.op_type in _ELEMENTWISE:
                names += new
                seen.update(new)
    if shape[2] <= _MAX_IMAGE_CHANNELS < shape[0]:
        return "NHWC", "the last dimension is that of the channels"
    return "NCHW", "the usual layout"
