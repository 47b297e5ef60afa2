"""Apache TVM: the Relax ONNX frontend, LLVM for this CPU, and the virtual machine."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

__all__ = ["compile", "integer_kernels", "run", "version"]


def version() -> str:
    """Return TVM's version."""
    import tvm

    return str(tvm.__version__)


def compile(model: str, folder: str) -> Any:
    """Compile an ONNX file."""
    import onnx
    import tvm
    from tvm import relax
    from tvm.relax.frontend.onnx import from_onnx

    module = from_onnx(onnx.load(model))
    module = relax.transform.DecomposeOpsForInference()(module)
    text = module.script()
    machine = relax.VirtualMachine(tvm.compile(module, target="llvm"), tvm.cpu())
    return machine, text


def run(compiled: Any, batch: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    """Run one batch."""
    import tvm

    values = compiled[0]["main"](tvm.runtime.tensor(batch))
    many = not hasattr(values, "numpy")
    return [np.array(value.numpy()) for value in (values if many else [values])]


def integer_kernels(compiled: Any) -> tuple[int, int]:
    """Count convolutions and products in the Relax program, by the type of their result."""
    found = re.findall(r'"(\w+)"\) = R\.(?:nn\.conv\w*|matmul)\(', compiled[1])
    return sum(kind.startswith("int") for kind in found), len(found)
