"""Learn how to round the weights, layer by layer (AdaRound) or block by block (BRECQ).

Each block in turn sees the tensors that the quantized network gives it and learns roundings with
which it gives back what the float network's block gives (AdaRound, arXiv 2004.10568, equation 25;
BRECQ, arXiv 2102.05426, section 3). Activation functions and joins are part of it, so errors that
a Relu cuts off cost nothing; what precedes a block is decided, what follows it is not touched.
The exponents of its activation quantizers are learned after its weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace

import torch

from graph_tools.blocks import Block
from graph_tools.quantizer import QuantizedConstant, TensorQuantizer
from graph_tools.torch_graph import TorchGraph
from pipeline.quantize.fisher import output_sensitivity
from pipeline.quantize.lockstep import Lockstep
from pipeline.quantize.placement import Weighted
from pipeline.quantize.samples import Sample, Samples
from pipeline.quantize.soft_quantizer import SoftQuantizer
from pipeline.quantize.soft_rounding import SoftRounding

__all__ = ["Reconstruction", "reconstruct", "tensors_by_image"]

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
    linked: Mapping[str, str],
    how: Reconstruction,
    generator: torch.Generator,
    *,
    on_step: Callable[[int, int, Mapping[str, float]], None] | None = None,
) -> dict[str, QuantizedConstant]:
    """Learn the integers of every weight, and the exponents of the activations.

    Args:
        lockstep: both networks, at their beginning, weights rounded to nearest. What is learned
            replaces its weights and the exponents of its quantizers.
        blocks: the graph, cut into blocks that can run one after the other.
        weighted: operators with constant weights, by node name.
        linked: tensors that must have the quantizer of another, with that one.
        how: settings.
        generator: draws images and dropped elements.
        on_step: called as (blocks done, blocks, terms).

    Returns:
        The learned weights by initializer name.
    """
    learned: dict[str, QuantizedConstant] = {}
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
            found, terms = task.learn_weights([weighted[n] for n in block.layers])
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
        targets: Sequence[str],
        samples: Samples,
        how: Reconstruction,
        generator: torch.Generator,
    ) -> None:
        self.graph: TorchGraph = lockstep.graph
        self.quantizers: MutableMapping[str, TensorQuantizer] = lockstep.tensors
        self.constants = lockstep.constants
        self.fixed = lockstep.values(name for step in block.steps for name in step.inputs)
        self.block, self.targets, self.samples = block, targets, samples
        self.how, self.generator = how, generator
        self.made = [n for s in block.steps for n in s.outputs if n in self.quantizers]

    def learn_weights(
        self, sites: Sequence[Weighted]
    ) -> tuple[dict[str, QuantizedConstant], dict[str, float]]:
        """Learn the roundings; those that beat the nearest are in force when this returns."""
        how = self.how
        soft = {
            site.weight: SoftRounding(
                self.graph.constants[site.weight], self.constants[site.weight]
            )
            for site in sites
        }
        inner = {
            n: SoftQuantizer(self.quantizers[n]) for n in self.made if n not in self.targets
        }
        total = sum(item.logits.numel() for item in soft.values())
        nearest = self._mean_error(inner)
        if not 0 < nearest < math.inf:
            return {}, {}  # nothing to gain, or nothing to compare with
        optimizer = torch.optim.Adam(
            [item.logits for item in soft.values()], lr=_LEARNING_RATE
        )
        for iteration in range(how.iterations):
            weights = {name: item.weight() for name, item in soft.items()}
            loss = self._error(self._draw(), weights, inner, how.drop) / nearest
            if not loss.requires_grad:  # the outputs do not depend on the weights by value
                return {}, {}
            if iteration >= _WARM_UP * how.iterations:
                done = (iteration / how.iterations - _WARM_UP) / (1 - _WARM_UP)
                # both terms are relative: to the error of weights rounded to nearest, to the number
                # of weights
                beta = 2 + 9 * (1 + math.cos(math.pi * done))
                undecided = torch.stack([item.regularizer(beta) for item in soft.values()])
                loss = loss + _REGULARIZATION * undecided.sum() / total
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            _mute_undefined(item.logits for item in soft.values())
            optimizer.step()
        found = {name: item.hard() for name, item in soft.items()}
        before = {name: self.fixed[name] for name in found}
        self.fixed.update((name, torch.from_numpy(c.values)) for name, c in found.items())
        error = self._mean_error(inner) / nearest
        if not error < 1:  # too few steps or images for this block
            self.fixed.update(before)
            return {}, {"error": 1.0}
        self.constants.update(found)
        return found, {"error": error}

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
        if not 0 < nearest < math.inf:
            return
        for _ in range(self.how.iterations // 4):
            loss = self._error(self._draw(), {}, soft, 0.0) / nearest
            if not loss.requires_grad:
                return
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            _mute_undefined(parameters)
            optimizer.step()
        for root, quantizer in own.items():
            learned = replace(
                self.quantizers[root], exponent=round(float(quantizer.exponent.detach()))
            )
            for name in [root, *(n for n, r in linked.items() if r == root)]:
                if name in self.quantizers:
                    self.quantizers[name] = learned

    def _draw(self) -> Sequence[Sample]:
        return self.samples.draw(_BATCH, self.generator)

    def _mean_error(self, quantizers: Mapping[str, SoftQuantizer]) -> float:
        """The error with the weights in force, over some 64 images."""
        with torch.no_grad():
            return float(self._error(self.samples.first(64), {}, quantizers, 0.0))

    def _error(
        self,
        samples: Sequence[Sample],
        weights: Tensors,
        quantizers: Mapping[str, SoftQuantizer],
        drop: float,
    ) -> torch.Tensor:
        """Mean squared error of the block's outputs, weighted by their sensitivity."""
        errors = []
        for sample in samples:
            values = self._run(sample["inputs"], weights, quantizers, drop)
            for name in self.targets:
                error = (values[name] - sample["targets"][name]).square()
                if name in sample["sensitivity"]:
                    error = error * sample["sensitivity"][name]
                errors.append(error.mean())
        return torch.stack(errors).sum() / len(samples)

    def _run(
        self,
        inputs: Tensors,
        weights: Tensors,
        quantizers: Mapping[str, SoftQuantizer],
        drop: float,
    ) -> dict[str, torch.Tensor]:
        values = dict(inputs)
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
        return values


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
