"""Bits of each weight by a size budget: ``--target-size``.

The widths 8, 4, 3 and 2 are chosen so that the sum of the weights' sensitivities, each measured
alone (`pipeline.quantize.sensitivity`), is least within the budget (`pipeline.quantize.knapsack`):
the scheme of ZeroQ (arXiv 2001.00281, section 3.3) with another measure. Sizes are those of the
packed weights, bits times elements; biases and scales, which no width changes, are not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from graph_tools.errors import SettingsError
from graph_tools.quantizer import QuantizedConstant
from pipeline.quantize.knapsack import least_error
from pipeline.quantize.lockstep import Lockstep
from pipeline.quantize.placement import Weighted
from pipeline.quantize.sensitivity import measure_sensitivity
from pipeline.settings import TargetSize

__all__ = ["NUM_IMAGES", "WIDTHS", "MixedLayer", "MixedPrecision", "choose_mixed"]

WIDTHS = (8, 4, 3, 2)
"""Bits that a weight may get."""

NUM_IMAGES = 64
"""Most images that sensitivities are measured on."""

Quantize = Callable[[Weighted, int], QuantizedConstant]


@dataclass(frozen=True, kw_only=True)
class MixedLayer:
    """A weight and its width.

    Attributes:
        nodes: the operators that read the weight.
        elements: number of weights.
        bits: chosen width.
        errors: sensitivity by width; empty for layers whose bits are given.
    """

    nodes: tuple[str, ...]
    elements: int
    bits: int
    errors: Mapping[int, float]


@dataclass(frozen=True, kw_only=True)
class MixedPrecision:
    """The widths that were chosen, and from what.

    Attributes:
        budget: bytes that the packed weights may take; ``size``: what they take; ``size_w8``:
            what they would take with 8 bits each.
        num_images: images that the sensitivities were measured on.
        layers: by initializer name of the weight.
    """

    budget: int
    size: int
    size_w8: int
    num_images: int
    layers: Mapping[str, MixedLayer]

    @property
    def widths(self) -> dict[str, int]:
        """Bits by node name."""
        return {node: layer.bits for layer in self.layers.values() for node in layer.nodes}

    @property
    def range(self) -> str:
        """``2-8``: the fewest and the most bits."""
        used = sorted({layer.bits for layer in self.layers.values()})
        return str(used[0]) if len(used) == 1 else f"{used[0]}-{used[-1]}"

    @property
    def note(self) -> str:
        """The result in words."""
        counts = [
            f"{n} of {bits} bits"
            for bits in WIDTHS
            if (n := sum(layer.bits == bits for layer in self.layers.values()))
        ]
        return (
            f"packed weights: {self.size:,} bytes of {self.budget:,} allowed, "
            f"{self.size / self.size_w8:.3f} of 8-bit weights: {', '.join(counts)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the report."""
        return {**asdict(self), "note": self.note}


def choose_mixed(
    lockstep: Lockstep,
    sites: Mapping[str, Weighted],
    quantize: Quantize,
    target: TargetSize,
    given: Mapping[str, int],
    *,
    correct_biases: bool,
    on_step: Callable[[int, int], None] | None = None,
) -> MixedPrecision:
    """Choose the width of every weight.

    Args:
        lockstep: at its beginning; only its float network is run.
        sites: operators with constant weights, by node name.
        quantize: rounds the weight of an operator to a number of bits.
        target: size of all packed weights.
        given: bits that are given already, by node name.
        correct_biases: whether biases will be corrected.
        on_step: called with (passes done, passes).

    Raises:
        SettingsError: the budget is less than the least possible size.
    """
    readers: dict[str, list[Weighted]] = {}
    for site in sites.values():
        readers.setdefault(site.weight, []).append(site)
    constants = lockstep.graph.constants
    elements = {weight: constants[weight].numel() for weight in readers}
    fixed = {
        w: given[s.node] for w, found in readers.items() for s in found if s.node in given
    }
    size_w8 = sum(elements.values())
    budget = target.bytes_of(size_w8)
    least = _bytes({w: fixed.get(w, min(WIDTHS)) for w in readers}, elements)
    if least > budget:
        raise SettingsError(
            f"{target} is {budget:,} bytes of packed weights, and the least possible is "
            f"{least:,} bytes ({least / size_w8:.3f}x)",
            where="--target-size",
            hint="ask for more, or for fewer bits where --bits or the academic scheme names layers",
        )
    errors = measure_sensitivity(
        lockstep,
        sites,
        dict.fromkeys((weight for weight in readers if weight not in fixed), WIDTHS),
        lambda site, bits: torch.from_numpy(quantize(site, bits).values),
        correct_biases=correct_biases,
        on_step=on_step,
    )
    free = 8 * budget - sum(bits * elements[weight] for weight, bits in fixed.items())
    chosen = least_error(
        [
            {bits: (bits * elements[weight], error) for bits, error in found.items()}
            for weight, found in errors.items()
        ],
        free,
    )
    bits = {**fixed, **dict(zip(errors, chosen, strict=True))}
    return MixedPrecision(
        budget=budget,
        size=_bytes(bits, elements),
        size_w8=size_w8,
        num_images=lockstep.num_images,
        layers={
            weight: MixedLayer(
                nodes=tuple(site.node for site in found),
                elements=elements[weight],
                bits=bits[weight],
                errors=errors.get(weight, {}),
            )
            for weight, found in readers.items()
        },
    )


def _bytes(bits: Mapping[str, int], elements: Mapping[str, int]) -> int:
    return -(-sum(bits[weight] * elements[weight] for weight in elements) // 8)
