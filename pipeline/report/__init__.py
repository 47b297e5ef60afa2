"""The report of a run: report.json for programs, report.html for people."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from graph_tools.errors import SettingsError
from pipeline.report.numbers import to_json_values
from pipeline.report.page import render_page

__all__ = ["write_report"]


def write_report(
    folder: Path, report: Mapping[str, Any], images: npt.NDArray[np.uint8]
) -> Path:
    """Write ``report.json`` and the self-contained ``report.html`` into ``folder``.

    Equal arguments give equal bytes. Each file is whole or absent.

    Args:
        folder: where to write; made if it is missing.
        report: model, settings, generation, quantization, proof and so on, in the order in
            which the JSON file is to have them; a part that did not run is None. Not-a-number
            is written as null, infinity as the string ``"inf"``.
        images: [n, height, width, 1 or 3] uint8 pictures of the images that calibrated the
            model, n may be 0; the page shows the first few.

    Returns:
        Path of ``report.html``.

    Raises:
        SettingsError: the folder cannot be written to.
        ValueError: images of another shape or dtype.
    """
    values = to_json_values(report)
    text = json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    page = render_page(values, images)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "report.json", text)
        return _write(folder / "report.html", page)
    except OSError as error:
        raise SettingsError(
            f"the report cannot be written: {error.strerror or error}",
            where=str(folder),
            hint="choose a folder that is writable and has space",
        ) from error


def _write(path: Path, text: str) -> Path:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        unfinished.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path
