"""Sets of images on disk: one uncompressed ``.npz`` array, written and read batch by batch.

Memory use does not depend on the number of images, ``numpy.load(path)["images"]`` opens the
file anywhere, and the same images give the same bytes (archive times are fixed).
"""

from __future__ import annotations

import contextlib
import glob
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from graph_tools.errors import DataError
from graph_tools.fixed_inputs import NPY_FAULTS
from pipeline.archives import check_archive, check_member

__all__ = ["ImageSet", "ImageWriter", "open_images"]

ARRAY = "images"
MAX_VALUES = 2**28  # of one image, a gigabyte
# What zipfile, zlib and numpy.lib.format raise on files that are not what they claim.
_BROKEN = (
    OSError,
    EOFError,
    ValueError,
    RuntimeError,
    NotImplementedError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Images on disk, float32, in the model's own layout and normalization.

    Args:
        path: the ``.npz`` or ``.npy`` file.
        count: number of images N.
        shape: shape of one image, [C, H, W] or [H, W, C].
    """

    path: Path
    count: int
    shape: tuple[int, int, int]

    def batches(
        self, size: int, *, limit: int | None = None
    ) -> Iterator[npt.NDArray[np.float32]]:
        """Read the images in order, ``size`` at a time.

        Args:
            size: images a batch; the last batch may be smaller.
            limit: stop after this many images.

        Yields:
            [<= size, *shape] float32, a new array each time.

        Raises:
            DataError: the file is damaged or has changed, or an image holds NaN or infinity.
        """
        if size < 1:
            raise ValueError(f"batch size {size} is not positive")
        total = self.count if limit is None else max(0, min(limit, self.count))
        with _open_array(self.path) as (stream, header):
            if header.shape != (self.count, *self.shape):
                raise DataError(
                    "the file has changed since it was opened", where=str(self.path)
                )
            for start in range(0, total, size):
                count = min(size, total - start)
                yield self._read(stream, header.dtype, start, count)

    def load(self, limit: int | None = None) -> npt.NDArray[np.float32]:
        """Return the first ``limit`` images, or all, as one [N, *shape] float32 array.

        Raises:
            DataError: as in `batches`.
        """
        count = self.count if limit is None else max(0, min(limit, self.count))
        images = np.empty((count, *self.shape), dtype=np.float32)
        start = 0
        for batch in self.batches(max(1, min(count, 64)), limit=count):
            images[start : start + len(batch)] = batch
            start += len(batch)
        return images

    def _read(
        self, stream: IO[bytes], dtype: np.dtype[Any], start: int, count: int
    ) -> npt.NDArray[np.float32]:
        wanted = count * math.prod(self.shape) * dtype.itemsize
        with _explained(self.path):
            data = stream.read(wanted)
        if len(data) != wanted:
            raise DataError("the file is truncated", where=str(self.path))
        images = np.frombuffer(data, dtype=dtype).astype(np.float32)
        images = images.reshape(count, *self.shape)
        _check_finite(images, start, str(self.path))
        return images


class ImageWriter:
    """Write a known number of images to ``path``, batch by batch, as a context manager.

    The file appears under its name only when the ``with`` block ends without an error and all
    images are there; otherwise nothing is left.

    Args:
        path: the ``.npz`` file to write; replaced if it exists.
        count: number of images that will be appended.
        shape: shape of one image.

    Raises:
        DataError: the file cannot be written, or an image holds NaN or infinity.
        ValueError: a batch has another shape, or there are too many or too few images.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "images.npz"
        >>> with ImageWriter(path, count=3, shape=(1, 2, 2)) as writer:
        ...     writer.append(np.zeros((2, 1, 2, 2), dtype=np.float32))
        ...     writer.append(np.ones((1, 1, 2, 2), dtype=np.float32))
        >>> open_images(path).count
        3
    """

    def __init__(
        self, path: str | os.PathLike[str], *, count: int, shape: tuple[int, int, int]
    ) -> None:
        if count < 1 or len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"{count} images of shape {list(shape)} cannot be written")
        self.path, self.count, self.shape = Path(path), count, shape
        self.written = 0
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        self._archive: zipfile.ZipFile | None = None
        self._stream: IO[bytes] | None = None

    def __enter__(self) -> ImageWriter:
        if self.path.is_dir():
            raise DataError("is a folder, not a file to write", where=str(self.path))
        try:
            with self._cannot_write():
                self._archive = zipfile.ZipFile(self._temporary, "w", zipfile.ZIP_STORED)
                # zipfile's default time for a ZipInfo, 1980, keeps the bytes reproducible.
                info = zipfile.ZipInfo(f"{ARRAY}.npy")
                info.external_attr = 0o644 << 16
                self._stream = self._archive.open(info, "w", force_zip64=True)
                header = {
                    "descr": "<f4",
                    "fortran_order": False,
                    "shape": (self.count, *self.shape),
                }
                np.lib.format.write_array_header_1_0(self._stream, header)
        except BaseException:
            self._discard()
            raise
        return self

    @staticmethod
    def remove_leftovers(path: Path) -> None:
        """Remove what killed processes left of files that were to become ``path``."""
        for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            with contextlib.suppress(OSError):
                left.unlink()

    def append(self, batch: npt.NDArray[np.floating[Any]]) -> None:
        """Write the next images.

        Args:
            batch: [n, *shape], floating point, finite; stored as float32.
        """
        if self._stream is None:
            raise ValueError("ImageWriter is not open; use it in a with block")
        if batch.ndim != 4 or batch.shape[1:] != self.shape:
            raise ValueError(f"a batch has shape {batch.shape}, not [n, *{self.shape}]")
        if self.written + len(batch) > self.count:
            raise ValueError(f"more than the announced {self.count} images")
        data = np.ascontiguousarray(batch, dtype="<f4")
        _check_finite(data, self.written, str(self.path))
        with self._cannot_write():
            self._stream.write(data.data)
        self.written += len(batch)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is not None:
                return
            if self.written != self.count:
                raise ValueError(f"{self.written} images written, {self.count} announced")
            with self._cannot_write():
                self._close()
                os.replace(self._temporary, self.path)
        finally:
            self._discard()

    @contextlib.contextmanager
    def _cannot_write(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"cannot be written ({error.strerror or error})",
                where=str(self.path),
                hint="check the folder, its permissions and the free space",
            ) from error

    def _close(self) -> None:
        stream, archive = self._stream, self._archive
        self._stream = self._archive = None
        try:
            if stream is not None:
                stream.close()
        finally:
            if archive is not None:
                archive.close()

    def _discard(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._close()
        with contextlib.suppress(OSError):
            self._temporary.unlink(missing_ok=True)


def open_images(
    path: str | os.PathLike[str], *, shape: tuple[int, int, int] | None = None
) -> ImageSet:
    """Open a file of images without reading them; nothing is ever unpickled.

    Args:
        path: an ``.npz`` file with the array "images" (or just one array), or a ``.npy`` file:
            [N, ...] float32, in the model's own layout and normalization.
        shape: shape that one image must have.

    Raises:
        DataError: no such file, another format, shape or dtype, no images, or truncated.
            NaN and infinity are found when the images are read.
    """
    path = Path(path)
    with _open_array(path) as (_, header):
        count, *image = header.shape
    found = (image[0], image[1], image[2])
    if shape is not None and found != tuple(shape):
        raise DataError(
            f"holds images of shape {list(found)}, but the model takes {list(shape)}",
            where=str(path),
            hint="store them in the model's own layout, size and normalization",
        )
    return ImageSet(path=path, count=count, shape=found)


@dataclass(frozen=True, kw_only=True)
class _Header:
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


@contextlib.contextmanager
def _open_array(path: Path) -> Iterator[tuple[IO[bytes], _Header]]:
    """Open the array of images and stop behind its header."""
    if not path.is_file():
        raise DataError("there is no such file", where=str(path))
    with contextlib.ExitStack() as stack:
        with _explained(path):
            file = stack.enter_context(path.open("rb"))
            magic = file.read(6)
            file.seek(0)
        stream: IO[bytes] = file
        size = path.stat().st_size
        if magic[:2] == b"PK":
            with _explained(path):
                archive = stack.enter_context(zipfile.ZipFile(file))
                check_archive(archive, where=str(path))
                member = _member(archive, path)
                check_member(member, where=str(path))
                stream = stack.enter_context(archive.open(member))
            size = member.file_size
        elif magic != b"\x93NUMPY":
            raise DataError(
                "is not an .npz or .npy file",
                where=str(path),
                hint="write it with numpy.savez",
            )
        with _explained(path):
            header, start = _read_header(stream)
        _check_header(header, size - start, path)
        yield stream, _Header(shape=header[0], dtype=header[2])


def _member(archive: zipfile.ZipFile, path: Path) -> zipfile.ZipInfo:
    arrays = [info for info in archive.infolist() if info.filename.endswith(".npy")]
    named = [info for info in arrays if info.filename == f"{ARRAY}.npy"]
    if named or len(arrays) == 1:
        return (named or arrays)[0]
    names = ", ".join(info.filename.removesuffix(".npy") for info in arrays[:8]) or "none"
    raise DataError(f'has no array "{ARRAY}" (arrays: {names})', where=str(path))


def _read_header(
    stream: IO[bytes],
) -> tuple[tuple[tuple[int, ...], bool, np.dtype[Any]], int]:
    version = np.lib.format.read_magic(stream)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"npy format {version} is not known")
    try:
        return readers[version](stream), stream.tell()
    except (*NPY_FAULTS, TypeError) as error:
        raise ValueError("its header is not that of an array") from error


def _check_header(
    header: tuple[tuple[int, ...], bool, np.dtype[Any]], size: int, path: Path
) -> None:
    shape, fortran_order, dtype = header
    where = str(path)
    if dtype.hasobject:
        raise DataError(
            "holds pickled objects, which are never loaded",
            where=where,
            hint="store one float32 array",
        )
    if dtype.newbyteorder("=") != np.float32:
        hint = "normalize the images as the model expects and store them as float32"
        raise DataError(f"holds {dtype} values, not float32", where=where, hint=hint)
    if len(shape) != 4:
        raise DataError(f"holds an array of shape {list(shape)}, not four axes", where=where)
    if min(shape) < 1:
        raise DataError(f"holds no images (shape {list(shape)})", where=where)
    if fortran_order:
        raise DataError(
            "is stored in Fortran order",
            where=where,
            hint="apply numpy.ascontiguousarray before saving",
        )
    if math.prod(shape[1:]) > MAX_VALUES:
        raise DataError(f"one image would have {math.prod(shape[1:]):,} values", where=where)
    if size != math.prod(shape) * dtype.itemsize:
        raise DataError(
            f"the file is truncated or does not fit its header, {list(shape)}", where=where
        )


def _check_finite(images: npt.NDArray[np.float32], start: int, where: str) -> None:
    finite = np.isfinite(images).all(axis=(1, 2, 3))
    if not finite.all():
        index = start + int(np.argmin(finite))
        raise DataError(f"image {index} (from 0) holds NaN or infinity", where=where)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except _BROKEN as error:
        raise DataError(f"cannot be read ({error})", where=str(path)) from error
