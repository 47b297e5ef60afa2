"""What a proof compares: a model, compiled for every run, and its tensors of integers.

Tensors are compared where integers end: at graph outputs that hold dequantized integers, and,
where a float tail follows (a Softmax, box decoding), at the last integers in front of it, in a
copy of the model that is cut there. Making an inner tensor an output of the whole model would
keep onnxruntime from fusing the kernels around it, and so prove something else.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx

from graph_tools.quantized_graph import QuantizedGraph
from graph_tools.saving import loadable
from pipeline.settings import VerifySettings
from pipeline.verify.compilers import onnxruntime as ort
from pipeline.verify.cut import cut_at
from pipeline.verify.differences import DifferenceMeter
from pipeline.verify.kernels import Kernels, read_kernels
from pipeline.verify.proof import TensorProof

__all__ = ["Part", "Target", "compile_parts"]

_MODES: tuple[ort.Mode, ...] = ("unoptimized", "optimized", "default")
_PAIRS = tuple(itertools.combinations(_MODES, 2))


@dataclass(frozen=True, kw_only=True)
class Target:
    """A tensor to compare: its name in the run, and what it stands for.

    ``integers``: where the stored integers are if it is no graph output.
    """

    output: str
    name: str
    scale: float | None
    feeds: tuple[str, ...] = ()
    integers: str = ""
    decides: bool = False

    @property
    def kind(self) -> Literal["integer output", "float output", "last integers", "decision"]:
        """As in `TensorProof`."""
        if self.feeds:
            return "last integers"
        if self.decides:
            return "decision"
        return "float output" if self.scale is None else "integer output"


class Part:
    """One model, compiled for every mode, and the meters of its outputs."""

    def __init__(self, runs: Sequence[ort.Compiled], targets: Sequence[Target]) -> None:
        self._runs = runs
        self.targets = targets
        self.meters = {
            (target.output, pair): DifferenceMeter(*pair, target.scale)
            for target in targets
            for pair in _PAIRS
        }

    def compare(
        self, batch: npt.NDArray[np.float32]
    ) -> dict[ort.Mode, dict[str, npt.NDArray[Any]]]:
        """Run a batch in every mode and compare; returns the outputs by mode."""
        values = {run.mode: ort.run(run, batch) for run in self._runs}
        for (output, (first, second)), meter in self.meters.items():
            meter.update(values[first][output], values[second][output])
        return values

    def results(self) -> Iterator[TensorProof]:
        """Return what was measured, a tensor at a time."""
        for target in self.targets:
            yield TensorProof(
                name=target.name,
                kind=target.kind,
                scale=target.scale,
                feeds=target.feeds,
                differences=tuple(
                    self.meters[target.output, pair].result() for pair in _PAIRS
                ),
            )


def compile_parts(
    graph: QuantizedGraph, settings: VerifySettings, where: str
) -> tuple[list[Part], Kernels]:
    """Compile the file, and the copy that ends where integers end if there are float tails."""
    with tempfile.TemporaryDirectory(prefix="zsq-") as folder:
        model = loadable(graph.proto, Path(folder))
        optimized = Path(folder) / "optimized.onnx"
        runs = [
            ort.compile(
                model,
                mode,
                threads=settings.threads,
                optimized_path=optimized if mode == "optimized" else None,
                where=where,
            )
            for mode in _MODES
        ]
        kernels = read_kernels(graph, onnx.load(optimized, load_external_data=False))

    scales = {name: graph.output_scale(name) for name in graph.outputs}
    targets = [
        Target(
            output=name,
            name=name,
            scale=None if scale is None else float(scale),
            decides=name in graph.decisions,
        )
        for name, scale in scales.items()
    ]
    parts = [Part(runs, targets)]
    feeds = graph.last_integers()
    if feeds:
        cut, ends = cut_at(graph, tuple(feeds))
        with tempfile.TemporaryDirectory(prefix="zsq-") as folder:
            model = loadable(cut, Path(folder))
            runs = [
                ort.compile(model, m, threads=settings.threads, where=where) for m in _MODES
            ]
        parts.append(
            Part(
                runs,
                [
                    Target(
                        output=end.output,
                        name=end.tensor,
                        scale=end.scale,
                        feeds=tuple(feeds[end.integers]),
                        integers=end.integers,
                    )
                    for end in ends
                ],
            )
        )
    return parts, kernels
