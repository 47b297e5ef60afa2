"""Real images with labels: a folder or a zip of pictures, or an ``.npz``."""

from __future__ import annotations

import csv
import io
import logging
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from graph_tools.errors import DataError
from pipeline.archives import check_member
from pipeline.evaluate.files import Files, open_files
from pipeline.evaluate.pictures import SUFFIXES
from pipeline.evaluate.placement import Resize
from pipeline.evaluate.sources import ArraySource, ImageSource, PartSource, PictureSource

if TYPE_CHECKING:
    from graph_tools.model import ImageInput
    from pipeline.preprocessing import Preprocessing

__all__ = ["Dataset", "open_dataset"]

logger = logging.getLogger(__name__)

LABELS = "labels.csv"
# Arrays are held in memory; folders and zips of pictures are not.
MAX_ARRAY_BYTES = 4 * 2**30


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """Images and, if they have any, their labels.

    Args:
        path: the folder or file.
        source: the images.
        count: number of images N.
        labels: [N] int64, 0 or more; None if there are none.
        class_names: names of the labels 0, 1, ..., if the data have names.
        unlabelled: why there are no labels; empty if there are.
    """

    path: Path
    source: ImageSource = field(repr=False)
    count: int
    labels: npt.NDArray[np.int64] | None = field(default=None, repr=False)
    class_names: tuple[str, ...] | None = field(default=None, repr=False)
    unlabelled: str = ""

    @property
    def num_classes(self) -> int | None:
        """Number of class names, or the largest label plus 1; None without labels."""
        if self.class_names is not None:
            return len(self.class_names)
        return None if self.labels is None else int(self.labels.max()) + 1

    def drawn(
        self, limit: int | None = None, seed: int | None = None
    ) -> npt.NDArray[np.int64]:
        """Return the indices of the images that `batches` delivers, in their order."""
        order = np.arange(self.count, dtype=np.int64)
        if seed is not None:
            order = np.random.default_rng(seed).permutation(order)
        return order if limit is None else order[: max(0, limit)]

    def without(self, left_out: npt.NDArray[np.int64]) -> Dataset:
        """Return the images of all other indices, in their order."""
        chosen = np.setdiff1d(np.arange(self.count, dtype=np.int64), left_out)
        return replace(
            self,
            source=PartSource(whole=self.source, chosen=chosen),
            count=len(chosen),
            labels=None if self.labels is None else self.labels[chosen],
        )

    def batches(
        self,
        model_input: ImageInput,
        preprocessing: Preprocessing,
        size: int,
        *,
        limit: int | None = None,
        seed: int | None = None,
        resize: Resize = "crop",
    ) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.int64] | None]]:
        """Read, decode and normalize the images, ``size`` at a time.

        Args:
            model_input: layout and size to deliver; pictures of another size are scaled
                (bilinear, antialiased).
            preprocessing: normalization of pictures; floating-point arrays are taken as
                normalized already.
            size: images a batch; the last batch may be smaller.
            limit: stop after this many images.
            seed: shuffle with this seed before the limit; without it, the data set's order,
                which is class by class for class folders.
            resize: how pictures of another size are laid on the input.

        Yields:
            ``images, labels``: [<= size, *model_input.shape] float32, [<= size] int64 or None.

        Raises:
            DataError: an image cannot be read or decoded, or has another number of channels.
            SettingsError: the preprocessing is for another number of channels.
        """
        if size < 1:
            raise ValueError(f"batch size {size} is not positive")
        order = self.drawn(limit, seed)
        images = self.source.batches(order, size, model_input, preprocessing, resize)
        for start, batch in zip(range(0, len(order), size), images, strict=True):
            chosen = order[start : start + size]
            yield batch, None if self.labels is None else self.labels[chosen]


def open_dataset(path: str | os.PathLike[str]) -> Dataset:
    """Open real images without decoding them; nothing is ever unpickled.

    - A folder or zip with ``labels.csv`` at its top (header ``file,label``): the files listed
      there. Labels are numbers, or names, which are numbered in sorted order.
    - A folder or zip of class folders, numbered in sorted order of their names.
    - A folder or zip whose pictures lie in one folder: no labels.
    - An ``.npz`` with ``images``, uint8 [N, H, W, C] or [N, H, W], or floating point in the
      model's own layout and normalization, and maybe ``labels``, integers [N].

    A single folder around all of it is looked through.

    Raises:
        DataError: no such path, another format, no images, or labels that cannot be used.
    """
    path = Path(path)
    files = open_files(path)
    if path.is_dir():
        return _pictures(files)
    names = files.names()
    holds_arrays = any(name.endswith(".npy") for name in names)
    if holds_arrays and not any(_is_picture(name) for name in names):
        return _arrays(path)
    return _pictures(files)


def _is_picture(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in SUFFIXES


def _pictures(files: Files) -> Dataset:
    names = files.names()
    pictures = [name for name in names if _is_picture(name)]
    if not pictures:
        raise DataError(
            "holds no pictures",
            where=str(files.path),
            hint=f"known are {', '.join(sorted(SUFFIXES))}",
        )
    root = _common_root([name for name in names if _is_picture(name) or _is_labels(name)])
    if f"{root}{LABELS}" in names:
        return _listed(files, root, set(pictures))
    folders = {name: name.removeprefix(root).split("/")[:-1] for name in pictures}
    outside = next((name for name, parts in folders.items() if not parts), None)
    classes = tuple(sorted({parts[0] for parts in folders.values() if parts}))
    unlabelled = ""
    if len(classes) < 2:
        unlabelled = f"all pictures lie in one folder, and there is no {LABELS}"
    elif outside is not None:
        unlabelled = f"{outside} lies outside the class folders"
    if unlabelled:
        source = PictureSource(files=files, names=tuple(pictures))
        return Dataset(
            path=files.path, source=source, count=len(pictures), unlabelled=unlabelled
        )
    number = {name: index for index, name in enumerate(classes)}
    pictures.sort(key=lambda name: (number[folders[name][0]], name))
    labels = np.array([number[folders[name][0]] for name in pictures], dtype=np.int64)
    return Dataset(
        path=files.path,
        source=PictureSource(files=files, names=tuple(pictures)),
        count=len(pictures),
        labels=labels,
        class_names=classes,
    )


def _is_labels(name: str) -> bool:
    return PurePosixPath(name).name == LABELS


def _common_root(names: list[str]) -> str:
    """Return the folder around all of ``names`` that is not itself a class, with a slash."""
    root = ""
    while True:
        inner = [name.removeprefix(root) for name in names]
        top = inner[0].split("/")[0]
        if not all(name.startswith(f"{top}/") for name in inner):
            return root
        below = [name.removeprefix(f"{top}/") for name in inner]
        if LABELS not in below and not any("/" in name for name in below):
            return root
        root += f"{top}/"


def _listed(files: Files, root: str, pictures: set[str]) -> Dataset:
    where = f"{files.path}:{root}{LABELS}"
    with files.opened() as read:
        content = read(f"{root}{LABELS}")
    try:
        rows = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""))
        if not {"file", "label"} <= set(rows.fieldnames or ()):
            raise DataError("its first line is not the header file,label", where=where)
        pairs = [((row["file"] or "").strip(), (row["label"] or "").strip()) for row in rows]
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"is not a CSV file in UTF-8 ({error})", where=where) from error
    backslash = "\\"  # as spreadsheets on Windows write paths
    names = [f"{root}{name.replace(backslash, '/').removeprefix('./')}" for name, _ in pairs]
    for line, (name, (_, label)) in enumerate(zip(names, pairs, strict=True), start=2):
        if name not in pictures:
            raise DataError(f"row {line} names {name!r}, which is not there", where=where)
        if not label:
            raise DataError(f"row {line} has no label", where=where)
    if not names:
        raise DataError("lists no files", where=where)
    if rest := pictures - set(names):
        logger.warning(
            "%s does not list %d of %d pictures; they are left out",
            where,
            len(rest),
            len(pictures),
        )
    numbers, class_names = _numbered([label for _, label in pairs], where)
    return Dataset(
        path=files.path,
        source=PictureSource(files=files, names=tuple(names)),
        count=len(names),
        labels=numbers,
        class_names=class_names,
    )


def _numbered(
    labels: list[str], where: str
) -> tuple[npt.NDArray[np.int64], tuple[str, ...] | None]:
    """Return labels as numbers, and the classes' names if the labels are names."""
    try:
        numbers = np.array([int(label) for label in labels], dtype=np.int64)
    except (ValueError, OverflowError):
        names = tuple(sorted(set(labels)))
        index = {name: number for number, name in enumerate(names)}
        return np.array([index[label] for label in labels], dtype=np.int64), names
    if numbers.min() < 0:
        raise DataError(f"label {numbers.min()} is negative", where=where)
    return numbers, None


def _arrays(path: Path) -> Dataset:
    where = str(path)
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                check_member(member, where=where)
            total = sum(info.file_size for info in archive.infolist())
        if total > MAX_ARRAY_BYTES:
            raise DataError(
                f"its arrays take {total:,} bytes, more than {MAX_ARRAY_BYTES:,}",
                where=where,
                hint="give a folder or zip of pictures",
            )
        with np.load(path, allow_pickle=False) as file:
            if "images" not in file.files:
                raise DataError(
                    f'has no array "images" (arrays: {", ".join(file.files[:8])})', where=where
                )
            images = file["images"]
            labels = file["labels"] if "labels" in file.files else None
    except DataError:
        raise
    # numpy and zipfile raise many classes on damaged files.
    except Exception as error:
        raise DataError(f"cannot be read ({error})", where=where) from error
    if images.dtype == np.uint8 and images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or (images.dtype != np.uint8 and images.dtype.kind != "f"):
        raise DataError(
            f'its array "images" is {images.dtype} {list(images.shape)}',
            where=where,
            hint="store uint8 [N, H, W, C], or float32 in the model's own layout",
        )
    if images.size == 0:
        raise DataError(f"holds no images (shape {list(images.shape)})", where=where)
    source = ArraySource(path=path, images=images)
    if labels is None:
        reason = 'there is no array "labels"'
        return Dataset(path=path, source=source, count=len(images), unlabelled=reason)
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise DataError(
            f'its array "labels" is {labels.dtype} {list(labels.shape)}, not '
            f"{len(images)} integers from 0",
            where=where,
        )
    return Dataset(path=path, source=source, count=len(images), labels=labels.astype(np.int64))
