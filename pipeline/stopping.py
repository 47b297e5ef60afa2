"""Let a signal end a long computation where it can be taken up again.

SIGINT (Ctrl-C) and SIGTERM normally end a command where it stands. Inside `deferred_stop` the first
one only leaves a note, and the computation ends at the next step, when it has written a checkpoint;
the second one ends it at once.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

__all__ = ["Interrupted", "StopRequest", "deferred_stop", "terminable"]

_SAME = 0.5
"""Seconds within which two signals are one: a signal to a process group reaches this process from
its sender, and once more from the parent that passes it on (`pipeline.crash`)."""

_Handler = Callable[[int, FrameType | None], object]


class Interrupted(KeyboardInterrupt):
    """Ended on request; the text says how to go on."""


class StopRequest:
    """Whether the computation is to end.

    Attributes:
        requested: whether it is.
    """

    def __init__(self) -> None:
        self.requested = False
        self._since = 0.0

    def note(self, number: int, frame: FrameType | None) -> None:
        """Take note of a signal: its handler."""
        now = time.monotonic()
        if self.requested and now - self._since > _SAME:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested, self._since = True, now


@contextlib.contextmanager
def deferred_stop() -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a request while the block runs.

    Outside the main thread, where Python handles no signals, nothing changes.

    Raises:
        KeyboardInterrupt: at the end, if there was a request that nobody met; at once with the
            second signal.
    """
    request = StopRequest()
    with _handled(request.note, signal.SIGINT, signal.SIGTERM):
        yield request
    if request.requested:
        raise KeyboardInterrupt


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM end the block as SIGINT does, so that what it began is cleaned up.

    The same signal may come once more, see ``_SAME``: that one is waited for, and does nothing.
    """
    last = -_SAME

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > _SAME:
            last = now
            raise KeyboardInterrupt

    with _handled(interrupt, signal.SIGINT, signal.SIGTERM):
        try:
            yield
        except KeyboardInterrupt:
            time.sleep(max(0.0, last + _SAME - time.monotonic()))
            raise


@contextlib.contextmanager
def _handled(handler: _Handler, *numbers: signal.Signals) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
