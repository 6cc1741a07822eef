"""Apart: the same job on four ranks, beside megatron-core's schedule over the same transport.

All ranks share the device and talk through host memory; on the CPU, with gloo. Both sides run the forwards and
backwards of a step in 1F1B, sum the encoder's gradients over its dp ranks, and agree on loss and gradient norm.
These are compared before anything is timed. A step takes as long as its slowest rank, from a moment when all were
there.
"""

from typing import Any

from bench import compared, open_bench
from mimogrid.shell.device.place import RankPlace
from mimogrid.shell.job.jobs import Job
from schedule import open_schedule
from workload import Options


def in_world(place: RankPlace, job: Job, options: Options) -> dict[str, Any]:
    """Compare, on every rank of the world; all return the same."""
    with open_bench(place, job, options) as bench, open_schedule(bench) as theirs:
        return compared(bench, theirs, options.pairs)
