"""Say in one line that native code died, where the process could no longer say anything itself.

The libraries that read and run a network are written in C++, and some files make them crash. So
the command runs in a child process, which takes a millisecond to fork since nothing is imported
yet, and the parent waits. Where there is no fork, and with ``--debug``, the command runs in the
process itself.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

__all__ = ["run_guarded"]

_PASSED_ON = (
    {signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    if hasattr(os, "fork")
    else set()
)
_ASKED_FOR = frozenset({"SIGHUP", "SIGINT", "SIGTERM", "SIGPIPE"})


def run_guarded(command: Callable[[], int], on_crash: Callable[[str], int]) -> int:
    """Run a command so that a crash of native code is noticed.

    Args:
        command: returns the exit code; run in a child process, in which this function returns,
            too, so that what is to be done at the end of the process is done.
        on_crash: given the name of the signal that killed the child, returns the exit code.
            It is not called for signals by which users and systems end a process: these end
            the parent in turn.
    """
    if not hasattr(os, "fork"):
        return command()
    alive, held = os.pipe()
    # Inherited from a process that ignores its children, this would lose the exit code of ours.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # Blocked before there is a child, so that none that comes early is lost on the parent.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)
    child = os.fork()
    if not child:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(held)
        threading.Thread(target=_end_with_parent, args=(alive,), daemon=True).start()
        return command()
    os.close(alive)
    code = _wait(child)
    os.close(held)
    if code >= 0:
        return code
    name = signal.Signals(-code).name
    if name not in _ASKED_FOR:
        return on_crash(name)
    signal.signal(-code, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {-code})
    os.kill(os.getpid(), -code)
    return 128 - code


def _wait(child: int) -> int:
    """Wait for the end of a process, and pass on what others send to this one.

    A terminal sends Ctrl-C to both; the kernel marks that, so that the child gets it once.
    """
    if not hasattr(signal, "sigwaitinfo"):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        received = signal.sigtimedwait(_PASSED_ON, 1.0)
        passed_on = received is not None and received.si_signo in _PASSED_ON - {signal.SIGCHLD}
        if received is not None and passed_on and received.si_code <= 0:  # sent by a process
            os.kill(child, received.si_signo)


def _end_with_parent(alive: int) -> None:
    """End the process when the parent has ended, however: the pipe ``alive`` then closes."""
    os.read(alive, 1)
    os._exit(3)
