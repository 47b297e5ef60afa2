"""The backend tests that ship with the onnx package, run through TorchGraph.

Node tests are single operators, run as they are. Model tests are small files of old exporters:
those with one image input take the way of a user's file, the others are converted to the opset
of the normal form. Used by the tests and by ``make_operators.py``.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, numpy_helper

from graph_tools.model import load
from graph_tools.opset import to_opset, to_running_opset
from graph_tools.passes import constants_to_initializers, drop_initializer_inputs
from graph_tools.torch_graph import TorchGraph
from graph_tools.torch_ops import OPERATORS
from graph_tools.torch_ops.dtypes import to_tensor

with warnings.catch_warnings():  # making the cases divides by zero on purpose
    warnings.simplefilter("ignore")
    from onnx.backend.test.case.test_case import TestCase as OnnxCase
    from onnx.backend.test.loader import load_model_tests

__all__ = [
    "EXCLUDED",
    "EXCLUDED_MODELS",
    "MODEL_KINDS",
    "UNSUPPORTED",
    "WITHOUT_GRADIENT",
    "OnnxCase",
    "check_case",
    "check_model_case",
    "has_image_input",
    "is_float_and_static",
    "missing_operators",
    "model_cases",
    "model_of",
    "node_cases",
    "reason_for",
]

MODEL_KINDS = ("pytorch-converted", "pytorch-operator", "simple")

_SUMS = frozenset({"Attention", "DFT", "LinearAttention", "MatMul"})
_STEPS = 2  # of the type: sums depend on the order, and the order on the processor

EXCLUDED: dict[str, tuple[str, ...]] = {
    "torch has no arithmetic on uint16, uint32 and uint64": (
        "test_bitwise_not_3d",
        *(
            f"test_{name}_uint{bits}*"
            for name in "add bitshift_left bitshift_right div greater greater_equal less "
            "less_equal max min mod sub".split()
            for bits in (16, 32, 64)
        ),
    ),
    "torch has no 4-bit float": ("*FLOAT4E2M1*", "*_float4e2m1"),
    "torch casts no other type to exponent-only floats": ("*_FLOAT8E8M0*",),
    "torch has no strings": ("test_equal_string*",),
    "training mode is refused": ("*_training_mode", "test_training_dropout*"),
    "older than opset 13": ("test_dropout_*_old", "test_dynamicquantizelinear*_expanded"),
}
"""Why -> names of node tests (patterns) that fail for it; one that passes is not excused."""


EXCLUDED_MODELS: dict[str, tuple[str, ...]] = {
    "sequences are no tensors": ("test_sequence_model*",),
    "strings are no numbers": ("test_strnorm_model_*",),
    "asks for gradients, in a training domain": ("test_gradient_of_*",),
}
"""The same for the model tests."""

UNSUPPORTED: dict[str, str] = {
    "random numbers: nothing to compare, and no network's inference needs them": (
        "Bernoulli RandomNormal RandomNormalLike RandomUniform RandomUniformLike Multinomial"
    ),
    "quantized arithmetic: the tool wants the float model": (
        "ConvInteger DynamicQuantizeLinear MatMulInteger QLinearConv QLinearMatMul"
    ),
    "removed from ONNX before opset 13; `load` converts it": "Scatter Upsample",
    "features of text": "TfIdfVectorizer",
    "features of sound, no gradient": "MelWeightMatrix",
}
"""Why -> operators in float and static tests that TorchGraph does not have."""

WITHOUT_GRADIENT: dict[str, str] = {
    "comparisons and logic": """And BitCast BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor
    Equal Greater GreaterOrEqual IsInf IsNaN Less LessOrEqual Not Or Xor""",
    "integers in or out": """ArgMax ArgMin DequantizeLinear EyeLike NonMaxSuppression NonZero
    QuantizeLinear Shape Size""",
    "no float input": """BlackmanWindow Constant ConstantOfShape HammingWindow HannWindow OneHot
    Range""",
    "steps, of gradient zero": "Ceil Floor Hardmax Round Sign",
}
"""Why -> operators without a gradient; that of all others equals finite differences."""

_FLOAT_TYPES = frozenset(
    {TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16}
)


@lru_cache
def node_cases() -> dict[str, OnnxCase]:
    """Return all node tests of the installed onnx package that have a model, by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = load_model_tests(kind="node")
    return {case.name: case for case in cases if case.model is not None}


@lru_cache
def model_cases() -> dict[str, tuple[str, OnnxCase]]:
    """Return kind and case of all model tests of the kinds in ``MODEL_KINDS``, by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            case.name: (kind, case)
            for kind in MODEL_KINDS
            for case in load_model_tests(kind=kind)
        }


def reason_for(name: str, excluded: Mapping[str, tuple[str, ...]] = EXCLUDED) -> str | None:
    """Return why a test is expected to fail, None if it must pass."""
    for reason, patterns in excluded.items():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            return reason
    return None


def missing_operators(model: onnx.ModelProto) -> tuple[str, ...]:
    """Return the operators of a model that TorchGraph does not have."""
    names = {
        f"{node.domain}:{node.op_type}" if node.domain else node.op_type
        for node in model.graph.node
        if node.domain or node.op_type not in OPERATORS
    }
    return tuple(sorted(names | {f"{f.domain}:{f.name}" for f in model.functions}))


def is_float_and_static(model: onnx.ModelProto) -> bool:
    """Tell whether a node test concerns float tensors in a static graph.

    Float: some input or output of the test is float16, bfloat16, float32 or float64. Static:
    inputs and outputs are tensors of numbers, and no node has a subgraph, works on sequences
    or optionals, or is of another domain than ai.onnx.
    """
    graph = model.graph
    values = [value.type for value in (*graph.input, *graph.output)]
    types = {value.tensor_type.elem_type for value in values}
    return (
        all(value.WhichOneof("value") == "tensor_type" for value in values)
        and bool(types & _FLOAT_TYPES)
        and TensorProto.STRING not in types
        and not model.functions
        and not any(
            node.domain
            or (
                any(word in node.op_type for word in ("Sequence", "Optional"))
                and node.op_type != "ReverseSequence"
            )
            or any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)
            for node in graph.node
        )
    )


def check_case(case: OnnxCase) -> None:
    """Run a node test with every input fed, and with all but the first as constants.

    Raises:
        AssertionError: a result differs in type, shape or value from what ONNX expects.
    """
    for inputs, outputs in case.data_sets:
        _check(case, TorchGraph(case.model), inputs, outputs)
        constant = onnx.ModelProto()
        constant.CopyFrom(case.model)
        for value_info, value in list(zip(constant.graph.input, inputs, strict=True))[1:]:
            initializer = constant.graph.initializer.add()
            initializer.CopyFrom(_proto(value))
            initializer.name = value_info.name
        _check(case, TorchGraph(constant), inputs[:1], outputs)


def model_of(case: OnnxCase) -> onnx.ModelProto:
    """Return the model of a case, from its folder if it has one."""
    if case.model is not None:
        return case.model
    return onnx.load(str(Path(case.model_dir) / "model.onnx"))


def has_image_input(model: onnx.ModelProto) -> bool:
    """Tell whether a model's only input is a float tensor of rank 4."""
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [
        value.type.tensor_type for value in model.graph.input if value.name not in constants
    ]
    return (
        len(inputs) == 1
        and inputs[0].elem_type == TensorProto.FLOAT
        and len(inputs[0].shape.dim) == 4
    )


def check_model_case(case: OnnxCase) -> None:
    """Run a model test from its file.

    Raises:
        AssertionError: a result differs in type, shape or value from what ONNX expects.
        ZsqError: the model is refused.
    """
    model = model_of(case)
    if has_image_input(model):
        proto = load(Path(case.model_dir) / "model.onnx").proto
    else:
        model = to_running_opset(model, where=case.name)
        drop_initializer_inputs(model.graph)
        constants_to_initializers(model.graph)
        proto = to_opset(model, where=case.name)
    for inputs, outputs in case.data_sets or _stored_data(case):
        _check(case, TorchGraph(proto), inputs, outputs)


def _stored_data(case: OnnxCase) -> list[tuple[list[TensorProto], list[TensorProto]]]:
    folders = sorted(Path(case.model_dir).glob("test_data_set_*"))
    return [(_stored(folder, "input"), _stored(folder, "output")) for folder in folders]


def _stored(folder: Path, what: str) -> list[TensorProto]:
    count = len(list(folder.glob(f"{what}_*.pb")))
    return [onnx.load_tensor(str(folder / f"{what}_{index}.pb")) for index in range(count)]


def _proto(value: Any) -> TensorProto:
    return (
        value if isinstance(value, TensorProto) else numpy_helper.from_array(np.asarray(value))
    )


def _tensor(value: Any) -> torch.Tensor:
    return to_tensor(numpy_helper.to_array(_proto(value)))


def _check(
    case: OnnxCase, graph: TorchGraph, inputs: Sequence[Any], wanted: Sequence[Any]
) -> None:
    results = graph(*[_tensor(value) for value in inputs])
    sums = any(node.op_type in _SUMS for node in model_of(case).graph.node)
    for name, value in zip(graph.output_names, wanted, strict=True):
        expected, result = _tensor(value), results[name]
        assert result.dtype == expected.dtype, name
        assert result.shape == expected.shape, name
        rtol, atol = case.rtol, case.atol
        if result.dtype.is_floating_point:
            if sums and expected.numel():
                step = _STEPS * torch.finfo(result.dtype).eps
                largest = float(expected.double().nan_to_num(0, 0, 0).abs().max())
                rtol, atol = max(rtol, step), max(atol, step * largest)
            result, expected = result.double(), expected.double()
        np.testing.assert_allclose(
            result.detach().numpy(), expected.numpy(), rtol=rtol, atol=atol
        )
