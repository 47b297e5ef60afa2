from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for package in ("graph_tools", "pipeline")
    for path in sorted((ROOT / package).rglob("*.py"))
]
SURFACE = {  # what users import; a change here is a change of the public interface
    "graph_tools.batchnorm": {
        "AffineLeftover",
        "BatchNormSite",
        "expose_inputs",
        "find_affine_leftovers",
        "find_bare_convolutions",
        "find_batch_norms",
        "fold_batch_norms",
    },
    "graph_tools.model": {
        "ImageInput",
        "Layout",
        "Model",
        "initializers",
        "load",
        "replace_proto",
        "save",
    },
    "graph_tools.ort_graph": {"OrtGraph"},
    "graph_tools.prepare": {"prepare_for_quantization"},
    "graph_tools.qdq": {"dequantized_name", "write_qdq"},
    "graph_tools.quantizer": {
        "LIFT",
        "FloatNode",
        "Plan",
        "QuantizedConstant",
        "TensorQuantizer",
    },
    "graph_tools.restore": {"Match", "Restoration", "restore_batch_norms"},
    "graph_tools.side_file": {"NormStatistics", "SideFile", "read_side_file"},
    "graph_tools.torch_graph": {"Entry", "Hook", "OLDEST_OPSET", "Step", "TorchGraph"},
    "pipeline": {
        "CheckpointSettings",
        "DetectionSettings",
        "GenerateSettings",
        "InputSettings",
        "QuantizeJob",
        "QuantizeSettings",
        "Result",
        "SweepGrid",
        "VerifySettings",
        "ZsqError",
        "compare_files",
        "evaluate_files",
        "export_file",
        "generate_images",
        "load",
        "open_images",
        "quantize_file",
        "quantize_model",
        "sweep_file",
        "verify_model",
        "write_qdq",
    },
    "pipeline.environments": {
        "Environment",
        "environments_folder",
        "find_environment",
        "how_to_get",
        "install_environment",
        "missing_commands",
    },
    "pipeline.images": {"ImageSet", "ImageWriter", "open_images"},
    "pipeline.quantize": {"Quantization", "quantize"},
    "pipeline.verify": {"Proof", "Saturation", "TensorProof", "verify"},
    "pipeline.settings": {
        "CheckpointSettings",
        "DetectionSettings",
        "GenerateSettings",
        "InputSettings",
        "Method",
        "QuantizeSettings",
        "Rounding",
        "SweepGrid",
        "TargetSize",
        "VerifySettings",
    },
}


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("torch_ops")])
def test_every_public_name_exists(name):
    module = importlib.import_module(name)
    is_package = hasattr(module, "__path__")  # some only hold modules
    for public in getattr(module, "__all__", ()) if is_package else module.__all__:
        assert hasattr(module, public), public


@pytest.mark.parametrize("name", SURFACE)
def test_the_interface_is_what_users_know(name):
    assert set(importlib.import_module(name).__all__) == SURFACE[name]


def test_import_pipeline_is_fast():
    """Nothing heavy is imported before a name is used; every name is what its module has."""
    code = """
import sys, pipeline
assert sorted(dir(pipeline)) == dir(pipeline) and set(pipeline.__all__) <= set(dir(pipeline))
heavy = {"torch", "onnx", "onnxruntime", "numpy", "matplotlib", "tyro"} & set(sys.modules)
assert not heavy, heavy
import pipeline.generate, pipeline.quantize, pipeline.verify
assert all(callable(getattr(pipeline, name)) for name in pipeline.__all__)
assert pipeline.load is pipeline.api.load
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        importlib.import_module("pipeline").nothing  # noqa: B018
