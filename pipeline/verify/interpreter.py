"""The integer interpreter beside the runtimes: what the file says, without anybody's kernels."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from graph_tools.errors import IntegerOverflowError, VerificationError, ZsqError
from graph_tools.integer import FirstDifference, IntegerNetwork, first_difference
from graph_tools.quantized_graph import QuantizedGraph
from graph_tools.saving import loadable
from pipeline.verify.compilers import onnxruntime as ort
from pipeline.verify.differences import Difference, DifferenceMeter
from pipeline.verify.opening import filled
from pipeline.verify.reference import zero_point

__all__ = ["Compared", "Interpreted", "Interpreter", "Traced"]

_RUNS: tuple[ort.Mode, ...] = ("unoptimized", "optimized")


@dataclass(frozen=True, kw_only=True)
class Traced:
    """The first integers at which the unoptimized run parts from the interpreter.

    Attributes:
        difference: tensor, node and steps.
        behind: names of the nodes between the last equal integers and these.
    """

    difference: FirstDifference
    behind: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One tensor of integers: the interpreter against both runs of onnxruntime."""

    name: str
    unoptimized: Difference
    optimized: Difference


@dataclass(frozen=True, kw_only=True)
class Interpreted:
    """What the interpreter computed.

    Attributes:
        images: that it ran.
        tensors: the tensors of integers in the proof.
        traced: where the unoptimized run parts; None where all integers are equal.
        accumulator_bits: largest that a sum or product took.
        tables: nodes that were looked up; ``float_nodes`` were computed in float32.
        overflow: which node left its accumulator; "" if none.
        refused: why it could not run the file; "" if it could.
        seconds: time taken.
    """

    images: int = 0
    tensors: tuple[Compared, ...] = ()
    traced: Traced | None = None
    accumulator_bits: int = 0
    tables: tuple[str, ...] = ()
    float_nodes: tuple[str, ...] = ()
    overflow: str = ""
    refused: str = ""
    seconds: float = 0.0

    @property
    def elements(self) -> int:
        """Integers compared with each run."""
        return sum(entry.optimized.elements for entry in self.tensors)

    @property
    def differing(self) -> int:
        """Those that differ from the run that differs more."""
        return max(
            sum(entry.unoptimized.differing for entry in self.tensors),
            sum(entry.optimized.differing for entry in self.tensors),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the fields, ``elements`` and ``differing``."""
        first = self.traced
        return {
            "images": self.images,
            "elements": self.elements,
            "differing": self.differing,
            "tensors": [
                {
                    "name": entry.name,
                    "differences": [entry.unoptimized.to_dict(), entry.optimized.to_dict()],
                }
                for entry in self.tensors
            ],
            "first_difference": None if first is None else vars(first.difference).copy(),
            "accumulator_bits": self.accumulator_bits,
            "tables": list(self.tables),
            "float_nodes": list(self.float_nodes),
            "overflow": self.overflow,
            "refused": self.refused,
            "seconds": self.seconds,
        }

    def line(self) -> str:
        """For a terminal."""
        if self.overflow or self.refused:
            return f"interpreter: did not run: {self.overflow or self.refused}"
        if not self.images:
            return "interpreter: not asked for"
        floats = f", {len(self.float_nodes)} nodes in float32" if self.float_nodes else ""
        return (
            f"interpreter: {self.differing:,} of {self.elements:,} integers differ from "
            f"onnxruntime, {self.images} images, accumulators of at most "
            f"{self.accumulator_bits} bits{floats}"
        )


class Interpreter:
    """Runs the first batches of a proof in integers and compares what the runtimes gave.

    Args:
        graph: the file.
        scales: of the tensors of integers to compare, by name; ``integers`` names the stored
            integers of those that are no graph outputs.
        limit: images to run, in whole batches.
        accumulator_bits: as in `IntegerNetwork`.
        threads: as in `ort.compile`.
    """

    def __init__(
        self,
        graph: QuantizedGraph,
        scales: Mapping[str, float],
        integers: Mapping[str, str],
        *,
        limit: int,
        accumulator_bits: int,
        threads: int,
    ) -> None:
        self._graph, self._integers, self._limit = graph, integers, limit
        self._threads = threads
        self._meters = {
            name: [DifferenceMeter(run, "interpreter", scale) for run in _RUNS]
            for name, scale in scales.items()
        }
        self._network: IntegerNetwork | None = None
        self._overflow = self._refused = ""
        self._images, self._bits, self._seconds = 0, 0, 0.0
        self._tables: tuple[str, ...] = ()
        self._float_nodes: tuple[str, ...] = ()
        self._traced: Traced | None = None
        try:
            self._network = IntegerNetwork(graph.proto, accumulator_bits=accumulator_bits)
        except ZsqError as error:
            self._refused = str(error)

    def compare(
        self,
        batch: npt.NDArray[np.float32],
        found: Mapping[str, Mapping[str, npt.NDArray[Any]]],
    ) -> None:
        """Run a batch, unless enough were run.

        Args:
            batch: [n, ...] images.
            found: tensors of integers, dequantized, by run and name.
        """
        if self._network is None or self._images >= self._limit:
            return
        started = time.perf_counter()
        try:
            self._compare(self._network, batch, found)
        except IntegerOverflowError as error:
            self._overflow, self._network = str(error), None
        except ZsqError as error:
            self._refused, self._network = str(error), None
        self._seconds += time.perf_counter() - started

    def result(self) -> Interpreted:
        """What was found."""
        stopped = bool(self._overflow or self._refused)
        tensors = () if stopped or not self._images else tuple(self._meters.items())
        return Interpreted(
            images=0 if stopped else self._images,
            tensors=tuple(
                Compared(
                    name=name,
                    unoptimized=unoptimized.result(),
                    optimized=optimized.result(),
                )
                for name, (unoptimized, optimized) in tensors
            ),
            traced=self._traced,
            accumulator_bits=self._bits,
            tables=self._tables,
            float_nodes=self._float_nodes,
            overflow=self._overflow,
            refused=self._refused,
            seconds=self._seconds,
        )

    def _compare(
        self,
        network: IntegerNetwork,
        batch: npt.NDArray[np.float32],
        found: Mapping[str, Mapping[str, npt.NDArray[Any]]],
    ) -> None:
        whole = filled(batch, self._graph.batch)
        run = network.run(whole)
        self._images += len(batch)
        self._tables, self._float_nodes = run.tables, run.float_nodes
        self._bits = max(self._bits, *run.accumulators.values(), 0)
        differs = False
        for name, meters in self._meters.items():
            if name in run.outputs:
                values: npt.NDArray[Any] = run.outputs[name]
            else:
                values = self._dequantized(name, run.integers)
            if len(batch) < len(whole) and len(values) == len(whole):
                values = values[: len(batch)]
            for runtime, meter in zip(_RUNS, meters, strict=True):
                meter.update(found[runtime][name], values)
                differs |= not np.array_equal(found[runtime][name], values)
        if differs and self._traced is None:
            self._traced = self._trace(whole, run.integers)

    def _dequantized(
        self, name: str, integers: Mapping[str, npt.NDArray[np.int64]]
    ) -> npt.NDArray[np.float32]:
        stored = self._integers.get(name)
        if stored is None or stored not in integers:
            raise VerificationError(f"the interpreter has no integers for '{name}'")
        reader = next(n for n in self._graph.dequantizers if n.input[0] == stored)
        scale = self._graph.scale(reader)
        middle = zero_point(self._graph, reader)
        step = 1.0 if scale is None else float(scale.reshape(-1)[0])
        return ((integers[stored] - middle) * step).astype(np.float32)

    def _trace(
        self, batch: npt.NDArray[np.float32], integers: Mapping[str, npt.NDArray[np.int64]]
    ) -> Traced | None:
        whole = onnx.ModelProto()
        whole.CopyFrom(self._graph.proto)
        outputs = [name for name in integers if name not in self._graph.outputs]
        whole.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
        with tempfile.TemporaryDirectory(prefix="zsq-") as folder:
            model = loadable(whole, Path(folder))
            compiled = ort.compile(model, "unoptimized", threads=self._threads)
            difference = first_difference(self._graph, integers, ort.run(compiled, batch))
        if difference is None:
            return None
        return Traced(difference=difference, behind=_behind(self._graph, [difference.tensor]))


def _behind(graph: QuantizedGraph, tensors: Sequence[str]) -> frozenset[str]:
    """The nodes between the last dequantized tensors and these."""
    found: set[str] = set()
    pending: Collection[str] = tensors
    while pending:
        nodes = [graph.producers[name] for name in pending if name in graph.producers]
        found.update(node.name for node in nodes)
        pending = [
            name
            for node in nodes
            if node.op_type != "DequantizeLinear"
            for name in node.input
            if name
        ]
    return frozenset(found)
