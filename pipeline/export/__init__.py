"""Hand a quantized file on to a compiler that reads another dialect: one module a target."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graph_tools.errors import SettingsError, TargetError, ZsqError
from graph_tools.reading import read_proto
from pipeline.export.calibration import write_calibration
from pipeline.export.converter import convert
from pipeline.export.fake_quantized import FakeQuantized
from pipeline.export.qonnx import write_qonnx
from pipeline.images import ImageSet
from pipeline.target_profiles import TargetProfile

__all__ = ["EXPORTS", "Exported", "export"]

EXPORTS = ("calibration", "imx500", "qonnx")
"""Targets that need another file than the quantized one."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export left behind.

    Attributes:
        folder: where; ``files`` are names in it.
        lines: what there is to say, in words.
        facts: the same as plain data.
    """

    folder: Path
    files: tuple[str, ...]
    lines: tuple[str, ...]
    facts: dict[str, Any] = field(default_factory=dict)


def export(
    path: Path,
    profile: TargetProfile,
    output: Path,
    *,
    images: ImageSet | None = None,
    float_model: Path | None = None,
    timeout: float = 1800.0,
) -> Exported:
    """Write what a target reads, and run its converter where it is installed.

    Args:
        path: a file that ``zsq quantize`` wrote.
        profile: the target, one of `EXPORTS`.
        output: the folder to write; files of the same names there are replaced.
        images: for calibration: the images.
        float_model: for calibration: the network in float.
        timeout: seconds that a converter gets.

    Raises:
        SettingsError: the target reads the quantized file itself.
        TargetError: the target cannot take the file; nothing is written then.
    """
    if profile.name not in EXPORTS:
        raise SettingsError(
            f"target {profile.name} reads the quantized file itself",
            where="--target",
            hint=f"zsq quantize --target {profile.name} writes it; export is for "
            + ", ".join(EXPORTS),
        )
    proto, _ = read_proto(path)
    if not any(node.op_type == "QuantizeLinear" for node in proto.graph.node):
        raise TargetError(
            "is not quantized", where=str(path), hint="run `zsq quantize` on it first"
        )
    network = FakeQuantized(proto)
    with _folder(output) as work:
        if profile.name == "imx500":
            lines, facts = convert(network, profile, work, timeout=timeout)
        elif profile.name == "qonnx":
            lines, facts = write_qonnx(network, work)
        else:
            lines, facts = write_calibration(network, path, images, float_model, work)
        files = tuple(
            str(item.relative_to(work)) for item in sorted(work.rglob("*")) if item.is_file()
        )
    return Exported(folder=output, files=files, lines=tuple(lines), facts=facts)


@contextmanager
def _folder(output: Path) -> Iterator[Path]:
    """A hidden folder whose contents go to ``output`` if all goes well."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise _cannot_write(output, error) from error
    try:
        yield work
        output.mkdir(exist_ok=True)
        for item in sorted(work.iterdir()):
            there = output / item.name
            if there.is_dir():
                shutil.rmtree(there)
            item.replace(there)
    except OSError as error:
        raise _cannot_write(output, error) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _cannot_write(output: Path, error: OSError) -> ZsqError:
    return ZsqError(
        f"cannot write there: {error.strerror or error}",
        where=str(output),
        hint="choose another folder with -o",
    )
