"""What is learned and corrected once every tensor and constant has a quantizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch

from graph_tools.blocks import find_blocks, find_layers
from graph_tools.model import Model
from graph_tools.quantizer import QuantizedConstant, TensorQuantizer
from graph_tools.torch_graph import TorchGraph
from pipeline.quantize.activations import absorb_activations
from pipeline.quantize.bias_correction import correct_biases, correct_biases_analytically
from pipeline.quantize.constants import quantize_biases
from pipeline.quantize.exponents import learn_exponents
from pipeline.quantize.lockstep import Lockstep
from pipeline.quantize.placement import Placement
from pipeline.quantize.reconstruction import Reconstruction, reconstruct
from pipeline.quantize.second_moment import SecondMomentCorrection
from pipeline.settings import QuantizeSettings

__all__ = ["OnStep", "Refinement", "without_terms"]

Array = np.ndarray[Any, np.dtype[Any]]
OnStep = Callable[[int, int, Mapping[str, float]], None]
"""(done, total, terms)"""

DEFAULT_ITERATIONS = 100


class Refinement:
    """Learned roundings, learned exponents, corrections.

    Args:
        model: the network.
        graph: the same in torch.
        placement: which of its tensors have quantizers.
        tensors: these quantizers; replaced by learned ones.
        constants: integers of its constants; replaced by learned and corrected ones.
        values: the float constants; not changed.
        batches: starts a new pass over the calibration images.
    """

    def __init__(
        self,
        model: Model,
        graph: TorchGraph,
        placement: Placement,
        tensors: dict[str, TensorQuantizer],
        constants: dict[str, QuantizedConstant],
        values: Mapping[str, Array],
        batches: Callable[[], Iterator[torch.Tensor]],
    ) -> None:
        self._graph, self._placement = graph, placement
        self._tensors, self._constants = tensors, constants
        self._values = dict(values)
        self._batches, self._whole = batches, model.fixed_batch is not None

    def run(
        self, settings: QuantizeSettings, seed: int = 0, on_step: OnStep | None = None
    ) -> Iterator[str]:
        """Do what the settings say, note by note for the user.

        Args:
            settings: rounding, exponents, corrections.
            seed: of what is drawn while roundings are learned.
            on_step: called as (done, total, terms), from the start for each part.
        """
        if settings.rounding != "nearest":
            yield self._learn_roundings(settings, seed, on_step)
            if settings.learn_exponents:
                yield self._learn_exponents(on_step)
            return
        if settings.learn_exponents:
            list(self._correct(settings, on_step))  # errors of biases are not theirs to mend
            yield self._learn_exponents(on_step)
        yield from self._correct(settings, on_step)

    def _correct(self, settings: QuantizeSettings, on_step: OnStep | None) -> Iterator[str]:
        if settings.bias_correction == "analytic":
            yield self._correct_analytically()
        elif settings.bias_correction == "empirical":
            yield from self._correct_empirically(settings, on_step)

    def _side_by_side(self, *, spill: bool = False) -> Lockstep:
        return Lockstep(
            self._graph,
            self._tensors,
            self._constants,
            self._batches(),
            whole_batches=self._whole,
            spill=spill,
        )

    def _quantize_biases(self) -> None:
        self._constants.update(
            quantize_biases(self._placement, self._tensors, self._constants, self._values)
        )

    def _learn_roundings(
        self, settings: QuantizeSettings, seed: int, on_step: OnStep | None
    ) -> str:
        find = find_layers if settings.rounding == "adaround" else find_blocks
        weighted = self._placement.weighted
        apart = {node.node for node in self._placement.float_nodes}
        lockstep = self._side_by_side(spill=True)
        found = reconstruct(
            lockstep,
            find(self._graph, weighted, apart=apart),
            weighted,
            Reconstruction(
                iterations=settings.rounding_iterations or DEFAULT_ITERATIONS,
                biases=settings.bias_correction != "none",
                drop=settings.qdrop,
                fisher=settings.reconstruction == "fisher",
                scales=_fitted_scales(settings),
            ),
            torch.Generator().manual_seed(seed),
            on_step=on_step,
        )
        self._values.update(found.biases)
        self._constants.update(found.weights)
        self._quantize_biases()
        what = "roundings and biases" if found.biases else "roundings"
        return f"{what} learned on {lockstep.num_images} images ({settings.rounding})"

    def _learn_exponents(self, on_step: OnStep | None) -> str:
        changes = learn_exponents(
            self._side_by_side(),
            {**self._placement.shares, **dict(self._placement.activations.values())},
            fixed=self._placement.unit_range | set(self._placement.shifted.values()),
            on_step=without_terms(on_step),
        )
        absorb_activations(self._placement, self._tensors)
        self._quantize_biases()
        return f"exponents learned: {changes} changed"

    def _correct_analytically(self) -> str:
        self._constants.update(
            correct_biases_analytically(
                self._graph,
                self._batches(),
                self._placement.weighted,
                self._values,
                self._tensors,
                self._constants,
            )
        )
        return "biases corrected by the means of the float network's inputs"

    def _correct_empirically(
        self, settings: QuantizeSettings, on_step: OnStep | None
    ) -> Iterator[str]:
        lockstep = self._side_by_side()
        rescale = (
            SecondMomentCorrection(self._values, settings.threshold)
            if settings.second_moment_correction
            else None
        )
        sites = self._placement.weighted.values()
        self._constants.update(
            correct_biases(
                lockstep,
                self._placement.weighted,
                {site.bias: self._values[site.bias] for site in sites if site.bias},
                rescale=rescale,
                on_step=without_terms(on_step),
            )
        )
        if rescale is not None:
            yield f"second moments corrected: {rescale.num_channels} channels"
        yield f"biases corrected on {lockstep.num_images} images"


def without_terms(on_step: OnStep | None) -> Callable[[int, int], None] | None:
    """``on_step`` for parts that have no terms to show."""
    return None if on_step is None else lambda done, total: on_step(done, total, {})


def _fitted_scales(settings: QuantizeSettings) -> Literal["keep", "channel", "tensor"]:
    if settings.weight_error == "weights":
        return "keep"
    return "tensor" if settings.weight_granularity == "tensor" else "channel"
