"""How long a run stands still when one of its ranks is lost, measured under torchrun on this machine.

    python benchmarks/recovery.py [--ranks 2] [--timeout-s 5] [--each 2]

torchrun trains `examples/elastic`. In turn a rank is killed (SIGKILL), and one is stopped (SIGSTOP), as one that hangs.
Each line is what the run itself notes (`interruptions.jsonl`), with the load of the machine.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mimogrid.shell.run.folders import HEARTBEATS, METRICS
from mimogrid.shell.run.interruptions import interruptions_of
from mimogrid.shell.world.heartbeat import read


JOB = Path(__file__).parents[1] / "examples/elastic/job.toml"
HARMS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}
LIMIT_S = 300.0


@contextlib.contextmanager
def run(folder: Path, ranks: int, timeout_s: float, said: Path) -> Iterator[None]:
    """Train under torchrun meanwhile."""
    settings = {"run_dir": folder, "timeout_s": timeout_s, "steps": 10**6}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={ranks}",
        "--max-restarts=1000",
    ]
    command += ["--standalone", "-m", "mimogrid", "train", str(JOB)]
    command += [f"--set=train.{name}={value}" for name, value in settings.items()]
    with said.open("w") as file:
        torchrun = subprocess.Popen(command, stdout=file, stderr=file)
        try:
            yield
        finally:
            torchrun.kill()  # its ranks end with it
            torchrun.wait()


def steps_of(folder: Path) -> int:
    """How many steps a run has in its metrics."""
    path = folder / METRICS
    return len(path.read_bytes().splitlines()) if path.is_file() else 0


def await_that(holds: Any, what: str, said: Path) -> None:
    """Wait until something holds. Raises TimeoutError with what the run has said."""
    begun = time.monotonic()
    while not holds():
        if time.monotonic() - begun > LIMIT_S:
            raise TimeoutError(f"not within {LIMIT_S:g} s: {what}\n{said.read_text()[-3000:]}")
        time.sleep(0.05)


def lost(folder: Path, harm: str, said: Path) -> dict[str, Any]:
    """Harm the last rank after some steps; return what the run notes of it when it is as far again."""
    steps, before = steps_of(folder), len(interruptions_of(folder))
    await_that(lambda: steps_of(folder) >= steps + 8, "eight steps", said)
    ranks = read(folder / HEARTBEATS)
    os.kill(ranks[max(ranks)].pid, HARMS[harm])
    await_that(lambda: len(interruptions_of(folder)) > before, f"a run goes on after a rank was {harm}", said)
    return interruptions_of(folder)[-1]


def main() -> None:
    """Print a line for each harm."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--timeout-s", type=float, default=5.0)
    parser.add_argument("--each", type=int, default=2)
    given = parser.parse_args()
    print(f"{given.ranks} ranks, train.timeout_s = {given.timeout_s:g}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as name:
        folder, said = Path(name, "run"), Path(name, "said")
        with run(folder, given.ranks, given.timeout_s, said):
            for harm in [*HARMS] * given.each:
                found = lost(folder, harm, said)
                facts = {key: found[key] for key in ("noticing_s", "restart_s", "repeated", "lost_s")}
                load = os.getloadavg()[0]
                print(f"a rank is {harm:8}", json.dumps(facts), f"load {load:.1f}", flush=True)


if __name__ == "__main__":
    main()
