"""How much a checkpoint holds up training: the steps around a save, when it is waited for and when it is not.

    python benchmarks/checkpoint.py [JOB] [--set KEY=VALUE ...] [--saves N]

Between saves there are some steps. A save costs what these take longer, together, than as many steps without one:
the ratio is (seconds of a save and the steps after it) / (seconds of as many median steps). `held up` is the time from
a save point until the next step begins. The first save, which also plans and takes memory for copies, does not count.
Writing takes the same processor time in both ways. What is gained is that a step need not wait for the disk, and that
ranks write while others compute; on a machine whose cores are all busy, the time of the writers is still paid for.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from mimogrid.shell.checkpoint.saving import open_saver
from mimogrid.shell.checkpoint.state import manifest_of, slices_to_save
from mimogrid.shell.device.place import RankPlace
from mimogrid.shell.job.jobs import Job, open_job
from mimogrid.shell.runtime.session import open_session
from mimogrid.shell.runtime.train_step import train_step
from mimogrid.shell.world.launch import Pool


JOB = Path(__file__).with_name("step_time.toml")
BETWEEN = 4
"""Steps between two saves: both legs end in them."""


def in_world(place: RankPlace, job: Job, folder: str, saves: int, in_background: bool) -> dict[str, Any]:
    """Measure one rank."""
    with open_session(place, job) as session:
        runtime = session.runtime
        assert runtime is not None
        steps: list[float] = []
        held: list[float] = []
        around: list[float] = []
        with open_saver(Path(folder), runtime.group, keep=1) as saver:
            following = job.step(0)
            for index in range((saves + 2) * BETWEEN):
                step, following = following, job.step(index + 1)
                begun = time.perf_counter()
                runtime.has_saved = saver.is_ready
                if train_step(runtime, index, step, following).all_saved:
                    saver.advance()
                steps.append(time.perf_counter() - begun)
                if (index + 1) % BETWEEN == 0 and index >= BETWEEN:
                    around.append(sum(steps[-BETWEEN:]) + (held[-1] if held else 0.0))
                if (index + 1) % BETWEEN == 0:
                    begun = time.perf_counter()
                    saver.begin(slices_to_save(runtime), manifest_of(runtime, index + 1))
                    if not in_background:
                        saver.wait_for_save()
                    held.append(time.perf_counter() - begun)
        return {"steps": steps, "held_s": held[1:-1], "around_s": around[1:]}


def measured(pool: Pool, job: Job, saves: int, *, in_background: bool) -> dict[str, float]:
    """Run a world; return what its first rank saw."""
    name = f"{Path(__file__).stem}:in_world"
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        seen = pool.run(name, job.topology.world_size, job, folder, saves, in_background)[0]
        size = sum(path.stat().st_size for path in Path(folder).glob("*/*"))
    return {
        "checkpoint_mb": size / 1e6,
        "step_ms": 1e3 * statistics.median(seen["steps"]),
        "held_up_ms": 1e3 * statistics.median(seen["held_s"]),
        "around_ms": 1e3 * statistics.median(seen["around_s"]),
        "around": statistics.median(seen["around_s"]) / (BETWEEN * statistics.median(seen["steps"])),
    }


def main() -> None:
    """Run the job in both ways and print a table; with --json, the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", nargs="?", default=str(JOB))
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    job = open_job(given.job, given.overrides)
    with Pool(job.topology.world_size) as pool:
        rows = {
            way: measured(pool, job, given.saves, in_background=way == "in background")
            for way in ("waited for", "in background")
        }
    if given.json:
        print(json.dumps(rows))
        return
    machine = f"{platform.platform()}, {os.cpu_count()} cores"
    print(f"{machine}, Python {platform.python_version()}, torch {torch.__version__}")
    print(f"{'':16}" + "".join(f"{column:>15}" for column in rows["waited for"]))
    for way, row in rows.items():
        print(f"{way:16}" + "".join(f"{value:15.3f}" for value in row.values()))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
