"""The largest part of a network that a target takes, from the input on."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from onnx import NodeProto

from graph_tools.errors import TargetError
from pipeline.export.fake_quantized import FakeQuantized

__all__ = ["Cut", "cut_before"]


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Where a network ends on a target.

    Attributes:
        ends: rounded tensors that become its outputs.
        nodes: what is cut off, in the graph's order.
    """

    ends: tuple[str, ...]
    nodes: tuple[NodeProto, ...]


def cut_before(
    network: FakeQuantized, *, operators: Collection[str] = (), refused: Collection[str] = ()
) -> Cut:
    """Cut a network before all that a target does not take, and before what stays in float.

    Args:
        network: the quantized file.
        operators: those the target takes; empty for all.
        refused: names of nodes that it does not take.

    Raises:
        TargetError: nothing is left.
    """
    graph = network.graph
    leads_to_rounding = graph.leading_to(entry.source for entry in network.roundings.values())
    reached = {entry.name for entry in graph.inputs} | set(network.stored)
    rounded: set[str] = set()
    cut = []
    sources: dict[str, list[str]] = {}
    for entry in network.roundings.values():
        sources.setdefault(entry.source, []).append(entry.result)

    def reach(tensor: str) -> None:
        reached.add(tensor)
        for result in sources.get(tensor, ()):
            rounded.add(result)
            reached.add(result)

    for entry in graph.inputs:
        reach(entry.name)
    for node in network.operators:
        known = all(not n or n in reached or graph.is_constant(n) for n in node.input)
        allowed = (not operators or node.op_type in operators) and node.name not in refused
        if known and allowed and id(node) in leads_to_rounding:
            for name in node.output:
                reach(name)
        elif node.op_type != "Constant":
            cut.append(node)
    inputs = {result for entry in graph.inputs for result in sources.get(entry.name, ())}
    wanted = {name for node in cut for name in node.input}
    inner = [name for name in network.roundings if name in wanted]
    ends = [name for name in (*graph.outputs, *inner) if name in rounded - inputs]
    if not ends:
        raise TargetError(
            "the target takes no part of the network",
            where=f"{cut[0].op_type} {cut[0].name}" if cut else "",
            hint="the first node is already one that it does not take",
        )
    return Cut(ends=tuple(dict.fromkeys(ends)), nodes=tuple(cut))
