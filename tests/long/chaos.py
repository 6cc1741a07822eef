"""A run whose nodes come and go at random: ``make chaos``, or ``make chaos MINUTES=5 SEED=1``.

    python tests/long/chaos.py [--minutes 30] [--seed N] [--summary FILE]

Up to two nodes of two ranks train `examples/elastic`. Now and then one of its agents or ranks is killed or stopped, or
an agent is asked to leave, or added. Where an agent gives up by itself, all are started again. What happens when is
drawn by the seed, which is printed. In the end the run is asked to stop. Then every step up to there must have been
done once, in order, with the losses of a run of as many steps that nothing happened to.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import attrs

import launching
import nodes
from mimogrid.shell.job.jobs import open_job
from mimogrid.shell.run.folders import METRICS
from mimogrid.shell.run.interruptions import interruptions_of
from mimogrid.shell.world.launch import Pool


JOB = Path(__file__).parents[2] / "examples/elastic/job.toml"
SLOW = "delay rank 0 every step for 0.2 s at NORM"
"""So that a calm run of as many steps takes a part of the time."""
PAUSE_S, PAUSE_STEPS, PATIENCE_S = 20.0, 12, 120.0
"""The longest time from one disturbance to the next, or the most steps, for which there is patience."""
STOPPED_S = (1.0, 12.0)
LIMIT_S = 300.0
"""How long the run may take to go on after the last disturbance, and to stop."""
TOLERANCE = 1e-9
STEADY = ("optimizer.name=sgd", "optimizer.lr=0.01")
"""Under AdamW the rounding of one layout against another grows from 1e-16 to 1e-3 within 160 steps of this job."""


@attrs.define
class Chaos:
    """Disturbs a cluster; `told` counts what it did."""

    cluster: nodes.Cluster
    folder: Path
    random: random.Random
    begun: float = attrs.field(factory=time.monotonic)
    told: collections.Counter[str] = attrs.field(factory=collections.Counter[str])

    def pause(self) -> None:
        """Wait for a moment: some steps later, or some time, in which a world may just have begun to start."""
        begun, steps = time.monotonic(), steps_of(self.folder)
        if self.random.random() < 0.5:
            time.sleep(self.random.uniform(0.0, PAUSE_S))
            return
        wanted = self.random.randint(1, PAUSE_STEPS)
        while time.monotonic() - begun < PATIENCE_S and steps_of(self.folder) < steps + wanted:
            agents = self.cluster.agents
            if not agents or not all(agent.is_alive() for agent in agents):
                return
            time.sleep(0.1)

    def disturb(self) -> None:
        """Do one thing that is possible now."""
        self.reap()
        agents, ranks = self.cluster.agents, self._ranks()
        kinds = (["add"] if len(agents) < nodes.NODES_MOST else []) + (
            ["kill an agent", "stop an agent", "remove"] if agents else []
        )
        kinds += ["kill a rank", "stop a rank", "stop a rank for a while"] if ranks else []
        kind = self.random.choice(kinds)
        at = self.random.random()
        agent, rank = _pick(agents, at), _pick(ranks, at)
        self._say(kind)
        match kind:
            case "add":
                self.cluster.add()
            case "kill an agent":
                self.cluster.remove(agent)
            case "remove":
                self.cluster.remove(agent, signal.SIGTERM)
            case "stop an agent":
                self._stop(agent.pid)
            case "kill a rank":
                _signal(rank, signal.SIGKILL)
            case "stop a rank":
                _signal(rank, signal.SIGSTOP)
            case _:
                self._stop(rank)

    def _stop(self, pid: int) -> None:
        """Stop a process for a while."""
        _signal(pid, signal.SIGSTOP)
        time.sleep(self.random.uniform(*STOPPED_S))
        _signal(pid, signal.SIGCONT)

    def reap(self) -> None:
        """Start torchrun again on no node where an agent has ended by itself, as what schedules nodes does.

        An agent that another one left while they met gives up after a minute, and its rendezvous is closed for good.
        """
        if ended := [agent for agent in self.cluster.agents if not agent.is_alive()]:
            self._say(f"an agent ended with code {ended[0].exitcode}")
            self.cluster.clear()

    def settle(self) -> None:
        """Let the run go on, on all nodes. Raises AssertionError where it does not."""
        wanted, begun = steps_of(self.folder) + 10, time.monotonic()
        while steps_of(self.folder) < wanted:
            assert time.monotonic() - begun < LIMIT_S, (
                f"the run does not go on: {self.cluster.said.read_text()[-5000:]}"
            )
            self.reap()
            while len(self.cluster.agents) < nodes.NODES_MOST:
                self.cluster.add()
            time.sleep(0.5)

    def _ranks(self) -> list[int]:
        """The ranks that train now: of the holders of the lock, those that have an agent as their parent."""
        agents = {agent.pid for agent in self.cluster.agents}
        return sorted(pid for pid in launching.holders(self.folder) if pid not in agents)

    def _say(self, what: str) -> None:
        self.told[what] += 1
        print(f"{time.monotonic() - self.begun:6.1f} s  step {steps_of(self.folder)}: {what}", flush=True)


def _pick(candidates: Any, at: float) -> Any:
    return candidates[int(at * len(candidates))] if candidates else None


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
        os.kill(pid, number)


def steps_of(folder: Path) -> int:
    """How many steps a run has in its metrics."""
    path = folder / METRICS
    return len(path.read_bytes().splitlines()) if path.is_file() else 0


def disturbed(folder: Path, said: Path, *, seconds: float, seed: int) -> Chaos:
    """Train for some time while nodes come and go; let the run go on once more, and stop it."""
    arguments = ["train", str(JOB), "--set", f"train.run_dir={folder}", "--set", "train.steps=1000000"]
    arguments += [word for override in STEADY for word in ("--set", override)]
    with nodes.cluster(arguments, said, fault=SLOW) as cluster:
        chaos = Chaos(cluster, folder, random.Random(seed))
        chaos.cluster.add()
        while time.monotonic() - chaos.begun < seconds:
            chaos.pause()
            chaos.disturb()
        chaos.settle()
        for agent in [*cluster.agents]:
            os.kill(agent.pid or 0, signal.SIGTERM)
        cluster.join(LIMIT_S)
    return chaos


def wrong_with(lines: list[dict[str, Any]], calm: list[dict[str, Any]]) -> str:
    """Return what is wrong with the metrics of a run, beside those of a calm one; "" if nothing is."""
    if [line["step"] for line in lines] != [*range(len(lines))]:
        return "steps are lost, doubled, or out of order"
    for ours, theirs in zip(lines, calm, strict=True):
        if _difference(ours, theirs) > TOLERANCE:
            return f"step {ours['step']} has the loss {ours['loss']!r}, and {theirs['loss']!r} in calm"
    return ""


def _difference(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    return float(abs(ours["loss"] - theirs["loss"]) / abs(theirs["loss"]))


def main() -> int:
    """Disturb a run, compare it with a calm one, print what was lost. Returns 1 if they are not the same."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--summary", type=Path, help="write what was lost into this file, as JSON")
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    with Pool(4) as pool, tempfile.TemporaryDirectory() as name:  # its server forks all agents and ranks
        folder, calm = Path(name, "run"), Path(name, "calm")
        chaos = disturbed(folder, Path(name, "said"), seconds=60 * given.minutes, seed=given.seed)
        lines = [*map(json.loads, (folder / METRICS).read_text().splitlines())]
        print(f"{len(lines)} steps; now a calm run of as many", flush=True)
        overrides = [*STEADY, f"train.steps={len(lines)}", "train.evaluate=false", "train.checkpoint_every=0"]
        pool.run("mimogrid.shell.run.train:in_world", 4, open_job(JOB, overrides), None, str(calm))
        undisturbed = [*map(json.loads, (calm / METRICS).read_text().splitlines())]
        wrong = wrong_with(lines, undisturbed)
        lost = summary(interruptions_of(folder), chaos, lines)
        lost["loss_differs_by_at_most"] = max(map(_difference, lines, undisturbed))
        said = Path(name, "said").read_text()
    print(json.dumps(lost, indent=1))
    if given.summary:
        given.summary.write_text(json.dumps(lost, indent=1) + "\n")
    if wrong:
        print(said)
    print(wrong or "every step was done once, in order, with the losses of the calm run")
    return bool(wrong)


def summary(found: list[dict[str, Any]], chaos: Chaos, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what happened, and what was lost by it."""
    noticed = [i["noticing_s"] for i in found if i["noticing_s"] is not None]
    return {
        "disturbances": dict(chaos.told),
        "steps": len(lines),
        "interruptions": len(found),
        "failed_starts": sum(i["starts"] - 1 for i in found),
        "steps_repeated": sum(i["repeated"] for i in found),
        "lost_s": round(sum(i["lost_s"] for i in found), 1),
        "noticing_s": _middle_and_most(noticed),
        "restart_s": _middle_and_most([i["restart_s"] for i in found]),
    }


def _middle_and_most(seconds: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(seconds), 2), "most": round(max(seconds), 2)} if seconds else {}


if __name__ == "__main__":
    sys.exit(main())
