"""A case is a number: which file is damaged, how, and what is done with it."""

from __future__ import annotations

import functools
import random
import sys
import tempfile
from pathlib import Path

import torch

from graph_tools.errors import ZsqError
from graph_tools.model import load
from pipeline.cli import main
from tests.fuzz.mutations import mutate
from tests.fuzz.samples import float_samples, quantized_samples
from tests.fuzz.worker import Outcome, run_command, run_limited

__all__ = ["COMMANDS", "GOOD", "case", "run_case", "warm_up"]

GOOD = ("done", "refused")
_FEW = ("--mean", "0.5", "--std", "0.5", "--method", "noise", "--num-images", "4")
COMMANDS: dict[str, tuple[str, ...]] = {
    "load": (),
    "inspect": ("inspect",),
    "quantize": ("quantize", *_FEW, "--verify-images", "4", "--interpreter-images", "2"),
    "verify": ("verify", "--max-images", "4", "--interpreter-images", "2"),
}
"""The arguments of ``zsq`` by command; ``load`` is the function behind all of them."""


@functools.cache
def _samples(quantized: bool) -> tuple[bytes, ...]:
    return tuple(quantized_samples() if quantized else float_samples())


def case(command: str, seed: int, number: int) -> bytes:
    """Return the content of a damaged file, always the same."""
    rng = random.Random(f"{seed}/{number}")
    return mutate(rng.choice(_samples(command == "verify")), rng)


@functools.cache
def warm_up() -> None:
    """Go the whole way once, so that what is imported on it is there in all forks.

    With one thread, for threads do not survive a fork.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path, output = f"{folder}/case.onnx", f"{folder}/q.onnx"
        Path(path).write_bytes(_samples(False)[0])
        for command, *rest in (
            ("inspect", path),
            ("quantize", path, "-o", output, *COMMANDS["quantize"][1:]),
            ("verify", output, *COMMANDS["verify"][1:]),
        ):
            code = main([command, *rest, "--threads", "1", "--quiet"])
            assert not code, command


def run_case(command: str, content: bytes) -> Outcome:
    """Give the content to a command of ``zsq``, with one thread."""
    warm_up()
    if command != "load":
        return run_command(content, (*COMMANDS[command], "--threads", "1"))
    return run_limited(_load, {"case.onnx": content})


def _load() -> int:
    try:
        load("case.onnx")
    except ZsqError as error:
        sys.stderr.write(f"zsq: {error}\n")
        return 2
    return 0
