"""Bring any supported opset to the one of the normal form.

Older files go up through `onnx.version_converter`. Newer ones are relabelled: since opset 21
the ordinary operators mostly gained element types, so a node whose use fits both definitions
means the same in both. What does not fit goes down through the converter, or is refused.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx
from onnx import helper, inliner, version_converter
from onnx.defs import OpSchema, SchemaError

from graph_tools.errors import ModelError, TargetError, UnsupportedOperatorError
from graph_tools.quiet import quiet
from graph_tools.shapes import infer, set_shape
from graph_tools.walk import all_nodes
from graph_tools.weights import is_outside, values_of

__all__ = [
    "IR_VERSION",
    "OLDEST_OPSET",
    "OPSET",
    "check_operators",
    "check_versions",
    "opset_version",
    "to_older_opset",
    "to_opset",
    "to_running_opset",
]

OPSET = 21
"""Opset of the normal form."""

IR_VERSION = 10
"""IR version of the normal form: what runtimes of the same age as the opset read."""

OLDEST_OPSET = 6
OLDEST_IR = 3

_OLDEST_RUNNING = 7
"""The oldest opset that onnxruntime runs."""

_RESIZE_MODES = 11  # the opset that gave Resize its coordinate modes

_QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")


def opset_version(proto: onnx.ModelProto) -> int:
    """Return the version of the default operator set; 0 if the model imports none."""
    versions = [o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")]
    return max(versions, default=0)


def check_versions(proto: onnx.ModelProto, *, where: str) -> None:
    """Refuse IR versions and opsets outside the supported range.

    Raises:
        ModelError: naming the version and the range.
    """
    newest = onnx.defs.onnx_opset_version()
    version = opset_version(proto)
    if not OLDEST_IR <= proto.ir_version <= onnx.IR_VERSION:
        raise ModelError(
            f"IR version {proto.ir_version} is outside {OLDEST_IR} to {onnx.IR_VERSION}",
            where=where,
            hint="export with another onnx version",
        )
    if not version:
        raise ModelError("imports no opset of domain ai.onnx", where=where)
    if not OLDEST_OPSET <= version <= newest:
        raise ModelError(
            f"opset {version} is outside {OLDEST_OPSET} to {newest}",
            where=where,
            hint="export with opset_version=17",
        )


def check_operators(proto: onnx.ModelProto, *, where: str) -> None:
    """Refuse quantized models and operators that ONNX does not define.

    Args:
        proto: a model whose local functions may still be there; they count as defined.
        where: the file, for the message.

    Raises:
        ModelError: the model is quantized already.
        UnsupportedOperatorError: naming every unknown operator at once.
    """
    quantized = sorted({node.op_type for node in all_nodes(proto) if _is_quantized(node)})
    if quantized:
        raise ModelError(
            f"the model is already quantized ({', '.join(quantized)})",
            where=where,
            hint="give the float model",
        )
    version = opset_version(proto)
    local = {(f.domain, f.name) for f in proto.functions}
    missing = [
        f"{node.domain}:{node.op_type}" if _domain(node) else node.op_type
        for node in all_nodes(proto)
        if (node.domain, node.op_type) not in local
        and (_domain(node) or _schema(node.op_type, version) is None)
    ]
    if missing:
        raise UnsupportedOperatorError(tuple(missing), where=where)


def to_opset(proto: onnx.ModelProto, *, where: str) -> onnx.ModelProto:
    """Return `proto` at opset `OPSET` and IR version `IR_VERSION`.

    Args:
        proto: a model of domain ai.onnx only, constants as initializers.
        where: the file, for the message.

    Raises:
        ModelError: the conversion fails.
        UnsupportedOperatorError: operators newer than `OPSET` that cannot be spelled in it.
    """
    version = opset_version(proto)
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    result.ir_version = IR_VERSION
    if version < OPSET:
        result = _convert(result, version, where=where)
        if version < _RESIZE_MODES:
            _set_resize_modes(result.graph)
    elif version > OPSET:
        result = _lower(result, version, where=where)
    _replace_removed_mode(result.graph)
    del result.opset_import[:]
    result.opset_import.append(helper.make_opsetid("", OPSET))
    result.ir_version = IR_VERSION
    return result


def to_older_opset(proto: onnx.ModelProto, version: int, *, where: str) -> onnx.ModelProto:
    """Return `proto` itself, or declared for an older opset where its nodes mean the same.

    Nodes of other domains are left as they are.

    Raises:
        TargetError: a node that the older opset does not have, or has with another meaning.
    """
    newer = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 0)
    if newer <= version:
        return proto
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    for node in all_nodes(result):
        if _domain(node):
            continue
        if not _fits(node, newer, version):
            raise TargetError(
                f"opset {version} has no {node.op_type} like that of opset {newer}",
                where=f"{where}: node {node.name}",
                hint="export to ONNX at an older opset",
            )
        _drop_newer_attributes(node, version)
    for entry in result.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = version
    return result


def to_running_opset(proto: onnx.ModelProto, *, where: str) -> onnx.ModelProto:
    """Return `proto` itself, or at an opset that onnxruntime runs if it is older.

    Raises:
        ModelError: the conversion fails.
    """
    version = opset_version(proto)
    if version >= _OLDEST_RUNNING:
        return proto
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    result.ir_version = max(
        result.ir_version, 4
    )  # the converter's own constants are no inputs
    _align_from_the_right(result)
    del result.graph.value_info[:]
    for value in (*result.graph.input, *result.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if not dim.HasField("dim_value"):  # the converter fails on symbols
                dim.dim_value = 1
    result = _convert(result, version, where=where, target=_OLDEST_RUNNING)
    stored = {value.name: value for value in (*proto.graph.input, *proto.graph.output)}
    for value in (*result.graph.input, *result.graph.output):
        value.CopyFrom(stored[value.name])
    return result


def _align_from_the_right(proto: onnx.ModelProto) -> None:
    """Append axes of length 1 to operands that begin at an axis of the other one.

    Before opset 7 an attribute tells where an operand begins, and PRelu has one slope a channel;
    since then shapes are aligned at their ends.
    """
    types = infer(proto)
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    for node in nodes:
        axis = next((a.i for a in node.attribute if a.name == "axis"), None)
        if node.op_type == "PRelu":
            axis = 1
        elif not any(a.name == "broadcast" and a.i for a in node.attribute):
            axis = None
        shapes = [types[name].shape for name in node.input if name in types]
        if axis is not None and len(shapes) == 2 and None not in shapes:
            rank, own = (len(shape or ()) for shape in shapes)
            missing = tuple(range(own, rank - axis % rank)) if rank else ()
            if missing and types[node.input[1]].static not in ((), (1,)):
                aligned = f"{node.output[0]}/aligned"
                proto.graph.node.append(
                    helper.make_node("Unsqueeze", [node.input[1]], [aligned], axes=missing)
                )
                node.input[1] = aligned
            kept = [a for a in node.attribute if a.name != "axis"]
            del node.attribute[:]
            node.attribute.extend(kept)
        proto.graph.node.append(node)


def _convert(
    proto: onnx.ModelProto, version: int, *, where: str, target: int = OPSET
) -> onnx.ModelProto:
    del proto.opset_import[:]
    proto.opset_import.append(helper.make_opsetid("", version))
    outside = {t.name: t for t in proto.graph.initializer if is_outside(t)}
    try:
        with quiet():
            result = version_converter.convert_version(proto, target)
    except Exception as error:
        raise ModelError(
            f"opset {version} cannot be converted to {target}: {_first_line(error)}",
            where=where,
            hint="export again with opset_version=17",
        ) from error
    for tensor in result.graph.initializer:
        if tensor.name in outside:  # the converter forgets where the values are
            tensor.CopyFrom(outside[tensor.name])
    return result


def _set_resize_modes(graph: onnx.GraphProto) -> None:
    """Write out the only sampling that Upsample and Resize-10 knew; the converter omits it.

    As onnxruntime does, nearest rounds down when it enlarges and up when it shrinks.
    """
    constants = {t.name: t for t in graph.initializer}
    for node in graph.node:
        if node.op_type != "Resize":
            continue
        scales = constants.get(node.input[2]) if len(node.input) > 2 else None
        shrinks = scales is not None and bool((values_of(scales) < 1).any())
        modes = {
            "coordinate_transformation_mode": "asymmetric",
            "nearest_mode": "ceil" if shrinks else "floor",
        }
        kept = [a for a in node.attribute if a.name not in modes]
        del node.attribute[:]
        node.attribute.extend(kept)
        node.attribute.extend(helper.make_attribute(*entry) for entry in modes.items())


def _replace_removed_mode(graph: onnx.GraphProto) -> None:
    """Write nearest sampling as opset 13 left it without the mode that TensorFlow has.

    ``floor((i + 0.5) / scale)`` is ``floor(x + 0.5)`` of the half-pixel coordinate
    ``x = (i + 0.5) / scale - 0.5``: half a pixel, rounded with ties up. Exporters go on using
    the removed mode, and onnxruntime goes on reading it.
    """
    for node in graph.node:
        given = {a.name: a for a in node.attribute}
        mode, nearest = given.get("coordinate_transformation_mode"), given.get("nearest_mode")
        if node.op_type != "Resize" or mode is None or mode.s != b"tf_half_pixel_for_nn":
            continue
        if nearest is not None and nearest.s == b"floor":
            mode.s, nearest.s = b"half_pixel", b"round_prefer_ceil"


def _lower(proto: onnx.ModelProto, version: int, *, where: str) -> onnx.ModelProto:
    newer = {n.op_type for n in all_nodes(proto) if _schema(n.op_type, OPSET) is None}
    if newer:
        proto = _write_out(proto, version, newer, where=where)
        missing = [n.op_type for n in all_nodes(proto) if _schema(n.op_type, OPSET) is None]
        if missing:
            raise UnsupportedOperatorError(tuple(missing), where=where)
    nodes = list(all_nodes(proto))
    if all(_fits(node, version) for node in nodes):
        for node in nodes:
            _drop_newer_attributes(node)
        return proto
    return _convert(proto, version, where=where)


def _write_out(
    proto: onnx.ModelProto, version: int, operators: set[str], *, where: str
) -> onnx.ModelProto:
    """Replace operators by the function bodies that ONNX defines for them, if it does.

    Many bodies depend on the types of the inputs, those of weights included; and the inliner
    does not fill in defaults of attributes.
    """
    for node in all_nodes(proto):
        if node.op_type in operators:
            _set_defaults(node, version)
    types = infer(proto)
    del proto.graph.value_info[:]
    for name, known in types.items():
        if known.elem_type:
            set_shape(proto.graph.value_info.add(name=name), known.elem_type, known.shape)
    names = [("", name) for name in sorted(operators)]
    try:
        with quiet():
            proto = inliner.inline_selected_functions(
                proto, names, inline_schema_functions=True
            )
    except RuntimeError as error:
        raise ModelError(
            f"{', '.join(name for _, name in names)} cannot be written out: "
            f"{_first_line(error)}",
            where=where,
            hint=f"export again with an opset of at most {OPSET}",
        ) from error
    del proto.graph.value_info[:]
    return proto


def _set_defaults(node: onnx.NodeProto, version: int) -> None:
    schema = _schema(node.op_type, version)
    given = {attribute.name for attribute in node.attribute}
    for name, attribute in ({} if schema is None else schema.attributes).items():
        if name not in given and attribute.default_value.name:
            node.attribute.add().CopyFrom(attribute.default_value)


def _fits(node: onnx.NodeProto, version: int, older: int = OPSET) -> bool:
    """Whether `node`, written for opset `version`, means the same under an `older` one."""
    new, old = _schema(node.op_type, version), _schema(node.op_type, older)
    if new is None or old is None:
        return False
    if new.since_version == old.since_version:
        return True
    if len(node.input) > old.max_input or len(node.output) > old.max_output:
        return False
    same_names = all(a.name == b.name for a, b in zip(new.inputs, old.inputs, strict=False))
    given = {attribute.name: attribute for attribute in node.attribute}
    for name, attribute in given.items():
        if name not in old.attributes and not _is_default(attribute, new):
            return False
    shared = set(new.attributes) & set(old.attributes) - set(given)
    return same_names and all(_default(new, name) == _default(old, name) for name in shared)


def _drop_newer_attributes(node: onnx.NodeProto, version: int = OPSET) -> None:
    schema = _schema(node.op_type, version)
    assert schema is not None
    kept = [a for a in node.attribute if a.name in schema.attributes]
    del node.attribute[:]
    node.attribute.extend(kept)


def _is_default(attribute: onnx.AttributeProto, schema: OpSchema) -> bool:
    if attribute.name not in schema.attributes:
        return False
    default = onnx.AttributeProto()
    default.CopyFrom(schema.attributes[attribute.name].default_value)
    return bool(
        default.type == attribute.type
        and helper.get_attribute_value(default) == helper.get_attribute_value(attribute)
    )


def _default(schema: OpSchema, name: str) -> bytes:
    return bytes(schema.attributes[name].default_value.SerializeToString())


def _schema(op_type: str, version: int) -> OpSchema | None:
    try:
        schema = onnx.defs.get_schema(op_type, version, "")
    except SchemaError:
        return None
    return None if schema.deprecated else schema


def _domain(node: onnx.NodeProto) -> str:
    return "" if node.domain == "ai.onnx" else str(node.domain)


def _is_quantized(node: onnx.NodeProto) -> bool:
    name = node.op_type
    return (
        name in _QUANTIZED
        or name.startswith(("QLinear", "QGemm", "QAttention"))
        or name.endswith("Integer")
    )


def _first_line(error: BaseException) -> str:
    return next(iter(_lines(str(error))), type(error).__name__)[:160]


def _lines(text: str) -> Iterable[str]:
    return (line.strip() for line in text.splitlines() if line.strip())
