"""Learn how to round the weights, layer by layer (AdaRound) or block by block (BRECQ).

Each block in turn sees the tensors that the quantized network gives it and learns roundings with
which it gives back what the float network's block gives (AdaRound, arXiv 2004.10568, equation 25;
BRECQ, arXiv 2102.05426, section 3). Activation functions and joins are part of it, so errors that
a Relu cuts off cost nothing; what precedes a block is decided, what follows it is not touched.

Biases are learned with the roundings. Corrected afterwards, channel by channel to the float
network's mean, they would undo what the roundings have made of values that saturate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from graph_tools.blocks import Block
from graph_tools.quantizer import QuantizedConstant
from pipeline.quantize.fisher import output_sensitivity
from pipeline.quantize.lockstep import Lockstep
from pipeline.quantize.output_error import MOST_BITS, fit_scales
from pipeline.quantize.placement import Weighted
from pipeline.quantize.samples import Sample, Samples
from pipeline.quantize.soft_bias import SoftBias
from pipeline.quantize.soft_quantizer import soft_quantize
from pipeline.quantize.soft_rounding import SoftRounding
from pipeline.quantize.weights import (
    bias_bits,
    input_exponent,
    quantize_bias,
    scale_candidates,
)

__all__ = ["Learned", "Reconstruction", "reconstruct", "tensors_by_image"]

Tensors = Mapping[str, torch.Tensor]

_BATCH = 32  # images in a step
_FEWEST = 8  # of large ones
_FITTED = 128  # images that choose scales
_POSITIONS = 2**15  # of a tensor, over all images of a step, that are enough
_WARM_UP = 0.2  # share of the steps before the regularizer sets in
_SETTLING = 0.5  # steps for the biases alone, as a share of those for all
_CHECK = 0.1  # share of the steps after which unchanged roundings are final
_LEARNING_RATE = 1e-1  # of Adam, for the logits; few steps need more than the usual 1e-3
_BIAS_RATE = 3e-2  # of Adam, in standard deviations of a channel
_REGULARIZATION = 0.01


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """How roundings are learned.

    Attributes:
        iterations: steps for a block.
        biases: whether biases are learned, too.
        drop: share of the inner activations that stay unquantized meanwhile.
        fisher: weigh errors by the sensitivity of the outputs to them.
        scales: whether those of narrow weights are chosen by the error of the outputs first, for
            each channel or for the whole tensor.
    """

    iterations: int
    biases: bool = True
    drop: float = 0.5
    fisher: bool = False
    scales: Literal["keep", "channel", "tensor"] = "channel"


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What was learned, by initializer name.

    Attributes:
        weights: their integers.
        biases: float, [channels].
    """

    weights: dict[str, QuantizedConstant] = field(default_factory=dict)
    biases: dict[str, np.ndarray[Any, np.dtype[np.float32]]] = field(default_factory=dict)


def reconstruct(
    lockstep: Lockstep,
    blocks: Sequence[Block],
    weighted: Mapping[str, Weighted],
    how: Reconstruction,
    generator: torch.Generator,
    *,
    on_step: Callable[[int, int, Mapping[str, float]], None] | None = None,
) -> Learned:
    """Learn the integers of every weight, and the biases.

    Args:
        lockstep: both networks, at their beginning, weights rounded to nearest. What is learned
            replaces its constants.
        blocks: the graph, cut into blocks that can run one after the other.
        weighted: operators with constant weights, by node name.
        how: settings.
        generator: draws images and dropped elements.
        on_step: called as (blocks done, blocks, terms).
    """
    learned = Learned()
    by_image = tensors_by_image(lockstep)
    for index, block in enumerate(blocks):
        lockstep.run_exact_block(block.steps, block.outputs)
        targets = {
            name: lockstep.exact[name]
            for name in block.outputs
            if lockstep.exact[name][0].is_floating_point()
        }
        terms: dict[str, float] = {}
        if block.layers and targets:
            sensitivity = (
                output_sensitivity(lockstep, tuple(targets), generator) if how.fisher else {}
            )
            inputs = {name: lockstep.rounded[name] for name in block.inputs}
            samples = Samples(
                {"inputs": inputs, "targets": targets, "sensitivity": sensitivity},
                lockstep.sizes,
                mixed=by_image.issuperset({*inputs, *targets}),
            )
            task = _Task(lockstep, block, tuple(targets), samples, how, generator)
            sites = [weighted[name] for name in block.layers]
            if how.scales != "keep":
                learned.weights.update(task.fit_scales(sites))
            found, error = task.learn(sites)
            learned.weights.update(found.weights)
            learned.biases.update(found.biases)
            terms = {"error": error}
        for step in block.steps:
            lockstep.run_rounded(step)
            lockstep.quantize(step.outputs)
            lockstep.forget(step)
        if on_step is not None:
            on_step(index + 1, len(blocks), terms)
    return learned


class _Task:
    """One block to reconstruct."""

    def __init__(
        self,
        lockstep: Lockstep,
        block: Block,
        targets: Sequence[str],
        samples: Samples,
        how: Reconstruction,
        generator: torch.Generator,
    ) -> None:
        self.graph, self.constants = lockstep.graph, lockstep.constants
        self.block, self.targets, self.samples = block, targets, samples
        self.how, self.generator = how, generator
        self.quantizers = lockstep.tensors
        self.inner = {
            name: self.quantizers[name]
            for step in block.steps
            for name in step.outputs
            if name in self.quantizers and name not in targets
        }
        positions = max(lockstep.exact[name][0][:1, :1].numel() for name in targets)
        self.batch = min(max(_FEWEST, _POSITIONS // max(positions, 1)), _BATCH)

    def fit_scales(self, sites: Sequence[Weighted]) -> dict[str, QuantizedConstant]:
        """Choose the scales of narrow weights by the error of the operators' outputs.

        Returns:
            These weights, rounded to nearest; they are the lockstep's, too.
        """
        steps = {step.name: step for step in self.block.steps}
        found = {}
        for site in sites:
            constant = self.constants[site.weight]
            if constant.quantizer.bits > MOST_BITS:
                continue
            bias = self.graph.constants[site.bias].numpy() if site.bias else None
            exponent = input_exponent(site, self.quantizers)
            room = bias_bits(site, self.quantizers)
            constant = fit_scales(
                self.graph,
                steps[site.node],
                site,
                self._inputs(site),
                constant,
                scale_candidates(constant.quantizer, bias, exponent, room),
                self.generator,
                centered=self.how.biases and bias is not None,
                shared=self.how.scales == "tensor",
            )
            self.constants[site.weight] = found[site.weight] = constant
            if bias is not None:
                self.constants[site.bias] = quantize_bias(site, bias, exponent, constant)
        return found

    def _inputs(self, site: Weighted) -> list[torch.Tensor]:
        """What an operator reads in the quantized network, for some images."""
        found = []
        with torch.no_grad():
            for sample in self.samples.first(_FITTED):
                values = sample["inputs"]
                if site.input not in values:
                    values = self._run(values, self._constants(), 0.0)
                found.append(values[site.input])
        return found

    def learn(self, sites: Sequence[Weighted]) -> tuple[Learned, float]:
        """Learn roundings and biases; those that beat the nearest are then the lockstep's.

        Returns:
            What was learned, nothing if it does not help, and the error that is left as a share
            of that with weights rounded to nearest.
        """
        soft = {
            site.weight: SoftRounding(
                self.graph.constants[site.weight], self.constants[site.weight]
            )
            for site in sites
        }
        biases = self._soft_biases(sites) if self.how.biases else {}
        nearest = self._mean_error()
        if not 0 < nearest < math.inf:  # nothing to gain, or nothing to compare with
            return Learned(), 1.0
        iterations, drop = self.how.iterations, self.how.drop
        if not self._descend(soft, biases, nearest, iterations, drop):
            return Learned(), 1.0
        before = dict(self.constants)
        weights = {name: item.hard() for name, item in soft.items()}
        self.constants.update(weights)
        if biases:  # weights that were undecided have moved: once more with all as it will be
            self._descend({}, biases, nearest, round(_SETTLING * iterations), drop)
        found = Learned(
            weights=weights,
            biases={name: item.value().detach().numpy() for name, item in biases.items()},
        )
        self.constants.update(
            (
                site.bias,
                quantize_bias(
                    site,
                    found.biases[site.bias],
                    input_exponent(site, self.quantizers),
                    found.weights[site.weight],
                ),
            )
            for site in sites
            if site.bias in found.biases
        )
        error = self._mean_error() / nearest
        if not error < 1:  # too few steps or images for this block
            self.constants.update(before)
            return Learned(), 1.0
        return found, error

    def _soft_biases(self, sites: Sequence[Weighted]) -> dict[str, SoftBias]:
        with torch.no_grad():
            sample = self.samples.first(self.batch)[0]
            values = self._run(sample["inputs"], self._constants(), 0.0)
        return {
            site.bias: SoftBias(
                self.graph.constants[site.bias], values[site.output], site.channel_axis
            )
            for site in sites
            if site.bias
        }

    def _descend(
        self,
        soft: Mapping[str, SoftRounding],
        biases: Mapping[str, SoftBias],
        unit: float,
        iterations: int,
        drop: float,
    ) -> bool:
        """Minimize the block's error in units of ``unit``; False where weights do not matter."""
        logits = [item.logits for item in soft.values()]
        shifts = [item.shift for item in biases.values()]
        optimizer = torch.optim.Adam(
            [
                {"params": logits, "lr": _LEARNING_RATE},
                {"params": shifts, "lr": _BIAS_RATE},
            ]
        )
        total = sum(item.numel() for item in logits)
        fixed = self._constants()
        decided: list[torch.Tensor] = []
        for iteration in range(iterations):
            constants = fixed | {name: item.weight() for name, item in soft.items()}
            constants |= {name: item.value() for name, item in biases.items()}
            samples = self.samples.draw(self.batch, self.generator)
            loss = self._error(samples, constants, drop) / unit
            if not loss.requires_grad:  # the outputs do not depend on the weights by value
                return False
            if soft and iteration >= _WARM_UP * iterations:
                done = (iteration / iterations - _WARM_UP) / (1 - _WARM_UP)
                # both terms are relative: to the error of weights rounded to nearest, to the number
                # of weights
                beta = 2 + 9 * (1 + math.cos(math.pi * done))
                undecided = torch.stack([item.regularizer(beta) for item in soft.values()])
                loss = loss + _REGULARIZATION * undecided.sum() / total
            if not soft:
                optimizer.param_groups[-1]["lr"] = _BIAS_RATE * (1 - iteration / iterations)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            _mute_undefined([*logits, *shifts])
            optimizer.step()
            if soft and iteration % max(1, round(_CHECK * iterations)) == 0:
                before, decided = decided, [item >= 0 for item in logits]
                started = iteration >= _WARM_UP * iterations
                if started and all(map(torch.equal, before, decided)):
                    break
        return True

    def _constants(self) -> dict[str, torch.Tensor]:
        """Values of the block's quantized constants."""
        names = {name for step in self.block.steps for name in step.inputs}
        return {
            name: torch.from_numpy(constant.values)
            for name, constant in self.constants.items()
            if name in names
        }

    def _mean_error(self) -> float:
        """The error with the constants in force, over some 64 images."""
        with torch.no_grad():
            return float(self._error(self.samples.first(64), self._constants(), 0.0))

    def _error(
        self, samples: Sequence[Sample], constants: Tensors, drop: float
    ) -> torch.Tensor:
        """Mean squared error of the block's outputs, weighted by their sensitivity."""
        errors = []
        for sample in samples:
            values = self._run(sample["inputs"], constants, drop)
            for name in self.targets:
                error = (values[name] - sample["targets"][name]).square()
                if name in sample["sensitivity"]:
                    error = error * sample["sensitivity"][name]
                errors.append(error.mean())
        return torch.stack(errors).sum() / len(samples)

    def _run(self, inputs: Tensors, constants: Tensors, drop: float) -> Tensors:
        def quantize(name: str, value: torch.Tensor) -> torch.Tensor:
            if name not in self.inner:
                return value
            return soft_quantize(value, self.inner[name], drop, self.generator)

        return self.graph.run_steps(
            self.block.steps, inputs, constants=constants, hook=quantize
        )


def _mute_undefined(parameters: Iterable[torch.Tensor]) -> None:
    """Infinite slopes, such as that of a square root at zero, say nothing about the others."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


def tensors_by_image(lockstep: Lockstep) -> frozenset[str]:
    """Return the tensors with one row for each image; attention may merge or move that axis.

    Args:
        lockstep: both networks, at their beginning.
    """
    if lockstep.whole_batches:
        return frozenset()
    images = lockstep.exact[lockstep.graph.input_names[0]]
    found = set(lockstep.graph.input_names)
    sizes: dict[str, list[int]] = {}

    def measure(name: str, value: torch.Tensor) -> torch.Tensor:
        sizes.setdefault(name, []).append(len(value) if value.dim() else 0)
        return value

    with torch.no_grad():
        for count in (1, 2):
            lockstep.graph(images[0][:1].repeat_interleave(count, 0), hook=measure)
    found.update(name for name, counts in sizes.items() if counts == [1, 2])
    return frozenset(found)
