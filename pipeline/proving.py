"""Prove a written file: onnxruntime, other compilers, and what converters make of it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from graph_tools.errors import ZsqError
from graph_tools.quantized_checks import check_quantized
from pipeline.environments import find_environment, how_to_get, missing_commands
from pipeline.evaluate.sessions import open_session
from pipeline.export import export
from pipeline.images import ImageSet, ImageWriter, open_images
from pipeline.settings import VerifySettings
from pipeline.target_profiles import TargetProfile
from pipeline.verify import verify
from pipeline.verify.agreement import compare_targets
from pipeline.verify.engines import parse_targets
from pipeline.verify.opening import read_file
from pipeline.verify.proof import Proof
from pipeline.verify.rows import Agreement, TargetRow

__all__ = ["convert_row", "verify_file"]

OnProgress = Callable[[str, int, int, Mapping[str, float]], None]


def verify_file(
    path: Path,
    images: Path | None,
    settings: VerifySettings,
    *,
    targets: str = "",
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> tuple[Proof, Agreement | None]:
    """Prove a quantized file, and compare it on other targets.

    Args:
        path: the file.
        images: images to run; by default those beside the file, else Gaussian noise.
        settings: how many images, threads, seconds for each compiler.
        targets: ``all`` or names with commas between them; "" for none.
        seed: of the noise.
        on_progress: called as (stage, done, total, terms).

    Returns:
        The proof, and what was found on the targets if there are any.

    Raises:
        ZsqError: the file, the images or a target cannot be used.
    """
    progress = on_progress or (lambda stage, done, total, terms: None)
    if targets:
        parse_targets(targets)  # a wrong name is said before anything runs
    proto = read_file(path)
    check_quantized(proto, where=str(path))
    with _images_for(path, images, settings.max_images, seed) as chosen:
        proof = verify(
            path,
            chosen,
            settings,
            proto=proto,
            on_step=lambda done, total, terms: progress("verify", done, total, terms),
        )
        if not targets:
            return proof, None
        return proof, compare_targets(
            path,
            chosen,
            settings,
            targets,
            proto=proto,
            convert=lambda profile: convert_row(path, profile, settings.timeout),
            on_step=lambda done, total, terms: progress("targets", done, total, terms),
        )


def convert_row(path: Path, profile: TargetProfile, timeout: float) -> TargetRow:
    """Have a target's converter compile a file; what it makes is thrown away.

    Args:
        path: the file.
        profile: of a target that `pipeline.export` converts for.
        timeout: seconds that the converter gets.
    """
    environment = find_environment(profile)
    lacking = missing_commands(profile.install) if profile.install is not None else ()
    if environment is None or lacking:
        said = f"not installed: {how_to_get(profile)}"
        return TargetRow(target=profile.name, skipped=said)
    row: dict[str, Any] = {
        "target": profile.name,
        "version": environment.version,
        "packed": "",
    }
    with tempfile.TemporaryDirectory(prefix="zsq-") as folder:
        try:
            made = export(path, profile, Path(folder) / "out", timeout=timeout)
        except ZsqError as error:
            where = f"{error.where}: " if error.where and error.where != profile.name else ""
            hint = f" ({error.hint})" if error.hint else ""
            return TargetRow(**row, refused=f"{where}{error.what}{hint}")
    memory = made.facts["memory"]
    words = ["{Memory Usage} of {Total Memory Available On Chip}".format(**memory)]
    if not memory.get("Fit In Chip", True):
        words.append("does not fit into the chip")
    if cut := made.facts["cut"]:
        words.append(f"{len(cut)} nodes cut off, from {cut[0]} on")
    return TargetRow(**row | {"packed": ", ".join(words)}, compiled=True)


@contextmanager
def _images_for(path: Path, images: Path | None, count: int, seed: int) -> Iterator[ImageSet]:
    """The images given, those beside the file, or noise."""
    shape = open_session(path).input.shape
    beside = path.with_suffix("") / "images.npz"
    with tempfile.TemporaryDirectory() as folder:
        if images is None and not beside.is_file():
            noise = Path(folder) / "noise.npz"
            generator = np.random.default_rng(seed)
            with ImageWriter(noise, count=count, shape=shape) as writer:
                for _ in range(count):
                    writer.append(generator.standard_normal((1, *shape), dtype=np.float32))
            yield open_images(noise, shape=shape)
        else:
            yield open_images(images or beside, shape=shape)
