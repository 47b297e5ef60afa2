"""The float and the quantized network, side by side over the calibration images.

Node by node both compute the same tensors, `Lockstep.exact` and `Lockstep.rounded`; what is
decided about one layer therefore sees the layers before it as they will be: quantized. Tensors are
freed after their last reader. What does not fit a memory budget goes to files, where that is asked
for; else only as many images are taken as fit.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence

import torch

from graph_tools.quantizer import QuantizedConstant, TensorQuantizer
from graph_tools.torch_graph import Step, TorchGraph
from pipeline.quantize.simulate import fake_quantize
from pipeline.quantize.spill import free_bytes, on_disk

__all__ = ["Batches", "Lockstep"]

logger = logging.getLogger(__name__)

Batches = list[torch.Tensor]

MEMORY_BUDGET = 2 * 2**30
"""Bytes of live activations, float and quantized, that are kept in memory."""
_DISK_SHARE = 0.5  # of the room for temporary files
_SMALL = 2**18  # bytes; tensors of a batch below this stay in memory


class Lockstep:
    """Both networks, run to the same node.

    Args:
        graph: the float network.
        tensors: quantizers of the activation tensors.
        constants: integers of weights, biases and operands, by initializer name.
        batches: the images, [n, ...] each; only as many are read as fit the budget.
        whole_batches: the graph takes only batches of one size, none of them may be cut.
        spill: keep activations in files when they do not fit into memory.

    Attributes:
        exact: tensors of the float network that are still needed, one a batch.
        rounded: the same of the quantized one, behind their quantizers.
        tensors: as given; may be replaced one by one.
        constants: likewise.
        pending: nodes that the float network has not computed yet, in order.
        sizes: how many images are in each batch.
        num_images: how many images are used.
        whole_batches: as given.
    """

    def __init__(
        self,
        graph: TorchGraph,
        tensors: MutableMapping[str, TensorQuantizer],
        constants: Mapping[str, QuantizedConstant],
        batches: Iterable[torch.Tensor],
        *,
        whole_batches: bool = False,
        spill: bool = False,
    ) -> None:
        self.graph, self.tensors = graph, tensors
        self.whole_batches = whole_batches
        self.constants = dict(constants)
        self.pending = list(graph.steps)
        self._waiting = Counter(name for step in graph.steps for name in set(step.inputs))
        budget = max(MEMORY_BUDGET, _DISK_SHARE * free_bytes()) if spill else MEMORY_BUDGET
        images, needed = _images_within(budget, graph, batches, whole_batches)
        self._spill = needed > MEMORY_BUDGET and spill
        self.sizes = tuple(len(batch) for batch in images)
        self.num_images = sum(self.sizes)
        name = graph.input_names[0]
        self.exact: dict[str, Batches] = {name: images}
        self.rounded: dict[str, Batches] = {name: images}
        self.quantize([name])

    def run(self, step: Step) -> None:
        """Compute a node in both networks; the quantizers behind it are `quantize`'s."""
        self.run_exact(step)
        self.run_rounded(step)

    def run_exact(self, step: Step) -> None:
        """Compute a node in the float network."""
        self._run(step, self.exact, {})
        self.pending.remove(step)

    def run_exact_block(self, steps: Sequence[Step], outputs: Collection[str]) -> None:
        """Compute nodes in the float network; of what they make only ``outputs`` are kept."""
        inner = {name for step in steps for name in step.outputs}.difference(outputs)
        last = {n: i for i, s in enumerate(steps) for n in (*s.inputs, *s.outputs)}
        for index, step in enumerate(steps):
            self.run_exact(step)
            for name in inner.intersection((*step.inputs, *step.outputs)):
                if last[name] == index:
                    self.exact.pop(name, None)

    def run_rounded(self, step: Step) -> None:
        """Compute a node in the quantized network."""
        self._run(step, self.rounded, self.values(step.inputs))

    def values(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Float values of those of ``names`` that are quantized constants."""
        known = [name for name in names if name in self.constants]
        return {name: torch.from_numpy(self.constants[name].values) for name in known}

    def quantize(self, tensors: Iterable[str]) -> None:
        """Apply the quantizers of ``tensors`` in the quantized network."""
        for tensor in tensors:
            if (quantizer := self.tensors.get(tensor)) is not None:
                self.rounded[tensor] = [
                    self._kept(fake_quantize(value, quantizer))
                    for value in self.rounded[tensor]
                ]

    def forget(self, step: Step) -> None:
        """Free what nobody needs after ``step``; to be called once for each node."""
        self._waiting.subtract(set(step.inputs))
        for tensor in (*step.inputs, *step.outputs):
            if self._waiting[tensor] <= 0:
                self.exact.pop(tensor, None)
                self.rounded.pop(tensor, None)

    def _run(
        self, step: Step, values: dict[str, Batches], constants: Mapping[str, torch.Tensor]
    ) -> None:
        with torch.no_grad():
            for batch in range(len(self.sizes)):
                given = {name: values[name][batch] for name in step.inputs if name in values}
                outputs = self.graph.run_step(step, {**given, **constants})
                for tensor, value in zip(step.outputs, outputs, strict=False):
                    values.setdefault(tensor, []).append(self._kept(value))

    def _kept(self, value: torch.Tensor) -> torch.Tensor:
        """``value``, in a file if memory is short."""
        return on_disk(value) if self._spill and value.nbytes >= _SMALL else value


def _last_readers(graph: TorchGraph) -> dict[str, int]:
    """Index of the last step that reads each tensor."""
    return {tensor: i for i, s in enumerate(graph.steps) for tensor in s.inputs}


def _images_within(
    budget: float, graph: TorchGraph, batches: Iterable[torch.Tensor], whole_batches: bool
) -> tuple[Batches, float]:
    """As many batches as keep the live activations within the budget, and what they need."""
    taken: Batches = []
    limit, used, per_image = 0, 0, 0.0
    for batch in batches:
        if not taken:
            per_image = 2 * _live_bytes(graph, batch) / len(batch)
            limit = max(1, int(budget / per_image))
        if used + len(batch) > limit and not whole_batches:
            batch = batch[: limit - used]
        if len(batch):
            taken.append(_copied(batch))
            used += len(batch)
        if used >= limit:
            logger.info("%d images are used (budget of memory or disk)", used)
            break
    return taken, used * per_image


def _copied(batch: torch.Tensor) -> torch.Tensor:
    """A copy in the memory format in which convolutions run best."""
    images = batch.dim() == 4
    return batch.clone(memory_format=torch.channels_last if images else torch.preserve_format)


def _live_bytes(graph: TorchGraph, batch: torch.Tensor) -> int:
    """Largest number of bytes alive at one time when the graph runs on ``batch``."""
    sizes: dict[str, int] = {}

    def measure(name: str, value: torch.Tensor) -> torch.Tensor:
        sizes[name] = value.numel() * value.element_size()
        return value

    with torch.no_grad():
        graph(batch, hook=measure)
    last_reader = _last_readers(graph)
    live = {graph.input_names[0]}
    peak = 0
    for index, step in enumerate(graph.steps):
        live.update(step.outputs)
        peak = max(peak, sum(sizes.get(tensor, 0) for tensor in live))
        live = {tensor for tensor in live if last_reader.get(tensor, -1) > index}
    return max(peak, 1)
