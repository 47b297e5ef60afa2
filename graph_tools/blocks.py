"""Cut a graph into layers, or into blocks, for reconstruction.

A *layer* is one operator with weights and what follows it up to the next one: bias, activation,
pooling, the Add that closes a residual. A *block* is a run of layers between two cut points:
tensors that dominate all that comes after them, such as the sums of a residual network, so that
nothing else passes from one side to the other (BRECQ, arXiv 2102.05426, section 3.2). Blocks are
found on the graph, not by names: residual, inverted-residual, shuffle, inception and attention
blocks all begin at a fork and end where it is joined. Where no cut is near, as between the levels
of a feature pyramid, each layer is a block of its own.

A tensor that only a distant reader still needs (the lateral connection of a pyramid, an output of
the graph) does not keep a block open.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

from graph_tools.torch_graph import Step, TorchGraph

__all__ = ["Block", "find_blocks", "find_layers"]

_MAX_LAYERS = 8


@dataclass(frozen=True, kw_only=True)
class Block:
    """Consecutive nodes of a graph.

    Attributes:
        steps: the nodes, in an order in which they can run.
        layers: names of those with weights; a block without any only moves data on.
        inputs: tensors, not constants, that come from outside.
        outputs: tensors that are read outside or are outputs of the graph.
    """

    steps: tuple[Step, ...]
    layers: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def find_layers(
    graph: TorchGraph, weighted: Collection[str], *, apart: Collection[str] = ()
) -> tuple[Block, ...]:
    """Cut a graph so that every operator with weights is in a block of its own.

    Args:
        graph: the network.
        weighted: names of the nodes with weights.
        apart: nodes that must not be in a block with weights.

    Returns:
        Blocks that can run one after the other; each node is in exactly one.
    """
    return _blocks(graph, [[part] for part in _parts(graph, weighted, apart)], weighted)


def find_blocks(
    graph: TorchGraph,
    weighted: Collection[str],
    *,
    apart: Collection[str] = (),
    max_layers: int = _MAX_LAYERS,
) -> tuple[Block, ...]:
    """Cut a graph at its dominators.

    Args:
        graph: the network.
        weighted: names of the nodes with weights.
        apart: nodes that must not be in a block with weights.
        max_layers: a cut farther away than this is not waited for.

    Returns:
        Blocks that can run one after the other; each node is in exactly one.
    """
    parts = _parts(graph, weighted, apart)
    cuts = _Cuts(graph, parts, weighted, apart)
    groups, first = [], 0
    while first < len(parts):
        last = cuts.end_of_block(first, max_layers)
        groups.append(parts[first : last + 1])
        first = last + 1
    return _blocks(graph, groups, weighted)


def _parts(
    graph: TorchGraph, weighted: Collection[str], apart: Collection[str]
) -> list[list[Step]]:
    """Nodes by layer. Data only flows from a part to itself and to later ones."""
    count = 0
    part_of: dict[str, int] = {}
    closed: set[int] = set()
    for step in graph.steps:
        index = max(
            (part_of[name] for name in step.inputs if name in part_of), default=count - 1
        )
        if step.name in weighted or step.name in apart or index in {-1, *closed}:
            index, count = count, count + 1
        if step.name in apart:
            closed.add(index)
        part_of.update((name, index) for name in step.outputs if name)
    fixed = {*weighted, *apart}
    _sink([step for step in graph.steps if step.name not in fixed], graph, part_of, closed)
    parts: list[list[Step]] = [[] for _ in range(count)]
    for step in graph.steps:
        parts[part_of[_key(step)]].append(step)
    return [part for part in parts if part]


def _sink(
    movable: Sequence[Step], graph: TorchGraph, part_of: dict[str, int], closed: Set[int]
) -> None:
    """Move nodes to the part that reads them, where fewer tensors then cross between parts.

    A Split belongs to the block that reads its halves, and the Slice and Pad of a shortcut to the
    block whose input they read: the cut is in front of them.
    """
    readers = _readers(graph.steps)
    members: dict[int, list[Step]] = {}
    for step in movable:
        members.setdefault(part_of[_key(step)], []).append(step)
    for tensor in [name for step in reversed(graph.steps) for name in step.outputs if name]:
        here = part_of[tensor]
        inside, made = [], {tensor}  # what this part computes from the tensor alone
        for step in members.get(here, ()):
            variables = {name for name in step.inputs if name in part_of}
            if variables and variables <= made:
                inside.append(step)
                made.update(filter(None, step.outputs))
        made.discard(tensor)
        uses = {
            name: [part_of[_key(reader)] for reader in readers.get(name, ())]
            for name in (tensor, *made)
        }
        passed = [name for name in made if any(part > here for part in uses[name])]
        crosses = tensor in graph.output_names or any(part > here for part in uses[tensor])
        if made.intersection(graph.output_names) or len(passed) <= (not crosses):
            continue
        target = min(part for name in passed for part in uses[name] if part > here)
        names = {step.name for step in inside}
        tied = any(
            step.name not in names and part_of[_key(step)] == here
            for name in (tensor, *made)
            for step in readers.get(name, ())
        )
        if not tied and closed.isdisjoint((here, target)):
            part_of.update((name, target) for name in made)
            members[here] = [step for step in members[here] if step.name not in names]
            members[target] = inside + members.get(target, [])


def _key(step: Step) -> str:
    """The tensor under which a node's part is noted."""
    return next(name for name in step.outputs if name)


def _readers(steps: Iterable[Step]) -> dict[str, list[Step]]:
    readers: dict[str, list[Step]] = {}
    for step in steps:
        for name in set(step.inputs):
            readers.setdefault(name, []).append(step)
    return readers


class _Cuts:
    """Where the parts of a graph hang together by one tensor only."""

    def __init__(
        self,
        graph: TorchGraph,
        parts: Sequence[Sequence[Step]],
        weighted: Collection[str],
        apart: Collection[str],
    ) -> None:
        self.closed = [any(step.name in apart for step in part) for part in parts]
        self.layers = [[step for step in part if step.name in weighted] for part in parts]
        self.shapes = {
            step.name: tuple(graph.constants[step.inputs[1]].shape)
            for part in self.layers
            for step in part
        }
        self.produced = [[name for step in part for name in step.outputs] for part in parts]
        self.read = [{name for step in part for name in step.inputs} for part in parts]
        self.variables = {*graph.input_names, *(name for p in self.produced for name in p)}
        self.last_reader = {name: i for i, names in enumerate(self.read) for name in names}

    def end_of_block(self, first: int, max_layers: int) -> int:
        """Index of the last part of the block that begins with part ``first``."""
        horizon, count = first, 0
        while horizon < len(self.layers):
            count += len(self.layers[horizon])
            if count > max_layers or self.closed[horizon]:
                break
            horizon += 1
        for last in range(first, horizon):
            if self._is_cut(first, last, horizon) and not self._is_inverted(first, last):
                return last
        return first

    def _is_cut(self, first: int, last: int, horizon: int) -> bool:
        """Whether parts ``first`` to ``last`` pass on one tensor, and nobody near their input."""
        produced = [name for part in self.produced[first : last + 1] for name in part]
        passed = [name for name in produced if self.last_reader.get(name, -1) > last]
        read = self.variables & set().union(*self.read[first : last + 1])
        later = set().union(*self.read[last + 1 : horizon])
        return len(passed) <= 1 and not (read - set(produced)) & later

    def _is_inverted(self, first: int, last: int) -> bool:
        """Whether a cut behind ``last`` would part a depthwise convolution from its neighbors.

        It belongs with the pointwise convolution behind it, and with the one before it if that
        only widens the tensor for it.
        """
        layers = [step for part in self.layers[first : last + 1] for step in part]
        behind = next((step for part in self.layers[last + 1 :] for step in part), None)
        if not layers or behind is None:
            return False
        if self._is_depthwise(layers[-1]):
            return True
        out_channels, in_channels, *kernel = self.shapes[layers[-1].name]
        widens = out_channels > in_channels and set(kernel) == {1}
        after_depthwise = len(layers) > 1 and self._is_depthwise(layers[-2])
        return self._is_depthwise(behind) and widens and not after_depthwise

    def _is_depthwise(self, step: Step) -> bool:
        group = step.attributes.get("group", 1)
        return step.op_type == "Conv" and group == self.shapes[step.name][0] > 1


def _blocks(
    graph: TorchGraph, groups: Iterable[Sequence[Sequence[Step]]], weighted: Collection[str]
) -> tuple[Block, ...]:
    members = [tuple(step for part in group for step in part) for group in groups]
    readers: dict[str, set[int]] = {}
    for index, steps in enumerate(members):
        for step in steps:
            for name in step.inputs:
                readers.setdefault(name, set()).add(index)
    variables = {*graph.input_names, *(n for s in graph.steps for n in s.outputs if n)}
    return tuple(
        _block(steps, index, readers, variables, graph.output_names, weighted)
        for index, steps in enumerate(members)
    )


def _block(
    steps: tuple[Step, ...],
    index: int,
    readers: Mapping[str, set[int]],
    variables: Collection[str],
    graph_outputs: Collection[str],
    weighted: Collection[str],
) -> Block:
    produced = [name for step in steps for name in step.outputs if name]
    read = dict.fromkeys(name for step in steps for name in step.inputs)
    return Block(
        steps=steps,
        layers=tuple(step.name for step in steps if step.name in weighted),
        inputs=tuple(n for n in read if n in variables and n not in produced),
        outputs=tuple(
            n for n in produced if n in graph_outputs or readers.get(n, set()) - {index}
        ),
    )
