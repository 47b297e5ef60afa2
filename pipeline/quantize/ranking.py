"""Which tensors cost most: the error of the outputs when one alone is rounded, as in the file.

Weights are measured by `pipeline.quantize.sensitivity`. Of activations the float network runs with
one quantizer in it (and those that share it), from where that tensor is made. Errors are summed
over the outputs, each the root of its squared error over its power. What the worst together cost is
measured, too: the quantized network runs again with these in more bits and the same thresholds.

Large networks would take long: there only the tensors that lose most by their own rounding are
measured, on fewer images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from graph_tools.integer_tail import find_integer_tail
from graph_tools.macs import count_macs
from graph_tools.model import initializers
from graph_tools.quantizer import TensorQuantizer
from graph_tools.torch_graph import TorchGraph
from pipeline.images import ImageSet
from pipeline.quantize import Quantization
from pipeline.quantize.lockstep import Lockstep
from pipeline.quantize.observe import Histogram
from pipeline.quantize.sensitivity import finish, measure_sensitivity
from pipeline.quantize.simulate import fake_quantize

__all__ = ["Cost", "Ranking", "rank_tensors"]

NUM_IMAGES = 16
"""Most images that errors are measured on."""
FEWEST_IMAGES = 4
BUDGET = 6e10
"""Multiply-accumulates that the measurement may take; some ten seconds of one core."""
_WORST = 3
_WIDER = {"activation": {4: 8, 8: 16}, "weight": {2: 4, 3: 8, 4: 8}}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What rounding one tensor costs.

    Attributes:
        name: the tensor, an activation or the initializer of a weight.
        kind: which of the two.
        node: what makes it, or reads it; the input has none.
        bits: as it is; ``wider`` the next width that exists, None if there is none.
        error: of the outputs, relative, with this tensor alone rounded; 0 is perfect.
        pattern: what ``--bits`` calls it, the tensor's name or the node's.
    """

    name: str
    kind: Literal["activation", "weight"]
    node: str
    bits: int
    wider: int | None
    error: float
    pattern: str

    @property
    def flag(self) -> str | None:
        """The entry of ``--bits`` that gives it more bits."""
        letter = "A" if self.kind == "activation" else "W"
        return None if self.wider is None else f"{self.pattern}={letter}{self.wider}"


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Tensors by what they cost.

    Attributes:
        images: how many errors were measured on.
        costs: worst first.
        unmeasured: how many tensors were left out, those that lose least by themselves.
        error: of the outputs with everything rounded.
        widened: the worst for which more bits exist, at most three of them.
        widened_error: with these in more bits; None if there are none.
    """

    images: int
    costs: tuple[Cost, ...]
    unmeasured: int
    error: float
    widened: tuple[str, ...]
    widened_error: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the fields, each cost with its ``flag``."""
        return {
            **asdict(self),
            "costs": [{**asdict(cost), "flag": cost.flag} for cost in self.costs],
        }


def rank_tensors(
    quantization: Quantization, images: ImageSet, *, correct_biases: bool
) -> Ranking:
    """Measure what each tensor's rounding costs.

    Args:
        quantization: the network and its plan.
        images: calibration images.
        correct_biases: whether the plan's biases take mean errors off.
    """
    plan, model = quantization.plan, quantization.model
    graph = TorchGraph(model.proto, outputs=find_integer_tail(model.proto).ends)
    weights = {
        site.weight: site.node
        for site in quantization.weighted.values()
        if site.weight in plan.constants
    }
    losses = _own_losses(quantization, weights)
    macs = max(1, sum(count_macs(model).values()))
    count, measured = _within_budget(losses, macs, model.fixed_batch or 1)
    batches = _batches(images, count, model.fixed_batch)
    count = min(count, images.count)

    def lockstep() -> Lockstep:
        whole = model.fixed_batch is not None
        return Lockstep(graph, {}, {}, batches, whole_batches=whole)

    found = measure_sensitivity(
        lockstep(),
        quantization.weighted,
        {name: (plan.constants[name].quantizer.bits,) for name in measured if name in weights},
        lambda site, bits: torch.from_numpy(plan.constants[site.weight].values),
        correct_biases=correct_biases,
    )
    errors = {name: error for name, by_bits in found.items() for error in by_bits.values()}
    groups: dict[str, dict[str, TensorQuantizer]] = {}
    for name, quantizer in plan.tensors.items():
        root = quantization.roots.get(name, name)
        if root in measured:
            groups.setdefault(root, {})[name] = quantizer
    errors |= _measure_activations(lockstep(), groups)
    costs = sorted(
        (_cost(name, error, quantization, weights) for name, error in errors.items()),
        key=lambda cost: -cost.error,
    )
    worst = [cost for cost in costs if cost.wider is not None][:_WORST]
    return Ranking(
        images=count,
        costs=tuple(costs),
        unmeasured=len(losses) - len(errors),
        error=_error_of_all(graph, quantization, batches, ()),
        widened=tuple(cost.name for cost in worst),
        widened_error=_error_of_all(graph, quantization, batches, worst) if worst else None,
    )


def _own_losses(quantization: Quantization, weights: Mapping[str, str]) -> dict[str, float]:
    """Squared rounding error of each tensor by itself, over its power."""
    plan, known = quantization.plan, initializers(quantization.model.proto)
    losses = {
        root: _own_loss(histogram, plan.tensors[root])
        for root, histogram in quantization.histograms.items()
        if root in plan.tensors
    }
    for name in weights:
        exact = np.asarray(known[name], np.float64)
        lost = np.square(exact - plan.constants[name].values).sum()
        losses[name] = float(lost / max(np.square(exact).sum(), 1e-300))
    return losses


def _own_loss(histogram: Histogram, quantizer: TensorQuantizer) -> float:
    scale, centers = float(quantizer.scale), histogram.centers
    rounded = np.clip(np.rint(centers / scale), quantizer.qmin, quantizer.qmax) * scale
    power = float((histogram.counts * np.square(centers)).sum())
    return float((histogram.counts * np.square(centers - rounded)).sum()) / max(power, 1e-300)


def _within_budget(
    losses: Mapping[str, float], macs: int, batch: int
) -> tuple[int, frozenset[str]]:
    """How many images, and which tensors; each takes half a run of the network on the average."""
    for count in range(NUM_IMAGES, FEWEST_IMAGES - 1, -1):
        if macs * count / 2 * len(losses) <= BUDGET:
            break
    count = -(-count // batch) * batch
    most = max(_WORST, int(BUDGET / (macs * count / 2)))
    return count, frozenset(sorted(losses, key=lambda name: -losses[name])[:most])


def _batches(images: ImageSet, count: int, fixed: int | None) -> list[torch.Tensor]:
    found = []
    for batch in images.batches(fixed or count, limit=count):
        if fixed is not None:  # what is left over is filled up from its start
            batch = np.resize(batch, (fixed, *batch.shape[1:]))
        found.append(torch.from_numpy(batch))
    return found


def _measure_activations(
    lockstep: Lockstep, groups: Mapping[str, Mapping[str, TensorQuantizer]]
) -> dict[str, float]:
    """Error of the outputs with one group of tensors rounded, by its name."""
    graph = lockstep.graph
    entry = graph.input_names[0]
    with torch.no_grad():
        exact = [graph(batch) for batch in lockstep.exact[entry]]
    waiting, found = dict(groups), {}

    def measure(made: Sequence[str], index: int) -> None:
        for root in [
            root for root, group in waiting.items() if not group.keys().isdisjoint(made)
        ]:
            tensors = waiting.pop(root)
            results = []
            for batch in range(len(exact)):
                values = {name: all_[batch] for name, all_ in lockstep.exact.items()}
                for name in tensors.keys() & set(made):
                    values[name] = fake_quantize(values[name], tensors[name])
                finish(graph, graph.steps[index:], values, {}, tensors)
                results.append({**exact[batch], **values})
            found[root] = _relative_error(graph.output_names, exact, results)

    measure([entry], 0)
    for index, step in enumerate(graph.steps):
        lockstep.run_exact(step)
        measure(step.outputs, index + 1)
        lockstep.forget(step)
    return found


def _relative_error(
    names: Sequence[str],
    exact: Sequence[Mapping[str, torch.Tensor]],
    found: Sequence[Mapping[str, torch.Tensor]],
) -> float:
    total = 0.0
    for name in names:
        power = sum(float(e[name].double().square().sum()) for e in exact)
        pairs = zip(exact, found, strict=True)
        error = sum(float((f[name] - e[name]).double().square().sum()) for e, f in pairs)
        total += math.sqrt(error / power) if power else 0.0
    return total


def _error_of_all(
    graph: TorchGraph,
    quantization: Quantization,
    batches: Sequence[torch.Tensor],
    wider: Sequence[Cost],
) -> float:
    """Error of the outputs with everything rounded, ``wider`` to more bits."""
    plan, known = quantization.plan, initializers(quantization.model.proto)
    bits = {cost.name: cost.wider for cost in wider if cost.wider is not None}
    tensors = {
        name: _widened(quantizer, bits.get(quantization.roots.get(name, name)))
        for name, quantizer in plan.tensors.items()
    }
    constants = {
        name: torch.from_numpy(constant.values) for name, constant in plan.constants.items()
    }
    for name in bits.keys() & constants.keys():
        quantizer = _widened(plan.constants[name].quantizer, bits[name])
        rounded = quantizer.dequantize(quantizer.quantize(known[name]))
        constants[name] = torch.from_numpy(rounded)
    entry, exact, found = graph.input_names[0], [], []
    with torch.no_grad():
        for batch in batches:
            exact.append(graph(batch))
            start = fake_quantize(batch, tensors[entry]) if entry in tensors else batch
            values = {entry: start}
            finish(graph, graph.steps, values, constants, tensors)
            found.append(values)
    return _relative_error(graph.output_names, exact, found)


def _widened(quantizer: TensorQuantizer, bits: int | None) -> TensorQuantizer:
    """More bits within the same threshold."""
    if bits is None:
        return quantizer
    more, exponent = bits - quantizer.bits, quantizer.exponent
    finer = (
        tuple(e - more for e in exponent) if isinstance(exponent, tuple) else exponent - more
    )
    scales = quantizer.scales
    return replace(
        quantizer,
        bits=bits,
        exponent=finer,
        scales=None if scales is None else tuple(scale / 2**more for scale in scales),
    )


def _cost(
    name: str, error: float, quantization: Quantization, weights: Mapping[str, str]
) -> Cost:
    if name in weights:
        bits, node = quantization.plan.constants[name].quantizer.bits, weights[name]
        kind: Literal["activation", "weight"] = "weight"
    else:
        bits, kind = quantization.plan.tensors[name].bits, "activation"
        producers = {o: n.name for n in quantization.model.proto.graph.node for o in n.output}
        node = producers.get(name, "(input)")
    return Cost(
        name=name,
        kind=kind,
        node=node,
        bits=bits,
        wider=_WIDER[kind].get(bits),
        error=error,
        pattern=node if kind == "weight" else name,
    )
