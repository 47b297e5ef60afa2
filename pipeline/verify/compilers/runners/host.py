"""Runs one compiler for one request: ``python -I host.py SCRIPT FOLDER``.

FOLDER/request.json: ``model`` (an .onnx file), ``images`` (an .npy file, [runs, batch, ...]
float32). It writes FOLDER/result.json: ``version``, ``stage`` (import, compile, run or done),
``error`` (one line, "" if there was none), ``outputs`` (files of [runs, ...] arrays, in order),
``integer_kernels`` ([integer, all] weighted operators, or null), ``compile_seconds`` and
``run_seconds`` (a run each). The file is written anew at every stage, so that a crash leaves the
stage that it happened in.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from typing import Any

import numpy as np

__all__ = ["main"]


def main(script: str, folder: str) -> None:
    """Serve the request in ``folder``."""
    result: dict[str, Any] = {
        "version": "",
        "stage": "import",
        "error": "",
        "outputs": [],
        "integer_kernels": None,
        "compile_seconds": None,
        "run_seconds": [],
    }

    def reach(stage: str) -> None:
        result["stage"] = stage
        temporary = os.path.join(folder, "result.tmp")
        with open(temporary, "w") as file:
            json.dump(result, file)
        os.replace(temporary, os.path.join(folder, "result.json"))

    reach("import")
    try:
        with open(os.path.join(folder, "request.json")) as file:
            request = json.load(file)
        images = np.load(request["images"])
        runner = _load(script)
        result["version"] = runner.version()
        reach("compile")
        started = time.perf_counter()
        compiled = runner.compile(request["model"], folder)
        result["compile_seconds"] = time.perf_counter() - started
        reach("run")
        runs = []
        for batch in images:
            started = time.perf_counter()
            runs.append([np.array(value, copy=True) for value in runner.run(compiled, batch)])
            result["run_seconds"].append(time.perf_counter() - started)
        for index, values in enumerate(zip(*runs)):  # noqa: B905 (Python 3.9)
            path = os.path.join(folder, f"output{index}.npy")
            np.save(path, np.stack(values), allow_pickle=False)
            result["outputs"].append(path)
        try:
            kernels = runner.integer_kernels(compiled)
            result["integer_kernels"] = None if kernels is None else list(kernels)
        except Exception:  # what cannot be found out is unknown
            result["integer_kernels"] = None
    except BaseException as error:  # compilers raise what they like, SystemExit too
        result["error"] = _one_line(error)
        reach(result["stage"])
        return
    reach("done")


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if any(line.startswith("Traceback") for line in lines):
        lines = lines[-1:]  # what was wrapped
    text = " ".join(" ".join([f"{type(error).__name__}:", *lines]).split())
    return text if len(text) <= 300 else text[:297] + "..."


def _load(script: str) -> Any:
    """Load a script under a name that hides no package: openvino.py is not ``openvino``."""
    spec = importlib.util.spec_from_file_location("zsq_runner", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
