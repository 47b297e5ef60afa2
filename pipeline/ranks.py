"""The processes of one run, as ``torchrun`` starts them (torch.distributed).

Process 0 is the one that reads, writes and speaks. Numbers on a GPU travel by nccl, all others by
gloo. Where there is one process nothing is sent and torch.distributed is not touched.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graph_tools.errors import GenerationError, SettingsError
from pipeline.torchrun import started_count, started_rank

__all__ = ["ALONE", "PeerLostError", "Ranks", "join_ranks"]

_FAILED, _NOTICED = "zsq-failed", "zsq-noticed"


class PeerLostError(GenerationError):
    """Another process of the run ended before its time.

    Args:
        count: processes there were.
        told: whether another process says it.
    """

    def __init__(self, count: int, *, told: bool) -> None:
        super().__init__(
            f"one of the {count} processes ended before its time",
            where="torchrun",
            hint="see what it said, if anything",
        )
        self.told = told


class Ranks:
    """The processes of a run, seen from one of them.

    Args:
        rank: number of this one, from 0.
        count: how many there are.
        local: number of this one among those on its machine.
    """

    def __init__(self, rank: int = 0, count: int = 1, local: int = 0) -> None:
        self.rank, self.count, self._local = rank, count, local

    def owner(self, index: int) -> int:
        """Return the process that has batch ``index``."""
        return index % self.count

    def owns(self, index: int) -> bool:
        """Whether this process has batch ``index``."""
        return self.owner(index) == self.rank

    def device(self, device: torch.device) -> torch.device:
        """Return this process's own GPU where just "cuda" was asked for."""
        if self.count == 1 or device.type != "cuda" or device.index is not None:
            return device
        return torch.device("cuda", self._local)

    def gather(self, values: Tensor) -> list[Tensor]:
        """Return everyone's tensor, in order; all have one shape."""
        if self.count == 1:
            return [values]
        found = [torch.empty_like(values) for _ in range(self.count)]
        with self._watched():
            torch.distributed.all_gather(found, values.contiguous())
        return found

    def broadcast(self, values: Tensor, source: int) -> Tensor:
        """Fill a contiguous tensor with that of process ``source``; return it."""
        if self.count > 1:
            with self._watched():
                torch.distributed.broadcast(values, src=source)
        return values

    def broadcast_number(self, value: float, source: int) -> float:
        """Return what process ``source`` gave, bit by bit."""
        if self.count == 1:
            return value
        return float(self.broadcast(torch.tensor([value], dtype=torch.float64), source))

    def broadcast_bytes(self, data: bytes, source: int = 0) -> bytes:
        """Return what process ``source`` gave; what others gave does not matter."""
        if self.count == 1:
            return data
        size = int(self.broadcast(torch.tensor([len(data)]), source))
        own = data if self.rank == source else bytes(size)
        values = torch.frombuffer(bytearray(own or b"\0"), dtype=torch.uint8)
        return self.broadcast(values, source).numpy().tobytes()[:size]

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """Return of each flag whether any process has set it."""
        if self.count == 1:
            return list(flags)
        rows = self.gather(torch.tensor([int(flag) for flag in flags]))
        return [bool(value) for value in torch.stack(rows).amax(0)]

    @contextlib.contextmanager
    def own_path(self, path: Path) -> Iterator[Path]:
        """Give the first process ``path``, and the others one of their own, removed at the end."""
        if self.rank == 0:
            for left in _left_of(path) if self.count == 1 else ():
                shutil.rmtree(left, ignore_errors=True)
            yield path
            return
        there = os.access(path.parent, os.W_OK)
        parent = path.parent if there else Path(tempfile.gettempdir())
        folder = parent / f".{path.name}.process{self.rank}"
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
        folder.mkdir()
        try:
            yield folder / path.name
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.any([False])

    def fail(self) -> None:
        """Let the others know that this process says why the run ends."""
        with contextlib.suppress(RuntimeError):
            _store().set(_FAILED, b"1")

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise PeerLostError(self.count, told=not self._is_first()) from error

    def _is_first(self) -> bool:
        """Whether nobody else has said that a process is gone, nor that one says why itself."""
        with contextlib.suppress(RuntimeError):
            store = _store()
            return not store.check([_FAILED]) and store.add(_NOTICED, 1) == 1
        return True  # what the processes share is gone, too


ALONE = Ranks()
"""One process."""


def _left_of(path: Path) -> list[Path]:
    return list(path.parent.glob(f".{glob.escape(path.name)}.process*"))


@contextlib.contextmanager
def join_ranks(device: str) -> Iterator[Ranks]:
    """Join the processes that torchrun started, while the block runs; without it, be alone.

    Args:
        device: what will compute.

    Raises:
        SettingsError: there is no torch.distributed, or fewer GPUs than processes.
    """
    count = started_count()
    if count == 1:
        yield ALONE
        return
    if not torch.distributed.is_available():
        raise SettingsError("this torch has no torch.distributed", where="torchrun")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = device.startswith("cuda")
    if on_gpu:
        if device == "cuda" and local >= torch.cuda.device_count():
            raise SettingsError(
                f"{torch.cuda.device_count()} GPU(s) for {local + 1} or more processes",
                where="--device cuda",
                hint="start as many processes as there are GPUs",
            )
        torch.cuda.set_device(local if device == "cuda" else torch.device(device))
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    ranks = Ranks(started_rank(), count, local)
    try:
        yield ranks
    finally:
        torch.distributed.destroy_process_group()


def _store() -> Any:
    return torch.distributed.distributed_c10d._get_default_store()
