"""The run as plain data: what goes into report.json and into the written file's metadata."""

from __future__ import annotations

import json
import math
import platform
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata as packages
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from graph_tools.batchnorm import find_affine_leftovers, find_batch_norms
from graph_tools.compare import TensorComparison, compare_tensors
from graph_tools.errors import ModelError, ZsqError
from graph_tools.model import Model
from graph_tools.qdq import dequantized_name
from graph_tools.reading import num_bytes, read_outline, read_proto
from graph_tools.restore import Restoration
from pipeline.cost import describe_cost
from pipeline.drop import Estimate, estimate_drop
from pipeline.evaluate.task import Measured
from pipeline.fidelity import Fidelity
from pipeline.generate import Generated, default_batch_size
from pipeline.images import ImageSet
from pipeline.preprocessing import Preprocessing
from pipeline.quantize import Quantization
from pipeline.quantize.ranking import Ranking
from pipeline.settings import GenerateSettings
from pipeline.tensor_rows import describe_tensors
from pipeline.verify.proof import Proof

if TYPE_CHECKING:
    from pipeline.run import QuantizeJob

__all__ = [
    "Record",
    "describe_generation",
    "describe_model",
    "describe_restoration",
    "flat_settings",
    "metadata",
    "recorded_preprocessing",
    "versions",
    "write_run_json",
]

_COMPARED_IMAGES = 64
_PACKAGES = ("onnx-zsq", "onnx", "onnxruntime", "torch", "numpy", "onnx-graphsurgeon")
_POOR_SQNR_DB = 10.0
_POOR_AGREEMENT = 0.8


def versions() -> dict[str, str]:
    """Versions of the packages that decide the result."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = packages.version(name)
        except packages.PackageNotFoundError:
            found[name] = "not installed"
    return found


def metadata(
    model: Model, job: QuantizeJob, preprocessing: Preprocessing, generated: Generated | None
) -> dict[str, str]:
    """``metadata_props`` of the written file: what made it, enough to make it again."""
    if generated is not None:
        source = f"{generated.images.count} generated ({generated.method})"
    else:
        source = str((job.data or job.images or Path()).name)
    free = {"zsq.weight_scale": "free"} if job.quantization.weight_scale == "free" else {}
    return {
        **free,
        "zsq.source_sha256": model.sha256,
        **({"zsq.target": job.target} if job.target != "onnxruntime" else {}),
        "zsq.images": source,
        "zsq.settings": json.dumps(flat_settings(job), sort_keys=True),
        "preprocessing": json.dumps(preprocessing.to_dict(), sort_keys=True),
        "zsq.versions": json.dumps(versions(), sort_keys=True),
    }


def recorded_preprocessing(path: Path) -> Preprocessing | None:
    """The normalization that `metadata` wrote into a quantized file; None without one."""
    try:
        properties = read_outline(path).metadata_props
    except ModelError:
        return None  # whoever runs the file says what is wrong with it
    return Preprocessing.from_metadata({entry.key: entry.value for entry in properties})


def flat_settings(job: QuantizeJob) -> dict[str, Any]:
    """All settings of a run by flag name, without paths."""
    inputs = asdict(job.input)
    inputs["input"] = [entry.rpartition("=")[0] for entry in job.input.input]
    quantization = asdict(job.quantization)
    for name in ("signedness", "weight_granularity", "bias_storage", "fused_sums"):
        if quantization[name] == "auto":  # as in files that were written before these existed
            del quantization[name]
    generation = asdict(job.generation)
    if generation["parallel_batches"] <= 1:  # likewise
        del generation["parallel_batches"]
    return {
        **quantization,
        **generation,
        **{name: value for name, value in inputs.items() if value},
    }


def describe_model(model: Model) -> dict[str, Any]:
    """The ``model`` part of the report, and the Mul+Add pairs left of BatchNormalization."""
    operators = Counter(node.op_type for node in model.proto.graph.node)
    sites = find_batch_norms(model)
    return {
        "path": str(model.source or ""),
        "sha256": model.sha256,
        "input": {
            "name": model.input.name,
            "shape": list(model.input.shape),
            "layout": model.input.layout,
            "batch": model.input.batch,
        },
        "outputs": list(model.outputs),
        "num_nodes": len(model.proto.graph.node),
        "num_batch_norms": len(sites),
        "batch_norms": [
            {"node": site.node, "tensor": site.tensor, "channels": site.channels}
            for site in sites
        ],
        "affine_leftovers": [asdict(pair) for pair in find_affine_leftovers(model)],
        "operators": dict(sorted(operators.items())),
        "notes": list(model.notes),
    }


def describe_generation(
    generated: Generated, settings: GenerateSettings, model: Model
) -> dict[str, Any]:
    """The ``generation`` part of the report."""
    size = model.input.height, model.input.width
    return {
        "method": generated.method,
        "num_images": generated.images.count,
        "iterations": len(generated.history),
        "batch_size": settings.batch_size or default_batch_size(*size, settings.device),
        "seconds": generated.seconds,
        "notes": list(generated.notes),
        "warnings": list(generated.warnings),
        "quality": asdict(generated.quality),
        "history": [asdict(record) for record in generated.history],
        "statistics": [asdict(match) for match in generated.statistics],
    }


def describe_restoration(restoration: Restoration, path: Path) -> dict[str, Any]:
    """The ``restoration`` part of the report: which statistics went to which node, and why."""
    return {
        "file": str(path),
        "restored": restoration.restored,
        "candidates": restoration.candidates,
        "difference": restoration.difference,
        "matches": [asdict(match) for match in restoration.matches],
    }


def write_run_json(path: Path, report: Mapping[str, Any]) -> None:
    """Settings, versions, seed and times of a run."""
    parts = ("tool", "settings", "preprocessing", "times", "versions")
    try:
        path.write_text(json.dumps({part: report[part] for part in parts}, indent=1) + "\n")
    except OSError as error:
        raise ZsqError(f"cannot write: {error.strerror}", where=str(path)) from error


@dataclass(frozen=True, kw_only=True)
class Record:
    """Everything a finished run knows.

    Attributes:
        model: as loaded; ``network`` as prepared, the float reference of the comparison.
        written: the quantized file.
        images: calibration images.
        restoration: how BatchNormalization came back; None without a side file.
        generated: None if the images were given.
        command: that gives this run again.
        ranking: what each tensor's rounding costs.
        fidelity: agreement of the two networks on images without labels.
    """

    job: QuantizeJob
    model: Model
    network: Model
    written: Path
    images: ImageSet
    preprocessing: Preprocessing
    generated: Generated | None
    quantization: Quantization
    proof: Proof
    accuracies: tuple[Measured, ...]
    command: str
    ranking: Ranking
    fidelity: tuple[Fidelity, ...]
    target_warnings: tuple[str, ...] = ()
    input_warnings: tuple[str, ...] = ()
    restoration: Restoration | None = None

    def to_dict(self, times: Mapping[str, float]) -> dict[str, Any]:
        """The report as plain data."""
        written, sha256 = read_proto(self.written)
        compared = self._compare(written)
        generation = None
        if self.generated is not None:
            generation = describe_generation(self.generated, self.job.generation, self.model)
        report: dict[str, Any] = {
            "tool": {
                "name": "onnx-zsq",
                "version": versions()["onnx-zsq"],
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
            },
            "model": describe_model(self.model),
            "command": self.command,
            "output": {"file": str(self.job.output), "sha256": sha256},
            "settings": flat_settings(self.job),
            "preprocessing": self.preprocessing.to_dict(),
            "restoration": None,
            "generation": generation,
            "quantization": self._quantization(compared, times.get("quantize", 0.0)),
            "cost": describe_cost(self.network, self.quantization.plan),
            "sensitivity": self.ranking.to_dict(),
            "fidelity": self._fidelity(),
            "proof": self.proof.to_dict(),
            "targets": None,
            "evaluation": [accuracy.to_dict() for accuracy in self.accuracies] or None,
            "times": dict(times),
            "versions": {**versions(), "python": platform.python_version()},
        }
        if self.restoration is not None and self.job.bn_from is not None:
            report["restoration"] = describe_restoration(self.restoration, self.job.bn_from)
        report["warnings"] = self._warnings(report)
        return report

    def _compare(self, written: onnx.ModelProto) -> dict[str, TensorComparison]:
        tensors = self.quantization.plan.tensors
        pairs = {name: dequantized_name(name, self.network.outputs) for name in tensors}
        pairs.update((name, name) for name in self.network.outputs)
        return compare_tensors(
            self.network.proto,
            written,
            pairs,
            self.images.batches(16, limit=_COMPARED_IMAGES),
            histograms=self.network.outputs,
        )

    def _quantization(
        self, compared: Mapping[str, TensorComparison], seconds: float
    ) -> dict[str, Any]:
        plan, mixed = self.quantization.plan, self.quantization.mixed
        operators = {n.name: n.op_type for n in self.network.proto.graph.node}
        return {
            "scheme": self.job.quantization.scheme,
            "weight_bits": self.job.quantization.weights if mixed is None else mixed.range,
            "activation_bits": self.job.quantization.activations,
            "seconds": seconds,
            "power_of_two": all(
                quantizer.power_of_two
                for quantizer in (
                    *plan.tensors.values(),
                    *(constant.quantizer for constant in plan.constants.values()),
                )
            ),
            "tensors": describe_tensors(self.quantization, self.network, compared),
            "float": [asdict(e) for e in (*plan.float_nodes, *plan.float_results)],
            "absorbed": [
                {"node": node, "op_type": operators[node], "into": tensor}
                for node, tensor in plan.absorbed.items()
            ],
            "outputs": [
                {
                    "name": name,
                    "sqnr_db": compared[name].sqnr_db,
                    "agreement": compared[name].agreement,
                    "same_top1": compared[name].same_top1,
                    "histogram": histogram.to_dict() if histogram is not None else None,
                }
                for name in self.network.outputs
                for histogram in [compared[name].histogram]
            ],
            "bytes": {
                "float": num_bytes(self.job.model),
                "quantized": num_bytes(self.written),
            },
            "mixed_precision": None if mixed is None else mixed.to_dict(),
            "notes": [*self.network.notes, *self.quantization.notes],
        }

    def _fidelity(self) -> dict[str, Any]:
        method = self.generated.method if self.generated is not None else None
        entry, output = self.network.input, self.network.proto.graph.output[0]
        shape = [dim.dim_value for dim in output.type.tensor_type.shape.dim][1:]
        estimate = estimate_drop(
            self.fidelity,
            matched=method not in (None, "noise", "prior"),
            classes=math.prod(shape) or None,
            size=max(entry.height, entry.width),
        )
        known = isinstance(estimate, Estimate)
        return {
            "measures": [fidelity.to_dict() for fidelity in self.fidelity],
            "estimate": estimate.to_dict() if isinstance(estimate, Estimate) else None,
            "why": None if known else estimate,
        }

    def _warnings(self, report: Mapping[str, Any]) -> list[str]:
        warnings = list(self.generated.warnings) if self.generated is not None else []
        warnings += self.input_warnings
        if self.preprocessing.source.startswith(("guessed", "assumed")):
            warnings.append(
                f"normalization was {self.preprocessing.source}; give --mean and --std if wrong"
            )
        for output in report["quantization"]["outputs"]:
            if output["agreement"] is not None and output["agreement"] < _POOR_AGREEMENT:
                warnings.append(
                    f"output {output['name']} agrees with the float network in only "
                    f"{100 * output['agreement']:.1f} %"
                )
            if output["sqnr_db"] is not None and output["sqnr_db"] < _POOR_SQNR_DB:
                warnings.append(
                    f"output {output['name']} has an SQNR of only {output['sqnr_db']:.1f} dB"
                )
        warnings += self.target_warnings
        if not self.proof.passed:
            warnings.append("the proof failed: see the proof section")
        return warnings
