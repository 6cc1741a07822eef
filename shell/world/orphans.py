"""No orphans: a process of a world ends with the launcher that started it, whatever ends the launcher.

The child of a launcher holds the reading end of a pipe whose writing end only the launcher has. When the launcher
ends, the kernel closes that end. On Linux it then sends SIGKILL to this process, which may be stopped, or busy in a
library that does not return. Elsewhere a thread waits for the end of the pipe.

torchrun gives its ranks no such pipe. There the kernel sends SIGKILL when the parent ends (PR_SET_PDEATHSIG). The
server from which ranks are forked asks for the same. A process that it forks does not inherit this.
"""

import contextlib
import ctypes
import fcntl
import multiprocessing
import os
import select
import signal
import sys
import threading
from typing import Any


_PR_SET_PDEATHSIG = 1


def end_with_launcher() -> None:
    """End this process when the one that started it as a rank ends: a process of ours, or the agent of torchrun."""
    launcher = multiprocessing.parent_process()
    if launcher is not None:
        _end_with_pipe(launcher.sentinel)
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()


def end_with_parent() -> None:
    """End this process when the thread that started it ends; only on Linux."""
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the kernel knew
        os.kill(os.getpid(), signal.SIGKILL)


def _end_with_pipe(descriptor: int) -> None:
    """End this process when no process has the other end of a pipe any more."""
    try:
        api: Any = fcntl  # what only Linux has
        fcntl.fcntl(descriptor, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(descriptor, api.F_SETSIG, signal.SIGKILL)
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_ASYNC)
    except (AttributeError, OSError):
        threading.Thread(target=_wait_for_end, args=(descriptor,), daemon=True).start()
        return
    if select.select([descriptor], [], [], 0)[0]:  # it was closed before the kernel knew
        os.kill(os.getpid(), signal.SIGKILL)


def _wait_for_end(descriptor: int) -> None:
    with contextlib.suppress(OSError):
        select.select([descriptor], [], [])
    os.kill(os.getpid(), signal.SIGKILL)
