"""Run one case in a process of its own, under limits of memory and time."""

from __future__ import annotations

import functools
import os
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline import cli, fidelity

__all__ = ["Outcome", "run_command", "run_limited"]

MEMORY = 6 * 2**30
"""Bytes of addresses that a case may take beyond what the process has."""

SECONDS = 60
"""Of the processor that a case gets; five times that by the clock."""

_DONE, _REFUSED, _FAILED_PROOF = 0, 2, 1
_SHOWN = 20_000


@dataclass(frozen=True)
class Outcome:
    """How a case ended.

    Attributes:
        kind: done; refused, in one line; foreign: an exception that is not ours, or an error of
            several lines; died: by a signal; slow.
        text: the line, or the end of the traceback.
        seconds: of the processor.
        megabytes: the most memory that the process held.
    """

    kind: Literal["done", "refused", "foreign", "died", "slow"]
    text: str
    seconds: float = 0.0
    megabytes: int = 0


def run_command(content: bytes, arguments: Sequence[str]) -> Outcome:
    """Run ``zsq`` on a file ``case.onnx`` of some content, in an empty folder."""

    line = (*arguments[:1], "case.onnx", *arguments[1:], "--debug")
    parsed = _parsed(line)  # takes longer than most cases

    def command() -> int:
        cli._parse = lambda arguments: parsed
        fidelity.default_num_images = lambda height, width: 4  # 256 take longer than the rest
        return cli.main(line)

    return run_limited(command, {"case.onnx": content})


_parsed = functools.cache(cli._parse)


def run_limited(
    command: Callable[[], int],
    files: dict[str, bytes],
    *,
    memory: int = MEMORY,
    seconds: int = SECONDS,
) -> Outcome:
    """Run a command in a forked process.

    Args:
        command: returns an exit code as ``zsq`` does; what it writes to stderr is read.
        files: by name, in the folder that it runs in.
        memory: see `MEMORY`.
        seconds: see `SECONDS`.
    """
    folder = Path(tempfile.mkdtemp(prefix="zsq-fuzz-"))
    try:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        ready, told = os.pipe()
        process = os.fork()
        if not process:
            _child(command, folder, told, memory, seconds)
        os.close(told)
        timely = bool(select.select([ready], [], [], 5 * seconds)[0])
        if not timely:
            os.kill(process, signal.SIGKILL)
        os.close(ready)
        _, status, usage = os.wait4(process, 0)
        text = (folder / "stderr").read_text(errors="replace")[-_SHOWN:]
        return _outcome(
            os.waitstatus_to_exitcode(status),
            text,
            usage.ru_utime + usage.ru_stime,
            usage.ru_maxrss // 1024,
            timely,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _child(
    command: Callable[[], int], folder: Path, told: int, memory: int, seconds: int
) -> None:
    """Never returns: the pipe ``told`` closes when the process ends."""
    code = 3
    try:
        os.chdir(folder)
        for stream, name in ((1, "stdout"), (2, "stderr")):
            file = os.open(name, os.O_CREAT | os.O_WRONLY, 0o600)
            os.dup2(file, stream)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # not those of pytest
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        code = command()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        os.write(2, traceback.format_exc().encode(errors="replace"))
    finally:
        os._exit(code)


def _outcome(code: int, text: str, seconds: float, megabytes: int, timely: bool) -> Outcome:
    if not timely or code == -signal.SIGXCPU:
        return Outcome("slow", text[-300:], seconds, megabytes)
    if code < 0:
        name = signal.Signals(-code).name
        return Outcome("died", f"{name} {text[-300:]}", seconds, megabytes)
    lines = [line for line in text.splitlines() if line.startswith("zsq: ")]
    if code in (_DONE, _FAILED_PROOF):
        return Outcome("done", "", seconds, megabytes)
    if (
        code == _REFUSED
        and lines
        and len(lines[-1]) < 1000
        and text.endswith(f"{lines[-1]}\n")
    ):
        return Outcome("refused", lines[-1], seconds, megabytes)
    return Outcome("foreign", _last_frames(text), seconds, megabytes)


def _last_frames(text: str) -> str:
    """The exception and the last places in our own code that it came through."""
    places = re.findall(
        r'File "[^"]*/((?:graph_tools|pipeline)/[^"]*)", line (\d+), in (\S+)', text
    )
    tail = " < ".join(f"{path}:{line} {name}" for path, line, name in places[:-4:-1])
    last = [line for line in text.splitlines() if line.strip()][-1:]
    return f"{tail} | {''.join(last)[:300]}"
