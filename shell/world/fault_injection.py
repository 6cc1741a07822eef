"""Faults on purpose: what `core.faults.injection` describes, done to this process.

For tests of how runs end. Nothing happens unless the variable MIMOGRID_FAULT holds a fault, and a process that has one
says so before it begins; there is no key for it in a job file. After a restart by a launcher the fault is over.
"""

import os
import signal
import sys
import time

from mimogrid.core.faults.injection import Fault, Harm, parse


VARIABLE = "MIMOGRID_FAULT"


class InjectedError(RuntimeError):
    """Raised where a fault wants a rank to fail."""


def from_environment(rank: int) -> Fault | None:
    """Return the fault that this rank is to suffer, if there is one. Raises ValueError for what is none."""
    text = os.environ.get(VARIABLE)
    if not text or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return None
    fault = parse(text)
    if fault.rank != rank:
        return None
    sys.stderr.write(f"{VARIABLE}: {fault}\n")
    return fault


def strike(fault: Fault) -> None:
    """Do to this process what a fault says."""
    match fault.harm:
        case Harm.FAIL:
            raise InjectedError(f"a fault on purpose: {fault}")
        case Harm.DELAY:
            time.sleep(fault.seconds)
        case Harm.STOP:
            os.kill(os.getpid(), signal.SIGSTOP)
        case Harm.KILL:
            os.kill(os.getpid(), signal.SIGKILL)
