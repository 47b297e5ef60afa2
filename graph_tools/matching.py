"""Which tensor of one model is which of another: by name, by structure, by position.

A graph is read as *steps*: an operator with what follows it alone and what quantization or
folding may take away or put in - BatchNormalization, Relu, Clip, QuantizeLinear and
DequantizeLinear. What a step gives is its last tensor, so that a convolution with its Relu in one
file is the convolution in the other whose Relu vanished into the quantizer behind it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Literal

import onnx

from graph_tools.quantized_graph import QuantizedGraph

__all__ = ["Match", "Matching", "match_tensors"]

_PASSED = frozenset(
    "BatchNormalization Cast Clip DequantizeLinear Dropout Identity QuantizeLinear Relu".split()
)
_WEIGHTED = frozenset("Conv ConvTranspose Gemm MatMul".split())
_NO_STEP = frozenset("Constant ConstantOfShape Shape Size".split())

How = Literal["name", "structure", "position"]


@dataclass(frozen=True, kw_only=True)
class Match:
    """A tensor in both models.

    Attributes:
        first: its name in the first model; ``second`` in the second.
        op_type: the operator whose step gives it, "(input)" for the input.
        how: what told that they are one: a common name, equal operators all the way from the
            input, or the place among operators of the type.
    """

    first: str
    second: str
    op_type: str
    how: How


@dataclass(frozen=True, kw_only=True)
class Matching:
    """What two models have in common.

    Attributes:
        matches: in the order of the first model's graph.
        only_first: tensors that steps of the first model give and none of the second does.
        only_second: likewise.
    """

    matches: tuple[Match, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _Step:
    """An operator with what follows it alone.

    Attributes:
        tensor: what it gives; dequantized where it is quantized.
        names: all names that the value goes by, the last ones first.
        key: equal for steps that are reached by the same operators from the input.
    """

    tensor: str
    names: tuple[str, ...]
    op_type: str
    key: Hashable


def match_tensors(first: onnx.ModelProto, second: onnx.ModelProto) -> Matching:
    """Find the tensors of two models that mean the same value.

    Args:
        first: float or quantized, weights inside.
        second: likewise.

    Returns:
        Pairs, no tensor in two of them. Their shapes are not compared: weights and attributes
        do not count.
    """
    numbers: dict[Hashable, int] = {}  # of keys, in both, so that hashing them stays cheap
    ours, theirs = (list(_steps(QuantizedGraph(proto), numbers)) for proto in (first, second))
    pairs: dict[int, tuple[_Step, _Step, How]] = {}
    left, right = list(ours), list(theirs)

    def pair(key: Callable[[_Step], Hashable], how: How) -> None:
        groups: dict[Hashable, tuple[list[_Step], list[_Step]]]
        groups = defaultdict(lambda: ([], []))
        for side, steps in enumerate((left, right)):
            for step in steps:
                groups[key(step)][side].append(step)
        for one, other in groups.values():
            if len(one) == len(other):
                for a, b in zip(one, other, strict=True):
                    pairs[id(a)] = (a, b, how)
                    left.remove(a)
                    right.remove(b)

    pair(lambda step: step.names[0], "name")
    _pair_by_any_name(left, right, pairs)
    pair(lambda step: step.key, "structure")
    pair(lambda step: (step.op_type, step.op_type in _WEIGHTED or id(step)), "position")
    return Matching(
        matches=tuple(
            Match(first=a.tensor, second=b.tensor, op_type=a.op_type, how=how)
            for a, b, how in (pairs[id(step)] for step in ours if id(step) in pairs)
        ),
        only_first=tuple(step.tensor for step in left),
        only_second=tuple(step.tensor for step in right),
    )


def _pair_by_any_name(
    left: list[_Step], right: list[_Step], pairs: dict[int, tuple[_Step, _Step, How]]
) -> None:
    """Pair steps of one operator that share any name."""
    known = {(name, step.op_type): step for step in right for name in step.names}
    for step in list(left):
        found = [known.get((name, step.op_type)) for name in step.names]
        other = next((one for one in found if one is not None and one in right), None)
        if other is not None:
            pairs[id(step)] = (step, other, "name")
            left.remove(step)
            right.remove(other)


def _steps(graph: QuantizedGraph, numbers: dict[Hashable, int]) -> Iterator[_Step]:
    """The input and the operators that compute on it, in graph order."""
    keys: dict[str, Hashable] = {}
    taken: set[str] = set()

    def step(tensor: str, op_type: str, key: Hashable) -> _Step:
        number = numbers.setdefault(key, len(numbers))
        chain = _chain(graph, tensor)
        for name in chain:
            keys[name] = number
        taken.update(chain)
        return _Step(chain[-1], tuple(_known_as(graph, chain)), op_type, number)

    for index, entry in enumerate(graph.inputs):
        yield step(entry.name, "(input)", ("(input)", index))
    for node in graph.nodes:
        inputs = tuple(keys[name] for name in node.input if name in keys)
        if not inputs or node.op_type in _NO_STEP:
            continue
        for index, tensor in enumerate(node.output):
            if tensor and tensor not in taken:
                passed = node.op_type in _PASSED
                key = inputs if passed else (node.op_type, index, inputs)
                yield step(tensor, node.op_type, key)


def _chain(graph: QuantizedGraph, tensor: str) -> list[str]:
    """A tensor and what it becomes while only one operator reads it and passes it on."""
    chain = [tensor]
    while chain[-1] not in graph.outputs:
        readers = graph.consumers.get(chain[-1], [])
        kinds = {node.op_type for node in readers}
        alone = len(readers) == 1 or kinds == {"DequantizeLinear"}  # written once a reader
        if not alone or not kinds <= _PASSED or readers[0].input[0] != chain[-1]:
            break
        chain.append(readers[0].output[0])
    while _is_integer(graph, chain[-1]) and len(chain) > 1:
        chain.pop()
    return chain


def _is_integer(graph: QuantizedGraph, name: str) -> bool:
    """Whether a tensor of a chain lies between its Q and its DQ."""
    node = graph.producers.get(name)
    while node is not None and node.op_type == "Clip":
        node = graph.producers.get(node.input[0])
    return node is not None and node.op_type == "QuantizeLinear"


def _known_as(graph: QuantizedGraph, chain: list[str]) -> Iterator[str]:
    """Names of a step's result, the most telling first.

    Those that DequantizeLinear gives come last, but for a graph output: whoever quantizes a
    tensor gives its name to the value in front, and keeps the names of the graph's outputs.
    """
    names = [name for name in reversed(chain) if not _is_integer(graph, name)]
    plain = [
        name for name in names if name in graph.outputs or not _is_dequantized(graph, name)
    ]
    yield from plain
    yield from (name for name in names if name not in plain)


def _is_dequantized(graph: QuantizedGraph, name: str) -> bool:
    node = graph.producers.get(name)
    return node is not None and node.op_type == "DequantizeLinear"
