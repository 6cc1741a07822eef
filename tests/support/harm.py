"""Harm: runs in which something goes wrong on purpose, and what must be true of them afterwards.

A *case* is a fault, by its line in the notation (`injection`), and what is to become of the run: it
ends with a report that names the rank, or goes on as if nothing had happened. Either way the run that is resumed
ends with the weights of one that nothing ever happened to.
"""

import itertools
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import attrs

from injection import Fault, Harm, injected, parse
from layouts import job as written
from mimogrid.core.base.errors import WorldError
from mimogrid.core.job.spec import JobSpec, TrainSpec
from mimogrid.shell.device.place import RankPlace
from mimogrid.shell.job.jobs import Job, open_job
from mimogrid.shell.run import metrics, train
from mimogrid.shell.runtime.agreement import Outcome
from mimogrid.shell.runtime.rank import RankRuntime
from mimogrid.shell.runtime.train_step import train_step
from mimogrid.shell.world.launch import Pool


STEPS, EVERY, LIMIT_S = 6, 2, 3.0
SHORT_S, LONG_S = 0.4, 60.0

AT_RANK: dict[int, dict[str, str]] = {
    # The first rank of the job, at the source; in step 3 there is a checkpoint to go back to.
    0: {
        "rendezvous": "step 0 {}at rendezvous",
        "building": "step 0 {}at building",
        "warm-up": "step 3 {}at enc.0 F0",
        "send": "step 3 {}at enc.0 SEND_F2*",
        "steady": "step 3 {}at enc.0 B1",
        "drain": "step 3 {}at enc.0 B3",
        "reduction": "step 3 {}at enc.0 REDUCE0",
        "norm": "step 3 {}at NORM",
        "optimizer": "step 3 {}at UPDATE",
        "checkpoint": "step 3 {}at saving a checkpoint",
        "before it is published": "step 3 {}at publishing a checkpoint",
        "after it is published": "step 3 {}at a checkpoint is published",
        "results": "step 5 {}at writing results",
    },
    # The last stage, where the loss is.
    3: {
        "rendezvous": "step 0 {}at rendezvous",
        "warm-up": "step 3 {}at lm.1 F0",
        "wait": "step 3 {}at lm.1 WAIT_RECV_F2*",
        "steady": "step 3 {}at lm.1 B1",
        "drain": "step 3 {}at lm.1 B3",
        "norm": "step 3 {}at NORM",
        "optimizer": "step 3 {}at UPDATE",
        "checkpoint": "step 3 {}at saving a checkpoint",
    },
}
"""Moments by rank and phase; the braces take how long a delay is."""


@attrs.frozen
class Case:
    """A fault, and whether the run is to go on with it."""

    fault: Fault
    phase: str
    goes_on: bool

    def __str__(self) -> str:
        return str(self.fault)

    @property
    def is_waited_for(self) -> bool:
        """Whether only a time limit ends the run."""
        return self.fault.harm in {Harm.STOP, Harm.DELAY} and not self.goes_on


@attrs.frozen
class Ended:
    """What came of a run: the first line of its report ("": it went on) and the seconds until then."""

    line: str
    seconds: float
    report: str


def cases() -> Iterator[Case]:
    """Yield every combination of harm, rank and phase."""
    for rank, phases in AT_RANK.items():
        for (phase, text), harm in itertools.product(
            phases.items(), ("fail", "kill", "stop", "late", "slow")
        ):
            lasting = {"late": f"for {LONG_S:g} s ", "slow": f"for {SHORT_S:g} s "}.get(harm, "")
            word = "delay" if lasting else harm
            yield Case(parse(f"{word} rank {rank} {text.format(lasting)}"), phase, goes_on=harm == "slow")


def job(grids: str = "enc(1,1,2)@0 lm(1,2,1)@2") -> JobSpec:
    """Return a small job: an encoder on two dp ranks, a language model on two stages, four ranks in all."""
    spec = written(grids, data={"absent": {"enc": 0.0}})
    limits = TrainSpec(
        steps=STEPS, checkpoint_every=EVERY, checkpoint_async=False, evaluate=False, timeout_s=LONG_S
    )
    return attrs.evolve(spec, train=limits)


def in_world(place: RankPlace, job: Job, folder: str, resume: str | None, fault: str) -> Any:
    """Train with a fault ("": none)."""
    with injected(fault):
        return train.in_world(place, job, None, folder, resume)


def watched(place: RankPlace, job: Job, folder: str, fault: str, window: int) -> Any:
    """Train with a fault; who straggles is told after so many steps."""
    with patch.object(metrics, "WINDOW", window):
        return in_world(place, job, folder, None, fault)


def run(pool: Pool, job: Job, folder: Path, fault: str = "", *, resume: bool = False) -> Ended:
    """Train a job in a folder, or resume it there."""
    folder.mkdir(exist_ok=True)
    begun, report = time.monotonic(), ""
    try:
        pool.run(
            "harm:in_world", job.topology.world_size, job, str(folder), str(folder) if resume else None, fault
        )
    except WorldError as error:
        report = str(error)
    return Ended(report.partition("\n")[0], time.monotonic() - begun, report)


def judge(pool: Pool, job: Job, folder: Path, whole: Path, case: Case) -> Ended:
    """Run a case and what is resumed from it. Raises AssertionError where it is not as it must be."""
    # On a busy machine ranks wait for each other for seconds; the limit is short only where it is reached.
    limited = open_job(job.path, [f"train.timeout_s={LIMIT_S}"]) if case.is_waited_for else job
    ended = run(pool, limited, folder, str(case.fault))
    if case.goes_on:
        assert not ended.report, ended.report
    else:
        assert ended.line.startswith(f"rank {case.fault.rank} (host "), ended.report
        assert f"at step {case.fault.step} in '" in ended.line, ended.report
        assert HOW[case.fault.harm] in ended.line, ended.report
        published = sorted(path.name for path in (folder / "checkpoints").glob("step-*[0-9]"))
        resumed = run(pool, job, folder, resume=True)
        assert not resumed.report, resumed.report
        if published:
            assert _resumed_at(folder) == int(published[-1].removeprefix("step-"))
    assert left(whole) == left(folder)
    return ended


HOW = {
    Harm.FAIL: "InjectedError",
    Harm.KILL: "was killed by signal 9",
    Harm.STOP: "is stopped",
    Harm.DELAY: "fell behind",
}


def left(folder: Path) -> tuple[bytes, list[float]]:
    """Return what a run leaves: its weights to the bit, and every loss."""
    losses = json.loads((folder / "report.json").read_text())["losses"]
    return (folder / "weights.safetensors").read_bytes(), losses


def _resumed_at(folder: Path) -> int:
    lines = map(json.loads, (folder / "logs" / "rank-0.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if line["event"] == "resuming"][-1]


def asked(place: RankPlace, job: Job, folder: str, rank: int, step: int) -> Any:
    """Train; in one step one rank gets a signal that asks it to stop."""

    def disturbed(runtime: RankRuntime, index: int, *arguments: Any, **named: Any) -> Outcome:
        if (runtime.rank, index) == (rank, step):
            os.kill(os.getpid(), signal.SIGUSR1)
        return train_step(runtime, index, *arguments, **named)

    with patch.object(train, "train_step", disturbed):
        return train.in_world(place, job, None, folder)
