"""Where quantizers go: the one table.

====================================  ==========================================================
operator                              quantizer of its output
====================================  ==========================================================
graph input, graph outputs            always one
Conv, ConvTranspose, Gemm, MatMul     own; none if the only reader is a Relu or Clip
Add, Sub, Mul, means, any other math  own; none if the only reader is a Relu or Clip
Relu, Clip                            own; the node itself vanishes into it where that is exact
Reshape, Transpose, MaxPool, ...      shares its input's (it only moves data)
Concat                                shares if all its inputs share one; own otherwise
arithmetic behind the last weights    none: decoding stays in float, and so does all behind it
what a Div divides by, or Log reads   none, nor the arithmetic that leads there: tiny values
                                      count there, and zero is no number to divide by
positions that GridSample, ... read   none, nor the arithmetic that leads there
what only an Add reads of a Conv      on request none: it is rounded once, behind the Add
non-linearities that are shifted      none; the sum with the shift has one, unsigned
integers, booleans, shapes            none
====================================  ==========================================================

The academic scheme is that of BRECQ (arXiv 2102.05426, section 4): outputs of layers that only an
Add of two tensors reads have none, so a residual branch is rounded once, behind the Add; what the
last layers compute, and all behind it, has none either. BRECQ's input has none; here images keep
theirs, which costs nothing where they have 8 bits to begin with, and the first layer is a layer of
integers like the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto

from graph_tools.model import Model, initializers
from graph_tools.quantizer import FloatNode
from graph_tools.torch_graph import Step

__all__ = ["DATA_MOVEMENT", "Placement", "Weighted", "place", "treatment"]

DATA_MOVEMENT = frozenset(
    "DepthToSpace Dropout Expand Flatten Gather GatherElements GatherND GlobalMaxPool Identity "
    "MaxPool Pad Reshape Slice SpaceToDepth Split Squeeze Tile Transpose Unsqueeze".split()
)
_ACTIVATIONS = frozenset({"Relu", "Clip"})
_NEVER_NEGATIVE = frozenset(
    "Abs Exp HardSigmoid ReduceL1 ReduceL2 ReduceSumSquare Relu Sigmoid Softmax Softplus "
    "Sqrt ThresholdedRelu".split()
)
_KEEPS_SIGN = frozenset(  # never negative if no input is
    "Add AveragePool Concat Div GlobalAveragePool Max Mean Min Mul Pow ReduceMax ReduceMean "
    "ReduceMin ReduceSum Resize Sum".split()
)
_SUMS = frozenset({"Add", "Sub", "Sum"})
_CONSTANT_OPERANDS = frozenset({"Add", "Sub", "Mul", "Div"})
_DECODING = frozenset(  # after the last weights these start the part that stays in float
    "ArgMax ArgMin Ceil Cos Div Exp Floor Log LogSoftmax Mod NonMaxSuppression Pow Range "
    "Reciprocal Round Sin Sqrt TopK Where".split()
)
_PASSES_PRECISION = frozenset(  # if the result must not be rounded, its inputs must not be
    "Abs Add Cast Clip Exp Expand Flatten Identity Max Mean Mul Pow ReduceL1 ReduceL2 ReduceMean "
    "ReduceSum ReduceSumSquare Reshape Sqrt Squeeze Sub Sum Tile Transpose Unsqueeze".split()
)
_POSITIONS = {  # index of the input that says where to read another one
    "AffineGrid": 0,
    "DeformConv": 2,
    "GridSample": 1,
    "MaxRoiPool": 1,
    "RoiAlign": 1,
}
_WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_UNIT_RANGE = frozenset({"Sigmoid", "HardSigmoid", "Softmax"})


@dataclass(frozen=True, kw_only=True)
class Weighted:
    """An operator with a constant weight.

    Attributes:
        weight: initializer name; ``bias`` likewise, empty for MatMul.
        axis: output-channel axis of the weight; ``channel_axis`` that of the output tensor.
    """

    node: str
    input: str
    output: str
    weight: str
    bias: str
    axis: int
    channel_axis: int


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Which tensors have quantizers, before any range is known.

    Attributes:
        roots: tensors with a quantizer of their own, in graph order.
        shares: tensors that use the quantizer of a root, with that root.
        nonnegative: tensors that cannot be negative, whatever the image.
        unit_range: tensors within [0, 1] by their operator (sigmoid, softmax) or [-1, 1] (tanh).
        weighted: operators with constant weights by node name.
        operands: constant operands of arithmetic (initializer name to node name).
        activations: Relu/Clip nodes whose producer has no other reader: node name to
            (tensor before, tensor after).
        clip_bounds: (low, high) of each Clip by node name.
        num_readers: how often operators read each tensor; being a graph output counts as one.
        float_nodes: what stays in float, and why.
        float_results: layers whose result stays in float, and why.
        shifted: tensors that are shifted until they are not negative, with the shifted tensor.
    """

    roots: tuple[str, ...]
    shares: Mapping[str, str]
    nonnegative: frozenset[str]
    unit_range: frozenset[str]
    weighted: Mapping[str, Weighted]
    operands: Mapping[str, str]
    activations: Mapping[str, tuple[str, str]]
    clip_bounds: Mapping[str, tuple[float, float]]
    num_readers: Mapping[str, int]
    float_nodes: tuple[FloatNode, ...]
    float_results: tuple[FloatNode, ...] = ()
    shifted: Mapping[str, str] = field(default_factory=dict)


def treatment(op_type: str) -> str:
    """Say in a few words what becomes of an operator in the quantized file."""
    if op_type in _WEIGHTED:
        return "integer weights and activations"
    if op_type in DATA_MOVEMENT:
        return "moves integers"
    if op_type in _DECODING:
        return "between quantizers; float behind the last weights"
    return "between quantizers"


def place(
    model: Model,
    steps: Sequence[Step],
    *,
    scheme: Literal["full", "academic"] = "full",
    fused_sums: bool = False,
    shifted: Mapping[str, str] | None = None,
) -> Placement:
    """Decide which tensors of a prepared network are quantized.

    Args:
        model: the network, prepared for quantization.
        steps: its operators in topological order.
        scheme: every tensor of the table, or those of the academic scheme.
        fused_sums: what convolutions give only to a sum is rounded behind the sum alone.
        shifted: tensors that are shifted until they are not negative, with the shifted tensor.
    """
    academic = scheme == "academic"
    return _Placer(model, steps, academic, fused_sums, shifted or {}).run()


class _Placer:
    def __init__(
        self,
        model: Model,
        steps: Sequence[Step],
        academic: bool,
        fused_sums: bool,
        shifted: Mapping[str, str],
    ) -> None:
        self.model, self.steps = model, steps
        self.academic, self.fused_sums, self.shifted = academic, fused_sums, shifted
        self.constants = initializers(model.proto)
        self.types = _element_types(model.proto)
        self.readers: dict[str, list[Step]] = {}
        for step in steps:
            for name in set(step.inputs) - {""}:
                self.readers.setdefault(name, []).append(step)
        self.weighted: dict[str, Weighted] = {}
        for step in steps:
            if (found := self._weighted(step)) is not None:
                self.weighted[step.name] = found

    def _weighted(self, step: Step) -> Weighted | None:
        if len(step.inputs) < 2 or step.inputs[1] not in self.constants:
            return None
        weight = self.constants[step.inputs[1]]
        if step.op_type == "MatMul":
            if weight.ndim != 2:
                return None
            return Weighted(
                node=step.name,
                input=step.inputs[0],
                output=step.outputs[0],
                weight=step.inputs[1],
                bias="",
                axis=1,
                channel_axis=-1,
            )
        if step.op_type not in ("Conv", "ConvTranspose", "Gemm") or len(step.inputs) < 3:
            return None
        bias = self.constants.get(step.inputs[2])
        if bias is None or bias.ndim != 1 or step.attributes.get("transA", 0):
            return None
        axis = {"Conv": 0, "ConvTranspose": 1}.get(
            step.op_type, 0 if step.attributes.get("transB", 0) else 1
        )
        return Weighted(
            node=step.name,
            input=step.inputs[0],
            output=step.outputs[0],
            weight=step.inputs[1],
            bias=step.inputs[2],
            axis=axis,
            channel_axis=1,
        )

    def _only_reader(self, tensor: str) -> Step | None:
        readers = self.readers.get(tensor, [])
        return readers[0] if len(readers) == 1 and tensor not in self.model.outputs else None

    def _before_weights(self) -> tuple[set[str], set[str]]:
        """Weighted nodes and those that lead to one; the tensors that lead to one."""
        before_weights: set[str] = set()
        wanted: set[str] = set()
        for step in reversed(self.steps):
            if step.name in self.weighted or wanted.intersection(step.outputs):
                before_weights.add(step.name)
                wanted.update(step.inputs)
        return before_weights, wanted

    def _float_results(self) -> dict[str, FloatNode]:
        """What the academic scheme leaves in float, by tensor: residual branches and results."""
        found = {}
        _, wanted = self._before_weights()
        for step in self.steps if self.academic else ():
            if step.name not in self.weighted:
                continue
            reader = self._only_reader(step.outputs[0])
            if not wanted.intersection(step.outputs):
                reason = "its result is the network's (academic scheme)"
            elif (
                reader is not None
                and reader.op_type == "Add"
                and not any(name in self.constants for name in reader.inputs)
            ):
                reason = (
                    f"only {reader.name} reads its result, and is rounded (academic scheme)"
                )
            else:
                continue
            found[step.outputs[0]] = FloatNode(
                node=step.name, op_type=step.op_type, reason=reason
            )
        return found

    def _fused_branches(self, apart: set[str]) -> dict[str, FloatNode]:
        """What is rounded behind a sum only, by tensor: a Conv's result, and its Relu's or Clip's.

        OpenVINO makes one kernel of the Conv and the sum, and skips a quantizer in between.

        Args:
            apart: nodes and tensors that stay in float: such sums have no quantizer behind.
        """
        found = {}
        for step in self.steps if self.fused_sums else ():
            if step.name not in self.weighted or step.op_type != "Conv":
                continue
            branch = [step]
            reader = self._only_reader(step.outputs[0])
            if reader is not None and reader.op_type in _ACTIVATIONS:
                branch.append(reader)
                reader = self._only_reader(reader.outputs[0])
            if (
                reader is None
                or reader.op_type not in _SUMS
                or {reader.name, reader.outputs[0]} & apart
                or any(name in self.constants for name in reader.inputs)
            ):
                continue
            for node in branch:
                found[node.outputs[0]] = FloatNode(
                    node=node.name,
                    op_type=node.op_type,
                    reason=f"only {reader.name} reads its result, which is rounded behind it",
                )
        return found

    def _float_nodes(self) -> dict[str, FloatNode]:
        """Decoding behind the last weighted operator, and all that depends on it."""
        before_weights, _ = self._before_weights()
        floats: dict[str, FloatNode] = {}
        tensors: set[str] = set()
        live = self._live()
        for step in self.steps:
            if step.name in before_weights or not live.intersection(step.inputs):
                continue
            reason = ""
            if tensors.intersection(step.inputs):
                reason = "reads a tensor that stays in float"
            elif step.op_type in _DECODING:
                reason = "decoding of the outputs, behind the last weighted operator"
            elif step.op_type in _CONSTANT_OPERANDS and self._constant_operand(step):
                reason = "arithmetic with a constant behind the last weighted operator"
            elif self.academic:
                reason = "behind the last weighted operator (academic scheme)"
            if reason:
                tensors.update(step.outputs)
                floats[step.name] = FloatNode(
                    node=step.name, op_type=step.op_type, reason=reason
                )
        return floats

    def _constant_operand(self, step: Step) -> str | None:
        names = [name for name in step.inputs if name in self.constants]
        is_float = bool(names) and self.constants[names[0]].dtype == np.float32
        return names[0] if len(names) == 1 and is_float else None

    def _unrounded(self) -> set[str]:
        """Tensors that lead only to divisors, logarithms and positions, back to quantizers.

        Variances of normalizations are such: rounded to zero, they would make the result
        infinite or undefined. Positions rounded to 8 bits would shift large images by pixels.
        """
        found: set[str] = set()
        for step in reversed(self.steps):
            if step.name in self.weighted or set(step.outputs) & set(self.model.outputs):
                continue
            uses = [(r, name) for name in step.outputs for r in self.readers.get(name, ())]
            if uses and all(self._divides(reader, name, found) for reader, name in uses):
                found.update(step.outputs)
        return found

    def _divides(self, reader: Step, tensor: str, unrounded: set[str]) -> bool:
        if reader.op_type == "Div" and reader.inputs[0] != tensor:
            return True
        if reader.op_type in ("Log", "Reciprocal"):
            return True
        position = _POSITIONS.get(reader.op_type)
        if position is not None and list(reader.inputs).index(tensor) == position:
            return True
        return reader.op_type in _PASSES_PRECISION and reader.outputs[0] in unrounded

    def _live(self) -> set[str]:
        """Float tensors that depend on the image by value."""
        live = {self.model.input.name}
        for step in self.steps:
            if live.intersection(step.inputs):
                live.update(
                    name
                    for name in step.outputs
                    if self.types.get(name, TensorProto.FLOAT) == TensorProto.FLOAT
                )
        return live

    def run(self) -> Placement:
        floats = self._float_nodes()
        live = self._live()
        unrounded = self._unrounded()
        results = self._float_results() | self._fused_branches({*floats, *unrounded})
        input_name = self.model.input.name
        root: dict[str, str] = {input_name: input_name}
        roots, shares = [input_name], {}
        nonnegative: set[str] = set()
        unit: set[str] = set()
        activations: dict[str, tuple[str, str]] = {}
        clip_bounds: dict[str, tuple[float, float]] = {}
        operands: dict[str, str] = {}
        for step in self.steps:
            if step.op_type == "Clip":
                clip_bounds[step.name] = self._clip_bounds(step)
            is_float = step.name in floats or step.outputs[0] in {*unrounded, *results}
            if not is_float and step.op_type in _CONSTANT_OPERANDS:
                operand = self._constant_operand(step)
                if operand is not None and live.intersection(step.inputs):
                    operands[operand] = step.name
            for tensor in step.outputs:
                if tensor not in live or not tensor:
                    continue
                if self._is_nonnegative(step, nonnegative, clip_bounds):
                    nonnegative.add(tensor)
                if tensor in self.shifted:
                    continue
                if step.op_type in _UNIT_RANGE or step.op_type == "Tanh":
                    unit.add(tensor)
                source = self._shared_root(step, root)
                if source is not None and step.name not in floats:
                    # Moving rounded values rounds nothing, wherever they go.
                    root[tensor] = shares[tensor] = source
                    continue
                if is_float:
                    continue
                reader = self._only_reader(tensor)
                if (
                    reader is not None
                    and reader.op_type in _ACTIVATIONS
                    and reader.name not in floats
                    and reader.outputs[0] not in unrounded
                    and step.op_type not in _ACTIVATIONS
                ):
                    activations[reader.name] = (tensor, reader.outputs[0])
                    continue
                root[tensor] = tensor
                roots.append(tensor)
        return Placement(
            roots=tuple(roots),
            shares=shares,
            nonnegative=frozenset(nonnegative),
            unit_range=frozenset(unit),
            weighted={
                name: site
                for name, site in self.weighted.items()
                if name not in floats and site.input in root
            },
            operands=operands,
            activations=activations,
            clip_bounds=clip_bounds,
            num_readers={
                tensor: sum(list(r.inputs).count(tensor) for r in self.readers.get(tensor, ()))
                + (tensor in self.model.outputs)
                for tensor in root
            },
            float_nodes=tuple(floats.values()),
            float_results=tuple(results.values()),
            shifted=self.shifted,
        )

    def _shared_root(self, step: Step, root: Mapping[str, str]) -> str | None:
        if step.op_type == "Concat":
            sources = {root.get(name) for name in step.inputs}
            return sources.pop() if len(sources) == 1 else None
        if step.op_type == "Pad":
            value = self.constants.get(step.inputs[2]) if len(step.inputs) > 2 else None
            if value is not None and value.size and float(value.reshape(-1)[0]) != 0.0:
                return None
        moves = step.op_type in DATA_MOVEMENT or (
            step.op_type == "Resize" and step.attributes.get("mode", "nearest") == "nearest"
        )
        return root.get(step.inputs[0]) if moves else None

    def _is_nonnegative(
        self,
        step: Step,
        known: set[str],
        clip_bounds: Mapping[str, tuple[float, float]],
    ) -> bool:
        if step.op_type in _NEVER_NEGATIVE or step.outputs[0] in self.shifted.values():
            return True
        if step.op_type == "Clip" and clip_bounds[step.name][0] >= 0:
            return True
        if step.op_type == "Resize" and step.attributes.get("mode", "nearest") == "cubic":
            return False
        if step.op_type in DATA_MOVEMENT or step.op_type in ("Clip", "Resize"):
            return step.inputs[0] in known
        if step.op_type not in _KEEPS_SIGN:
            return False
        return all(
            name in known
            or (name in self.constants and bool((self.constants[name] >= 0).all()))
            for name in step.inputs
            if name
        )

    def _clip_bounds(self, step: Step) -> tuple[float, float]:
        low, high = -np.inf, np.inf
        for index, name in enumerate(step.inputs[1:3]):
            if not name:
                continue
            if name not in self.constants:
                return -np.inf, np.inf
            value = float(self.constants[name].reshape(-1)[0])
            low, high = (value, high) if index == 0 else (low, value)
        return low, high


def _element_types(proto: onnx.ModelProto) -> dict[str, int]:
    graph = proto.graph
    return {
        value.name: value.type.tensor_type.elem_type
        for value in [*graph.input, *graph.output, *graph.value_info]
    }
