"""The state of a computation in a folder that is whole or absent.

A snapshot is a folder of safetensors files and ``state.json``, which holds plain numbers and the
SHA-256 of every file. It is written under another name, brought to the disk (fsync), then renamed:
after a crash at any moment there is the snapshot, or there is none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from pipeline.ranks import Ranks

__all__ = ["DamagedSnapshotError", "Snapshot", "State", "read_snapshot", "write_snapshot"]

_FACTS = "state.json"

Part = tuple[str, Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class State:
    """What a snapshot is made of.

    Args:
        facts: what JSON can hold; floats come back bit by bit.
        parts: named groups of tensors, taken one at a time, so that they need not be in memory
            together.
    """

    facts: Mapping[str, Any]
    parts: Iterable[Part]


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A whole snapshot.

    Args:
        folder: where it is.
        facts: as in `State`.
    """

    folder: Path
    facts: Mapping[str, Any]

    def part(self, name: str) -> dict[str, Tensor]:
        """Return a group of tensors, on the CPU."""
        tensors: dict[str, Tensor] = load_file(_file(self.folder, name))
        return tensors

    def shared(self, ranks: Ranks) -> Snapshot:
        """Return a snapshot whose parts all processes read at once; process 0 has the files."""
        return _Shared(folder=self.folder, facts=self.facts, ranks=ranks)


@dataclass(frozen=True, kw_only=True)
class _Shared(Snapshot):
    ranks: Ranks

    def part(self, name: str) -> dict[str, Tensor]:
        path = _file(self.folder, name)
        data = path.read_bytes() if self.ranks.rank == 0 else b""
        tensors: dict[str, Tensor] = load(self.ranks.broadcast_bytes(data))
        return tensors


class DamagedSnapshotError(Exception):
    """Files are missing or not what was written."""


def write_snapshot(folder: Path, state: State) -> bool:
    """Write a snapshot.

    Args:
        folder: to be made; a snapshot of that name is replaced.
        state: what to write.

    Returns:
        Whether it was written; it is not if a floating-point tensor is not finite: there is
        nothing to gain from going on there.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        digests = {}
        for name, tensors in state.parts:
            if not all(_is_finite(tensor) for tensor in tensors.values()):
                return False
            path = _file(temporary, name)
            ready = {key: value.detach().contiguous() for key, value in tensors.items()}
            try:
                save_file(ready, path)
            except SafetensorError as error:
                raise _as_os_error(error) from error
            digests[path.name] = _digest(path)
            _to_disk(path)
        body = {"facts": dict(state.facts), "files": digests}
        text = json.dumps({"sha256": _digest_of(body), **body})
        with (temporary / _FACTS).open("x") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        _to_disk(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        _to_disk(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return True


def read_snapshot(folder: Path, *, facts_only: bool = False) -> Snapshot:
    """Open a snapshot after a look at every byte of it.

    Args:
        folder: the snapshot.
        facts_only: look at the facts only.

    Raises:
        DamagedSnapshotError: it is not what was written.
    """
    try:
        content = json.loads((folder / _FACTS).read_text())
        body = {"facts": content["facts"], "files": content["files"]}
        if content["sha256"] != _digest_of(body):
            raise DamagedSnapshotError(f"{_FACTS} was changed")
        for name, digest in body["files"].items():
            if not facts_only and _digest(folder / name) != digest:
                raise DamagedSnapshotError(f"{name} was changed")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedSnapshotError(str(error) or type(error).__name__) from error
    return Snapshot(folder=folder, facts=body["facts"])


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _to_disk(path: Path) -> None:
    """Wait until a file, or the entries of a folder, have reached the disk."""
    flags = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) if path.is_dir() else os.O_RDONLY
    with contextlib.ExitStack() as stack:
        try:
            number = os.open(path, flags)
        except PermissionError:  # Windows opens no folders
            return
        stack.callback(os.close, number)
        os.fsync(number)


def _as_os_error(error: SafetensorError) -> OSError:
    """Return the operating system's error, which safetensors has as text."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    if found is None:
        return OSError(str(error))
    number = int(found[1])
    return OSError(number, os.strerror(number))
