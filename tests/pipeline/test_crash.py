"""A command whose process dies still ends with one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

ROOT = Path(__file__).resolve().parents[2]


def start(body: str) -> subprocess.Popen[str]:
    """Run ``command``, whose statements are given, guarded; a crash prints its signal."""
    lines = body.replace("\n", "\n    ")
    code = (
        "import atexit, os, signal, sys, time\n"
        "from pipeline.crash import run_guarded\n"
        f"def command():\n    {lines}\n"
        "def crashed(name):\n    print('crashed:', name)\n    return 3\n"
        "sys.exit(run_guarded(command, crashed))\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=-1, text=True)


def run(body: str) -> tuple[int, str]:
    with start(body) as process:
        out, _ = process.communicate(timeout=300)
    return process.returncode, out


@pytest.mark.parametrize("code", [0, 1, 2, 130])
def test_exit_codes_are_those_of_the_command(code: int) -> None:
    body = f"atexit.register(print, 'end')\nprint('ran')\nreturn {code}"
    assert run(body) == (code, "ran\nend\n")


def test_exit_code_below_a_process_that_ignores_its_children() -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        process = start("print('ran')\nreturn 5")
    finally:
        signal.signal(signal.SIGCHLD, before)
    with process:
        out, _ = process.communicate(timeout=300)
    assert (process.returncode, out) == (5, "ran\n")


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGFPE", "SIGKILL", "SIGILL"])
def test_crashes_are_said(name: str) -> None:
    body = f"signal.signal(signal.{name}, 0) if '{name}' != 'SIGKILL' else 0\n"
    assert run(f"{body}os.kill(os.getpid(), signal.{name})") == (3, f"crashed: {name}\n")


def test_ends_that_were_asked_for_are_no_crash() -> None:
    assert run("os.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(60)") == (-signal.SIGTERM, "")


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_reach_the_command(sent: int) -> None:
    body = (
        f"signal.signal({int(sent)}, lambda *_: sys.exit(7))\n"
        "print('ready', flush=True)\ntime.sleep(300)"
    )
    with start(body) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(sent)
        assert process.wait(timeout=300) == 7


def test_the_command_ends_with_its_parent() -> None:
    with start("print(os.getpid(), flush=True)\ntime.sleep(300)") as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        process.kill()
    for _ in range(3000):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{child}/stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the child is still running")
