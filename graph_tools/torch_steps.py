"""Read an ONNX graph into steps that torch can compute, and the constants that they read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from graph_tools.errors import ModelError, UnsupportedOperatorError
from graph_tools.torch_ops import OPERATORS
from graph_tools.torch_ops.creation import constant_value
from graph_tools.torch_ops.dtypes import to_tensor
from graph_tools.torch_ops.registry import Compute, Node
from graph_tools.walk import needed_nodes
from graph_tools.weights import is_outside, values_of

__all__ = [
    "OLDEST_OPSET",
    "Prepared",
    "Step",
    "constants_and_steps",
    "prepare_steps",
    "runnable_nodes",
]

OLDEST_OPSET = 13
"""Before it Softmax, Squeeze, ReduceSum and others meant something else."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One node, in the order of computation.

    Attributes:
        name: the node's name.
        op_type: the ONNX operator.
        inputs: tensor names, ``""`` where an input is absent.
        outputs: tensor names, ``""`` where an output is not wanted.
        attributes: what the node sets; strings are ``str``, lists are tuples, tensors are CPU
            tensors.
    """

    name: str
    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(hash=False)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A step with its function.

    Attributes:
        step: the node.
        compute: its function, which may have read some of its constant inputs.
        read_constants: names of those.
        host: indices of inputs that stay on the CPU.
        last_uses: tensors that nobody needs after this step.
    """

    step: Step
    node: Node
    compute: Compute
    read_constants: frozenset[str]
    host: frozenset[int]
    last_uses: tuple[str, ...] = ()


def _opset(proto: onnx.ModelProto) -> int:
    versions = [o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")]
    return versions[0] if versions else OLDEST_OPSET


def _check_versions(nodes: Sequence[onnx.NodeProto], opset: int, where: str) -> None:
    """Refuse operators that an old opset defines in another way than ``OLDEST_OPSET``."""
    if opset >= OLDEST_OPSET:
        return
    outdated = sorted(
        op_type
        for op_type in {node.op_type for node in nodes}
        if not onnx.defs.has(op_type, opset)
        or onnx.defs.get_schema(op_type, opset).since_version
        != onnx.defs.get_schema(op_type, OLDEST_OPSET).since_version
    )
    if outdated:
        raise ModelError(
            f"opset {opset} is too old to run {', '.join(outdated)}",
            where=where,
            hint=f"convert the model to opset {OLDEST_OPSET} or newer first",
        )


def _qualified(node: onnx.NodeProto) -> str:
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}:{node.op_type}"


def _is_known(node: onnx.NodeProto) -> bool:
    return node.domain in ("", "ai.onnx") and node.op_type in OPERATORS


def runnable_nodes(
    proto: onnx.ModelProto, outputs: Iterable[str], available: set[str]
) -> list[onnx.NodeProto]:
    """Return the nodes that the outputs depend on, in an order in which they can run.

    Args:
        proto: the model.
        outputs: tensors to compute.
        available: graph inputs and initializers.

    Raises:
        UnsupportedOperatorError: names all operators that are missing.
        ModelError: an output that is not in the graph, or an old opset.
    """
    nodes = needed_nodes(proto.graph, outputs, available)
    missing = tuple(_qualified(node) for node in nodes if not _is_known(node))
    if missing:
        raise UnsupportedOperatorError(missing, where=proto.graph.name)
    _check_versions(nodes, _opset(proto), proto.graph.name)
    return nodes


def constants_and_steps(
    proto: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], wanted: set[str]
) -> tuple[dict[str, torch.Tensor], list[Step]]:
    """Return the constants (initializers and Constant nodes) and the steps."""
    constants = {
        tensor.name: _weight(tensor)
        for tensor in proto.graph.initializer
        if tensor.name in wanted
    }
    steps = []
    for position, node in enumerate(nodes):
        step = Step(
            name=node.name or f"{node.op_type}_{position}",
            op_type=node.op_type,
            inputs=tuple(node.input),
            outputs=tuple(node.output),
            attributes={a.name: _attribute(a) for a in node.attribute},
        )
        if node.op_type == "Constant":
            constants[node.output[0]] = constant_value(_node(step, _opset(proto), {}, {}))
        else:
            steps.append(step)
    return constants, steps


def _weight(tensor: onnx.TensorProto) -> torch.Tensor:
    """Return an initializer as a tensor; values outside the model are mapped, not copied."""
    values = values_of(tensor)
    if is_outside(tensor) and values.dtype == np.float32 and values.flags.aligned:
        values.flags.writeable = True  # torch knows no other arrays; nothing writes to them
        return torch.from_numpy(values)
    return to_tensor(values)


def _attribute(attribute: onnx.AttributeProto) -> Any:
    """Return an attribute's value in plain types."""
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, onnx.TensorProto):
        return to_tensor(numpy_helper.to_array(value))
    if isinstance(value, int | float | onnx.SparseTensorProto):
        return value
    return tuple(item.decode() if isinstance(item, bytes) else item for item in value)


def _element_types(graph: onnx.GraphProto) -> dict[str, int]:
    """Return the ONNX element types of all tensors that declare one."""
    types = {
        value.name: value.type.tensor_type.elem_type
        for value in (*graph.input, *graph.value_info, *graph.output)
    }
    return types | {tensor.name: tensor.data_type for tensor in graph.initializer}


def _node(
    step: Step,
    opset: int,
    constants: Mapping[str, torch.Tensor],
    types: Mapping[str, int],
) -> Node:
    return Node(
        name=step.name,
        op_type=step.op_type,
        opset=opset,
        inputs=step.inputs,
        outputs=step.outputs,
        attributes=step.attributes,
        constants={i: constants[n] for i, n in enumerate(step.inputs) if n in constants},
        types={i: types[n] for i, n in enumerate(step.inputs) if types.get(n)},
    )


def _prepare(
    step: Step,
    opset: int,
    constants: Mapping[str, torch.Tensor],
    types: Mapping[str, int],
) -> Prepared:
    node, known = _node(step, opset, constants, types), OPERATORS[step.op_type]
    compute = known.build(node)
    read = frozenset(step.inputs[index] for index in node.read_constants)
    return Prepared(
        step=step, node=node, compute=compute, read_constants=read, host=known.host
    )


def prepare_steps(
    proto: onnx.ModelProto,
    steps: Sequence[Step],
    constants: Mapping[str, torch.Tensor],
    outputs: Iterable[str],
) -> tuple[Prepared, ...]:
    """Find each step's function, and what is dead after it; ``outputs`` never are."""
    opset, types = _opset(proto), _element_types(proto.graph)
    prepared = [_prepare(step, opset, constants, types) for step in steps]
    return _with_last_uses(prepared, {*outputs, *constants})


def _with_last_uses(prepared: Sequence[Prepared], kept: set[str]) -> tuple[Prepared, ...]:
    """Note after which step each value is dead; ``kept`` names never are."""
    seen = set(kept)
    result = []
    for item in reversed(prepared):
        names = dict.fromkeys(n for n in (*item.step.inputs, *item.step.outputs) if n)
        result.append(replace(item, last_uses=tuple(n for n in names if n not in seen)))
        seen.update(names)
    return tuple(reversed(result))
