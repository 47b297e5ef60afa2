"""IREE: torch-mlir's ONNX importer, LLVM for this CPU, and its runtime."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import numpy as np

__all__ = ["compile", "integer_kernels", "run", "version"]


def version() -> str:
    """Return the compiler's version."""
    from importlib.metadata import version as installed

    return installed("iree-base-compiler")


def compile(model: str, folder: str) -> Any:
    """Import an ONNX file, compile it and load the result."""
    import iree.runtime as runtime

    imported, binary = os.path.join(folder, "model.mlir"), os.path.join(folder, "model.vmfb")
    _call("-m", "iree.compiler.tools.import_onnx", model, "-o", imported)
    phases = os.path.join(folder, "phases")
    script = "iree.compiler.tools.scripts.iree_compile.__main__"
    _call(
        "-c",
        f"import sys; from {script} import main; sys.exit(main(sys.argv[1:]))",
        imported,
        "--iree-hal-target-backends=llvm-cpu",
        "--iree-llvmcpu-target-cpu=host",
        "--iree-llvmcpu-stack-allocation-limit=1048576",
        f"--dump-compilation-phases-to={phases}",
        "-o",
        binary,
    )
    config = runtime.Config("local-sync")
    with open(binary, "rb") as file:
        module = runtime.VmModule.copy_buffer(config.vm_instance, file.read())
    context = runtime.SystemContext(vm_modules=[module], config=config)
    loaded = context.modules[module.name]
    name = next(n for n in module.function_names if not n.startswith("_") and "$" not in n)
    return loaded[name], phases


def run(compiled: Any, batch: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    """Run one batch; results are copied, since the device's buffers are used again."""
    values = compiled[0](batch)
    values = values if isinstance(values, (list, tuple)) else [values]
    return [np.array(value.to_host(), copy=True) for value in values]


def integer_kernels(compiled: Any) -> tuple[int, int] | None:
    """Count convolutions and products in linalg, by the type of what they read."""
    names = [n for n in os.listdir(compiled[1]) if re.search(r"\.\d*\.?input\.mlir$", n)]
    if not names:
        return None
    with open(os.path.join(compiled[1], names[0])) as file:
        text = file.read()
    found = re.findall(
        r"linalg\.(?:conv|depthwise_conv|matmul|batch_matmul|quantized)[\w.]*\b[^\n]*?ins\(([^)]*)\)",
        text,
    )
    return sum("i8>" in operands for operands in found), len(found)


def _call(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-I", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
        raise RuntimeError((lines or [f"exit code {done.returncode}"])[0])
