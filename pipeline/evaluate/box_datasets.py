"""Pictures with boxes: a folder or a zip in YOLO's or in COCO's format.

YOLO: beside each picture, or in ``labels`` where the picture lies in ``images``, a text file of
its name; a line an object, ``class cx cy w h``, in shares of the picture. A picture without a
file holds nothing. COCO: one JSON file with images, annotations and categories; the classes are
the categories in the order of their identifiers. Nothing is ever extracted.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from graph_tools.errors import DataError
from pipeline.evaluate.average_precision import Objects
from pipeline.evaluate.coco_labels import CocoPicture, read_coco
from pipeline.evaluate.files import Files, open_files
from pipeline.evaluate.pictures import SUFFIXES
from pipeline.evaluate.yolo_labels import label_files, read_labels

__all__ = ["BoxDataset", "holds_boxes", "open_box_dataset"]


@dataclass(frozen=True, kw_only=True, eq=False)
class BoxDataset:
    """Pictures and the objects in them.

    Args:
        path: the folder or archive.
        files: where the pictures are.
        names: of the pictures.
        objects: of each picture, in its pixels; in shares of it with ``shares``.
        shares: whether boxes are shares of the picture's sides.
        sizes: width and height that the labels are for, None where they do not say.
        num_classes: number of classes that the data set knows of.
        class_names: their names, if it has any.
    """

    path: Path
    files: Files = field(repr=False)
    names: tuple[str, ...] = field(repr=False)
    objects: tuple[Objects, ...] = field(repr=False)
    shares: bool
    sizes: tuple[tuple[int, int] | None, ...] = field(repr=False)
    num_classes: int
    class_names: tuple[str, ...] | None = field(default=None, repr=False)

    @property
    def count(self) -> int:
        """Number of pictures."""
        return len(self.names)

    def only(self, chosen: Sequence[int]) -> BoxDataset:
        """Return the pictures of these indices, in this order."""
        return BoxDataset(
            path=self.path,
            files=self.files,
            names=tuple(self.names[index] for index in chosen),
            objects=tuple(self.objects[index] for index in chosen),
            shares=self.shares,
            sizes=tuple(self.sizes[index] for index in chosen),
            num_classes=self.num_classes,
            class_names=self.class_names,
        )


def holds_boxes(path: str | os.PathLike[str]) -> bool:
    """Return whether a folder or archive looks like pictures with boxes, by its names."""
    with contextlib.suppress(DataError):
        names = open_files(Path(path)).names()
        return bool(_annotations(names) or label_files(names, _pictures(names)))
    return False


def open_box_dataset(path: str | os.PathLike[str]) -> BoxDataset:
    """Read the labels of a data set; pictures are not decoded.

    A JSON file named ``instances*.json`` or ``*.coco.json``, or one in a folder
    ``annotations``, makes it COCO's format.

    Raises:
        DataError: no such path, no pictures or no labels, or labels that cannot be used.
    """
    files = open_files(Path(path))
    names = files.names()
    pictures = _pictures(names)
    if not pictures:
        raise DataError(
            "holds no pictures",
            where=str(path),
            hint=f"known are {', '.join(sorted(SUFFIXES))}",
        )
    annotations = _annotations(names)
    if len(annotations) > 1:
        raise DataError(
            f"holds {len(annotations)} files of annotations: {', '.join(annotations[:4])}",
            where=str(path),
            hint="leave the one that is meant",
        )
    if annotations:
        return _coco(files, annotations[0], pictures)
    labels = label_files(names, pictures)
    if not labels:
        raise DataError(
            "holds no boxes",
            where=str(path),
            hint="give labels/NAME.txt for images/NAME.jpg (YOLO's format), or "
            "annotations/instances.json (COCO's)",
        )
    with files.opened() as read:
        objects = tuple(
            read_labels(read(labels[name]), f"{path}:{labels[name]}")
            if name in labels
            else read_labels(b"", "")
            for name in pictures
        )
    largest = max((int(o.classes.max()) for o in objects if len(o.classes)), default=-1)
    return BoxDataset(
        path=files.path,
        files=files,
        names=tuple(pictures),
        objects=objects,
        shares=True,
        sizes=(None,) * len(pictures),
        num_classes=largest + 1,
    )


def _pictures(names: Sequence[str]) -> list[str]:
    return [name for name in names if PurePosixPath(name).suffix.lower() in SUFFIXES]


def _annotations(names: Sequence[str]) -> list[str]:
    found = []
    for name in names:
        path = PurePosixPath(name.lower())
        if path.suffix == ".json" and (
            path.name.startswith("instances")
            or path.name.endswith(".coco.json")
            or path.parent.name == "annotations"
        ):
            found.append(name)
    named = [n for n in found if PurePosixPath(n.lower()).name.startswith("instances")]
    return named or found  # captions and keypoints lie beside instances


def _coco(files: Files, name: str, pictures: Sequence[str]) -> BoxDataset:
    where = f"{files.path}:{name}"
    with files.opened() as read:
        entries, class_names = read_coco(read(name), where)
    return BoxDataset(
        path=files.path,
        files=files,
        names=_locate(entries, pictures, where),
        objects=tuple(entry.objects for entry in entries),
        shares=False,
        sizes=tuple(entry.size for entry in entries),
        num_classes=len(class_names),
        class_names=class_names,
    )


def _locate(
    entries: Sequence[CocoPicture], pictures: Sequence[str], where: str
) -> tuple[str, ...]:
    """Find the pictures that annotations name, which seldom say in which folder."""
    by_name: dict[str, list[str]] = {}
    for picture in pictures:
        by_name.setdefault(PurePosixPath(picture).name, []).append(picture)
    found = []
    for entry in entries:
        wanted = entry.file_name.replace("\\", "/").removeprefix("./")
        same = by_name.get(PurePosixPath(wanted).name, [])
        matching = [p for p in same if p == wanted or p.endswith(f"/{wanted}")] or same
        if len(matching) != 1:
            what = "is not there" if not matching else f"is there {len(matching)} times"
            raise DataError(f"names {entry.file_name!r}, which {what}", where=where)
        found.append(matching[0])
    return tuple(found)
