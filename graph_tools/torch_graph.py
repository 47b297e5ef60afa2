"""An ONNX graph as a differentiable torch module.

Every tensor keeps its ONNX name: any of them may be asked for, watched or replaced while the
graph runs. The operators live in :mod:`graph_tools.torch_ops`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import onnx
import torch

from graph_tools.errors import ModelError
from graph_tools.torch_ops import OPERATORS
from graph_tools.torch_steps import (
    OLDEST_OPSET,
    Prepared,
    Step,
    constants_and_steps,
    prepare_steps,
    runnable_nodes,
)

__all__ = ["OLDEST_OPSET", "Entry", "Hook", "Step", "TorchGraph"]

Hook = Callable[[str, torch.Tensor], torch.Tensor]
Entry = Callable[[Step, torch.Tensor], torch.Tensor]


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
        given = {tensor.name for tensor in graph.initializer}
        self.input_names = tuple(v.name for v in graph.input if v.name not in given)
        self.output_names = (
            tuple(v.name for v in graph.output) if outputs is None else tuple(outputs)
        )

        nodes = runnable_nodes(proto, self.output_names, {*given, *self.input_names})
        wanted = {name for node in nodes for name in node.input} | set(self.output_names)
        constants, steps = constants_and_steps(proto, nodes, wanted)

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

        kept = {*self.output_names, *constants}
        self._prepared = prepare_steps(proto, steps, constants, self.output_names)
        self._by_output = {item.step.outputs: item for item in self._prepared}
        self._unused_inputs = tuple(n for n in self.input_names if n not in {*wanted, *kept})
        self.steps = tuple(item.step for item in self._prepared)

    @property
    def constants(self) -> dict[str, torch.Tensor]:
        """Constants that the steps read, by tensor name: the very tensors, not copies."""
        buffers = {name: self._constant(name) for name in self._buffer_names}
        return {**buffers, **self._host_constants}

    def forward(
        self, *inputs: torch.Tensor, hook: Hook | None = None, entry: Entry | None = None
    ) -> dict[str, torch.Tensor]:
        """Compute the outputs.

        Args:
            inputs: one tensor for each of ``input_names``, all on one device.
            hook: called with name and value of each graph input and of each step's outputs, in
                order; what it returns is used instead.
            entry: called with each step and its first input; what it returns this step, and no
                other reader, takes instead.

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
            self._advance(item, values, hook, entry)
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

    def run_steps(
        self,
        steps: Sequence[Step],
        values: Mapping[str, torch.Tensor],
        *,
        constants: Mapping[str, torch.Tensor] | None = None,
        hook: Hook | None = None,
    ) -> dict[str, torch.Tensor]:
        """Compute some nodes one after the other, and keep all that they make.

        Args:
            steps: some of ``steps``, in order.
            values: what they read from others, by tensor name.
            constants: replace those of the graph.
            hook: called with name and value of each output; what it returns is used instead.

        Returns:
            ``values`` and the outputs of all the steps.
        """
        found, others = dict(values), constants or {}
        for step in steps:
            given = {name: found[name] for name in step.inputs if name in found}
            given.update((name, others[name]) for name in step.inputs if name in others)
            for name, value in zip(step.outputs, self.run_step(step, given), strict=False):
                found[name] = value if hook is None else hook(name, value)
        return found

    def _advance(
        self,
        item: Prepared,
        values: dict[str, torch.Tensor],
        hook: Hook | None,
        entry: Entry | None,
    ) -> None:
        """Run a step on ``values``, and drop what nobody needs after it.

        A method of its own, so that no local variable keeps a freed tensor alive during the
        next step.
        """
        for name, value in zip(
            item.step.outputs, self._run(item, values, entry), strict=False
        ):
            if name:
                values[name] = value if hook is None else hook(name, value)
        for name in item.last_uses:
            del values[name]

    def _run(
        self,
        item: Prepared,
        values: Mapping[str, torch.Tensor],
        entry: Entry | None = None,
    ) -> tuple[torch.Tensor, ...]:
        step, compute = item.step, item.compute
        if item.read_constants and not item.read_constants.isdisjoint(values):
            blank = replace(item.node, constants={}, read_constants=set())
            compute = OPERATORS[step.op_type].build(blank)
        arguments = [self._value(name, values) if name else None for name in step.inputs]
        if not all(argument is None or argument.is_cpu for argument in arguments):
            self._place(item, arguments, values)
        if entry is not None and arguments and arguments[0] is not None:
            arguments[0] = entry(step, arguments[0])
        try:
            result = compute(*arguments)
        except Exception as error:
            shapes = [None if a is None else tuple(a.shape) for a in arguments]
            error.add_note(f"in {step.op_type} node {step.name!r}, inputs of shapes {shapes}")
            raise
        return result if isinstance(result, tuple) else (result,)

    def _place(
        self,
        item: Prepared,
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
