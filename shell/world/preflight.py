"""Preflight: whether this machine can run a local world, asked before any process is started (`rehearsal`: any world).

Each check says what there is and what is needed. What a rank keeps all the time is known exactly
(`core.pricing.footprint`), and so is the size of a checkpoint. So a world that does not fit is refused in words: the
kernel would end it minutes later, or the disk would be full at the first checkpoint.
"""

import math
import os
import resource
import shutil
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path

import attrs

from mimogrid.core.base.errors import Problem
from mimogrid.core.base.units import in_bytes
from mimogrid.core.pricing.footprint import kept
from mimogrid.core.topology.topology import Topology
from mimogrid.core.update.contents import table_of
from mimogrid.shell.device import machine


RANKS_PER_CORE, FEW_RANKS = 4, 8
"""How many ranks may share a core; so few may run on any machine."""
PROCESS_BYTES = 100 << 20
"""What a forked process holds for itself before it has any tensor."""
FILES, FILES_PER_RANK = 64, 4
"""How many files the launcher has open, without its ranks and for each."""
DTYPE_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
_FORCE = "or go on with --force"


@attrs.frozen
class Check:
    """One thing that a world needs: what of it there is, and the problem if that is too little.

    Attributes:
        subject: the thing.
        fact: what there is, and what is needed, with numbers.
        problem: what is wrong, with the remedy; None where all is well.
        is_final: whether a run cannot even be tried.
    """

    subject: str
    fact: str
    problem: Problem | None = None
    is_final: bool = False


def checks(topology: Topology, *, on_host: bool, folder: Path | None) -> Iterator[Check]:
    """Yield what a world of local processes needs; `on_host`: tensors are in the machine's memory.

    `folder` is where the run writes, if it does. It need not exist.
    """
    ranks = _ranks(topology)
    yield ranks
    if ranks.problem is None:  # the others cost time on so large a world
        yield _memory(topology, on_host=on_host)
        if folder is not None:
            yield from disk(topology, folder)
    yield _files(topology.world_size)
    yield _loopback()


def problems(found: Iterable[Check], *, force: bool) -> list[Problem]:
    """Return the problems that keep a run from starting; with `force` only those without which none can."""
    return [check.problem for check in found if check.problem and (check.is_final or not force)]


def table(found: Iterable[Check]) -> Iterator[str]:
    """Yield a line for each check, and below it its remedy."""
    for check in found:
        yield f"{'ok' if check.problem is None else 'NO':3} {check.subject:10} {check.fact}"
        if check.problem:
            yield f"{'':14} {check.problem.remedy}"


def _ranks(topology: Topology) -> Check:
    size, cores = topology.world_size, machine.cores()
    fact = f"the job needs {size} ranks, and this machine has {cores} cores."
    remedy = f"Start it with torchrun on more machines, make the grids smaller, {_FORCE}."
    too_many = size > max(FEW_RANKS, RANKS_PER_CORE * cores)
    return Check("ranks", fact, Problem("world_size", fact, remedy) if too_many else None)


def _memory(topology: Topology, *, on_host: bool) -> Check:
    size, available = topology.world_size, machine.available_bytes()
    each = [PROCESS_BYTES + (kept(topology, rank).bytes if on_host else 0) for rank in range(size)]
    largest = max(range(size), key=each.__getitem__)
    there = "an unknown amount" if available is None else in_bytes(available)
    fact = (
        f"{size} ranks need at least {in_bytes(sum(each))} for processes, weights, gradients and the optimizer "
        f"(rank {largest} needs most, {in_bytes(each[largest])}), and this machine has {there} available."
    )
    is_short = available is not None and sum(each) > available
    remedy = f"Use more machines or a smaller model, {_FORCE}."
    return Check("memory", fact, Problem("memory", fact, remedy) if is_short else None)


def device_problems(
    topology: Topology, rank: int, device: str, memory_bytes: int | None
) -> Iterator[Problem]:
    """Yield why a rank does not fit on the device that it has; None: it has none of its own."""
    if memory_bytes is None or rank not in topology.ranks:
        return
    needed = kept(topology, rank).bytes
    if needed > memory_bytes:
        message = (
            f"rank {rank} needs at least {in_bytes(needed)} for weights, gradients and the optimizer, and its device "
            f"'{device}' has {in_bytes(memory_bytes)}."
        )
        remedy = "Use more ranks along tp or pp, optimizer.sharded, or bf16; `mimogrid plan` finds what fits."
        yield Problem("memory", message, remedy)


def too_small(size: int, needed: int) -> Problem:
    """Return that a launcher has started too few ranks."""
    return Problem(
        "world_size",
        f"the job needs {needed} ranks (0..{needed - 1}), the launcher started {size}.",
        f"Start {needed} processes (torchrun --nproc-per-node), or make the grids smaller.",
    )


def disk(topology: Topology, folder: Path) -> Iterator[Check]:
    """Yield whether a run can write its folder, which need not exist, and has the room for its checkpoints."""
    there = next(
        parent for parent in (folder.absolute(), *folder.absolute().parents) if os.path.isdir(parent)
    )
    writable = os.access(there, os.W_OK | os.X_OK)
    fact = f"'{there}' can{'' if writable else 'not'} be written."
    remedy = "Make it writable for this user, or name another: train.run_dir."
    yield Check("folder", fact, None if writable else Problem("train.run_dir", fact, remedy), is_final=True)
    copies, free = topology.spec.train.keep_checkpoints + 1, shutil.disk_usage(there).free
    needed = copies * checkpoint_bytes(topology)
    fact = f"{copies} checkpoints take {in_bytes(needed)}, and '{there}' has {in_bytes(free)} left."
    remedy = f"Name another folder (train.run_dir), lower train.keep_checkpoints, {_FORCE}."
    yield Check("disk", fact, Problem("train.run_dir", fact, remedy) if needed > free else None)


def checkpoint_bytes(topology: Topology) -> int:
    """Return how large a checkpoint is; what modules of the user's have is not known, and not counted."""
    tensors = table_of(topology, {}, (), steps_taken=1).values()
    return sum(math.prod(of.shape) * max(DTYPE_BYTES[dtype] for dtype in of.dtypes) for of in tensors)


def _files(size: int) -> Check:
    """Raise this process's limit of open files as far as it may be; a world needs several for each rank."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = FILES + FILES_PER_RANK * size
    has = math.inf if resource.RLIM_INFINITY in {soft, hard} else max(soft, hard)
    fact = f"a process may have {has} files open; a launcher of {size} ranks needs {needed}."
    if has < needed:
        remedy = f"Raise the limit: ulimit -n {max(1024, needed)}"
        return Check("files", fact, Problem("ulimit", fact, remedy), is_final=True)
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    return Check("files", fact)


def _loopback() -> Check:
    """Take a port and give it back: ranks of a local world meet on loopback."""
    try:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
    except OSError as error:
        fact = f"no port of 127.0.0.1 can be opened: {error.strerror}."
        remedy = "Let this process open ports on loopback: a sandbox or a full table of ports is in the way."
        return Check("ports", fact, Problem("loopback", fact, remedy), is_final=True)
    return Check("ports", "ranks can meet on 127.0.0.1.")
