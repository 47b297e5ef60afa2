"""How an ONNX operator becomes a torch function.

An operator is one function, registered under its ONNX name. It receives the :class:`Node`
once, when the graph is built, reads the attributes (with ONNX's defaults) and the constant
inputs there, and returns the function that computes the node::

    @operator("LeakyRelu")
    def leaky_relu(node: Node) -> Compute:
        alpha = node.number("alpha", 0.01)
        return lambda x: functional.leaky_relu(x, alpha)

The returned function gets one tensor an ONNX input, ``None`` where an input is absent, and
returns one tensor, or a tuple of as many as the node has outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from graph_tools.errors import ModelError

__all__ = ["OPERATORS", "Builder", "Compute", "Node", "Operator", "alias", "operator"]

Compute = Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]


@dataclass(frozen=True, kw_only=True)
class Node:
    """What an operator may know when the graph is built.

    Attributes:
        name: the node's name, for messages.
        op_type: the ONNX operator.
        opset: version of the ``ai.onnx`` operator set that the graph follows.
        inputs: tensor names, ``""`` where an input is absent.
        outputs: tensor names, ``""`` where an output is not wanted.
        attributes: attributes that the node sets; strings are ``str``, lists are tuples,
            tensors are ``torch.Tensor``.
        constants: values of the constant inputs, by input index.
        types: ``onnx.TensorProto`` element types of the inputs, by input index, where known.
        read_constants: indices of the constants that the operator has read; a node of which
            one of them is replaced later must be built anew.
    """

    name: str
    op_type: str
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    constants: Mapping[int, torch.Tensor]
    types: Mapping[int, int]
    read_constants: set[int] = field(default_factory=set)

    def integer(self, name: str, default: int) -> int:
        """Return an integer attribute."""
        return self.attributes.get(name, default)  # type: ignore[no-any-return]

    def flag(self, name: str, default: bool = False) -> bool:
        """Return an attribute that is 0 or 1 as a bool."""
        return bool(self.attributes.get(name, default))

    def number(self, name: str, default: float) -> float:
        """Return a float attribute."""
        return self.attributes.get(name, default)  # type: ignore[no-any-return]

    def text(self, name: str, default: str) -> str:
        """Return a string attribute."""
        return self.attributes.get(name, default)  # type: ignore[no-any-return]

    def integers(self, name: str) -> tuple[int, ...] | None:
        """Return an attribute that lists integers, None if it is not set."""
        return self.attributes.get(name)

    def wants(self, index: int) -> bool:
        """Tell whether somebody may read output ``index``."""
        return index < len(self.outputs) and self.outputs[index] != ""

    def has(self, index: int) -> bool:
        """Tell whether input ``index`` is connected."""
        return index < len(self.inputs) and self.inputs[index] != ""

    def constant(self, index: int) -> torch.Tensor | None:
        """Return input ``index`` if it is a constant; the node then depends on its value."""
        value = self.constants.get(index)
        if value is not None:
            self.read_constants.add(index)
        return value

    def scalar(self, index: int) -> float | int | None:
        """Return input ``index`` as a Python number if it is a constant with one element."""
        value = self.constants.get(index)
        if value is None or value.numel() != 1 or value.dim() > 1:
            return None
        self.read_constants.add(index)
        return value.item()

    def ints_input(
        self, index: int
    ) -> Callable[[torch.Tensor | None], tuple[int, ...] | None]:
        """Return a function that reads input ``index`` as integers; a constant is read now."""
        value = self.constant(index)
        if value is None:
            return lambda given: None if given is None else tuple(given.reshape(-1).tolist())
        fixed = tuple(value.reshape(-1).tolist())
        return lambda given: fixed

    def fault(self, what: str, hint: str = "") -> ModelError:
        """Return the error for a node that no engine here can run."""
        return ModelError(what, where=f"{self.op_type} node {self.name!r}", hint=hint)


Builder = Callable[[Node], Compute]


@dataclass(frozen=True, kw_only=True)
class Operator:
    """A registered operator.

    Attributes:
        build: makes the function that computes a node.
        host: indices of inputs that hold shapes, axes or sizes: int64 on the CPU, whatever the
            device.
    """

    build: Builder
    host: frozenset[int] = frozenset()


OPERATORS: dict[str, Operator] = {}


def operator(*names: str, host: tuple[int, ...] = ()) -> Callable[[Builder], Builder]:
    """Register the decorated builder under ONNX operator names.

    Args:
        names: ONNX names, such as ``"Conv"``.
        host: indices of inputs that hold shapes, axes or sizes and stay on the CPU.
    """

    def register(build: Builder) -> Builder:
        for name in names:
            OPERATORS[name] = Operator(build=build, host=frozenset(host))
        return build

    return register


def alias(name: str, compute: Compute) -> None:
    """Register an operator without attributes that torch has under another name."""
    OPERATORS[name] = Operator(build=lambda node: compute)
