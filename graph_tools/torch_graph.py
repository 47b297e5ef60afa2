"""An ONNX graph as a differentiable torch module.

Every tensor keeps its ONNX name: any of them may be asked for, watched or replaced while the
graph runs. The operators live in :mod:`graph_tools.torch_ops`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
from graph_tools.weights import is_outside, values_of

__all__ = ["OLDEST_OPSET", "Hook", "Step", "TorchGraph"]

Hook = Callable[[str, torch.Tensor], torch.Tensor]

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
class _Prepared:
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


class TorchGraph(torch.nn.Module):
    """Run an ONNX graph in torch, with gradients to its inputs.

    Constants are buffers without gradient and follow ``.to(device)``, except shapes, axes, scales
    of Resize and all of type int64: these stay on the CPU and are brought to the device of the
    data where an operator needs it. Attributes and constant shape inputs are read once, here.

    Args:
        proto: a model of opset 13 or newer without subgraphs; not changed. Weights outside it
            (`graph_tools.weights`) are shared with the mapped file.
        outputs: tensors to compute, of any name; default: the graph's outputs. Only the nodes
            that they need are kept.

    Raises:
        UnsupportedOperatorError: names all operators that are missing.
        ModelError: an output that is not in the graph, an old opset, a node in training mode.

    Example:
        >>> graph = TorchGraph(model.proto, outputs=["conv1_out"])  # doctest: +SKIP
        >>> graph(torch.zeros(1, 3, 32, 32))["conv1_out"].shape  # doctest: +SKIP
        torch.Size([1, 16, 32, 32])
    """

    def __init__(
        self, proto: onnx.ModelProto, *, outputs: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        graph = proto.graph
        opset = _opset(proto)
        given = {tensor.name for tensor in graph.initializer}
        self.input_names = tuple(v.name for v in graph.input if v.name not in given)
        self.output_names = (
            tuple(v.name for v in graph.output) if outputs is None else tuple(outputs)
        )

        nodes = _needed_nodes(graph, self.output_names, {*given, *self.input_names})
        missing = tuple(_qualified(node) for node in nodes if not _is_known(node))
        if missing:
            raise UnsupportedOperatorError(missing, where=graph.name)
        _check_versions(nodes, opset, graph.name)
        wanted = {name for node in nodes for name in node.input} | set(self.output_names)
        constants, steps = _constants_and_steps(graph, nodes, wanted, opset)

        self._host_constants: dict[str, torch.Tensor] = {}
        self._buffer_names: dict[str, str] = {}
        self._placed: dict[tuple[str, torch.device], torch.Tensor] = {}
        data = {
            name
            for step in steps
            for index, name in enumerate(step.inputs)
            if index not in OPERATORS[step.op_type].host
        } | set(self.output_names)
        for name, value in constants.items():
            if value.dtype == torch.int64 or name not in data:
                self._host_constants[name] = value
            else:
                self._buffer_names[name] = f"constant_{len(self._buffer_names)}"
                self.register_buffer(self._buffer_names[name], value, persistent=False)

        types = _element_types(graph)
        prepared = [_prepare(step, opset, constants, types) for step in steps]
        kept = {*self.output_names, *constants}
        self._prepared = _with_last_uses(prepared, kept)
        self._by_output = {item.step.outputs: item for item in self._prepared}
        self._unused_inputs = tuple(n for n in self.input_names if n not in {*wanted, *kept})
        self.steps = tuple(item.step for item in self._prepared)

    @property
    def constants(self) -> dict[str, torch.Tensor]:
        """Constants that the steps read, by tensor name: the very tensors, not copies."""
        buffers = {name: self._constant(name) for name in self._buffer_names}
        return {**buffers, **self._host_constants}

    def forward(
        self, *inputs: torch.Tensor, hook: Hook | None = None
    ) -> dict[str, torch.Tensor]:
        """Compute the outputs.

        Args:
            inputs: one tensor for each of ``input_names``, all on one device.
            hook: called with name and value of each graph input and of each step's outputs, in
                order; what it returns is used instead.

        Returns:
            The tensors of ``output_names``. All other values are freed after their last use
            (those that the gradient needs, by autograd).

        Raises:
            ModelError: the number of inputs is wrong.
        """
        if len(inputs) != len(self.input_names):
            expected = ", ".join(self.input_names)
            raise ModelError(f"the graph has input(s) {expected}, got {len(inputs)} tensor(s)")
        values: dict[str, torch.Tensor] = {}
        for name, value in zip(self.input_names, inputs, strict=True):
            values[name] = value if hook is None else hook(name, value)
        for name in self._unused_inputs:
            del values[name]
        for item in self._prepared:
            self._advance(item, values, hook)
        return {name: self._value(name, values) for name in self.output_names}

    def run_step(
        self, step: Step, values: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """Compute one node.

        Args:
            step: one of ``steps``.
            values: the step's inputs by name. Constants may be left out; a value given for one
                replaces it.

        Returns:
            One tensor for each of the step's outputs.
        """
        return self._run(self._by_output[step.outputs], values)

    def _advance(
        self, item: _Prepared, values: dict[str, torch.Tensor], hook: Hook | None
    ) -> None:
        """Run a step on ``values``, and drop what nobody needs after it.

        A method of its own, so that no local variable keeps a freed tensor alive during the
        next step.
        """
        for name, value in zip(item.step.outputs, self._run(item, values), strict=False):
            if name:
                values[name] = value if hook is None else hook(name, value)
        for name in item.last_uses:
            del values[name]

    def _run(
        self, item: _Prepared, values: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        step, compute = item.step, item.compute
        if item.read_constants and not item.read_constants.isdisjoint(values):
            blank = replace(item.node, constants={}, read_constants=set())
            compute = OPERATORS[step.op_type].build(blank)
        arguments = [self._value(name, values) if name else None for name in step.inputs]
        if not all(argument is None or argument.is_cpu for argument in arguments):
            self._place(item, arguments, values)
        try:
            result = compute(*arguments)
        except Exception as error:
            shapes = [None if a is None else tuple(a.shape) for a in arguments]
            error.add_note(f"in {step.op_type} node {step.name!r}, inputs of shapes {shapes}")
            raise
        return result if isinstance(result, tuple) else (result,)

    def _place(
        self,
        item: _Prepared,
        arguments: list[torch.Tensor | None],
        values: Mapping[str, torch.Tensor],
    ) -> None:
        """Bring data to the accelerator and shapes to the CPU, in place in ``arguments``."""
        device = next(a.device for a in arguments if a is not None and not a.is_cpu)
        for index, (name, argument) in enumerate(
            zip(item.step.inputs, arguments, strict=True)
        ):
            if argument is None:
                continue
            if index in item.host:
                arguments[index] = argument.cpu()
            elif argument.is_cpu and name in values:
                arguments[index] = argument.to(device)
            elif name in self._host_constants:
                key = (name, device)
                if key not in self._placed:
                    self._placed[key] = argument.to(device)
                arguments[index] = self._placed[key]

    def _value(self, name: str, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        value = values.get(name)
        return self._constant(name) if value is None else value

    def _constant(self, name: str) -> torch.Tensor:
        host = self._host_constants.get(name)
        if host is not None:
            return host
        buffer = self._buffers[self._buffer_names[name]]
        assert buffer is not None  # none is registered without a value
        return buffer


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


def _needed_nodes(
    graph: onnx.GraphProto, outputs: Iterable[str], available: set[str]
) -> list[onnx.NodeProto]:
    """Return the nodes that the outputs depend on, in an order in which they can run."""
    producers = {name: node for node in graph.node for name in node.output if name}
    ordered: list[onnx.NodeProto] = []
    done: set[int] = set()
    for output in outputs:
        if output not in producers and output not in available:
            raise ModelError(f"no tensor {output!r} in the graph", where=graph.name)
        # Depth first with a stack of its own: deep graphs exceed Python's recursion limit.
        stack = [producers[output]] if output in producers else []
        while stack:
            node = stack[-1]
            waiting = [
                producers[name]
                for name in node.input
                if name in producers and id(producers[name]) not in done
            ]
            if id(node) in done:
                stack.pop()
            elif waiting:
                stack.extend(reversed(waiting))
            else:
                done.add(id(node))
                ordered.append(stack.pop())
    return ordered


def _constants_and_steps(
    graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto], wanted: set[str], opset: int
) -> tuple[dict[str, torch.Tensor], list[Step]]:
    """Return the constants (initializers and Constant nodes) and the steps."""
    constants = {
        tensor.name: _weight(tensor) for tensor in graph.initializer if tensor.name in wanted
    }
    steps = []
    for position, proto in enumerate(nodes):
        step = Step(
            name=proto.name or f"{proto.op_type}_{position}",
            op_type=proto.op_type,
            inputs=tuple(proto.input),
            outputs=tuple(proto.output),
            attributes={a.name: _attribute(a) for a in proto.attribute},
        )
        if proto.op_type == "Constant":
            constants[proto.output[0]] = constant_value(_node(step, opset, {}, {}))
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
) -> _Prepared:
    node, known = _node(step, opset, constants, types), OPERATORS[step.op_type]
    compute = known.build(node)
    read = frozenset(step.inputs[index] for index in node.read_constants)
    return _Prepared(
        step=step, node=node, compute=compute, read_constants=read, host=known.host
    )


def _with_last_uses(prepared: Sequence[_Prepared], kept: set[str]) -> tuple[_Prepared, ...]:
    """Note after which step each value is dead; ``kept`` names never are."""
    seen = set(kept)
    result = []
    for item in reversed(prepared):
        names = dict.fromkeys(n for n in (*item.step.inputs, *item.step.outputs) if n)
        result.append(replace(item, last_uses=tuple(n for n in names if n not in seen)))
        seen.update(names)
    return tuple(reversed(result))
