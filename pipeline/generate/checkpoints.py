"""Checkpoints of one making of images: where they are, whose, how many, and when one is due.

They lie in a hidden folder beside the output, ``.NAME.checkpoint``, which holds the temporary files
of the run, too, and is gone after success. The making is a row of stages (`Stage`), one for each
loop, and each keeps its last two snapshots. Going on means to do everything again from the start:
what is quick is computed anew, and a stage that finds a snapshot takes its state from there. Since
equal seeds give equal bytes this gives what an uninterrupted run gives, whatever was lost.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from graph_tools.errors import DataError, SettingsError
from pipeline.generate.snapshot import (
    DamagedSnapshotError,
    Snapshot,
    State,
    read_snapshot,
    write_snapshot,
)
from pipeline.images import ImageWriter
from pipeline.ranks import ALONE, Ranks
from pipeline.settings import CheckpointSettings
from pipeline.stopping import Interrupted, StopRequest

__all__ = [
    "Checkpoints",
    "Identity",
    "Stage",
    "checkpoint_folder",
    "open_checkpoints",
    "remove_checkpoints",
]

logger = logging.getLogger(__name__)

_KEPT = 2
_SECONDS = 60.0
_SHARE = 50  # a checkpoint may take a fiftieth of the time
_WORK = "work"

Identity = Mapping[str, Mapping[str, Any]]
"""What must agree for a snapshot to be gone on from: groups of named values that JSON can hold."""


def checkpoint_folder(output: Path) -> Path:
    """Return where the checkpoints of a run that writes ``output`` are."""
    return output.with_name(f".{output.name}.checkpoint")


def remove_checkpoints(output: Path) -> None:
    """Remove the checkpoints of a run that writes ``output``, if there are any."""
    shutil.rmtree(checkpoint_folder(output), ignore_errors=True)


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: exists; nobody else uses it.
        identity: of the run.
        settings: when to write, and whether to go on.
        ranks: the processes of the run; the first one has the files.

    Raises:
        SettingsError: the snapshots there are those of another run, and this one is to go on.

    Attributes:
        folder: as given.
        work: a folder for temporary files.
        stop: whether somebody wants the run to end.
        ranks: as given.
        warnings: of snapshots that could not be used, and of other things to know.
        resumed_from: what was gone on from, in words; empty if nothing was.
        lowered_to: size of batches that did fit into memory; 0 if it was not lowered.
    """

    def __init__(
        self,
        folder: Path,
        identity: Identity,
        settings: CheckpointSettings,
        ranks: Ranks = ALONE,
    ) -> None:
        self.folder, self.work = folder, folder / _WORK
        self.stop, self.ranks = StopRequest(), ranks
        self.warnings: list[str] = []
        self.resumed_from = ""
        self.lowered_to = 0
        self._identity, self._settings = identity, settings
        self._last, self._pause = time.monotonic(), _SECONDS
        self._ours = settings.resume
        if settings.resume:
            for facts in self._facts():
                self._check_identity(facts)
                self.lowered_to = facts["lowered_to"]

    def stage(self, name: str, unit: str = "iteration") -> Stage:
        """Return a stage; its name, in lower-case letters and digits, is unique in the run."""
        return Stage(self, name, unit)

    def newest(self) -> Path | None:
        """Return the snapshot written or gone on from last, None without any."""
        found = sorted(_snapshots(self.folder), key=lambda path: path.stat().st_mtime_ns)
        return found[-1] if found and self._ours else None

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know."""
        if not self._settings.resume:
            return ()
        if not self.resumed_from:
            return ("there was no checkpoint to go on from: all was made anew",)
        return (f"went on from the checkpoint at {self.resumed_from}",)

    def clear(self) -> None:
        """Remove all snapshots."""
        for path in _snapshots(self.folder):
            shutil.rmtree(path, ignore_errors=True)

    def _facts(self) -> Iterator[Mapping[str, Any]]:
        for path in _snapshots(self.folder):
            with contextlib.suppress(DamagedSnapshotError):
                yield read_snapshot(path, facts_only=True).facts

    def _check_identity(self, facts: Mapping[str, Any]) -> None:
        for group, values in self._identity.items():
            other = facts["identity"].get(group, {})
            for name in dict.fromkeys((*values, *other)):
                if values.get(name) != other.get(name):
                    raise SettingsError(
                        f"the checkpoint is of another run: {group} {name} was "
                        f"{other.get(name)}, now it is {values.get(name)}",
                        where=str(self.folder),
                        hint="run as before, or without --resume to start anew",
                    )


class Stage:
    """One loop of a run, whose state can be kept; made by `Checkpoints.stage`."""

    def __init__(self, owner: Checkpoints, name: str, unit: str) -> None:
        self._owner, self._name, self._unit = owner, name, unit

    def restore(self) -> Snapshot | None:
        """Return the newest whole snapshot of this stage, if the run is to go on from one."""
        owner, ranks = self._owner, self._owner.ranks
        found = self._newest() if owner._ours and ranks.rank == 0 else None
        if ranks.count == 1:
            return found
        folder, facts = json.loads(
            ranks.broadcast_bytes(
                json.dumps(
                    [str(found.folder), found.facts] if found else [None, None]
                ).encode()
            )
        )
        if folder is None:
            return None
        return Snapshot(folder=Path(folder), facts=facts).shared(ranks)

    def _newest(self) -> Snapshot | None:
        owner = self._owner
        for path in reversed(self._snapshots()):
            try:
                found = read_snapshot(path)
            except DamagedSnapshotError as error:
                warning = f"checkpoint {path} is damaged ({error}); the one before is used"
                logger.warning(warning)
                owner.warnings.append(warning)
                continue
            owner.resumed_from = f"{self._unit} {found.facts['done']:.10g}"
            return found
        return None

    def step(self, done: float, state: Callable[[], State], *, ahead: float = 0.0) -> None:
        """Write a checkpoint if one is due, and end the run if that was asked for.

        Args:
            done: iterations so far; with a fraction inside of one.
            state: returns what to write, a float ``done`` among its facts.
            ahead: iterations that this step took.

        Raises:
            Interrupted: somebody asked for the end.
            DataError: the checkpoint cannot be written.
        """
        stop, due = self._owner.ranks.any(
            [self._owner.stop.requested, self._is_due(done, ahead)]
        )
        if stop:
            self.save(done, state())
            raise Interrupted(
                f"stopped after {self._unit} {done:.10g}; --resume goes on there"
            )
        if due:
            self.save(done, state())

    def _is_due(self, done: float, ahead: float) -> bool:
        """Whether a checkpoint is due; the first process's clock counts."""
        owner, every = self._owner, self._owner._settings.checkpoint_every
        if every:
            return int(done / every + 1e-9) > int((done - ahead) / every + 1e-9)
        return owner.ranks.rank == 0 and time.monotonic() - owner._last > owner._pause

    def save(self, done: float, state: State, *, only: bool = False) -> None:
        """Write a checkpoint.

        Args:
            done: iterations so far.
            state: what to write.
            only: remove the earlier ones of this stage.

        Raises:
            DataError: it cannot be written; earlier ones stay.
        """
        owner, start = self._owner, time.monotonic()
        parts = iter(state.parts)
        if owner.ranks.rank:
            _exhaust(parts)
            return
        if not owner._ours:  # what an earlier run left, which this one does not go on from
            owner.clear()
            owner._ours = True
        facts = {
            **state.facts,
            "done": done,
            "identity": owner._identity,
            "lowered_to": owner.lowered_to,
        }
        path = owner.folder / f"{self._name}-{round(done * 1000):012d}"
        try:
            if not write_snapshot(path, State(facts=facts, parts=parts)):
                _exhaust(parts)  # others wait to give theirs
                logger.warning("no checkpoint at %s: values are not finite", done)
                return
        except OSError as error:
            raise DataError(
                f"checkpoint cannot be written ({error.strerror or error})",
                where=str(path),
                hint="free some space, or make fewer images",
            ) from error
        for old in self._snapshots()[: -1 if only else -_KEPT]:
            shutil.rmtree(old, ignore_errors=True)
        owner._last = time.monotonic()
        owner._pause = max(_SECONDS, _SHARE * (owner._last - start))
        logger.info("checkpoint %s", path)

    def end(self, done: float, state: Callable[[], State]) -> None:
        """Write a checkpoint of the finished stage, unless it was over in no time."""
        owner = self._owner
        long = owner.ranks.rank == 0 and time.monotonic() - owner._last > _SECONDS
        if owner.ranks.any([bool(owner._settings.checkpoint_every) or long])[0]:
            self.save(done, state())

    def _snapshots(self) -> list[Path]:
        return sorted(
            path
            for path in _snapshots(self._owner.folder)
            if path.name.rpartition("-")[0] == self._name
        )


@contextlib.contextmanager
def open_checkpoints(
    output: Path, identity: Identity, settings: CheckpointSettings, ranks: Ranks = ALONE
) -> Iterator[Checkpoints]:
    """Keep checkpoints beside ``output``.

    The folder stays if there is a snapshot in it; its temporary files never do.

    Raises:
        DataError: the folder cannot be made, or another run uses it.
        SettingsError: see `Checkpoints`.
    """
    folder = checkpoint_folder(output)
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(exist_ok=True)
            lock = stack.enter_context((folder / "lock").open("w"))
        except OSError as error:
            raise DataError(
                f"no folder can be made there ({error.strerror or error})",
                where=str(output.parent),
                hint="choose another place with -o",
            ) from error
        if not _lock(lock):
            raise DataError(
                "another run is writing this file",
                where=str(output),
                hint="wait for it, or choose another name with -o",
            )
        stack.callback(_tidy, folder)
        ImageWriter.remove_leftovers(output)
        found = Checkpoints(folder, identity, settings, ranks)
        shutil.rmtree(found.work, ignore_errors=True)
        found.work.mkdir()
        yield found


def _tidy(folder: Path) -> None:
    shutil.rmtree(folder / _WORK, ignore_errors=True)
    for path in folder.glob(".*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
    if not _snapshots(folder):
        shutil.rmtree(folder, ignore_errors=True)


def _exhaust(parts: Iterator[object]) -> None:
    for _ in parts:
        pass


def _snapshots(folder: Path) -> list[Path]:
    return sorted(folder.glob("[a-z]*-????????????"))


def _lock(file: IO[str]) -> bool:
    """Take a lock that ends with the process; where there are none, say yes."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        pass
    return True
