"""What a zip archive may hold before anything of it is decompressed."""

from __future__ import annotations

import zipfile
from pathlib import PurePosixPath, PureWindowsPath

from graph_tools.errors import DataError

__all__ = ["MAX_MEMBERS", "check_archive", "check_member"]

MAX_MEMBERS = 2_000_000
"""The most files in an archive; ImageNet has 1.3 million."""

_MAX_RATIO = 200
_ANY_RATIO = 2**26  # bytes that may come of however little: blank images compress well


def check_archive(archive: zipfile.ZipFile, *, where: str) -> None:
    """Refuse an archive of too many files, or with names that lead out of a folder.

    Nothing is ever extracted; a file of such names is not what it claims to be.

    Raises:
        DataError: naming the member.
    """
    members = archive.infolist()
    if len(members) > MAX_MEMBERS:
        raise DataError(
            f"holds {len(members):,} files, more than {MAX_MEMBERS:,}", where=where
        )
    for member in members:
        path = PurePosixPath(member.filename)
        if (
            ".." in path.parts
            or path.is_absolute()
            or PureWindowsPath(member.filename).drive
            or "\\..\\" in f"\\{member.filename}\\"
        ):
            raise DataError(
                f"holds a file outside of itself, {member.filename!r}",
                where=where,
                hint="make the archive anew from a folder",
            )


def check_member(member: zipfile.ZipInfo, *, where: str) -> None:
    """Refuse a member that grows more than images ever do.

    Raises:
        DataError: a decompression bomb.
    """
    if member.file_size > max(_ANY_RATIO, _MAX_RATIO * member.compress_size):
        raise DataError(
            f"{member.filename!r} grows from {member.compress_size:,} to "
            f"{member.file_size:,} bytes",
            where=where,
            hint="store it with less compression if that is meant",
        )
