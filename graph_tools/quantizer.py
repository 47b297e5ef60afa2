"""Power-of-two quantizers and the plan that says where they go.

Uniform symmetric quantization, HPTQ (arXiv 2109.09113) section 3: threshold ``t = 2**k``, zero
point 0,

- signed: ``scale = t / 2**(bits - 1)``, integers ``-2**(bits-1) .. 2**(bits-1) - 1``;
- unsigned: ``scale = t / 2**bits``, integers ``0 .. 2**bits - 1``.

Some compilers (RKNN) take integers around the middle of their type for symmetric ones,
``-127 .. 127``, and stretch their scale to match. The zero point of a *lifted* quantizer lies two
below the middle: nothing is symmetric then, and the scale is kept. Two, since onnxruntime and
others add the zero point before they round: halves go to the even side only if it is even. The
range of integers of 7 bits and more moves up with it.

A quantizer stores the *exponent* of its scale, so a scale that is not a power of two cannot be
written down by accident. Only weights, and biases with them, may have free scales, for comparison:
those stand in a field of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from graph_tools.errors import DataError, ZsqError

__all__ = ["LIFT", "FloatNode", "Plan", "QuantizedConstant", "TensorQuantizer"]

FloatArray = np.ndarray[Any, np.dtype[np.float32]]
IntArray = np.ndarray[Any, np.dtype[np.int32]]

_PLAN_FORMAT = 1

LIFT = 2
"""Steps between the middle of a type and the zero point of a lifted quantizer."""


@dataclass(frozen=True, kw_only=True)
class TensorQuantizer:
    """A symmetric quantizer of one tensor, its scale a power of two unless ``scales`` are given.

    Attributes:
        bits: width of the integers, 2 to 32.
        signed: whether negative integers exist.
        exponent: ``scale = 2.0**exponent``; one integer, or one per channel of ``axis``.
        axis: per-channel axis; None for a per-tensor quantizer.
        scales: free scales, one per channel of ``axis``, in float32; None for powers of two. The
            exponents are then those of the powers of two from these up.
        lifted: whether the zero point lies `LIFT` below the middle; stored integers are this much
            smaller than the ones meant everywhere else.
    """

    bits: int
    signed: bool
    exponent: int | tuple[int, ...]
    axis: int | None = None
    scales: tuple[float, ...] | None = None
    lifted: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.exponent, tuple) != (self.axis is not None):
            raise ValueError("a per-channel exponent needs an axis, and only that")
        if self.scales is not None and (
            not isinstance(self.exponent, tuple) or len(self.scales) != len(self.exponent)
        ):
            raise ValueError("free scales are per channel, as many as exponents")
        if self.lifted and not self.signed:
            raise ValueError("only signed quantizers are lifted")

    @property
    def power_of_two(self) -> bool:
        """Whether the scale is ``2.0**exponent``."""
        return self.scales is None

    @property
    def qmin(self) -> int:
        """Smallest integer."""
        return self._moved - (1 << (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        """Largest integer."""
        return self._moved + (1 << (self.bits - self.signed)) - 1

    @property
    def lift(self) -> int:
        """What the zero point lies below 0 or the middle of its type."""
        return LIFT if self.lifted else 0

    @property
    def _moved(self) -> int:
        return self.lift if self.bits >= 7 else 0  # narrower ones have room in their type

    @property
    def scale(self) -> FloatArray:
        """``2.0**exponent``, or ``scales``: a scalar array, or ``[channels]`` float32."""
        if self.scales is not None:
            return np.asarray(self.scales, np.float32)
        return np.exp2(np.asarray(self.exponent, np.float32)).astype(np.float32)

    @property
    def threshold(self) -> float:
        """Largest magnitude of a per-tensor quantizer (of the widest channel otherwise)."""
        widest = max(self.exponent) if isinstance(self.exponent, tuple) else self.exponent
        return float(2.0 ** (widest + self.bits - self.signed))

    def scale_for(self, rank: int) -> FloatArray:
        """The scale, shaped to broadcast against a tensor of ``rank`` dimensions."""
        if self.axis is None:
            return self.scale
        shape = [1] * rank
        shape[self.axis] = -1
        return self.scale.reshape(shape)

    def quantize(self, values: FloatArray) -> IntArray:
        """Integers of ``values``: round half to even, then saturate (QuantizeLinear)."""
        scaled = np.asarray(
            np.divide(values, self.scale_for(np.ndim(values)), dtype=np.float64)
        )
        np.rint(scaled, out=scaled)
        return np.clip(scaled, self.qmin, self.qmax, out=scaled).astype(np.int32)

    def dequantize(self, integers: IntArray) -> FloatArray:
        """Values of ``integers`` (DequantizeLinear)."""
        exact = np.asarray(integers, np.float64) * self.scale_for(np.ndim(integers))
        return np.asarray(exact, np.float32)  # a scalar stays an array

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `from_dict` reads it back."""
        exponent = list(self.exponent) if isinstance(self.exponent, tuple) else self.exponent
        free = {} if self.scales is None else {"scales": list(self.scales)}
        lifted = {"lifted": True} if self.lifted else {}
        return {
            "bits": self.bits,
            "signed": self.signed,
            "exponent": exponent,
            "axis": self.axis,
            **free,
            **lifted,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TensorQuantizer:
        """Read what `to_dict` wrote."""
        exponent, scales = data["exponent"], data.get("scales")
        return cls(
            bits=int(data["bits"]),
            signed=bool(data["signed"]),
            exponent=tuple(exponent) if isinstance(exponent, list) else int(exponent),
            axis=data["axis"],
            scales=None if scales is None else tuple(float(scale) for scale in scales),
            lifted=bool(data.get("lifted", False)),
        )


@dataclass(frozen=True, kw_only=True)
class QuantizedConstant:
    """The integers of one initializer: a weight, a bias or an operand of an operator.

    Attributes:
        integers: int32, in the initializer's own shape.
        quantizer: their scale; a bias has 32 bits and the scale of input times weight.
        role: ``weight``, ``bias`` or ``operand``.
        node: the operator that reads it.
    """

    integers: IntArray
    quantizer: TensorQuantizer
    role: str
    node: str

    @property
    def values(self) -> FloatArray:
        """Dequantized, float32."""
        return self.quantizer.dequantize(self.integers)


@dataclass(frozen=True, kw_only=True)
class FloatNode:
    """An operator that stays in float, and why."""

    node: str
    op_type: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that the QDQ writer, an integer interpreter or a hand-off needs beside the graph.

    Attributes:
        tensors: quantizer of each quantized activation tensor, graph input and outputs
            included, by tensor name.
        constants: integers of each quantized initializer, by initializer name.
        absorbed: activation nodes (Relu, Clip) that the saturation of a quantizer does, by node
            name, with the tensor whose quantizer it is.
        shares: tensors that only move the data of another, with that tensor.
        midpoint: signed tensors stored unsigned around the middle (uint8 with zero point 128):
            the same values, in the form for which onnxruntime has integer kernels.
        float_nodes: operators that stay in float.
        float_results: operators on integers whose result stays in float.
    """

    tensors: Mapping[str, TensorQuantizer]
    constants: Mapping[str, QuantizedConstant]
    absorbed: Mapping[str, str] = field(default_factory=dict)
    shares: Mapping[str, str] = field(default_factory=dict)
    midpoint: frozenset[str] = frozenset()
    float_nodes: tuple[FloatNode, ...] = ()
    float_results: tuple[FloatNode, ...] = ()

    def save(self, path: Path) -> None:
        """Write ``path`` (JSON) and, beside it, the integers as ``.safetensors``.

        Raises:
            ZsqError: the folder cannot be written.
        """
        document = {
            "format": _PLAN_FORMAT,
            "tensors": {name: q.to_dict() for name, q in self.tensors.items()},
            "constants": {
                name: {"quantizer": c.quantizer.to_dict(), "role": c.role, "node": c.node}
                for name, c in self.constants.items()
            },
            "absorbed": dict(self.absorbed),
            "shares": dict(self.shares),
            "midpoint": sorted(self.midpoint),
            "float_nodes": [dict(vars(entry)) for entry in self.float_nodes],
            "float_results": [dict(vars(entry)) for entry in self.float_results],
        }
        integers = {
            name: np.asarray(constant.integers, order="C")
            for name, constant in self.constants.items()
        }
        try:
            for target, write in (
                (path.with_suffix(".safetensors"), lambda p: save_file(integers, str(p))),
                (path, lambda p: p.write_text(json.dumps(document, indent=1) + "\n")),
            ):
                partial = target.with_name(target.name + ".part")
                write(partial)
                partial.replace(target)
        except OSError as error:
            raise ZsqError(f"cannot write the plan: {error}", where=str(path)) from error

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read what `save` wrote.

        Raises:
            DataError: either file is missing or is not a plan.
        """
        try:
            document = json.loads(path.read_text())
            integers = load_file(str(path.with_suffix(".safetensors")))
            if document["format"] != _PLAN_FORMAT:
                raise ValueError(f"format {document['format']}, expected {_PLAN_FORMAT}")
            return cls(
                tensors={
                    name: TensorQuantizer.from_dict(q)
                    for name, q in document["tensors"].items()
                },
                constants={
                    name: QuantizedConstant(
                        integers=integers[name],
                        quantizer=TensorQuantizer.from_dict(entry["quantizer"]),
                        role=entry["role"],
                        node=entry["node"],
                    )
                    for name, entry in document["constants"].items()
                },
                absorbed=document["absorbed"],
                shares=document["shares"],
                midpoint=frozenset(document["midpoint"]),
                float_nodes=tuple(FloatNode(**entry) for entry in document["float_nodes"]),
                float_results=tuple(
                    FloatNode(**entry) for entry in document.get("float_results", ())
                ),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"not a readable plan: {error}", where=str(path)) from error
