"""Annotations in COCO's format: one JSON file with images, annotations and categories."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from graph_tools.errors import DataError
from pipeline.evaluate.average_precision import Objects

__all__ = ["CocoPicture", "read_coco"]


@dataclass(frozen=True, kw_only=True, eq=False)
class CocoPicture:
    """A picture as the annotations have it.

    Args:
        file_name: as given, maybe without its folder.
        size: width and height in pixels, None if not given.
        objects: in pixels.
    """

    file_name: str
    size: tuple[int, int] | None
    objects: Objects


def read_coco(content: bytes, where: str) -> tuple[tuple[CocoPicture, ...], tuple[str, ...]]:
    """Read a file of instances.

    Args:
        content: of the file.
        where: its name, for messages.

    Returns:
        The pictures in the order of the file, and the names of the classes 0, 1, ..., which are
        the categories in the order of their identifiers.

    Raises:
        DataError: not JSON, or something in it is missing or wrong.
    """
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"is not JSON ({error})", where=where) from error
    if not isinstance(data, dict):
        raise DataError("is not an object with images and annotations", where=where)
    categories = sorted(
        (_integer(entry, "id", place), str(entry.get("name", "")))
        for entry, place in _entries(data, "categories", where)
    )
    classes = {identifier: number for number, (identifier, _) in enumerate(categories)}
    if len(classes) < len(categories):
        raise DataError("has two categories of the same id", where=where)
    images: dict[int, tuple[str, tuple[int, int] | None]] = {}
    for entry, place in _entries(data, "images", where):
        identifier = _integer(entry, "id", place)
        if identifier in images:
            raise DataError(f"image {identifier} is there twice", where=place)
        name = entry.get("file_name")
        if not isinstance(name, str) or not name:
            raise DataError("has no file_name", where=place)
        size = None
        if "width" in entry and "height" in entry:
            size = _integer(entry, "width", place), _integer(entry, "height", place)
        images[identifier] = name, size
    if not images or not classes:
        raise DataError("holds no images or no categories", where=where)
    rows: dict[int, list[tuple[int, list[float], float, bool]]] = {i: [] for i in images}
    for entry, place in _entries(data, "annotations", where):
        image, category = (_integer(entry, key, place) for key in ("image_id", "category_id"))
        if image not in images or category not in classes:
            raise DataError(f"is for image {image}, category {category}: unknown", where=place)
        rows[image].append((classes[category], *_box(entry, place)))
    pictures = tuple(
        CocoPicture(file_name=name, size=size, objects=_objects(rows[identifier]))
        for identifier, (name, size) in images.items()
    )
    return pictures, tuple(name for _, name in categories)


def _entries(
    data: dict[str, Any], key: str, where: str
) -> Iterator[tuple[dict[str, Any], str]]:
    entries = data.get(key)
    if not isinstance(entries, list):
        raise DataError(f"has no list {key!r}", where=where)
    for number, entry in enumerate(entries):
        place = f"{where}, {key}[{number}]"
        if not isinstance(entry, dict):
            raise DataError("is not an object", where=place)
        yield entry, place


def _integer(entry: dict[str, Any], key: str, where: str) -> int:
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise DataError(f"its {key} is {value!r}, not an integer", where=where)
    return value


def _box(entry: dict[str, Any], where: str) -> tuple[list[float], float, bool]:
    """Return x y w h, the area and whether it is a crowd."""
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        raise DataError("its bbox is not four numbers, x y w h", where=where)
    if min(box[2:]) < 0:
        raise DataError("its bbox has a negative side", where=where)
    area = entry.get("area", box[2] * box[3])
    if not _is_number(area) or area < 0:
        raise DataError("its area is not a number", where=where)
    return [float(value) for value in box], float(area), bool(entry.get("iscrowd", 0))


def _is_number(value: object) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) < 1e9
        and math.isfinite(value)
    )


def _objects(rows: list[tuple[int, list[float], float, bool]]) -> Objects:
    values = np.array([row[1] for row in rows], dtype=np.float64).reshape(-1, 4)
    return Objects(
        boxes=np.concatenate([values[:, :2], values[:, :2] + values[:, 2:]], axis=1),
        classes=np.array([row[0] for row in rows], dtype=np.int64),
        areas=np.array([row[2] for row in rows], dtype=np.float64),
        crowd=np.array([row[3] for row in rows], dtype=bool),
    )
