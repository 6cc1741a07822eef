"""The flight recorder: what torch has noted of the last operations of this rank's process groups.

Torch notes the last 2,000 operations of a rank: group, sizes, Python stack, and whether it is complete; for gloo
collectives only, for NCCL also messages. A rank whose run fails leaves the record in ``flight-recorder/rank-N`` of the
run folder, a pickle that torch's analyzer reads:

    torchfrtrace RUN/flight-recorder --prefix rank- --allow-incomplete-ranks --just_print_entries

A rank that was killed leaves none. When the run goes on, the folder becomes ``flight-recorder-before``.
"""

import contextlib
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mimogrid.core.base.errors import PlanError


FOLDER, BEFORE = "flight-recorder", "flight-recorder-before"
TARGET = "TORCH_FR_DUMP_TEMP_FILE"
"""The variable by which torch knows where its own threads are to write records; a rank's number is put behind."""


@contextlib.contextmanager
def leaving_record(folder: Path, rank: int, *, backend: str) -> Iterator[None]:
    """Leave the record of this rank in the run folder if what is done meanwhile fails."""
    records = folder / FOLDER
    if backend == "nccl":
        # The watchdog of NCCL may end the process by itself after an operation that took too long.
        records.mkdir(exist_ok=True)
        os.environ.setdefault(TARGET, str(records.absolute() / "rank-"))
    try:
        yield
    except PlanError:
        raise
    except Exception:
        # The failure itself is what is to be reported. Some releases of torch have no record for gloo.
        with contextlib.suppress(OSError, AttributeError):
            records.mkdir(exist_ok=True)
            (records / f"rank-{rank}").write_bytes(record(backend))
        raise
    finally:
        with contextlib.suppress(OSError):  # there are records in it, or it was never made
            records.rmdir()


def record(backend: str) -> bytes:
    """Return torch's record of the operations of a backend in this process."""
    import torch  # noqa: PLC0415 -- run folders are looked at without torch

    c10d: Any = torch._C._distributed_c10d  # torch declares no types for these
    if backend == "nccl":
        return bytes(c10d._dump_nccl_trace())
    # Torch does not note which ranks are in a group of gloo, and its analyzer wants to know.
    facts = pickle.loads(c10d._dump_fr_trace())
    return pickle.dumps(facts | {"pg_config": _groups()})


def _groups() -> dict[str, dict[str, str]]:
    """Return name, purpose and ranks of each process group of this rank, as torch notes them for NCCL."""
    import torch.distributed as dist  # noqa: PLC0415

    return {
        group.group_name: {"name": group.group_name, "desc": group.group_desc, "ranks": str([*ranks])}
        for group, ranks in dist.distributed_c10d._world.pg_group_ranks.items()
    }


def put_aside(folder: Path) -> None:
    """Let the records of the last failure make room for those of the next one."""
    if (folder / FOLDER).is_dir():
        shutil.rmtree(folder / BEFORE, ignore_errors=True)
        (folder / FOLDER).rename(folder / BEFORE)
