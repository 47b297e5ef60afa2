"""How many bits each weight and each activation has.

One width for all weights and one for all activations (`QuantizeSettings.weights` and
``.activations``), then the scheme's exceptions, then ``--bits PATTERN=W4A8``, one after the other:
later entries win. The academic scheme has at least 8 bits in the weights of the first and last
layers, what the first make, what the last read, and the image. A pattern is

- a shell pattern on node names. W: the weight of that layer; A: the quantizer of the tensor that
  the node makes, behind the Relu or Clip that it absorbs;
- a shell pattern on tensor names (A);
- ``@first`` and ``@last``: layers that no other layer comes before, or behind, on any path;
  ``@depthwise``: convolutions of one channel a group. W and A as for nodes;
- ``@input``, ``@output``: the image and what leaves the graph; ``@add``: sums of two tensors, as
  at the end of residual blocks; ``@into-last``: what the last layers read (A).

Tensors that share a quantizer share its width, and so do layers that read the same weight: naming
one is naming all. A tensor that is shifted (``--shift-negative``) keeps the name and the width that
it has without. Constant operands have the width of the result.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from graph_tools.errors import SettingsError
from graph_tools.model import Model, initializers
from graph_tools.torch_graph import Step
from pipeline.quantize.placement import Placement
from pipeline.settings import QuantizeSettings

__all__ = ["Widths", "choose_widths", "tensor_bits"]

_ACADEMIC = ("@input", "@first", "@into-last")  # activations of at least 8 bits

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, kw_only=True)
class Widths:
    """Bits of everything that is quantized.

    Attributes:
        weights: by node name of the layer.
        activations: by tensor that has a quantizer of its own (a root of the placement).
        named: layers whose weights ``--bits`` or the scheme names.
    """

    weights: Mapping[str, int]
    activations: Mapping[str, int]
    named: frozenset[str] = frozenset()


def choose_widths(
    placement: Placement, steps: Sequence[Step], model: Model, settings: QuantizeSettings
) -> Widths:
    """Choose the width of each weight and each activation.

    Args:
        placement: what is quantized.
        steps: the operators in topological order.
        model: the network that they are from.
        settings: ``weights``, ``activations``, ``scheme`` and ``bits``.

    Raises:
        SettingsError: a pattern names nothing that has weights or a quantizer.
    """
    weights: dict[str, int] = dict.fromkeys(placement.weighted, settings.weights)
    activations: dict[str, int] = dict.fromkeys(placement.roots, settings.activations)
    names = _Names(placement, steps, model)
    named: set[str] = set()
    if settings.scheme == "academic":
        few = {root for name in _ACADEMIC for root in names.roots(name, required=False)}
        activations.update((root, max(8, activations[root])) for root in few)
        ends = names.layers("@first") | names.layers("@last")
        weights.update((name, max(8, weights[name])) for name in ends)
        named.update(ends)
    for pattern, weight_bits, activation_bits in settings.widths():
        if weight_bits is not None:
            found = names.layers(pattern)
            weights.update(dict.fromkeys(found, weight_bits))
            named.update(found)
        if activation_bits is not None:
            activations.update(dict.fromkeys(names.roots(pattern), activation_bits))
    return Widths(weights=weights, activations=activations, named=frozenset(named))


def tensor_bits(placement: Placement, widths: Widths) -> dict[str, int]:
    """Return the bits of every tensor that has a quantizer, its own or that of another."""
    linked = {**placement.shares, **dict(placement.activations.values())}
    bits = dict(widths.activations)
    return bits | {name: bits[root] for name, root in linked.items() if root in bits}


class _Names:
    """What patterns can name."""

    def __init__(self, placement: Placement, steps: Sequence[Step], model: Model) -> None:
        self._weighted = placement.weighted
        self._root = {
            **{root: root for root in placement.roots},
            **placement.shares,
            **dict(placement.activations.values()),
        }
        self._root |= {name: self._root.get(to, to) for name, to in placement.shifted.items()}
        self._made = {
            step.name: [self._root[name] for name in step.outputs if name in self._root]
            for step in steps
        }
        first, last = _ends(steps, placement)
        constants = initializers(model.proto)
        depthwise = {
            s.name for s in steps if s.name in self._weighted and _is_depthwise(s, constants)
        }
        self._layer_classes = {"@first": first, "@last": last, "@depthwise": depthwise}
        adds = [
            step
            for step in steps
            if step.op_type in ("Add", "Sum") and not set(step.inputs) & set(constants)
        ]
        self._tensor_classes = {
            "@input": {model.input.name},
            "@output": set(model.outputs),
            "@add": {name for step in adds for name in step.outputs},
            "@into-last": {self._weighted[name].input for name in last},
        }

    def layers(self, pattern: str) -> set[str]:
        """Names of the layers whose weight ``pattern`` names."""
        if pattern.startswith("@"):
            found = self._layer_classes.get(pattern, set())
        else:
            found = {name for name in self._weighted if _matches(name, pattern)}
        if not found:
            raise self._unknown(
                pattern, "layer with weights", self._weighted, self._layer_classes
            )
        shared = {self._weighted[name].weight for name in found}
        return {name for name, site in self._weighted.items() if site.weight in shared}

    def roots(self, pattern: str, *, required: bool = True) -> set[str]:
        """Tensors whose quantizer ``pattern`` names; none may be unless ``required``."""
        nodes = self._layer_classes.get(pattern, set())
        tensors = self._tensor_classes.get(pattern, set())
        if not pattern.startswith("@"):
            nodes = {name for name in self._made if _matches(name, pattern)}
            tensors = {name for name in self._root if _matches(name, pattern)}
        found = {root for name in nodes for root in self._made[name]}
        found |= {self._root[name] for name in tensors if name in self._root}
        if not found and required:
            named = [*(n for n, made in self._made.items() if made), *self._root]
            classes = {**self._layer_classes, **self._tensor_classes}
            raise self._unknown(pattern, "tensor with a quantizer", named, classes)
        return found

    @staticmethod
    def _unknown(
        pattern: str, what: str, names: Iterable[str], classes: Iterable[str]
    ) -> SettingsError:
        known = list(dict.fromkeys(classes if pattern.startswith("@") else names))
        nearest = difflib.get_close_matches(pattern, known, n=3, cutoff=0.0)
        return SettingsError(
            f"{pattern!r} names no {what}",
            where="--bits",
            hint=f"nearest: {', '.join(nearest)}",
        )


def _is_depthwise(step: Step, constants: Mapping[str, Array]) -> bool:
    group, shape = step.attributes.get("group", 1), constants[step.inputs[1]].shape
    return bool(
        step.op_type in ("Conv", "ConvTranspose")
        and group > 1
        and shape[1] == 1
        and (step.op_type == "Conv" or shape[0] == group)
    )


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or fnmatchcase(name, pattern)


def _ends(steps: Sequence[Step], placement: Placement) -> tuple[set[str], set[str]]:
    """Layers with no layer before them, and with none behind them."""
    weighted = placement.weighted
    behind: set[str] = set()  # tensors that depend on a layer
    first = set()
    for step in steps:
        depends = bool(behind.intersection(step.inputs))
        if step.name in weighted and not depends:
            first.add(step.name)
        if depends or step.name in weighted:
            behind.update(step.outputs)
    ahead: set[str] = set()  # tensors that a layer depends on
    last = set()
    for step in reversed(steps):
        leads = bool(ahead.intersection(step.outputs))
        if step.name in weighted and not leads:
            last.add(step.name)
        if leads or step.name in weighted:
            ahead.update(name for name in step.inputs if name)
    return first, last
