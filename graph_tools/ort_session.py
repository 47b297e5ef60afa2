"""Forward and backward pass of one static graph in onnxruntime-training.

The gradient builder joins a graph and its gradient; a TrainingAgent runs the first part up to the
outputs and, given the gradients of these, the rest up to the gradients of the inputs. Memory is
shared with torch by DLPack:

- Inputs are read where they are. Whoever changes one in place between the passes spoils the
  gradient: autograd is told of them and refuses the backward pass then.
- Outputs are handed out where they are, since the session runs with ``enable_mem_reuse`` off:
  with it onnxruntime puts other tensors in their place, during the backward pass and the next
  forward pass. Without it every run has memory of its own, and takes no longer.
- Gradients of outputs are read where they are; onnxruntime never writes to memory from outside.
- Gradients of inputs are results of the run, and belong to whoever reads them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.capi import _pybind_state as ort
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

from graph_tools.differentiable import traced_tensors
from graph_tools.errors import ModelError
from graph_tools.quiet import quiet
from graph_tools.shapes import infer

__all__ = ["OrtSession", "is_available"]

_FATAL = 4


def is_available() -> bool:
    """Whether the installed onnxruntime is onnxruntime-training."""
    return hasattr(ort, "OrtModuleGraphBuilder")


class OrtSession:
    """A static graph, ready to run and to differentiate.

    Args:
        proto: made of operators with gradients (`graph_tools.differentiable`).
        threads: of onnxruntime.

    Attributes:
        outputs: names of the outputs.
        differentiable: for each output whether a gradient flows from it.
        wants_gradient: for each input whether a gradient reaches it.

    Raises:
        ModelError: onnxruntime refuses the graph.
    """

    def __init__(self, proto: onnx.ModelProto, *, threads: int) -> None:
        self.outputs = tuple(value.name for value in proto.graph.output)
        traced = traced_tensors(proto, infer(proto))
        inputs = [value.name for value in proto.graph.input]
        self.wants_gradient = tuple(name in traced for name in inputs)
        self.differentiable = tuple(name in traced for name in self.outputs)
        self._where = proto.graph.name
        with quiet(), self._refusals("cannot differentiate the graph"):
            self._open(proto, [name for name in inputs if name in traced], threads)

    def _open(self, proto: onnx.ModelProto, wanted: list[str], threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.enable_mem_pattern = False
        options.enable_mem_reuse = False
        options.intra_op_num_threads = threads
        # Two pools of threads take turns here, torch's and this one: one that waits spinning
        # keeps the other from its cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = _FATAL
        if not wanted:
            self._session = _session(proto.SerializeToString(), options)
            return
        config = ort.OrtModuleGraphBuilderConfiguration()
        config.initializer_names = []  # none is given from outside: they stay in the graph
        config.initializer_names_to_train = []
        config.input_names_require_grad = wanted
        config.build_gradient_graph = True
        builder = ort.OrtModuleGraphBuilder()
        builder.initialize(proto.SerializeToString(), config)
        builder.build(ort.TrainingGraphTransformerConfiguration())
        content = builder.get_gradient_model()
        graph = onnx.load_from_string(content).graph
        self._session = _session(content, options)
        cpu = ort.OrtDevice(ort.OrtDevice.cpu(), ort.OrtDevice.default_memory(), 0)
        self._agent = ort.TrainingAgent(
            self._session._sess,
            [value.name for value in graph.input],
            [cpu] * len(self.outputs),
            [value.name for value in graph.output],
            [cpu] * len(graph.output),
            0,
        )

    @contextmanager
    def _refusals(self, what: str) -> Iterator[None]:
        """Turn onnxruntime's exceptions, which share no base class, into one of ours."""
        try:
            yield
        except Exception as error:
            raise ModelError(
                f"onnxruntime {what}: {_reason(error)}",
                where=self._where,
                hint="use --engine torch",
            ) from error

    def forward(self, inputs: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], Any]:
        """Run the forward part.

        Args:
            inputs: contiguous CPU tensors of the shapes that the graph was made for.

        Returns:
            The outputs, and the state that `backward` goes on from.

        Raises:
            ModelError: onnxruntime fails.
        """
        if not any(self.wants_gradient):
            feeds = zip(self._session.get_inputs(), inputs, strict=True)
            arrays = self._session.run(None, {given.name: x.numpy() for given, x in feeds})
            return [torch.from_numpy(np.asarray(array)) for array in arrays], None
        state, results = ort.PartialGraphExecutionState(), ort.OrtValueVector()
        with self._refusals("fails in the forward pass"):
            self._agent.run_forward(_vector(inputs), results, state, None)
        return results.to_dlpacks(from_dlpack), state

    def backward(self, gradients: Sequence[torch.Tensor], state: Any) -> list[torch.Tensor]:
        """Run the backward part, once for each `state`.

        Args:
            gradients: one for each output that is `differentiable`, contiguous.
            state: of the forward part.

        Returns:
            One gradient for each input that `wants_gradient`.

        Raises:
            ModelError: onnxruntime fails.
        """
        results = ort.OrtValueVector()
        with self._refusals("fails in the backward pass"):
            self._agent.run_backward(_vector(gradients), results, state)
        tensors: list[torch.Tensor] = results.to_dlpacks(from_dlpack)
        return tensors


def _reason(error: Exception) -> str:
    """Return what a message says behind the C++ function and the code that it starts with."""
    text = " ".join(str(error).split())
    return re.split(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", text)[-1][-160:]


def _session(content: bytes, options: Any) -> Any:
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _vector(tensors: Sequence[torch.Tensor]) -> Any:
    vector = ort.OrtValueVector()
    vector.reserve(len(tensors))
    for tensor in tensors:
        vector.push_back(to_dlpack(tensor), tensor.dtype == torch.bool)
    return vector
