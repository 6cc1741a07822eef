"""Running: jobs trained in a world of the pool, as `mimogrid train` trains them."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

from mimogrid.shell.device.place import RankPlace
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.run import report, train
from mimogrid.shell.world.launch import Pool


def trained(
    pool: Pool, job: Job, folder: Path, *, resume: bool = False, changed: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Train a job in a folder to its end, or go on there with keys that are `changed`; return its report."""
    folder.mkdir(exist_ok=True)
    arguments = (job, None, str(folder), str(folder) if resume else None, changed)
    said = pool.run("mimogrid.shell.run.train:in_world", job.topology.world_size, *arguments)
    return next(report for report in said if report)


def briefly(place: RankPlace, job: Job, *arguments: Any) -> Any:
    """Train as the command does; in the end examine one batch of each task, not 1,280 samples, and draw five."""
    with patch.multiple(report, READ_COUNT=1, OTHER_COUNT=1, ROWS=1):
        return train.in_world(place, job, *arguments)
