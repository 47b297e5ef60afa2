"""The words of ``zsq quantize`` that give a run: what a report tells its reader to type."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from pipeline.settings import VerifySettings

if TYPE_CHECKING:
    from pipeline.run import QuantizeJob

__all__ = ["command_of"]

_REPEATED = ("bits", "input")  # one flag an entry


def command_of(job: QuantizeJob) -> str:
    """Return the command that does ``job``, quoted for a POSIX shell.

    Defaults are left out, and so is how the run may be interrupted.
    """
    words = ["zsq", "quantize", str(job.model), "-o", str(job.output)]
    for flag, path in (
        ("--images", job.images),
        ("--data", job.data),
        ("--bn-from", job.bn_from),
        ("--evaluate", job.evaluate_data),
    ):
        words += [flag, str(path)] if path is not None else []
    if job.task != "auto":
        words += ["--task", job.task]
    if job.target != "onnxruntime":
        words += ["--target", job.target]
    for settings in (job.quantization, job.generation, job.input, job.detection):
        words += _flags(settings)
    verification, usual = job.verification, VerifySettings()
    if verification.max_images != usual.max_images:
        words += ["--verify-images", str(verification.max_images)]
    if verification.interpreter_images is not None:
        words += ["--interpreter-images", str(verification.interpreter_images)]
    if job.held_out:
        words += ["--held-out", str(job.held_out)]
    if job.threads:
        words += ["--threads", str(job.threads)]
    return shlex.join(words)


def _flags(settings: Any) -> Iterator[str]:
    """Yield the flags of what is not as by default."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        if value == field.default:
            continue
        flag = "--" + field.name.replace("_", "-")
        if isinstance(value, bool):
            yield flag if value else "--no-" + flag.removeprefix("--")
        elif field.name in _REPEATED:
            for entry in value:
                yield from (flag, str(entry))
        elif str(value).startswith("-"):
            yield f"{flag}={value}"
        elif isinstance(value, tuple):
            yield from (flag, *map(str, value))
        else:
            yield from (flag, str(value))
