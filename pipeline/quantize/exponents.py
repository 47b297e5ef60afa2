"""Learn the exponents of the activation quantizers from what they do to the network's outputs.

A power of two apart is a long way. The slope of an error at one exponent (TQT, arXiv 1903.08066)
does not know what waits at the next, a scale learned freely and rounded afterwards may land on
the worse side, and the mean squared error of a tensor or a block prefers fine steps to large
values, which decide more of the outputs. So whole exponents are tried, tensor after tensor, and
the outputs of the network judge, all of it quantized: biases and roundings must have been chosen
before, or exponents are chosen that make up for their errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from graph_tools.torch_graph import Step
from pipeline.quantize.lockstep import Batches, Lockstep
from pipeline.quantize.simulate import simulate

__all__ = ["learn_exponents", "output_difference"]

_BATCHES = 2  # of images that judge, at least
_IMAGES = 32  # likewise
_GAIN = 0.01  # share of the difference by which it has to fall

Values = Mapping[str, torch.Tensor]


def learn_exponents(
    lockstep: Lockstep,
    linked: Mapping[str, str],
    *,
    fixed: Collection[str] = (),
    on_step: Callable[[int, int], None] | None = None,
) -> int:
    """Coordinate descent over the exponents, one up or down, in the order of the graph.

    Args:
        lockstep: both networks, at their beginning; its quantizers are replaced.
        linked: tensors that must have the quantizer of another, with that one.
        fixed: tensors whose exponent stays.
        on_step: called with (operators done, operators).

    Returns:
        How many exponents changed.
    """
    graph = lockstep.graph
    with torch.no_grad():
        count = max(_BATCHES, math.ceil(_IMAGES / lockstep.sizes[0]))
        images = lockstep.exact[graph.input_names[0]][:count]
        wanted = [graph(batch) for batch in images]
    groups = dict(_groups(lockstep, linked))
    outputs: dict[str, Batches] = {}  # the lockstep frees those that no operator reads
    changes, least = 0, math.nan
    for index, step in enumerate(graph.steps):
        for first in groups.keys() & set(step.outputs):
            group = groups[first]
            if not set(fixed).isdisjoint(group):
                continue
            if math.isnan(least):
                least = _difference(lockstep, graph.steps[index:], outputs, wanted)
            before = lockstep.tensors[first]
            assert isinstance(before.exponent, int)
            for exponent in (before.exponent - 1, before.exponent + 1):
                trial = replace(before, exponent=exponent)
                lockstep.tensors.update(dict.fromkeys(group, trial))
                difference = _difference(lockstep, graph.steps[index:], outputs, wanted)
                if difference < (1 - _GAIN) * least:
                    least, changes = difference, changes + 1
                    break
                lockstep.tensors.update(dict.fromkeys(group, before))
        lockstep.run(step)
        lockstep.quantize(step.outputs)
        made = set(step.outputs).intersection(graph.output_names)
        outputs.update((name, lockstep.rounded[name]) for name in made)
        lockstep.forget(step)
        if on_step is not None:
            on_step(index + 1, len(graph.steps))
    return changes


def _groups(
    lockstep: Lockstep, linked: Mapping[str, str]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Tensors with one quantizer, by the one that is computed first."""
    made = [name for step in lockstep.graph.steps for name in step.outputs]
    groups: dict[str, list[str]] = {}
    for name in made:
        if name in lockstep.tensors:
            groups.setdefault(linked.get(name, name), []).append(name)
    for root, members in groups.items():
        if root in made:  # those of the input stay
            yield members[0], tuple(members)


def _difference(
    lockstep: Lockstep,
    steps: Sequence[Step],
    outputs: Mapping[str, Batches],
    wanted: Sequence[Values],
) -> float:
    """Of the quantized network's outputs from the float one's.

    ``steps`` are still to be run; ``outputs`` are those that the others have computed.
    """
    constants = lockstep.values({name for step in steps for name in step.inputs})
    total = 0.0
    known = {**outputs, **lockstep.rounded}
    for batch, exact in enumerate(wanted):
        values = {name: batches[batch] for name, batches in known.items()}
        found = simulate(lockstep.graph, steps, values, lockstep.tensors, constants)
        total += output_difference(exact, found)
    return total


def output_difference(exact: Values, found: Values) -> float:
    """Squared error of the outputs, each in units of its variance.

    Class scores are compared like other outputs: where generated images stretch them, their
    probabilities are as good as certain, and a divergence of these says little.

    Args:
        exact: outputs by name.
        found: their approximations; outputs that are missing there do not count.
    """
    total = 0.0
    for name, wanted in exact.items():
        if name not in found or not wanted.is_floating_point() or not wanted.numel():
            continue
        power = wanted.var(correction=0).clamp_min(1e-12)
        total += float((found[name] - wanted).square().mean() / power)
    return total if math.isfinite(total) else math.inf
