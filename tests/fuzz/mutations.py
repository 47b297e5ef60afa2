"""Damage a serialized model: its bytes, or what it says, so that it still parses."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Collection, Sequence

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, helper

__all__ = ["mutate"]

INTEGERS = (
    *(-1, 0, 1, 2, 3, 4, 7, 8, 16, 100, -2, -3, 255, 256, -128, 2**15, 2**16, 2**20, 2**24),
    *(2**26, 2**30, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, -(2**31), -(2**63)),
)
FLOATS = (
    *(0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 1e-45, 1e-38, 1e-7, 1e7, 1e38, 3e38),
    *(float("nan"), float("inf"), float("-inf")),
)
NAMES = (
    "", " ", "x" * 3000, "a/../../b", "[red]x[/red]", "{{ 7*7 }}", "<script>1</script>", "a\nb",
    "\x00", "\u202e", "N", "x", "%s%n", "../../etc/passwd", "None", "\u00e9" * 9,
)  # fmt: skip
TYPES = tuple(range(0, 26))
OPERATORS = tuple(sorted({s.name for s in onnx.defs.get_all_schemas() if s.domain == ""}))

Mutation = Callable[[onnx.ModelProto, random.Random], None]


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Return ``content``, a serialized model, with one to four faults."""
    if rng.random() < 0.15:
        return _bytes(content, rng)
    proto = onnx.ModelProto.FromString(content)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        rng.choice(MUTATIONS)(proto, rng)
    content = proto.SerializeToString()
    return _bytes(content, rng) if rng.random() < 0.03 else content


def _bytes(content: bytes, rng: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        kind, at = rng.randrange(6), rng.randrange(len(data) or 1)
        if kind == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1 and data:
            data[at : at + 1] = bytes([data[min(at, len(data) - 1)] ^ (1 << rng.randrange(8))])
        elif kind == 2:
            del data[at : at + rng.choice((1, 2, 8, 64))]
        elif kind == 3:
            data[at:at] = rng.randbytes(rng.choice((1, 2, 8)))
        elif kind == 4:
            data[at:at] = data[rng.randrange(len(data) or 1) :][: rng.choice((1, 8, 64))]
        else:
            data[at : at + 5] = b"\xff\xff\xff\xff\x0f"
    return bytes(data)


def _names(proto: onnx.ModelProto) -> list[str]:
    graph = proto.graph
    names = [name for node in graph.node for name in (*node.input, *node.output)]
    names += [value.name for value in (*graph.input, *graph.output)]
    return [*names, *(tensor.name for tensor in graph.initializer), *NAMES[:3]]


def _node(proto: onnx.ModelProto, rng: random.Random) -> onnx.NodeProto:
    if not proto.graph.node:
        proto.graph.node.append(helper.make_node("Relu", ["x"], ["y"]))
    return rng.choice(proto.graph.node)


def _numbers(rng: random.Random, choices: Sequence[int] = INTEGERS) -> list[int]:
    return [rng.choice(choices) for _ in range(rng.choice((0, 1, 2, 3, 4, 4, 5, 8, 40)))]


# ------------------------------------------------------------------------- nodes


def _swap_nodes(proto: onnx.ModelProto, rng: random.Random) -> None:
    nodes = list(proto.graph.node)
    rng.shuffle(nodes)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def _drop_node(proto: onnx.ModelProto, rng: random.Random) -> None:
    proto.graph.node.remove(_node(proto, rng))


def _duplicate_node(proto: onnx.ModelProto, rng: random.Random) -> None:
    copy = proto.graph.node.add()
    copy.CopyFrom(_node(proto, rng))
    if rng.random() < 0.5:
        copy.output[:] = [f"{name}/copy" for name in copy.output]


def _rewire(proto: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(proto, rng)
    if node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice(_names(proto))


def _cycle(proto: onnx.ModelProto, rng: random.Random) -> None:
    node, other = _node(proto, rng), _node(proto, rng)
    if node.input and other.output:
        node.input[rng.randrange(len(node.input))] = rng.choice(list(other.output))


def _inputs(proto: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(proto, rng)
    kind = rng.randrange(5)
    if kind == 0 and node.input:
        del node.input[rng.randrange(len(node.input))]
    elif kind == 1:
        node.input.append(rng.choice(_names(proto)))
    elif kind == 2:
        names = list(node.input)
        rng.shuffle(names)
        node.input[:] = names
    elif kind == 3:
        del node.input[:]
    else:
        node.input.insert(0, rng.choice(_names(proto)))


def _outputs(proto: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(proto, rng)
    kind = rng.randrange(4)
    if kind == 0 and node.output:
        node.output[rng.randrange(len(node.output))] = rng.choice(_names(proto))
    elif kind == 1:
        node.output.append(rng.choice(_names(proto)))
    elif kind == 2:
        del node.output[:]
    else:
        node.output.append(f"more{rng.randrange(99)}")


def _operator(proto: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(proto, rng)
    node.op_type = rng.choice((*OPERATORS, _node(proto, rng).op_type, "Magic", ""))
    if rng.random() < 0.5:
        del node.attribute[:]


def _domain(proto: onnx.ModelProto, rng: random.Random) -> None:
    domain = rng.choice(("ai.onnx", "com.microsoft", "com.acme", "ai.onnx.ml", *NAMES))
    _node(proto, rng).domain = domain
    if rng.random() < 0.5:
        proto.opset_import.append(helper.make_opsetid(domain, rng.choice((1, 2, 2**40, -1))))


def _rename(proto: onnx.ModelProto, rng: random.Random) -> None:
    """Rename one tensor everywhere, so that the graph may stay valid."""
    old, new = rng.choice(_names(proto)), rng.choice(NAMES)
    graph = proto.graph
    for node in graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        if value.name == old:
            value.name = new
    if rng.random() < 0.5:
        _node(proto, rng).name = new


# ------------------------------------------------------------------------- attributes


def _attribute(proto: onnx.ModelProto, rng: random.Random) -> None:
    nodes = [node for node in proto.graph.node if node.attribute]
    if not nodes:
        return
    attribute = rng.choice(rng.choice(nodes).attribute)
    kind = rng.randrange(4)
    if kind == 0:
        attribute.type = rng.choice((*range(15), 1))
    elif kind == 1 and attribute.ints:
        attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice(INTEGERS)
    elif kind == 2 and attribute.type in (AttributeProto.INTS, AttributeProto.FLOATS):
        attribute.ints[:] = _numbers(rng, INTEGERS if rng.random() < 0.5 else (1, 2, 3))
    else:
        attribute.i, attribute.f = rng.choice(INTEGERS), rng.choice(FLOATS)
        attribute.s = rng.choice((b"", b"SAME_UPPER", b"VALID", b"linear", b"\xff", b"NOTSET"))


def _drop_attribute(proto: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(proto, rng)
    if node.attribute:
        del node.attribute[rng.randrange(len(node.attribute))]


def _add_attribute(proto: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(proto, rng)
    names = ["axis", "foo"]
    if node.op_type in OPERATORS:
        names += list(onnx.defs.get_schema(node.op_type).attributes)
    value = rng.choice((rng.choice(INTEGERS), rng.choice(FLOATS), _numbers(rng), "SAME_UPPER"))
    if value == []:
        value = [1]
    node.attribute.append(helper.make_attribute(rng.choice(names), value))


# ------------------------------------------------------------------------- types and shapes


def _dimension(proto: onnx.ModelProto, rng: random.Random) -> None:
    graph = proto.graph
    value = rng.choice((*graph.input, *graph.input, *graph.output, *graph.value_info, None))
    if value is None or value.type.WhichOneof("value") not in ("tensor_type", None):
        return
    dims = value.type.tensor_type.shape.dim
    kind = rng.randrange(6)
    if kind == 0 and dims:
        del dims[rng.randrange(len(dims))]
    elif kind == 1:
        dims.add().dim_value = rng.choice(INTEGERS)
    elif kind == 2:
        value.type.tensor_type.elem_type = rng.choice(TYPES)
    elif kind == 3 and dims:
        rng.choice(dims).dim_param = rng.choice(NAMES)
    elif kind == 4:
        value.type.ClearField("tensor_type")
        value.type.sequence_type.elem_type.tensor_type.elem_type = 1
    elif dims:
        rng.choice(dims).dim_value = rng.choice(INTEGERS)


def _interface(proto: onnx.ModelProto, rng: random.Random) -> None:
    graph = proto.graph
    values = graph.input if rng.random() < 0.5 else graph.output
    kind = rng.randrange(4)
    if kind == 0 and values:
        del values[rng.randrange(len(values))]
    elif kind == 1 and values:
        values.add().CopyFrom(rng.choice(values))
    elif kind == 2:
        values.append(
            helper.make_tensor_value_info(
                rng.choice(_names(proto)), rng.choice((1, 7, 2, 3)), [1, 2]
            )
        )
    elif values:
        rng.choice(values).name = rng.choice(_names(proto))


def _version(proto: onnx.ModelProto, rng: random.Random) -> None:
    kind = rng.randrange(4)
    if kind == 0:
        proto.ir_version = rng.choice((*range(1, 15), 2**40, -1))
    elif kind == 1:
        proto.opset_import.append(helper.make_opsetid("", rng.randrange(1, 30)))
    elif kind == 2:
        del proto.opset_import[:]
    else:
        for entry in proto.opset_import:
            entry.version = rng.choice((*range(5, 28), 13, 2**40))


# ------------------------------------------------------------------------- weights


def _tensors(proto: onnx.ModelProto) -> list[TensorProto]:
    tensors = list(proto.graph.initializer)
    return tensors + [a.t for n in proto.graph.node for a in n.attribute if a.HasField("t")]


def _tensor(proto: onnx.ModelProto, rng: random.Random) -> None:
    tensors = _tensors(proto)
    if not tensors:
        return
    tensor = rng.choice(tensors)
    kind = rng.randrange(8)
    if kind == 0 and tensor.dims:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(INTEGERS)
    elif kind == 1:
        tensor.dims[:] = _numbers(rng, (*INTEGERS, 1, 1, 2, 3))
    elif kind == 2:
        tensor.data_type = rng.choice(TYPES)
    elif kind == 3:
        tensor.raw_data = tensor.raw_data[: rng.randrange(len(tensor.raw_data) + 1)]
    elif kind == 4:
        tensor.float_data.extend([1.0, 2.0])
    elif kind == 5:
        tensor.name = rng.choice(_names(proto))
    elif kind == 6:
        tensor.data_location = TensorProto.EXTERNAL
        places = ("case.onnx", "../secret", "/etc/passwd", "", "/dev/zero", ".", "a/b", "\x00")
        for key, value in (
            ("location", rng.choice(places)),
            ("offset", rng.choice((*INTEGERS, "x", ""))),
            ("length", rng.choice((*INTEGERS, "1e9"))),
        ):
            tensor.external_data.add(key=key, value=str(value))
    else:
        tensor.dims[:] = list(reversed(tensor.dims))


def _drawn(
    proto: onnx.ModelProto, rng: random.Random, types: Collection[int]
) -> tuple[onnx.TensorProto | None, np.ndarray]:
    """One of the tensors of these types with a copy of its values; None if there is none."""
    tensors = [t for t in _tensors(proto) if t.data_type in types]
    if tensors:
        tensor = rng.choice(tensors)
        with contextlib.suppress(ValueError, TypeError, onnx.checker.ValidationError):
            return tensor, onnx.numpy_helper.to_array(tensor).copy()
    return None, np.empty(0)


def _values(proto: onnx.ModelProto, rng: random.Random) -> None:
    """Keep a tensor's type and shape, but not its values: scales, zero points, shapes, pads."""
    tensor, array = _drawn(proto, rng, {*range(1, 14)} - {onnx.TensorProto.STRING})
    if tensor is None or not array.size:
        return
    flat, name = array.reshape(-1), tensor.name
    choices: Sequence[float] = FLOATS if array.dtype.kind == "f" else INTEGERS
    whole = rng.random() < 0.3
    for at in range(min(flat.size, 4096)) if whole else [rng.randrange(flat.size)]:
        value = rng.choice(choices)
        if array.dtype.kind in "iu":
            bits = 8 * array.dtype.itemsize
            value = int(value) % 2**bits
            value -= 2**bits if array.dtype.kind == "i" and value >= 2 ** (bits - 1) else 0
        flat[at] = bool(value) if array.dtype.kind == "b" else value
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))


def _reshaped(proto: onnx.ModelProto, rng: random.Random) -> None:
    """Give a tensor another rank or fewer values, sound in itself."""
    tensor, array = _drawn(proto, rng, {1, 2, 3, 6, 7})
    if tensor is None:
        return
    kind, name = rng.randrange(5), tensor.name
    if kind == 0:
        array = array.reshape(-1)[:1]
    elif kind == 1:
        array = array.reshape(-1)[:1].reshape(()) if array.size else array
    elif kind == 2:
        array = array[..., None]
    elif kind == 3:
        array = array.reshape(-1)[:0]
    else:
        array = array.reshape(-1)
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))


# ------------------------------------------------------------------------- bombs and graphs


def _insert(proto: onnx.ModelProto, rng: random.Random) -> None:
    """Put a node that makes much of little behind a tensor."""
    nodes = [node for node in proto.graph.node if node.output]
    if not nodes:
        return
    target = rng.choice(nodes)
    old, made = target.output[0], f"{target.output[0]}/small"
    target.output[0] = made
    shape = [rng.choice(INTEGERS) for _ in range(4)]
    sizes = helper.make_tensor(f"{old}/sizes", 7, [4], shape)
    kind = rng.randrange(6)
    names = [sizes.name]
    if kind == 0:
        new = [helper.make_node("Expand", [made, *names], [old])]
    elif kind == 1:
        new = [helper.make_node("Tile", [made, *names], [old])]
    elif kind == 2:
        new = [
            helper.make_node("ConstantOfShape", names, [f"{old}/big"]),
            helper.make_node("Add", [made, f"{old}/big"], [old]),
        ]
    elif kind == 3:
        scales = helper.make_tensor(f"{old}/scales", 1, [4], [float(n) for n in shape])
        proto.graph.initializer.append(scales)
        new = [helper.make_node("Resize", [made, "", scales.name], [old])]
    elif kind == 4:
        pads = helper.make_tensor(f"{old}/pads", 7, [8], [0, 0, *shape[:2], 0, 0, *shape[2:]])
        proto.graph.initializer.append(pads)
        new = [helper.make_node("Pad", [made, pads.name], [old])]
    else:
        new = [helper.make_node("Reshape", [made, *names], [old])]
    proto.graph.initializer.append(sizes)
    place = list(proto.graph.node).index(target) + 1
    rest = [*new, *list(proto.graph.node)[place:]]
    del proto.graph.node[place:]
    proto.graph.node.extend(rest)


def _nest(proto: onnx.ModelProto, rng: random.Random) -> None:
    """Put a node into the branches of an If, or the body of a Loop, some levels deep."""
    index = rng.randrange(len(proto.graph.node) or 1)
    node = onnx.NodeProto()
    node.CopyFrom(_node(proto, rng))
    for level in range(rng.choice((1, 1, 2, 3, 60))):
        graph = helper.make_graph(
            [node], f"g{level}", [], [onnx.ValueInfoProto(name=n) for n in node.output]
        )
        if rng.random() < 0.7:
            made = helper.make_node(
                "If", ["go"], list(node.output), then_branch=graph, else_branch=graph
            )
        else:
            graph.input.extend(helper.make_tensor_value_info(n, t, []) for n, t in _LOOP)
            graph.output.insert(0, helper.make_tensor_value_info("c", 9, []))
            made = helper.make_node("Loop", ["trips", "go"], list(node.output), body=graph)
        node = made
        if node.ByteSize() > 2**16:  # both branches hold what is inside
            break
    if index < len(proto.graph.node):
        proto.graph.node[index].CopyFrom(node)
    proto.graph.initializer.append(helper.make_tensor("go", 9, [], [rng.random() < 0.7]))
    proto.graph.initializer.append(helper.make_tensor("trips", 7, [], [rng.choice(INTEGERS)]))


_LOOP = (("i", 7), ("c", 9))


def _function(proto: onnx.ModelProto, rng: random.Random) -> None:
    """Move a node into a local function, which may call itself."""
    node = _node(proto, rng)
    body = onnx.NodeProto()
    body.CopyFrom(node)
    inputs = list(dict.fromkeys(name for name in node.input if name))
    function = helper.make_function(
        "local", "F", inputs, list(node.output), [body], list(proto.opset_import)
    )
    if rng.random() < 0.3:
        function.node[0].op_type, function.node[0].domain = "F", "local"
        del function.node[0].attribute[:]
    proto.functions.append(function)
    node.op_type, node.domain = "F", "local"
    del node.attribute[:]
    node.input[:] = inputs
    if rng.random() < 0.8:
        proto.opset_import.append(helper.make_opsetid("local", 1))


def _clutter(proto: onnx.ModelProto, rng: random.Random) -> None:
    kind = rng.randrange(5)
    if kind == 0:
        entry = proto.metadata_props.add()
        entry.key = rng.choice(
            ("zsq.weight_scale", "zsq.preprocessing", "zsq.digests", "zsq.version", "x")
        )
        entry.value = rng.choice((*NAMES, "free", "{}", "[", '{"mean": 1}'))
    elif kind == 1:
        for entry in proto.metadata_props:
            entry.value = rng.choice((*NAMES, "free", "{}", "[1]", '{"mean": [1e999]}'))
    elif kind == 2:
        proto.graph.value_info.append(
            helper.make_tensor_value_info(
                rng.choice(_names(proto)), rng.choice(TYPES), [rng.choice(INTEGERS)]
            )
        )
    elif kind == 3:
        sparse = proto.graph.sparse_initializer.add()
        sparse.values.name = rng.choice(_names(proto))
        sparse.dims.extend(_numbers(rng))
    else:
        annotation = proto.graph.quantization_annotation.add()
        annotation.tensor_name = rng.choice(_names(proto))


MUTATIONS: tuple[Mutation, ...] = (
    *(_swap_nodes, _drop_node, _duplicate_node, _rewire, _cycle, _inputs, _outputs, _operator),
    *(_domain, _rename, _attribute, _attribute, _drop_attribute, _add_attribute, _dimension),
    *(_dimension, _interface, _version, _tensor, _tensor, _values, _values, _reshaped),
    *(_insert, _nest, _function, _clutter, _operator, _rewire),
)
