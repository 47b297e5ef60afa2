"""An ONNX graph run and differentiated by onnxruntime-training, as a function on torch tensors.

The second engine beside :mod:`graph_tools.torch_graph`: other kernels, another gradient. It needs
onnxruntime-training, which installs over onnxruntime and so lives in an environment of its own
(``make ort``).

For each shape of the inputs the graph is made static, rewritten into operators that have
gradients (:mod:`graph_tools.differentiable`), and given to onnxruntime's gradient builder. The
result is one graph in two parts: ``run_forward`` stops where the outputs are known, and
``run_backward`` goes on from their gradients to those of the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
import torch

from graph_tools.batch import resolve_shapes
from graph_tools.differentiable import differentiable
from graph_tools.errors import ModelError, SettingsError
from graph_tools.opset import OPSET, opset_version
from graph_tools.ort_session import OrtSession, is_available
from graph_tools.passes import constants_to_initializers
from graph_tools.shapes import infer, set_shape
from graph_tools.torch_ops.dtypes import to_tensor
from graph_tools.walk import needed_nodes
from graph_tools.weights import is_outside, values_of

__all__ = ["OrtGraph"]

_SHAPE_ARITHMETIC = frozenset({"Shape", "Size"})


class OrtGraph:
    """Run an ONNX graph in onnxruntime, with gradients to its inputs.

    The interface is that of `TorchGraph`, without hooks and single steps. Sessions are built at
    the first call with new input shapes or another number of threads
    (``torch.get_num_threads()``), and kept. Constants are frozen.

    Args:
        proto: a model of opset 21, as `graph_tools.model.load` gives it; not changed.
        outputs: tensors to compute, of any name; default: the graph's outputs. Only the nodes
            that they need are kept.

    Raises:
        SettingsError: onnxruntime-training is not installed.
        UnsupportedOperatorError: names all operators that have no gradient.
        ModelError: an output that is not in the graph, another opset, or weights over 1 GiB.

    Example:
        >>> graph = OrtGraph(model.proto, outputs=["conv1_out"])  # doctest: +SKIP
        >>> graph(torch.zeros(1, 3, 32, 32))["conv1_out"].shape  # doctest: +SKIP
        torch.Size([1, 16, 32, 32])
    """

    def __init__(
        self, proto: onnx.ModelProto, *, outputs: Sequence[str] | None = None
    ) -> None:
        if not is_available():
            raise SettingsError(
                "'ort' needs onnxruntime-training, which is not installed here (it would replace "
                "onnxruntime)",
                where="--engine",
                hint="`make ort` builds an environment of its own for it: .venv-ort/bin/zsq",
            )
        if opset_version(proto) != OPSET:
            raise ModelError(
                f"opset {opset_version(proto)} is not {OPSET}",
                where=proto.graph.name,
                hint="load the model first",
            )
        if any(is_outside(tensor) for tensor in proto.graph.initializer):
            raise ModelError(
                "the gradient builder of onnxruntime-training takes no weights over 1 GiB",
                where=proto.graph.name,
                hint="use --engine torch",
            )
        given = {tensor.name for tensor in proto.graph.initializer}
        self.input_names = tuple(v.name for v in proto.graph.input if v.name not in given)
        self.output_names = (
            tuple(v.name for v in proto.graph.output) if outputs is None else tuple(outputs)
        )
        self._proto, self._constants = _needed_part(proto, self.input_names, self.output_names)
        self._sessions: dict[tuple[object, ...], OrtSession] = {}
        # Operators without gradient are a matter of now, not of the first call.
        if (shapes := _smallest_shapes(self._proto)) is not None:
            self._static(shapes)

    def to(self, device: torch.device | str) -> OrtGraph:
        """Return the graph itself.

        Raises:
            SettingsError: the device is not the CPU.
        """
        if torch.device(device).type != "cpu":
            raise SettingsError(
                f"{str(device)!r} cannot be used with --engine ort, which runs on the CPU",
                where="--device",
                hint="use --engine torch",
            )
        return self

    def __call__(self, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the outputs.

        Args:
            inputs: one CPU tensor for each of ``input_names``.

        Returns:
            The tensors of ``output_names``. They and the inputs are shared with onnxruntime
            until the backward pass: autograd refuses it once one was changed in place.

        Raises:
            ModelError: the number of inputs is wrong, or onnxruntime fails.
        """
        if len(inputs) != len(self.input_names):
            expected = ", ".join(self.input_names)
            raise ModelError(f"the graph has input(s) {expected}, got {len(inputs)} tensor(s)")
        shapes = [tuple(value.shape) for value in inputs]
        values = dict(zip(self.input_names, inputs, strict=True)) | self._constants
        if self._proto.graph.output:
            session = self._session(shapes)
            contiguous = [value.contiguous() for value in inputs]
            results = _Run.apply(session, *contiguous)  # type: ignore[no-untyped-call]
            values |= dict(zip(session.outputs, results, strict=True))
        return {name: values[name] for name in self.output_names}

    def _session(self, shapes: Sequence[tuple[int, ...]]) -> OrtSession:
        """Return the session for inputs of these shapes and torch's number of threads."""
        key = (*shapes, threads := torch.get_num_threads())
        if key not in self._sessions:
            self._sessions[key] = OrtSession(self._static(shapes), threads=threads)
        return self._sessions[key]

    def _static(self, shapes: Sequence[tuple[int, ...]]) -> onnx.ModelProto:
        """Return the graph for inputs of these shapes, rewritten to be differentiable."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self._proto)
        for value, shape in zip(proto.graph.input, shapes, strict=True):
            set_shape(value, value.type.tensor_type.elem_type, shape)
        if any(node.op_type in _SHAPE_ARITHMETIC for node in proto.graph.node):
            proto = resolve_shapes(proto, batches=tuple(shapes[0][:1]) or (1,))
        proto = differentiable(proto)
        types = infer(proto)
        for value in proto.graph.output:
            set_shape(value, types[value.name].elem_type, types[value.name].shape)
        return proto


class _Run(torch.autograd.Function):
    """The graph as one operation of autograd."""

    @staticmethod
    def forward(
        ctx: Any, session: OrtSession, *inputs: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        outputs, state = session.forward(inputs)
        ctx.session, ctx.state = session, state
        # onnxruntime reads them again in the backward pass; autograd sees to it that they are
        # then what they are now.
        ctx.save_for_backward(*inputs, *outputs)
        ctx.mark_non_differentiable(
            *(o for o, known in zip(outputs, session.differentiable, strict=True) if not known)
        )
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        session: OrtSession = ctx.session
        inputs = ctx.saved_tensors[: len(session.wants_gradient)]
        state, ctx.state = ctx.state, None
        if state is None:  # used up by an earlier backward pass with retain_graph
            _, state = session.forward(inputs)
        given = [
            gradient.contiguous()
            for gradient, known in zip(gradients, session.differentiable, strict=True)
            if known
        ]
        results = iter(session.backward(given, state))
        return None, *(next(results) if wanted else None for wanted in session.wants_gradient)


def _needed_part(
    proto: onnx.ModelProto, inputs: Sequence[str], outputs: Sequence[str]
) -> tuple[onnx.ModelProto, dict[str, torch.Tensor]]:
    """Return the nodes that the outputs need, and those outputs that are constants."""
    graph = proto.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    nodes = needed_nodes(graph, outputs, {*constants, *inputs})
    used = {name for node in nodes for name in node.input}
    part = onnx.ModelProto(ir_version=proto.ir_version)
    part.opset_import.extend(proto.opset_import)
    part.graph.name = graph.name or "graph"
    part.graph.node.extend(nodes)
    part.graph.input.extend(value for value in graph.input if value.name in inputs)
    part.graph.initializer.extend(t for t in graph.initializer if t.name in used)
    constants_to_initializers(part.graph)
    constants |= {tensor.name: tensor for tensor in part.graph.initializer}
    for name in dict.fromkeys(outputs):
        if name not in constants and name not in inputs:
            part.graph.output.add(name=name)
    values = {
        name: to_tensor(values_of(constants[name])) for name in outputs if name in constants
    }
    return part, values


def _smallest_shapes(proto: onnx.ModelProto) -> list[tuple[int, ...]] | None:
    """Return the input shapes at batch size 1 where it is free, None if more is free."""
    shapes = []
    for value in proto.graph.input:
        dims = value.type.tensor_type.shape.dim
        sizes = [dim.dim_value or (1 if axis == 0 else 0) for axis, dim in enumerate(dims)]
        if not all(sizes):
            return None
        shapes.append(tuple(sizes))
    return shapes
