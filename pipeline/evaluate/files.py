"""Named files in a folder or in a zip archive, read where they are."""

from __future__ import annotations

import contextlib
import os
import stat
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from graph_tools.errors import DataError
from pipeline.archives import check_archive, check_member

__all__ = ["Files", "FolderFiles", "Read", "ZipFiles", "is_hidden", "open_files"]

Read = Callable[[str], bytes]
# A picture of MAX_PIXELS that hardly compresses is about this large.
MAX_BYTES = 256 * 2**20


class Files(Protocol):
    """A tree of files, addressed by their path in it, with forward slashes."""

    @property
    def path(self) -> Path:
        """The folder or the archive."""

    def names(self) -> list[str]:
        """Return the paths of all files, sorted, hidden ones left out."""

    def opened(self) -> contextlib.AbstractContextManager[Read]:
        """Return a context in which files can be read by name."""


@dataclass(frozen=True)
class FolderFiles:
    """The files below a folder; links are followed."""

    path: Path

    def names(self) -> list[str]:
        """Return the paths of all files, sorted, hidden ones left out."""
        found: list[str] = []
        seen: set[str] = set()
        for folder, subfolders, files in os.walk(self.path, followlinks=True):
            real = os.path.realpath(folder)
            if real in seen:  # a link to a folder above itself
                subfolders.clear()
                continue
            seen.add(real)
            relative = Path(folder).relative_to(self.path)
            found += [(relative / name).as_posix() for name in files]
        return sorted(name for name in found if not is_hidden(name))

    @contextlib.contextmanager
    def opened(self) -> Iterator[Read]:
        """Yield a function that reads one file."""

        def read(name: str) -> bytes:
            file = self.path / name
            try:
                status = file.stat()
                if not stat.S_ISREG(status.st_mode):  # a pipe would never end
                    raise DataError("is not a regular file", where=str(file))
                _check_bytes(status.st_size, str(file))
                return file.read_bytes()
            except OSError as error:
                what = f"cannot be read ({error.strerror or error})"
                raise DataError(what, where=str(file)) from error

        yield read


@dataclass(frozen=True)
class ZipFiles:
    """The files in a zip archive."""

    path: Path

    def names(self) -> list[str]:
        """Return the paths of all files, sorted, hidden ones left out."""
        with self._archive() as archive:
            names = {info.filename for info in archive.infolist() if not info.is_dir()}
        return sorted(name for name in names if not is_hidden(name))

    @contextlib.contextmanager
    def opened(self) -> Iterator[Read]:
        """Yield a function that decompresses one file."""
        with self._archive() as archive:

            def read(name: str) -> bytes:
                where = f"{self.path}:{name}"
                try:
                    member = archive.getinfo(name)
                    _check_bytes(member.file_size, where)
                    check_member(member, where=str(self.path))
                    return archive.read(name)
                except DataError:
                    raise
                # Besides BadZipFile: encryption, unknown compression, zlib's own errors.
                except Exception as error:
                    raise DataError(f"cannot be read ({error})", where=where) from error

            yield read

    @contextlib.contextmanager
    def _archive(self) -> Iterator[zipfile.ZipFile]:
        try:
            archive = zipfile.ZipFile(self.path)
        except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
            raise DataError(
                f"cannot be read as a zip archive ({error})", where=str(self.path)
            ) from error
        with archive:
            check_archive(archive, where=str(self.path))
            yield archive


def open_files(path: Path) -> Files:
    """Return the files of a folder or a zip archive.

    Raises:
        DataError: no such path, or neither of the two.
    """
    if path.is_dir():
        return FolderFiles(path)
    if not path.is_file():
        raise DataError("there is no such file or folder", where=str(path))
    if not zipfile.is_zipfile(path):
        raise DataError(
            "is not a folder, a zip archive or an .npz file",
            where=str(path),
            hint="give a folder or zip of class folders, or an .npz with images and labels",
        )
    return ZipFiles(path)


def is_hidden(name: str) -> bool:
    """Return whether a part of the path is hidden, or put there by macOS."""
    parts = PurePosixPath(name).parts
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


def _check_bytes(size: int, where: str) -> None:
    if size > MAX_BYTES:
        raise DataError(f"is {size:,} bytes large, more than {MAX_BYTES:,}", where=where)
