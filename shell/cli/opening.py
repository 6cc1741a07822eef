"""Opening: a job for a command that only looks at it, with what is to be said of that on standard error."""

import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

from mimogrid.shell.job.builders import PlanWarning
from mimogrid.shell.job.jobs import Job, open_job


def opened(path: Path, overrides: Iterable[str] = (), *, run_code: bool, silent: bool) -> Job:
    """Open a job; note what cannot be checked and, unless `silent`, which code of the user's was run for it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PlanWarning)
        job = open_job(path, overrides, run_code=run_code)
    for warning in caught:
        print(f"note: {warning.message}", file=sys.stderr)
    if job.ran and not silent:
        print(f"note: to plan this, code was run: {', '.join(job.ran)} (--no-code: none).", file=sys.stderr)
    return job
