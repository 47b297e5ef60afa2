"""Labels in YOLO's format: a text file a picture, ``class cx cy w h`` a line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np

from graph_tools.errors import DataError
from pipeline.evaluate.average_precision import Objects

__all__ = ["label_files", "read_labels"]

_BEYOND = 0.01  # by which rounded numbers may leave the picture
_HINT = "a line is: class cx cy w h, in shares of the picture's sides"


def label_files(names: Sequence[str], pictures: Sequence[str]) -> dict[str, str]:
    """Return the label file of each picture that has one.

    ``a/images/b/c.jpg`` has ``a/labels/b/c.txt``, or ``c.txt`` in its own folder.
    """
    known = {name for name in names if name.endswith(".txt")}
    found = {}
    for picture in pictures:
        path = PurePosixPath(picture).with_suffix(".txt")
        candidates = [path]
        folders = [i for i, part in enumerate(path.parts[:-1]) if part == "images"]
        if folders:
            parts = [*path.parts]
            parts[folders[-1]] = "labels"
            candidates.insert(0, PurePosixPath(*parts))
        for candidate in candidates:
            if str(candidate) in known:
                found[picture] = str(candidate)
                break
    return found


def read_labels(content: bytes, where: str) -> Objects:
    """Read a label file.

    Args:
        content: of the file; empty if the picture holds nothing.
        where: the file's name, for messages.

    Returns:
        Objects in shares of the picture's sides.

    Raises:
        DataError: not text, or a line that is not five numbers in range.
    """
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"is not text ({error})", where=where) from error
    rows = [
        _row(line.split(), f"{where}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    values = np.array([row[1] for row in rows], dtype=np.float64).reshape(-1, 4)
    center, half = values[:, :2], values[:, 2:] / 2
    return Objects(
        boxes=np.concatenate([center - half, center + half], axis=1),
        classes=np.array([row[0] for row in rows], dtype=np.int64),
    )


def _row(words: list[str], where: str) -> tuple[int, list[float]]:
    if len(words) != 5:
        raise DataError(f"has {len(words)} number(s), not 5", where=where, hint=_HINT)
    try:
        number, values = float(words[0]), [float(word) for word in words[1:]]
    except ValueError:
        raise DataError("holds something else than numbers", where=where, hint=_HINT) from None
    if not 0 <= number < 2**31 or number != math.floor(number):
        raise DataError(f"its class, {words[0]}, is not 0, 1, ...", where=where, hint=_HINT)
    if not all(-_BEYOND <= value <= 1 + _BEYOND for value in values):
        raise DataError("holds a number that is not in 0..1", where=where, hint=_HINT)
    return int(number), values
