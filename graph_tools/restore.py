"""Put BatchNormalization back where an exporter folded it away.

Folding leaves a weighted node with ``W' = r W`` (row by row, one row an output channel) and
``b' = beta + r (b - mean)``, ``r = gamma / sqrt(variance + epsilon)``. The folded numbers alone do
not tell the five vectors apart, but beside the weights and statistics of the same network they
are recognized by value, whatever anything is called:

    1. a tensor of the side file whose rows are proportional to the node's gives ``r``;
    2. of the statistics with as many channels, those that reproduce both ``r`` and ``b'`` are
       the node's. ``epsilon``, which a state_dict does not hold, and a bias of the unfolded
       node are found on the way.

A per-channel Mul or Add behind the node counts as part of it, so BatchNormalization written as
arithmetic is found, too; so is a Mul and Add on their own. A BatchNormalization in front of a
weighted node that was folded forward cannot be told from the node and stays folded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from graph_tools.batchnorm import find_batch_norms
from graph_tools.equivalence import largest_difference, run_model
from graph_tools.errors import ModelError
from graph_tools.folded_units import Unit, find_units, from_rows
from graph_tools.model import Model, replace_proto
from graph_tools.passes import drop_unused_initializers, unused_name
from graph_tools.recognize import Finder, Found, Match
from graph_tools.side_file import NormStatistics, SideFile
from graph_tools.weights import is_outside, tensor_of

__all__ = ["Match", "Restoration", "restore_batch_norms"]

_TOLERANCE = 1e-2  # of the outputs, where float16 weights were rounded; usually 1e-6


@dataclass(frozen=True, kw_only=True)
class Restoration:
    """A network with its BatchNormalization back, and how that came about.

    Attributes:
        model: the network; its notes say how many nodes were restored.
        matches: one a node that could have lost a BatchNormalization, in graph order.
        difference: of the outputs to those of the folded network, relative to the largest.
    """

    model: Model
    matches: tuple[Match, ...]
    difference: float

    @property
    def restored(self) -> int:
        """How many nodes have their BatchNormalization back."""
        return sum(match.state == "restored" for match in self.matches)

    @property
    def candidates(self) -> int:
        """How many nodes could have lost one: those that are not the same in the side file."""
        return sum(match.state != "unchanged" for match in self.matches)


def restore_batch_norms(model: Model, side: SideFile) -> Restoration:
    """Unfold the BatchNormalization of a network with the help of a side file.

    Args:
        model: a network, some or all of its BatchNormalization folded.
        side: weights and statistics of the same trained network.

    Returns:
        The network with the weights and statistics of the side file; its outputs are those of
        ``model`` up to rounding, which was checked in onnxruntime. Nodes without a match stay.

    Raises:
        ModelError: nothing in the file belongs to this network, or the outputs differ.
    """
    units = list(find_units(model))
    finder = Finder(side)
    found = [finder.find(unit) for unit in units]
    matches = tuple(result.match for result in found)
    count = sum(match.state == "restored" for match in matches)
    if units and not any(match.state != "unmatched" for match in matches):
        raise _nothing(model, units, matches, side)
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    graph = proto.graph
    taken = {t.name for t in graph.initializer} | {o for n in graph.node for o in n.output}
    for unit, result in zip(units, found, strict=True):
        if result.norm is not None:
            _unfold(graph, unit, result, result.norm, taken)
    candidates = sum(match.state != "unchanged" for match in matches)
    note = (
        f"BatchNormalization of {count} of {candidates} node(s) restored from {side.path.name}"
    )
    drop_unused_initializers(proto.graph)
    restored = replace_proto(model, proto, notes=(note,))
    difference = _difference(model, restored)
    if not difference <= _TOLERANCE:
        raise ModelError(
            f"the statistics do not reproduce the network: outputs differ by {difference:.1e}",
            where=str(side.path),
            hint="give the file that this network was exported from",
        )
    return Restoration(model=restored, matches=matches, difference=difference)


def _unfold(
    graph: onnx.GraphProto, unit: Unit, found: Found, norm: NormStatistics, taken: set[str]
) -> None:
    """Write the side file's node and BatchNormalization in place of a unit.

    Args:
        graph: changed in place.
        unit: of the graph before any change.
        found: the numbers for it.
        norm: the statistics in `found`.
        taken: names of tensors; new ones are added.
    """
    place, node = next(
        (i, n) for i, n in enumerate(graph.node) if n.output[0] == unit.node.output[0]
    )
    constants = {tensor.name: tensor for tensor in graph.initializer}
    outside = any(map(is_outside, graph.initializer))
    prefix, output = f"{node.name}/restored", unit.output

    def add(name: str, values: np.ndarray) -> str:
        unique = unused_name(f"{prefix}/{name}", taken)
        single = values.astype(np.float32)
        graph.initializer.append(tensor_of(single, unique, outside=outside))
        return unique

    mean = norm.mean
    if found.rows is not None:
        assert found.bias is not None
        shape = tuple(constants[node.input[1]].dims)
        del node.input[2:]
        node.input[1] = add("weight", from_rows(found.rows, node, shape))
        if node.op_type == "MatMul":  # has no place for a bias: the mean takes it
            mean = mean - found.bias
        elif found.bias.any():
            node.input.append(add("own_bias", found.bias))
        for attribute in node.attribute:
            if attribute.name in ("alpha", "beta"):
                attribute.f = 1.0
        source = unused_name(f"{prefix}/input", taken)
        node.output[0] = source
        place += 1
    else:
        source = next(name for name in node.input if name not in constants)
        del graph.node[place]
    normalization = helper.make_node(
        "BatchNormalization",
        [
            source,
            add("scale", norm.scale),
            add("bias", norm.bias),
            add("mean", mean),
            add("variance", norm.variance),
        ],
        [output],
        name=f"{unit.node.name}/BatchNormalization",
        epsilon=norm.epsilon,
    )
    gone = {follower.output[0] for follower in unit.chain}
    for index in reversed(range(place, len(graph.node))):
        if graph.node[index].output[0] in gone:
            del graph.node[index]
    graph.node.insert(place, normalization)


def _difference(model: Model, restored: Model) -> float:
    """Run both on the same random images."""
    batch = model.fixed_batch or 2
    shape = (batch, *model.input.shape)
    images = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    feeds = {model.input.name: images}
    try:
        return largest_difference(
            run_model(restored.proto, feeds), run_model(model.proto, feeds)
        )
    except RuntimeError as error:
        raise ModelError(
            f"the restored network does not run ({error})", where=str(model.source or "")
        ) from error


def _nothing(
    model: Model, units: list[Unit], matches: tuple[Match, ...], side: SideFile
) -> ModelError:
    kept = len(find_batch_norms(model))
    hint = "give the file that this network was exported from, of the same training run"
    if kept:
        hint = (
            f"the network still has {kept} BatchNormalization node(s) and may need no others; "
            f"else {hint}"
        )
    partly = [match for match in matches if match.weight]
    closest = (
        f"; closest: '{partly[0].node}' is proportional to '{partly[0].weight}', but no "
        "statistics explain its scale and bias"
        if partly
        else ""
    )
    return ModelError(
        f"nothing in it belongs to this network: compared {len(units)} node(s), the first of "
        f"{units[0].weight_shape}, with {len(side.weights)} weight tensor(s) and "
        f"{len(side.norms)} BatchNormalization(s) by value{closest}",
        where=str(side.path),
        hint=hint,
    )
