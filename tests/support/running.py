"""Running: jobs trained in a world of the pool, as `mimogrid train` trains them."""

from pathlib import Path
from typing import Any

from mimogrid.shell.job.jobs import Job
from mimogrid.shell.world.launch import Pool


def trained(pool: Pool, job: Job, folder: Path, *, resume: bool = False) -> dict[str, Any]:
    """Train a job in a folder to its end, or go on there; return its report."""
    folder.mkdir(exist_ok=True)
    arguments = (job, None, str(folder), str(folder) if resume else None)
    said = pool.run("mimogrid.shell.run.train:in_world", job.topology.world_size, *arguments)
    return next(report for report in said if report)
