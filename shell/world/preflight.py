"""Preflight: whether this machine can hold a local world, asked before any process is started.

What a rank keeps all the time is known exactly (`core.pricing.footprint`), so a world that needs more than there is
would be ended by the kernel, minutes later and without a word.
"""

import resource
from collections.abc import Iterator

from mimogrid.core.base.errors import Problem
from mimogrid.core.pricing.footprint import kept
from mimogrid.core.topology.topology import Topology
from mimogrid.shell.device import machine


RANKS_PER_CORE, FEW_RANKS = 4, 8
"""How many ranks may share a core; so few may run on any machine."""
PROCESS_BYTES = 100 << 20
"""What a forked process holds for itself before it has any tensor."""
FILES, FILES_PER_RANK = 64, 4
"""How many files the launcher has open, without its ranks and for each."""
_FORCE = "or go on with --force"


def problems(topology: Topology, *, on_host: bool) -> Iterator[Problem]:
    """Yield why this machine is too small for a world of local processes; `on_host`: tensors are in its memory."""
    size, cores = topology.world_size, machine.cores()
    if size > max(FEW_RANKS, RANKS_PER_CORE * cores):
        message = f"the job needs {size} ranks, and this machine has {cores} cores."
        remedy = f"Start it with torchrun on more machines, make the grids smaller, {_FORCE}."
        yield Problem("world_size", message, remedy)
        return  # the others cost time on so large a world
    needed = sum(PROCESS_BYTES + (kept(topology, rank).bytes if on_host else 0) for rank in range(size))
    available = machine.available_bytes()
    if available is not None and needed > available:
        message = (
            f"{size} ranks need at least {needed / 1e9:.1f} GB for weights, gradients and the optimizer, "
            f"and this machine has {available / 1e9:.1f} GB available."
        )
        yield Problem("memory", message, f"Use more machines or a smaller model, {_FORCE}.")


def allow_files(size: int) -> Iterator[Problem]:
    """Raise this process's limit of open files as far as it may; yield a problem where that is too low for a world."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = FILES + FILES_PER_RANK * size
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        message = f"a process may have {hard} files open; a launcher of {size} ranks needs {needed}."
        yield Problem("ulimit", message, f"Raise the limit: ulimit -n {max(1024, needed)}")
    else:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
