"""Find the tensors whose range the output loss stretches.

The loss works on what the last linear layers compute. Behind them exporters leave softmaxes,
box decoding and reshapes, which bound the range or only move data, and decisions such as ArgMax
and NonMaxSuppression; the search walks back through these, through both sides of a
concatenation.
"""

from __future__ import annotations

from graph_tools.integer_tail import is_float, tensor_types
from graph_tools.model import Model, initializers

__all__ = ["find_heads"]

_TRANSPARENT = frozenset(
    "Softmax LogSoftmax Sigmoid HardSigmoid Tanh Exp Softplus Reshape Flatten Squeeze Unsqueeze "
    "Transpose Identity Cast Slice Split Gather GatherElements GatherND Concat Expand TopK "
    "Compress".split()
)
_ARITHMETIC = frozenset(("Add", "Sub", "Mul", "Div"))
_FIRST_ONLY = frozenset(
    "Compress Expand Gather GatherElements GatherND Reshape Slice TopK".split()
)
_LINEAR = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul"))


def find_heads(model: Model) -> tuple[str, ...]:
    """Return the pre-activation tensors behind the model's outputs, in order, each once.

    An output that no linear layer feeds stands for itself, if it is float.
    """
    types = tensor_types(model.proto)
    constants = set(initializers(model.proto))
    producers = {name: node for node in model.proto.graph.node for name in node.output}
    heads: dict[str, None] = {}
    for output in model.outputs:
        found: dict[str, None] = {}
        waiting, seen = [output], {output}
        while waiting:
            name = waiting.pop(0)
            node = producers.get(name)
            if node is None:
                continue
            variable = [i for i in node.input if i and i not in constants]
            if not is_float(name, types):  # decided from what it reads
                waiting.extend(i for i in variable if i not in seen)
                seen.update(variable)
                continue
            if node.op_type in _LINEAR:
                found[name] = None
                continue
            if node.op_type in _ARITHMETIC and len(variable) == 1:
                behind = producers.get(variable[0])
                if behind is not None and behind.op_type == "MatMul":
                    found[name] = None  # a bias belongs to its matrix product
                    continue
            elif node.op_type not in (_TRANSPARENT | _ARITHMETIC):
                found[name] = None
                continue
            sources = variable[:1] if node.op_type in _FIRST_ONLY else variable
            waiting.extend(i for i in sources if i not in seen)
            seen.update(sources)
        if found or is_float(output, types):
            heads.update(found or {output: None})
    return tuple(heads)
