"""Which batches advance together, and what processes tell each other of them.

Batch i is of lane i modulo the number of lanes. Every step takes one batch of each lane, and every
lane has an order of its own, drawn anew for every iteration. Process p of P holds the batches p,
p + P, p + 2 P and so on, the lanes being a multiple of P, so that all have work in every step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch

from pipeline.generate.statistics import Sums
from pipeline.ranks import Ranks

__all__ = ["TERMS", "Moved", "draw_order", "exchange"]

TERMS = ("total", "statistics", "output", "output_weight", "learning_rate")
"""What is known of a step: the fields of a `LossRecord`."""


@dataclass(frozen=True)
class Moved:
    """What a step of a batch gives.

    Args:
        old: its moments before.
        new: its moments now.
        terms: of `TERMS`, 0 where missing.
    """

    old: Sums
    new: Sums
    terms: Mapping[str, float]


def draw_order(count: int, lanes: int, generator: torch.Generator) -> list[int]:
    """Return the order of the batches in an iteration.

    Args:
        count: number of batches.
        lanes: how many advance at the same time.
        generator: on the CPU.
    """
    drawn = [
        torch.randperm(len(range(lane, count, lanes)), generator=generator).tolist()
        for lane in range(min(lanes, count))
    ]
    return [
        turn * lanes + lane
        for step in zip_longest(*drawn)
        for lane, turn in enumerate(step)
        if turn is not None
    ]


def exchange(own: Sequence[Moved], count: int, zero: Sums, ranks: Ranks) -> Sequence[Moved]:
    """Return what all processes found, given what this one did.

    Args:
        own: of this process's batches among them.
        count: how many batches there are in a row, the first one being process 0's, the next one
            process 1's, and so on.
        zero: the moments of no images.
        ranks: the processes.
    """
    if ranks.count == 1:
        return own
    length = len(zero.first)
    sent = zero.first.new_zeros(-(-count // ranks.count), 6 * length + len(TERMS))
    for row, moved in zip(sent, own, strict=False):
        old, new = moved.old, moved.new
        terms = row.new_tensor([moved.terms.get(name, 0.0) for name in TERMS])
        parts = [old.count, old.first, old.second, new.count, new.first, new.second, terms]
        row.copy_(torch.cat(parts))
    got = ranks.gather(sent)
    found = []
    for place in range(count):
        slot, rank = divmod(place, ranks.count)
        *sums, terms = torch.split(got[rank][slot], [length] * 6 + [len(TERMS)])
        told = dict(zip(TERMS, terms.tolist(), strict=True))
        found.append(Moved(Sums(*sums[:3]), Sums(*sums[3:]), told))
    return found
