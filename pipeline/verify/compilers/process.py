"""Run a model in a compiler's own environment: a process a request, which talks by files."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from graph_tools.opset import opset_version
from graph_tools.saving import save
from pipeline.verify.compilers.engine import Ran, Refusal

__all__ = ["RUNNERS", "ProcessEngine"]

RUNNERS = Path(__file__).parent / "runners"
"""Where the scripts are; one is named like its target."""

_STAGES = {"import": "starting", "compile": "compiling", "run": "running"}


@dataclass(frozen=True, kw_only=True)
class ProcessEngine:
    """A compiler behind a script of `runners`.

    Attributes:
        name: the target's.
        version: as installed.
        python: interpreter of its environment.
        script: what `runners/host.py` loads.
        timeout: seconds for one request.
        threads: for the compiled model; 0 lets the compiler choose.
        opset: newest that it reads; 0: any.
    """

    name: str
    version: str
    python: Path
    script: Path
    timeout: float
    threads: int = 0
    opset: int = 0

    def run(self, proto: onnx.ModelProto, images: npt.NDArray[np.float32]) -> Ran:
        """Compile and run a model.

        Args:
            proto: one input, of a static shape.
            images: [runs, batch, ...]

        Raises:
            Refusal: it does not compile, run or answer, or takes too long.
        """
        with tempfile.TemporaryDirectory(prefix="zsq-") as name:
            folder = Path(name)
            save(_relabelled(proto, self.opset), folder / "model.onnx")
            np.save(folder / "images.npy", images)
            request = {
                "model": str(folder / "model.onnx"),
                "images": str(folder / "images.npy"),
            }
            (folder / "request.json").write_text(json.dumps(request))
            try:
                ended = self._serve(folder)
            except OSError as error:
                said = f"cannot be started: {error.strerror or error}"
                raise Refusal(said, compiled=False) from error
            result = _read(folder / "result.json")
            stage = str(result.get("stage", "import"))
            compiled = stage in ("run", "done")
            if ended is not None:
                raise Refusal(f"{ended} while {_STAGES.get(stage, stage)}", compiled=compiled)
            if result.get("error"):
                raise Refusal(str(result["error"]), compiled=compiled)
            return _answer(result, len(images), len(proto.graph.output))

    def _serve(self, folder: Path) -> str | None:
        """Run the process; say how it ended unless it ended well."""
        environment = dict(os.environ)
        if self.threads:
            for variable in ("OMP_NUM_THREADS", "TVM_NUM_THREADS"):
                environment[variable] = str(self.threads)
        command = [str(self.python), "-I", str(RUNNERS / "host.py"), str(self.script)]
        with (folder / "log.txt").open("w") as log:
            process = subprocess.Popen(
                [*command, str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=environment,
                start_new_session=True,  # so that its own children end with it
            )
            try:
                code = process.wait(self.timeout)
            except subprocess.TimeoutExpired:
                return f"took longer than {self.timeout:g} s"
            finally:
                if process.poll() is None:
                    _kill(process)
        if code < 0:
            with contextlib.suppress(ValueError):
                return f"was killed by {signal.Signals(-code).name}"
        return _last_words(folder / "log.txt", code) if code else None


def _relabelled(proto: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """Say an older opset, if all operators are in it with the attributes they have."""
    version = opset_version(proto)
    if not opset or version <= opset:
        return proto
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    del copy.opset_import[:]
    copy.opset_import.append(onnx.helper.make_opsetid("", opset))
    try:
        onnx.checker.check_model(copy)
    except (onnx.checker.ValidationError, ValueError) as error:
        said = f"reads opset {opset}, this is {version}: {str(error).splitlines()[0]}"
        raise Refusal(said[:300], compiled=False) from error
    return copy


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()


def _last_words(log: Path, code: int) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    said = next((line for line in reversed(lines) if line), "")
    return f"ended with code {code}{': ' if said else ''}{said[:200]}"


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _answer(result: dict[str, Any], runs: int, outputs: int) -> Ran:
    try:
        values = tuple(np.load(path, allow_pickle=False) for path in result["outputs"])
        kernels = result["integer_kernels"]
        ran = Ran(
            outputs=values,
            integer_kernels=None if kernels is None else (int(kernels[0]), int(kernels[1])),
            compile_seconds=float(result["compile_seconds"]),
            run_seconds=tuple(float(seconds) for seconds in result["run_seconds"]),
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError, EOFError) as error:
        raise Refusal("its answer cannot be read", compiled=False) from error
    if len(values) != outputs or any(len(value) != runs for value in values):
        raise Refusal(f"gave {len(values)} outputs in place of {outputs}", compiled=True)
    return ran
