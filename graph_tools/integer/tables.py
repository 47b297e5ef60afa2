"""Operators without an exact integer form: tables over all input integers, or float32.

An elementwise operator with one input of 8 bits is a table of 256 entries. The entries are
float32, computed once by onnxruntime from one node; the QuantizeLinear behind turns them into
integers, and running the network is looking them up. What is no elementwise operator (Softmax, a
Resize that interpolates) is computed in float32 by onnxruntime from one node, and named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import NodeProto, helper, numpy_helper

from graph_tools.errors import VerificationError
from graph_tools.integer.arithmetic import Fixed, Integers

__all__ = ["ELEMENTWISE", "MAX_ENTRIES", "FloatOperator", "Lookup", "table_over"]

MAX_ENTRIES = 2**16

ELEMENTWISE = frozenset(
    "Abs Add Ceil Celu Clip Cos Div Elu Erf Exp Floor Gelu HardSigmoid HardSwish LeakyRelu Log "
    "Max Min Mish Mul Neg PRelu Pow Reciprocal Relu Round Selu Sigmoid Sign Sin Softplus "
    "Softsign Sqrt Sub Swish Tanh ThresholdedRelu".split()
)

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Lookup:
    """The tensor ``values[index]``.

    Attributes:
        index: int64, in the tensor's shape.
        values: [entries] float32.
    """

    index: Integers
    values: npt.NDArray[np.float32]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return self.index.shape

    def to_float(self) -> npt.NDArray[np.float32]:
        """The tensor."""
        found: npt.NDArray[np.float32] = self.values[self.index]
        return found

    def mapped(self, values: npt.NDArray[np.float32]) -> Lookup:
        """The same elements with other values."""
        return replace(self, values=values)


def table_over(value: Fixed) -> Lookup | None:
    """A tensor of few bits as a table of all that it can hold; None when that is unknown."""
    if value.span is None or value.exponent.size != 1 or value.divisor.size != 1:
        return None
    low, high = value.span
    if high - low >= MAX_ENTRIES:
        return None
    whole = replace(
        value, mantissa=np.arange(low, high + 1), exponent=value.exponent.reshape(())
    )
    return Lookup(index=value.mantissa - low, values=whole.to_float())


class FloatOperator:
    """One node, run by onnxruntime without optimization in float32.

    Args:
        node: the node.
        opsets: of its model.
        constants: values of its inputs that are constants, by name.
    """

    def __init__(
        self,
        node: NodeProto,
        opsets: Sequence[onnx.OperatorSetIdProto],
        constants: Mapping[str, Array],
    ) -> None:
        self._node, self._opsets, self._constants = node, opsets, constants
        self._session: Any = None

    def __call__(self, given: Mapping[str, Array]) -> list[Array]:
        """The outputs, from the inputs that are no constants.

        Raises:
            VerificationError: onnxruntime cannot run the node.
        """
        try:
            if self._session is None:
                self._session = self._compile(given)
            results: list[Array] = self._session.run(None, dict(given))
        except Exception as error:  # onnxruntime's exceptions have no base class of their own
            text = " ".join(str(error).split())[:200]
            raise VerificationError(
                f"onnxruntime cannot run {self._node.op_type} alone: {text}",
                where=f"node {self._node.name}",
            ) from error
        return results

    def _compile(self, given: Mapping[str, Array]) -> Any:
        inputs = [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(values.dtype), [None] * values.ndim
            )
            for name, values in given.items()
        ]
        outputs = [onnx.ValueInfoProto(name=name) for name in self._node.output if name]
        stored = [
            numpy_helper.from_array(np.asarray(values), name)
            for name, values in self._constants.items()
        ]
        graph = helper.make_graph([self._node], "one node", inputs, outputs, stored)
        model = helper.make_model(graph, opset_imports=list(self._opsets), ir_version=10)
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        return ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
