"""Every operator against ONNX's own node tests (forward) and finite differences (gradient)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from docs.onnx_cases import (
    EXCLUDED,
    EXCLUDED_MODELS,
    WITHOUT_GRADIENT,
    check_case,
    check_model_case,
    has_image_input,
    missing_operators,
    model_cases,
    model_of,
    node_cases,
    reason_for,
)
from graph_tools.errors import ModelError
from graph_tools.torch_graph import TorchGraph
from graph_tools.torch_ops import OPERATORS
from graph_tools.torch_ops.dtypes import to_tensor, torch_type

CASES = {
    name: case for name, case in node_cases().items() if not missing_operators(case.model)
}
EXCLUDED_COUNTS = (43, 14, 4, 2, 8, 5)

REQUIRED = set(
    """
    Abs Add And ArgMax ArgMin AveragePool BatchNormalization Cast CastLike Ceil Celu Clip Concat
    Constant ConstantOfShape Conv ConvTranspose Cos CumSum DepthToSpace DequantizeLinear Div
    Dropout Einsum Elu Equal Erf Exp Expand Flatten Floor Gather GatherElements GatherND Gelu
    Gemm GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual GroupNormalization HardSigmoid
    HardSwish Identity InstanceNormalization LRN LayerNormalization LeakyRelu Less LessOrEqual
    Log LogSoftmax MatMul Max MaxPool Mean Min Mish Mod Mul Neg Not Or PRelu Pad Pow
    QuantizeLinear Range Reciprocal ReduceL1 ReduceL2 ReduceLogSumExp ReduceMax ReduceMean
    ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize Round Selu Shape Sigmoid
    Sign Sin Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Swish
    Tanh ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Where Xor
    AffineGrid Attention CenterCropPad Col2Im Compress CumProd DFT DeformConv Det EyeLike GRU
    GridSample Hardmax LSTM LpNormalization LpPool MaxUnpool MeanVarianceNormalization
    NonMaxSuppression NonZero OneHot RMSNormalization RNN ReverseSequence RoiAlign
    RotaryEmbedding ScatterElements ScatterND Shrink TensorScatter Unique
    """.split()
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tensors of a few numbers: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _parameters(names: Iterable[str], excluded: Mapping[str, tuple[str, ...]]) -> list[Any]:
    parameters = []
    for name in names:
        reason = reason_for(name, excluded)
        marks = [pytest.mark.xfail(reason=reason, strict=True)] if reason else []
        parameters.append(pytest.param(name, marks=marks, id=name[5:]))
    return parameters


@pytest.mark.parametrize("name", _parameters(CASES, EXCLUDED))
def test_node_case(name: str) -> None:
    """With every input fed, and with all but the first as constants, which builders may read."""
    check_case(CASES[name])


@pytest.mark.parametrize("name", _parameters(model_cases(), EXCLUDED_MODELS))
def test_model_case(name: str) -> None:
    """Files of old exporters, those with an image input by the way of a user's file."""
    check_model_case(model_cases()[name][1])


def test_number_of_model_cases() -> None:
    by_load = [
        name for name, (_, case) in model_cases().items() if has_image_input(model_of(case))
    ]
    assert (len(by_load), len(model_cases())) == (42, 140)


def test_every_required_operator_has_a_case_of_its_own_that_must_pass() -> None:
    covered = {
        case.model.graph.node[0].op_type
        for name, case in CASES.items()
        if len(case.model.graph.node) == 1 and reason_for(name) is None
    }
    assert REQUIRED - covered == set()


def test_number_of_excluded_cases_byreason_for() -> None:
    counts = {reason: 0 for reason in EXCLUDED}
    for name in CASES:
        if reason := reason_for(name):
            counts[reason] += 1
    assert tuple(counts.values()) == EXCLUDED_COUNTS
    used = {p for ps in EXCLUDED.values() for p in ps if any(fnmatchcase(n, p) for n in CASES)}
    assert used == {p for patterns in EXCLUDED.values() for p in patterns}


# -- gradients -----------------------------------------------------------------------------------

# (operator, attributes, inputs); an input is the shape of a float tensor that gets a gradient,
# an array (a constant), or None (absent).
F = (2, 3, 4)
IMAGE = (1, 4, 4, 5)
RANDOM = np.random.default_rng(0)


def _f(*shape: int) -> np.ndarray:
    return (0.5 + RANDOM.random(shape)).astype(np.float32)


def _i(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def _n(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


SCALAR = np.float32(0.5).reshape(())
GRADIENT_CASES: list[tuple[str, dict[str, Any], list[Any]]] = [
    *[
        (name, {}, [F])
        for name in """Abs Asin Asinh Atan Cos Cosh Erf Exp Identity Neg Sin Sinh Tan Tanh Elu Celu
        Selu Gelu HardSigmoid HardSwish LeakyRelu LogSoftmax Mish Relu Sigmoid Softmax Softplus
        Softsign Swish ThresholdedRelu Flatten Dropout""".split()
    ],
    *[(name, {"positive": True}, [F]) for name in ("Log", "Sqrt", "Reciprocal", "Acosh")],
    ("Acos", {}, [F]),
    ("Atanh", {}, [F]),
    ("Gelu", {"approximate": "tanh"}, [F]),
    ("Swish", {"alpha": 0.7}, [F]),
    ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}, [F]),
    ("PRelu", {}, [IMAGE, _f(4, 1, 1)]),
    ("PRelu", {}, [IMAGE, _f(4, 4, 5)]),
    ("Clip", {}, [F, np.float32(-0.3).reshape(()), SCALAR]),
    ("Clip", {}, [F, None, SCALAR]),
    *[(name, {}, [F, (3, 1)]) for name in ("Add", "Sub", "Mul", "Max", "Min", "Sum", "Mean")],
    ("Div", {"positive": True}, [F, (4,)]),
    ("Pow", {"positive": True}, [F, (4,)]),
    ("Pow", {}, [F, np.float32(2).reshape(())]),
    ("Mod", {"fmod": 1}, [F, _f(4)]),
    ("Where", {}, [np.array([True, False, True, False]), F, F]),
    ("Conv", {"pads": [1, 0, 2, 1], "strides": [2, 1]}, [IMAGE, (2, 4, 3, 2), (2,)]),
    ("Conv", {"group": 4, "pads": [1, 1, 1, 1], "dilations": [2, 1]}, [IMAGE, _f(8, 1, 2, 3)]),
    ("Conv", {"auto_pad": "SAME_LOWER", "strides": [2]}, [(1, 2, 7), _f(3, 2, 4)]),
    ("Conv", {}, [(1, 2, 3, 4, 3), _f(2, 2, 2, 3, 2)]),
    (
        "ConvTranspose",
        {"strides": [2, 2], "pads": [1, 1, 1, 1]},
        [IMAGE, _f(4, 2, 3, 3), _f(2)],
    ),
    (
        "ConvTranspose",
        {"strides": [3, 2], "output_shape": [11, 10], "group": 2},
        [IMAGE, _f(4, 1, 3, 3), _f(2)],
    ),
    ("Gemm", {"alpha": 0.5, "beta": 2.0, "transA": 1}, [(3, 2), (3, 4), (4,)]),
    ("Gemm", {"transB": 1}, [(2, 3), (4, 3), (4,)]),
    ("MatMul", {}, [F, (4, 2)]),
    ("Einsum", {"equation": "bij, jk -> bik"}, [F, (4, 2)]),
    ("MaxPool", {"kernel_shape": [2, 3], "ceil_mode": 1, "strides": [2, 2]}, [IMAGE]),
    ("MaxPool", {"kernel_shape": [3, 3], "pads": [0, 0, 2, 1]}, [IMAGE]),
    ("AveragePool", {"kernel_shape": [2, 3], "pads": [1, 1, 1, 1]}, [IMAGE]),
    (
        "AveragePool",
        {"kernel_shape": [3, 2], "pads": [0, 0, 1, 1], "dilations": [1, 2]},
        [IMAGE],
    ),
    ("GlobalAveragePool", {}, [IMAGE]),
    ("GlobalMaxPool", {}, [IMAGE]),
    ("BatchNormalization", {}, [IMAGE, _f(4), _f(4), _f(4), _f(4)]),
    ("InstanceNormalization", {}, [IMAGE, _f(4), _f(4)]),
    ("GroupNormalization", {"num_groups": 2}, [IMAGE, _f(4), _f(4)]),
    ("LayerNormalization", {"axis": 2}, [IMAGE, _f(4, 5), _f(4, 5)]),
    ("LayerNormalization", {"axis": 2}, [IMAGE, _f(5), None]),
    ("LRN", {"size": 3, "alpha": 0.3}, [IMAGE]),
    *[
        (f"Reduce{name}", {"keepdims": 0}, [F, _i(0, 2)])
        for name in ("Mean", "Sum", "Max", "Min", "Prod", "L1", "L2", "SumSquare", "LogSumExp")
    ],
    ("ReduceLogSum", {"positive": True}, [F, _i(1)]),
    ("ReduceL2", {"noop_with_empty_axes": 1, "positive": True}, [F]),
    ("CumSum", {"exclusive": 1, "reverse": 1}, [F, _i(1)]),
    ("TopK", {"outputs": 2}, [F, _i(2)]),
    ("Concat", {"axis": 1}, [F, (2, 1, 4)]),
    ("Split", {"axis": 2, "outputs": 2}, [F, _i(1, 3)]),
    ("Slice", {}, [F, _i(-1, 1), _i(-9, 3), _i(2, 1), _i(-2, 1)]),
    ("Gather", {"axis": 1}, [F, np.array([[0, -1], [1, 1]], dtype=np.int64)]),
    ("Gather", {"axis": 2}, [F, np.array(1, dtype=np.int64)]),
    ("GatherElements", {"axis": 2}, [F, np.full((2, 3, 2), -1, dtype=np.int64)]),
    ("GatherND", {"batch_dims": 1}, [F, np.array([[[1]], [[-1]]], dtype=np.int64)]),
    ("Trilu", {"upper": 0}, [F, np.array(-1, dtype=np.int64)]),
    ("Pad", {}, [F, _i(0, 1, 2, 0, -1, 1)]),
    *[
        (("Pad"), {"mode": mode}, [IMAGE, _i(0, 0, 1, 2, 0, 0, 2, 1)])
        for mode in ("reflect", "edge", "wrap")
    ],
    ("Transpose", {"perm": [2, 0, 1]}, [F]),
    ("Reshape", {}, [F, _i(0, -1)]),
    ("Squeeze", {}, [(2, 1, 3), _i(1)]),
    ("Unsqueeze", {}, [F, _i(0, -1)]),
    ("Expand", {}, [(3, 1), _i(2, 1, 4)]),
    ("Tile", {}, [F, _i(1, 2, 2)]),
    ("DepthToSpace", {"blocksize": 2}, [IMAGE]),
    ("SpaceToDepth", {"blocksize": 2}, [(1, 2, 4, 6)]),
    ("Cast", {"to": TensorProto.DOUBLE}, [F]),
    ("CastLike", {}, [F, np.zeros(1)]),
    ("Resize", {}, [IMAGE, None, _n(1, 1, 2, 3)]),
    ("Resize", {}, [IMAGE, None, _n(1, 1, 0.6, 1.7)]),
    ("Resize", {"mode": "linear"}, [IMAGE, None, _n(1, 1, 2, 1.5)]),
    ("Resize", {"mode": "linear", "antialias": 1}, [IMAGE, None, _n(1, 1, 0.6, 0.5)]),
    ("Resize", {"mode": "cubic"}, [IMAGE, None, None, _i(1, 4, 7, 9)]),
    (
        "Resize",
        {
            "mode": "cubic",
            "coordinate_transformation_mode": "asymmetric",
            "exclude_outside": 1,
        },
        [IMAGE, None, None, _i(1, 4, 7, 9)],
    ),
    (
        "Resize",
        {"mode": "linear", "coordinate_transformation_mode": "tf_crop_and_resize"},
        [IMAGE, _n(0, 0, 0.1, -0.2, 1, 1, 0.8, 1.2), None, _i(1, 4, 3, 7)],
    ),
    ("Shrink", {"bias": 0.1, "lambd": 0.3}, [F]),
    ("SwiGLU", {"alpha": 0.7}, [F, F]),
    ("RMSNormalization", {"axis": 1}, [F, (4,)]),
    ("LpNormalization", {"axis": 1}, [F]),
    ("LpNormalization", {"p": 1}, [F]),
    ("MeanVarianceNormalization", {}, [IMAGE]),
    ("LpPool", {"kernel_shape": [2, 3], "pads": [1, 0, 0, 1], "p": 3}, [IMAGE]),
    ("LpPool", {"kernel_shape": [3, 3], "strides": [2, 2]}, [IMAGE]),
    ("GlobalLpPool", {"p": 2}, [IMAGE]),
    (
        "MaxUnpool",
        {"kernel_shape": [2], "strides": [2]},
        [(1, 2, 2), _i(1, 2, 5, 6).reshape(1, 2, 2)],
    ),
    (
        "Col2Im",
        {"pads": [1, 0, 0, 1], "strides": [1, 2], "dilations": [2, 1]},
        [(1, 8, 9), _i(4, 5), _i(2, 2)],
    ),
    ("CenterCropPad", {"axes": [1, -1]}, [F, _i(2, 7)]),
    ("CumProd", {"reverse": 1}, [F, _i(1)]),
    ("Det", {}, [(2, 3, 3)]),
    ("ReverseSequence", {}, [(3, 2, 2), _i(2, 3)]),
    ("Compress", {"axis": 1}, [F, np.array([True, False, True])]),
    ("Unique", {}, [F]),
    ("ScatterElements", {"axis": 1}, [F, np.array([[[-1], [0]]]), (1, 2, 1)]),
    *[
        (
            name,
            {"reduction": reduction},
            [(4, 3), np.array([[3], [-3], [3]]) + 0 * columns, updates],
        )
        for name, columns, updates in (
            ("ScatterElements", np.zeros((1, 3), np.int64), (3, 3)),
            ("ScatterND", np.zeros((1, 1), np.int64), (3, 3)),
        )
        for reduction in ("add", "mul", "max", "min")
    ],
    ("ScatterND", {}, [F, np.array([[1, -1], [0, 2]]), (2, 4)]),
    ("TensorScatter", {"mode": "circular"}, [(2, 3, 4), (2, 2, 4), _i(2, 1)]),
    *[
        (
            "GridSample",
            {"mode": mode, "padding_mode": padding, "align_corners": corners},
            [IMAGE, (1, 2, 3, 2)],
        )
        for mode in ("linear", "cubic")
        for padding in ("zeros", "border", "reflection")
        for corners in (0, 1)
    ],
    (
        "GridSample",
        {"mode": "nearest"},
        [IMAGE, _n(*np.linspace(-1.1, 0.9, 12)).reshape(1, 2, 3, 2)],
    ),
    ("GridSample", {"padding_mode": "border"}, [(1, 2, 3, 4, 3), (1, 2, 2, 1, 3)]),
    ("GridSample", {"padding_mode": "reflection"}, [(1, 2, 5), (1, 4, 1)]),
    ("GridSample", {"mode": "cubic"}, [(1, 1, 3, 3, 3), (1, 1, 1, 2, 3)]),
    ("AffineGrid", {}, [(1, 2, 3), _i(1, 1, 3, 4)]),
    (
        "DeformConv",
        {"pads": [1, 1, 0, 1], "strides": [2, 1], "offset_group": 2, "group": 2},
        [IMAGE, (2, 2, 2, 2), (1, 16, 2, 6), (2,), (1, 8, 2, 6)],
    ),
    (
        "RoiAlign",
        {"output_height": 2, "output_width": 2, "spatial_scale": 0.7},
        [IMAGE, _n(0.3, 0.6, 4.9, 4.2, -1.2, 0.1, 2.1, 3.3).reshape(2, 4), _i(0, 0)],
    ),
    (
        "RoiAlign",
        {"output_height": 2, "output_width": 1, "sampling_ratio": 3, "mode": "max"},
        [IMAGE, _n(0.3, 0.6, 4.9, 4.2).reshape(1, 4), _i(0)],
    ),
    (
        "MaxRoiPool",
        {"pooled_shape": [2, 3], "spatial_scale": 0.6},
        [IMAGE, _n(0, 0.3, 1.6, 4.9, 4.2, 0, -2.0, 4, 3, 9).reshape(2, 5)],
    ),
    ("Attention", {}, [(1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 5, 2)]),
    (
        "Attention",
        {"q_num_heads": 2, "kv_num_heads": 1, "is_causal": 1, "softcap": 2.0, "scale": 0.7},
        [(1, 3, 4), (1, 3, 2), (1, 3, 3), (3, 3)],
    ),
    (
        "Attention",
        {"left_window_size": 1, "outputs": 3},
        [(1, 1, 2, 2), (1, 1, 2, 2), (1, 1, 2, 2), None, (1, 1, 2, 2), (1, 1, 2, 2)],
    ),
    (
        "RotaryEmbedding",
        {"num_heads": 2, "rotary_embedding_dim": 2},
        [(1, 2, 6), (3, 1), (3, 1), np.array([[2, 0]])],
    ),
    ("RotaryEmbedding", {"interleaved": 1}, [(1, 2, 3, 4), (1, 3, 2), (1, 3, 2)]),
    (
        "LinearAttention",
        {"q_num_heads": 2, "kv_num_heads": 1},
        [(1, 3, 4), (1, 3, 2), (1, 3, 2), None, (1, 3, 2), (1, 3, 1)],
    ),
    ("CausalConvWithState", {"activation": "silu"}, [(1, 2, 4), (2, 1, 3), (2,)]),
    ("NegativeLogLikelihoodLoss", {}, [(2, 3), _i(2, 0), _f(3)]),
    (
        "SoftmaxCrossEntropyLoss",
        {"reduction": "sum", "ignore_index": 1},
        [F, np.arange(8).reshape(2, 4) % 3],
    ),
    ("DFT", {"onesided": 1}, [(1, 5, 1), None, np.array(1)]),
    ("DFT", {"inverse": 1}, [(1, 4, 2)]),
    ("STFT", {}, [(1, 9, 1), np.array(2), (4,)]),
    ("RNN", {"hidden_size": 2, "direction": "reverse"}, [(3, 1, 2), (1, 2, 2), (1, 2, 2)]),
    (
        "GRU",
        {"hidden_size": 2, "direction": "bidirectional", "linear_before_reset": 1},
        [(3, 2, 1), (2, 6, 1), (2, 6, 2), (2, 12), np.array([3, 2], np.int32)],
    ),
    (
        "LSTM",
        {
            "hidden_size": 2,
            "activations": ["HardSigmoid", "Affine", "LeakyRelu"],
            "activation_alpha": [0.3, 0.7, 0.2],
            "activation_beta": [0.4],
            "clip": 3.0,
            "outputs": 3,
        },
        [(3, 2, 1), (1, 8, 1), (1, 8, 2), (1, 16), np.array([1, 3], np.int32)],
    ),
    (
        "LSTM",
        {"hidden_size": 1, "layout": 1},
        [(1, 3, 2), (1, 4, 2), (1, 4, 1), (1, 8), None, (1, 1, 1), (1, 1, 1), (1, 3)],
    ),
]


def _graph(op_type: str, attributes: dict[str, Any], inputs: list[Any]) -> onnx.ModelProto:
    names, infos, initializers = [], [], []
    for index, given in enumerate(inputs):
        name = f"x{index}"
        if given is None:
            names.append("")
            continue
        names.append(name)
        if isinstance(given, tuple):
            infos.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, given))
        else:
            initializers.append(numpy_helper.from_array(given, name))
    options = dict(attributes)
    options.pop("positive", None)
    outputs = [f"y{index}" for index in range(options.pop("outputs", 1))]
    node = helper.make_node(op_type, names, outputs, **options)
    results = [helper.make_empty_tensor_value_info(name) for name in outputs]
    graph = helper.make_graph([node], "gradient", infos, results, initializers)
    opset = 21 if onnx.defs.has(op_type, 21) else onnx.defs.get_schema(op_type).since_version
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


def _away_from_kinks(shape: tuple[int, ...], positive: bool, seed: int) -> torch.Tensor:
    """Return distinct values, none within 0.01 of 0, 0.5 or of each other."""
    count = int(np.prod(shape))
    values = torch.arange(1, count + 1, dtype=torch.float64) / (count + 1) * 0.93 + 0.031
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    values = values[order].reshape(shape)
    signs = torch.where(order.reshape(shape) % 2 == 0, 1.0, -1.0)
    return 1 + values if positive else values * signs


@pytest.mark.parametrize(
    ("op_type", "attributes", "inputs"),
    GRADIENT_CASES,
    ids=[f"{index}-{case[0]}" for index, case in enumerate(GRADIENT_CASES)],
)
def test_gradient_equals_finite_differences(
    op_type: str, attributes: dict[str, Any], inputs: list[Any]
) -> None:
    graph = TorchGraph(_graph(op_type, attributes, inputs)).double()
    positive = attributes.get("positive", False)
    shapes = [given for given in inputs if isinstance(given, tuple)]
    tensors = [
        _away_from_kinks(shape, positive, seed).requires_grad_()
        for seed, shape in enumerate(shapes)
    ]

    def compute(*values: torch.Tensor) -> torch.Tensor:
        return graph(*values)["y0"]

    before = [tensor.detach().clone() for tensor in tensors]
    # eps well under the distance between values, so that no maximum changes hands
    assert torch.autograd.gradcheck(compute, tensors, eps=1e-6, atol=1e-6, rtol=1e-5)
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor, copy)  # no operator may write to its input


def test_every_operator_has_a_gradient_case_or_areason_for() -> None:
    excused = {name for names in WITHOUT_GRADIENT.values() for name in names.split()}
    assert set(OPERATORS) - {case[0] for case in GRADIENT_CASES} == excused


# -- against onnxruntime, where the node tests leave gaps --------------------------------------


@lru_cache
def _session_options() -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    return options


def _onnxruntime(proto: onnx.ModelProto, *inputs: np.ndarray) -> list[np.ndarray]:
    import onnxruntime

    proto.ir_version = 10
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), _session_options(), providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in session.get_inputs()]
    return session.run(None, dict(zip(names, inputs, strict=True)))


RUNTIME_CASES: list[tuple[str, dict[str, Any], list[Any]]] = [
    case
    for case in GRADIENT_CASES
    if case[0]
    not in ("Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Cosh", "Sinh", "Tan")
    and case[0] not in ("CastLike", "Swish")  # not in onnxruntime's CPU kernels
    and case[0] not in ("CausalConvWithState", "LinearAttention", "SwiGLU")  # newer than it
    and not case[1].keys() & {"layout", "left_window_size"}
    and (case[0] != "GridSample" or case[2][0] in (IMAGE, (1, 2, 3, 4, 3)))
    and not case[1].get("positive")
    and case[1].get("mode") != "wrap"
] + [
    ("Conv", {"auto_pad": "SAME_UPPER", "strides": [2, 3]}, [(1, 3, 11, 12), _f(4, 3, 4, 3)]),
    ("Conv", {"auto_pad": "VALID", "strides": [2, 3]}, [(1, 3, 11, 12), _f(4, 3, 4, 3)]),
    ("ConvTranspose", {"auto_pad": "SAME_UPPER", "strides": [2, 3]}, [IMAGE, _f(4, 2, 4, 4)]),
    ("ConvTranspose", {"auto_pad": "SAME_LOWER", "strides": [2, 3]}, [IMAGE, _f(4, 2, 4, 4)]),
    (
        "ConvTranspose",
        {"pads": [0, 1, 2, 0], "strides": [2, 2]},
        [IMAGE, _f(4, 2, 4, 4), _f(2)],
    ),
    (
        "ConvTranspose",
        {
            "pads": [1, 1, 0, 0],
            "strides": [3, 3],
            "output_padding": [2, 1],
            "dilations": [2, 1],
        },
        [IMAGE, _f(4, 2, 3, 3), _f(2)],
    ),
    ("ConvTranspose", {"strides": [2]}, [(2, 3, 7), _f(3, 2, 4)]),
    ("ConvTranspose", {"strides": [2, 1, 2]}, [(1, 2, 3, 4, 3), _f(2, 2, 3, 2, 2)]),
    (
        "MaxPool",
        {"kernel_shape": [3, 2], "auto_pad": "SAME_LOWER", "strides": [2, 2]},
        [IMAGE],
    ),
    ("MaxPool", {"kernel_shape": [2, 2], "dilations": [2, 3], "pads": [1, 0, 0, 1]}, [IMAGE]),
    (
        "MaxPool",
        {"kernel_shape": [3, 3], "pads": [1, 0, 2, 1], "strides": [2, 2], "outputs": 2},
        [IMAGE],
    ),
    ("MaxPool", {"kernel_shape": [3], "ceil_mode": 1, "strides": [3]}, [(2, 3, 8)]),
    (
        "AveragePool",
        {"kernel_shape": [3, 3], "auto_pad": "SAME_UPPER", "strides": [2, 2]},
        [IMAGE],
    ),
    (
        "AveragePool",
        {
            "kernel_shape": [3, 3],
            "pads": [1, 0, 2, 1],
            "count_include_pad": 1,
            "strides": [2, 2],
        },
        [IMAGE],
    ),
    (
        "AveragePool",
        {"kernel_shape": [2], "count_include_pad": 1, "pads": [1, 1]},
        [(2, 3, 7)],
    ),
    ("LRN", {"size": 5, "bias": 2.0}, [IMAGE]),
    ("Softmax", {"axis": 1}, [IMAGE]),
    ("Reshape", {"allowzero": 1}, [F, _i(6, 4)]),
    ("Split", {"axis": 1, "num_outputs": 2, "outputs": 2}, [F]),
    *[
        (
            "Resize",
            {"mode": mode, "coordinate_transformation_mode": coordinates, **more},
            [IMAGE, None, _n(1, 1, *scales)],
        )
        for mode, more in (
            ("nearest", {"nearest_mode": "floor"}),
            ("nearest", {"nearest_mode": "ceil"}),
            ("nearest", {"nearest_mode": "round_prefer_ceil"}),
            ("nearest", {}),
            ("linear", {}),
            ("cubic", {}),
            ("cubic", {"cubic_coeff_a": -0.5, "exclude_outside": 1}),
        )
        for coordinates in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
        for scales in ((2.0, 3.0), (1.5, 0.5))
        # onnxruntime rounds align_corners' fractional length, the standard's tests do not
        if (coordinates, scales) != ("align_corners", (1.5, 0.5))
    ],
]


@pytest.mark.parametrize(
    ("op_type", "attributes", "inputs"),
    RUNTIME_CASES,
    ids=[f"{index}-{case[0]}" for index, case in enumerate(RUNTIME_CASES)],
)
def test_result_equals_onnxruntime(
    op_type: str, attributes: dict[str, Any], inputs: list[Any]
) -> None:
    proto = _graph(op_type, attributes, inputs)
    shapes = [given for given in inputs if isinstance(given, tuple)]
    tensors = [
        _away_from_kinks(shape, positive=False, seed=3 + seed).float()
        for seed, shape in enumerate(shapes)
    ]
    expected = _onnxruntime(proto, *[x.numpy() for x in tensors])
    for result, wanted in zip(TorchGraph(proto)(*tensors).values(), expected, strict=True):
        # float32 on both sides, sums of at most 100 products
        np.testing.assert_allclose(result.numpy(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("center_point_box", [0, 1])
@pytest.mark.parametrize("ties", [False, True])
def test_suppression_selects_what_onnxruntime_selects(
    center_point_box: int, ties: bool
) -> None:
    generator = np.random.default_rng(1)
    boxes = generator.random((2, 60, 4), dtype=np.float32)
    boxes[:, ::7, 2:] = boxes[:, ::7, :2]  # some without area
    scores = generator.random((2, 3, 60), dtype=np.float32)
    scores = np.round(scores, 1) if ties else scores
    options = [_i(5), _n(0.3), _n(0.4)]
    proto = _graph(
        "NonMaxSuppression",
        {"center_point_box": center_point_box},
        [boxes.shape, scores.shape, *options],
    )
    (expected,) = _onnxruntime(proto, boxes, scores)
    (result,) = TorchGraph(proto)(torch.from_numpy(boxes), torch.from_numpy(scores)).values()
    assert len(expected) > 10
    np.testing.assert_array_equal(result.numpy(), expected)


@pytest.mark.parametrize(
    "element_type", [TensorProto.INT4, TensorProto.UINT4, TensorProto.INT16]
)
def test_quantizers_of_other_widths_equal_onnxruntime(element_type: int) -> None:
    x = np.linspace(-3, 3, 96, dtype=np.float32).reshape(2, 3, 16)
    scale, name = _n(0.25, 0.125, 0.5), TensorProto.DataType.Name(element_type)
    zero_point = helper.make_tensor("zero", element_type, [3], [0, 1, 2])
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], axis=1),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"], axis=1),
    ]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        name,
        [info("x", TensorProto.FLOAT, x.shape)],
        [info("y", TensorProto.FLOAT, x.shape)],
        [numpy_helper.from_array(scale, "scale"), zero_point],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    (expected,) = _onnxruntime(proto, x)
    result = TorchGraph(proto)(torch.from_numpy(x))["y"].numpy()
    np.testing.assert_array_equal(result, expected)


def test_group_normalization_before_opset_21_has_parameters_per_group() -> None:
    x = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    scale, bias = _f(2), _f(2)
    proto = _graph("GroupNormalization", {"num_groups": 2}, [tuple(x.shape), scale, bias])
    proto.opset_import[0].version = 20
    (result,) = TorchGraph(proto)(x).values()
    per_channel = [torch.from_numpy(np.repeat(value, 2)) for value in (scale, bias)]
    torch.testing.assert_close(result, torch.nn.functional.group_norm(x, 2, *per_channel))


def test_unknown_element_types_are_named() -> None:
    with pytest.raises(ModelError, match="STRING"):
        torch_type(TensorProto.STRING)
    with pytest.raises(ModelError, match="not supported"):
        to_tensor(np.array(["text"], dtype=object))
