"""onnxruntime, in this process, as an engine like the others."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

from graph_tools.errors import VerificationError
from graph_tools.quantized_graph import QuantizedGraph
from graph_tools.saving import loadable
from pipeline.verify.compilers import onnxruntime as ort
from pipeline.verify.compilers.engine import Ran, Refusal
from pipeline.verify.kernels import name_nodes, read_kernels

__all__ = ["OnnxruntimeEngine"]

_WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


@dataclass(frozen=True, kw_only=True)
class OnnxruntimeEngine:
    """One of the modes of `onnxruntime.compile`."""

    mode: ort.Mode
    threads: int = 0

    @property
    def name(self) -> str:
        """As in the table."""
        return f"onnxruntime {self.mode}"

    @property
    def version(self) -> str:
        """Of the installed package."""
        return ort.available()

    def run(self, proto: onnx.ModelProto, images: npt.NDArray[np.float32]) -> Ran:
        """Compile and run a model on [runs, batch, ...] images.

        Raises:
            Refusal: onnxruntime refuses the model or fails on a batch.
        """
        named = name_nodes(proto)
        compiled, runs, seconds = None, [], []
        try:
            with tempfile.TemporaryDirectory(prefix="zsq-") as folder:
                optimized = Path(folder) / "optimized.onnx"
                started = time.perf_counter()
                compiled = ort.compile(
                    loadable(named, Path(folder)),
                    self.mode,
                    threads=self.threads,
                    optimized_path=optimized,
                )
                compile_seconds = time.perf_counter() - started
                kernels = read_kernels(
                    QuantizedGraph(named), onnx.load(optimized, load_external_data=False)
                )
            for batch in images:
                started = time.perf_counter()
                values = ort.run(compiled, batch)
                seconds.append(time.perf_counter() - started)
                runs.append([values[name] for name in compiled.output_names])
        except VerificationError as error:
            raise Refusal(error.what, compiled=compiled is not None) from error
        weighted = [node for node in kernels.nodes if node.op_type in _WEIGHTED]
        integer = 0 if self.mode == "unoptimized" else sum(node.integer for node in weighted)
        return Ran(
            outputs=tuple(np.stack(values) for values in zip(*runs, strict=True)),
            integer_kernels=(integer, len(weighted)),
            compile_seconds=compile_seconds,
            run_seconds=tuple(seconds),
        )
