"""Run Sony's converter on the dialect that `pipeline.export.imx500` writes.

What the converter refuses is cut off, with all behind it, and it is run again: it names each node
that the chip does not take.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import onnx

from graph_tools.errors import TargetError
from graph_tools.opset import to_older_opset
from pipeline.environments import find_environment, how_to_get, missing_commands
from pipeline.export.cut import Cut, cut_before
from pipeline.export.fake_quantized import FakeQuantized
from pipeline.export.imx500 import to_imx500
from pipeline.target_profiles import Rules, TargetProfile

__all__ = ["convert", "memory_of", "refused_nodes"]

_MODEL = "model.onnx"
_ROUNDS = 8  # of cutting what was refused
_NAMED = 8  # nodes that a line names
_SUMS = ("Add", "Sub", "Sum")
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_REPORTED = (
    "Memory Usage",
    "Total Memory Available On Chip",
    "Memory Utilization",
    "Model Memory Physical Size",
    "Runtime Memory Physical Size",
)
_UNSUPPORTED = re.compile(r"unsupported ops: (.+?)(?: \[|$)", re.MULTILINE)
_REFUSED = re.compile(r"^Node \[[^\]]*\] op: \S+, id: (.+), errors:", re.MULTILINE)


def convert(
    network: FakeQuantized, profile: TargetProfile, folder: Path, *, timeout: float = 1800.0
) -> tuple[list[str], dict[str, Any]]:
    """Write ``model.onnx`` and, where the converter is installed, ``packerOut.zip``.

    Args:
        network: the quantized file.
        profile: of the chip.
        folder: an empty folder.
        timeout: seconds that the converter gets for one run.

    Returns:
        What there is to say in words, and as plain data.

    Raises:
        TargetError: the chip takes nothing of the network, or the converter failed, as it does
            where a convolution is not rounded before a sum.
    """
    _require_rounded(network)
    environment = find_environment(profile)
    lacking = missing_commands(profile.install) if profile.install is not None else ()
    refused: list[str] = []
    rules = profile.rules or Rules()
    runs = environment is not None and not lacking
    operators = () if runs else rules.operators
    for _ in range(_ROUNDS):
        cut = cut_before(network, operators=operators, refused=refused)
        _write(network, rules, cut, folder / _MODEL)
        if environment is None or lacking:
            lines = [*_describe(cut), "not converted: " + how_to_get(profile)]
            return lines, {"converted": False, "cut": [node.name for node in cut.nodes]}
        known = {node.name: node.op_type for node in network.operators}
        program = environment.folder / "bin" / "imxconv-pt"
        found = _run(program, folder, timeout)
        if found is None:
            break
        fresh = [
            name
            for name, op_type in known.items()
            if {name, op_type} & set(found) and name not in refused
        ]
        if not fresh:
            raise TargetError(
                f"the converter refuses nodes that cannot be cut off: {', '.join(found[:3])}",
                where=profile.name,
                hint="run imxconv-pt on a model.onnx without converter to see why",
            )
        refused += fresh
    else:
        raise TargetError(
            "the converter refuses every part of the network", where=profile.name
        )
    memory = memory_of(next(folder.glob("*MemoryReport.json")))
    size = (folder / "packerOut.zip").stat().st_size
    lines = [
        *_describe(cut),
        f"imx500-converter {environment.version}: packerOut.zip, {size:,} bytes",
        "memory: {Memory Usage} of {Total Memory Available On Chip} "
        "({Memory Utilization}); model {Model Memory Physical Size}, "
        "run time {Runtime Memory Physical Size}".format(**memory),
    ]
    if not memory.get("Fit In Chip", True):
        lines.append("it does not fit into the chip")
    return lines, {
        "converted": True,
        "cut": [node.name for node in cut.nodes],
        "version": environment.version,
        "memory": memory,
    }


def _require_rounded(network: FakeQuantized) -> None:
    """The converter takes no sum of what is not rounded: it says "not quantized" in its log."""
    graph = network.graph
    for node in network.operators:
        for name in node.input if node.op_type in _SUMS else ():
            maker = graph.producers.get(name)
            while maker is not None and maker.op_type in ("Relu", "Clip"):
                maker = graph.producers.get(maker.input[0])
            if maker is not None and maker.op_type in _WEIGHTED:
                raise TargetError(
                    f"reads {maker.op_type} {maker.name} unrounded, which the converter refuses",
                    where=f"{node.op_type} {node.name}",
                    hint="quantize with --target imx500: files of --target openvino "
                    "(--fused-sums yes) leave that rounding out",
                )


def _write(network: FakeQuantized, rules: Rules, cut: Cut, path: Path) -> None:
    proto = to_imx500(network, cut.ends)
    if rules.opset:
        proto = to_older_opset(proto, rules.opset, where="target imx500")
    onnx.save(proto, path)


def _describe(cut: Cut) -> list[str]:
    if not cut.nodes:
        return [f"{_MODEL}: the whole network, in the converter's dialect"]
    names = [f"{node.op_type} {node.name}" for node in cut.nodes[:_NAMED]]
    more = f" and {len(cut.nodes) - _NAMED} more" if len(cut.nodes) > _NAMED else ""
    return [
        f"{_MODEL}: the network up to {', '.join(cut.ends)}, in the converter's dialect",
        f"cut off, because the chip does not take them or what they read: "
        f"{', '.join(names)}{more}",
    ]


def _run(program: Path, folder: Path, timeout: float) -> list[str] | None:
    """Run the converter; None when it is done, else the nodes that it refuses."""
    folder = folder.resolve()
    work = folder / "converter"
    command = [str(program), "-i", str(folder / _MODEL), "-o", str(work), "--overwrite-output"]
    log = folder / "converter.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=folder,
            start_new_session=True,  # it starts others, which must end with it
            env={**os.environ, "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"},
        )
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise TargetError(
                f"the converter was not done after {timeout:.0f} s",
                where="imx500",
                hint="give it more with --timeout",
            ) from error
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    text = log.read_text(errors="replace")
    if not (work / "packerOut.zip").is_file():
        if refused := refused_nodes(text):
            return refused
        errors = [line for line in text.splitlines() if "ERROR" in line]
        raise TargetError(
            f"the converter failed: {' '.join(errors[-1:])[:400] or text[-300:]}",
            where="imx500",
        )
    for item in work.iterdir():
        if item.is_file():
            item.replace(folder / item.name)
    for item in sorted(work.rglob("*"), reverse=True):
        item.rmdir() if item.is_dir() else item.unlink()
    work.rmdir()
    return None


def refused_nodes(log: str) -> list[str]:
    """Names of the nodes, and types of the operators, that the converter's log refuses."""
    found = _REFUSED.findall(log)
    for line in _UNSUPPORTED.findall(log):
        found += re.findall(r"\w+", line)
    return found


def memory_of(path: Path) -> dict[str, Any]:
    """Read the converter's memory report.

    Raises:
        TargetError: it is not what this version of the converter writes.
    """
    try:
        found = json.loads(path.read_text())["Memory Report"]
        if missing := [key for key in _REPORTED if key not in found]:
            raise KeyError(missing[0])
        return dict(found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TargetError(f"no memory report: {error}", where=str(path.name)) from error
