"""Learn how to round the weights, layer by layer (AdaRound) or block by block (BRECQ).

Each block in turn sees the tensors that the quantized network gives it and learns roundings with
which it gives back what the float network's block gives (AdaRound, arXiv 2004.10568, equation 25;
BRECQ, arXiv 2102.05426, section 3). Activation functions and joins are part of it, so errors that
a Relu cuts off cost nothing; what precedes a block is decided, what follows it is not touched.
The exponents of its activation quantizers are learned after its weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace

import torch

from graph_tools.blocks import Block
from graph_tools.quantizer import QuantizedConstant, TensorQuantizer
from graph_tools.torch_graph import TorchGraph
from pipeline.quantize.fisher import output_sensitivity
from pipeline.quantize.lockstep import Lockstep
from pipeline.quantize.placement import Weighted
from pipeline.quantize.soft_quantizer import SoftQuantizer
from pipeline.quantize.soft_rounding import SoftRounding

__all__ = ["Reconstruction", "reconstruct"]

Tensors = Mapping[str, torch.Tensor]


_BATCH = 32  # images in a step
_WARM_UP = 0.2  # share of the steps before the regularizer sets in
_LEARNING_RATE = (
    3e-2  # Adam's, of the rounding logits; few steps need more than the usual 1e-3
)
_EXPONENT_RATE = 2e-2  # Adam's, of the activation exponents
_REGULARIZATION = 0.01


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """How roundings and exponents are learned.

    Attributes:
        iterations: steps for the weights of a block; a quarter as many for its exponents.
        exponents: whether the exponents of its activations are learned.
        drop: share of the activations that stay unquantized while weights are learned.
        fisher: weigh errors by the sensitivity of the outputs to them.
    """

    iterations: int = 400
    exponents: bool = True
    drop: float = 0.5
    fisher: bool = False


def reconstruct(
    lockstep: Lockstep,
    blocks: Sequence[Block],
    weighted: Mapping[str, Weighted],
    constants: Mapping[str, QuantizedConstant],
    linked: Mapping[str, str],
    how: Reconstruction,
    generator: torch.Generator,
    *,
    on_step: Callable[[int, int, Mapping[str, float]], None] | None = None,
) -> dict[str, QuantizedConstant]:
    """Learn the integers of every weight, and the exponents of the activations.

    Args:
        lockstep: both networks, at their beginning. The learned exponents replace those of its
            quantizers.
        blocks: the graph, cut into blocks that can run one after the other.
        weighted: operators with constant weights, by node name.
        constants: weights rounded to nearest, by initializer name.
        linked: tensors that must have the quantizer of another, with that one.
        how: settings.
        generator: draws images and dropped elements.
        on_step: called as (blocks done, blocks, terms).

    Returns:
        The learned weights by initializer name.
    """
    learned: dict[str, QuantizedConstant] = {}
    for index, block in enumerate(blocks):
        inputs = {name: _joined(lockstep.rounded[name]) for name in block.inputs}
        for step in block.steps:
            lockstep.run_exact(step)
        targets = {
            name: _joined(lockstep.exact[name])
            for name in block.outputs
            if lockstep.exact[name][0].is_floating_point()
        }
        terms: dict[str, float] = {}
        if block.layers and targets:
            sensitivity = (
                output_sensitivity(lockstep, tuple(targets), generator) if how.fisher else {}
            )
            task = _Task(lockstep, block, inputs, targets, sensitivity, how, generator)
            found, terms = task.learn_weights([weighted[n] for n in block.layers], constants)
            learned.update(found)
            if how.exponents:
                task.learn_exponents(linked)
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
        inputs: Tensors,
        targets: Tensors,
        sensitivity: Tensors,
        how: Reconstruction,
        generator: torch.Generator,
    ) -> None:
        self.graph: TorchGraph = lockstep.graph
        self.quantizers: MutableMapping[str, TensorQuantizer] = lockstep.tensors
        self.constants = lockstep.constants
        self.fixed = lockstep.values(name for step in block.steps for name in step.inputs)
        self.block, self.inputs, self.targets = block, inputs, targets
        self.sensitivity, self.how, self.generator = sensitivity, how, generator
        self.count = len(next(iter(targets.values())))
        self.made = [n for s in block.steps for n in s.outputs if n in self.quantizers]

    def learn_weights(
        self, sites: Sequence[Weighted], constants: Mapping[str, QuantizedConstant]
    ) -> tuple[dict[str, QuantizedConstant], dict[str, float]]:
        """Learn the roundings; they are in force when this returns."""
        how = self.how
        soft = {
            site.weight: SoftRounding(
                self.graph.constants[site.weight], constants[site.weight]
            )
            for site in sites
        }
        inner = {
            n: SoftQuantizer(self.quantizers[n]) for n in self.made if n not in self.targets
        }
        total = sum(item.logits.numel() for item in soft.values())
        nearest = self._mean_error(inner)
        optimizer = torch.optim.Adam(
            [item.logits for item in soft.values()], lr=_LEARNING_RATE
        )
        for iteration in range(how.iterations):
            weights = {name: item.weight() for name, item in soft.items()}
            loss = self._error(self._rows(), weights, inner, how.drop) / nearest
            if iteration >= _WARM_UP * how.iterations:
                done = (iteration / how.iterations - _WARM_UP) / (1 - _WARM_UP)
                # both terms are relative: to the error of weights rounded to nearest, to the number
                # of weights
                beta = 2 + 9 * (1 + math.cos(math.pi * done))
                undecided = torch.stack([item.regularizer(beta) for item in soft.values()])
                loss = loss + _REGULARIZATION * undecided.sum() / total
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        found = {name: item.hard() for name, item in soft.items()}
        self.constants.update(found)
        self.fixed.update((name, torch.from_numpy(c.values)) for name, c in found.items())
        return found, {"error": self._mean_error(inner) / nearest}

    def learn_exponents(self, linked: Mapping[str, str]) -> None:
        """Learn the exponents of the quantizers in and behind the block."""
        own = {
            name: SoftQuantizer(self.quantizers[name])
            for name in self.made
            if linked.get(name, name) == name
        }
        if not own:
            return
        parameters = [quantizer.exponent.requires_grad_() for quantizer in own.values()]
        optimizer = torch.optim.Adam(parameters, lr=_EXPONENT_RATE)
        soft = {
            name: own.get(linked.get(name, name)) or SoftQuantizer(self.quantizers[name])
            for name in self.made
        }
        nearest = self._mean_error(soft)
        for _ in range(self.how.iterations // 4):
            loss = self._error(self._rows(), {}, soft, 0.0) / nearest
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        for root, quantizer in own.items():
            learned = replace(
                self.quantizers[root], exponent=round(float(quantizer.exponent.detach()))
            )
            for name in [root, *(n for n, r in linked.items() if r == root)]:
                if name in self.quantizers:
                    self.quantizers[name] = learned

    def _rows(self) -> torch.Tensor:
        return torch.randint(self.count, (_BATCH,), generator=self.generator)

    def _mean_error(self, quantizers: Mapping[str, SoftQuantizer]) -> float:
        """The error with the weights in force, over up to 64 images; never 0."""
        with torch.no_grad():
            rows = torch.arange(min(self.count, 64))
            return max(float(self._error(rows, {}, quantizers, 0.0)), 1e-30)

    def _error(
        self,
        rows: torch.Tensor,
        weights: Tensors,
        quantizers: Mapping[str, SoftQuantizer],
        drop: float,
    ) -> torch.Tensor:
        """Mean squared error of the block's outputs, weighted by their sensitivity."""
        values = {name: value[rows] for name, value in self.inputs.items()}
        constants = {**self.fixed, **weights}
        for step in self.block.steps:
            given = {n: values[n] for n in step.inputs if n in values}
            given.update((n, constants[n]) for n in step.inputs if n in constants)
            for name, value in zip(
                step.outputs, self.graph.run_step(step, given), strict=False
            ):
                quantizer = quantizers.get(name)
                values[name] = (
                    value if quantizer is None else quantizer(value, drop, self.generator)
                )
        errors = []
        for name, target in self.targets.items():
            error = (values[name] - target[rows]).square()
            if name in self.sensitivity:
                error = error * self.sensitivity[name][rows]
            errors.append(error.mean())
        return torch.stack(errors).sum()


def _joined(batches: Sequence[torch.Tensor]) -> torch.Tensor:
    """All images of a tensor; convolutions run fastest in this memory format."""
    joined = torch.cat(list(batches))
    return (
        joined.contiguous(memory_format=torch.channels_last) if joined.dim() == 4 else joined
    )
