"""How a node is rewritten: what a rewrite sees of it, and how it writes its replacement."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from graph_tools.shapes import TensorType

__all__ = ["REWRITES", "NoGradientError", "Rewrite", "Site", "Writer", "rewrite"]


class NoGradientError(Exception):
    """A node that cannot be rewritten; the message names the operator and its variant."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """A node and what is known around it.

    Attributes:
        node: the node.
        types: types of all tensors, static.
        constants: values of initializers and Constant nodes by name.
        traced: tensors that lie between the inputs that want a gradient and the outputs.
    """

    node: onnx.NodeProto
    types: Mapping[str, TensorType]
    constants: Mapping[str, np.ndarray]
    traced: frozenset[str]

    def name(self, index: int) -> str:
        """Name of an input, ``""`` if it is absent."""
        return str(self.node.input[index]) if index < len(self.node.input) else ""

    def value(self, index: int) -> np.ndarray | None:
        """A constant input's value, None if it is absent.

        Raises:
            NoGradientError: it is computed.
        """
        name = self.name(index)
        if not name:
            return None
        if name not in self.constants:
            raise NoGradientError(f"{self.node.op_type} with a computed input {index}")
        return self.constants[name]

    def attribute(self, name: str, default: Any) -> Any:
        """An attribute in plain types, strings decoded."""
        for attribute in self.node.attribute:
            if attribute.name == name:
                value = helper.get_attribute_value(attribute)
                return value.decode() if isinstance(value, bytes) else value
        return default

    def shape(self, name: str) -> tuple[int, ...]:
        """Static shape of a tensor.

        Raises:
            NoGradientError: shape inference does not reach it.
        """
        shape = self.types[name].static if name in self.types else None
        if shape is None:
            raise NoGradientError(f"{self.node.op_type} on a tensor of unknown shape")
        return shape

    def is_traced(self, index: int) -> bool:
        """Whether the gradient flows through an input."""
        return self.name(index) in self.traced


class Writer:
    """Collects the nodes and constants that replace one node.

    Call it with an operator and its inputs, tensor names or numbers; it returns the output::

        write("Mul", x, write("Sigmoid", x))

    Attributes:
        nodes: so far, in order.
        constants: initializers that they read.
    """

    def __init__(self, prefix: str, taken: set[str]) -> None:
        self._prefix, self._taken = prefix, taken
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def __call__(self, op_type: str, *inputs: str | float | np.ndarray, **how: Any) -> str:
        """Add a node; numbers become float32 constants, arrays constants of their own type."""
        names = [
            value if isinstance(value, str) else self._constant(value) for value in inputs
        ]
        output = self._name(op_type)
        self.nodes.append(helper.make_node(op_type, names, [output], output, **how))
        return output

    def reshape(self, tensor: str, shape: tuple[int, ...]) -> str:
        """Reshape to a shape of plain numbers."""
        return self("Reshape", tensor, np.array(shape, np.int64))

    def _constant(self, value: float | np.ndarray) -> str:
        array = value if isinstance(value, np.ndarray) else np.float32(value)
        name = self._name("constant")
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def _name(self, kind: str) -> str:
        count = 0
        while (name := f"{self._prefix}/{kind}_{count}") in self._taken:
            count += 1
        self._taken.add(name)
        return name


Rewrite = Callable[[Site, Writer], str | None]
"""Writes what computes a node's first output and returns its name; None leaves the node."""

REWRITES: dict[str, Rewrite] = {}
"""By operator."""


def rewrite(*op_types: str) -> Callable[[Rewrite], Rewrite]:
    """Register a rewrite of the operators."""

    def register(function: Rewrite) -> Rewrite:
        for op_type in op_types:
            assert op_type not in REWRITES, op_type
            REWRITES[op_type] = function
        return function

    return register
