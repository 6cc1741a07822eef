r"""Probe: what the stages and edges of a job cost on this machine, measured in the job's own world.

The program of the job runs as it is in training, but *in turns*: of all actions that compute or join ranks only one
is under way at a time, and everybody else sleeps in a barrier.

    rank 0   F0 |      | F1 |    |            The order of turns is one in which a walk over the program starts its
    rank 1      | F0   |    | B0 |            actions. Messages are posted and waited for between the turns, where
                                              that walk does it, so no rank waits for what comes in a later turn.

So what is timed has the machine for itself, also where ranks share cores. How ranks then hold each other up is
measured by itself: in steps without turns, not by the clock, but by what they take of the cores. What that is more than
in turns (threads that carry messages, a core that is two threads of another, a memory too slow for all) makes
`cores` fewer than the machine has. Ranks that sleep, or have a core each, know no limit.

What a program does beside computing has its place in the costs, too: posting messages belongs to the stage that posts
them, and agreement, optimizer and the planning of a step are `update`. They are timed when all ranks do them at once,
as at the end of every step.
"""

import contextlib
import ctypes
import math
import os
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import tomlkit
import torch
import torch.distributed as dist

from mimogrid.core.costs import Costs, EdgeCosts, StageCosts
from mimogrid.core.errors import PlanError
from mimogrid.core.memory import peak_bytes
from mimogrid.core.schedule.actions import (
    Action,
    Compute,
    Direction,
    Kind,
    Norm,
    Recv,
    Reduce,
    Send,
    Tie,
    Update,
    Wait,
    WaitReduce,
)
from mimogrid.core.schedule.lower import Program, plan_step
from mimogrid.core.schedule.replay import meeting, replay
from mimogrid.core.schedule.work import may_split
from mimogrid.core.simulate import simulate
from mimogrid.core.topology import Link, Module, Stage, StageInfo
from mimogrid.core.traffic import message_bytes
from mimogrid.shell import costfile
from mimogrid.shell.device import Device
from mimogrid.shell.execute import Finisher, Timed, execute
from mimogrid.shell.jobs import Job, open_job
from mimogrid.shell.place import Place
from mimogrid.shell.pulse import Pulse
from mimogrid.shell.session import Session, open_session
from mimogrid.shell.stage import StageRunner
from mimogrid.shell.step import Crew
from mimogrid.shell.transport import Transport


WARM_UP = 2
"""Steps that are not counted: allocators, threads, connections."""
WHOLE, HALVES = "1f1b", "zb-h1"
"""Schedules under which a backward is timed the way that the job's own schedule does not run it."""
UNHINDERED = 0.95
"""Cores for this part of the ranks are as good as enough."""
PINGS = 21
LEAST_BYTES = 1 << 16
"""A bandwidth is measured with a message of this size, or with the job's own if that is larger."""


# -- what comes out ----------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Memory:
    """Bytes of a rank: the growth of what is resident from before its stages were built, and what a plan says."""

    peak: int
    planned: int


@attrs.frozen(kw_only=True)
class Probed:
    """What was measured of a job.

    Attributes:
        samples: per module, how many samples a microbatch has.
        costs: what was found, ready for a simulation.
        split: per stage that can be split, the seconds of its two halves over those of its whole backward.
        spread: per stage, how far the repetitions of an action are apart, relative to their median.
        memory: by rank.
        machine: where, and with which versions.
    """

    samples: Mapping[str, float]
    costs: Costs
    split: Mapping[str, float]
    spread: Mapping[str, float]
    memory: Mapping[int, Memory]
    machine: str

    def of_stages(self) -> dict[str, dict[str, Any]]:
        """Return the seconds of every stage, with the samples that they are for."""
        table = costfile.table_of(self.costs)["stages"]
        return {
            name: {"samples": self.samples[name.partition(".")[0]], **table.get(name, {})} for name in table
        }


def in_text(found: Probed, job: Job, others: Sequence[Probed] = ()) -> str:
    """Return a costs file; what was measured of other sizes of microbatches stands in its comments."""
    lines = [
        f"Measured by `mimogrid probe` for {job.path.name}. {found.costs.origin}.",
        "Seconds of stages are medians of the faster half of steps run in turns: nobody else computed. Those of",
        "joint actions are what they would take with a core for each rank. Posting messages is part of its stage;",
        "agreement, optimizer and planning are `update`. A backward is told by halves where it can be split; they",
        "add up to what the job's own schedule takes.",
    ]
    lines += [f"{name}: repetitions differ by {spread:.0%}" for name, spread in found.spread.items()]
    lines += [
        f"{name}: split in two, a backward takes {ratio:.3f} x as long as whole"
        for name, ratio in found.split.items()
    ]
    lines += [
        f"rank {rank}: memory grew by {of.peak / 1e6:.1f} MB; planned, without temporary buffers, "
        f"{of.planned / 1e6:.1f} MB"
        for rank, of in found.memory.items()
    ]
    for other in others:
        for name, seconds in other.of_stages().items():
            told = ", ".join(f"{key} {value:.4g}" for key, value in seconds.items())
            lines.append(f"other microbatches: {name}: {told}")
    comments = "".join(f"# {line}\n" for line in lines)
    return f"{comments}\n{tomlkit.dumps(costfile.table_of(found.costs))}"


def in_json(found: Probed, others: Sequence[Probed] = ()) -> dict[str, Any]:
    """Return all that was measured, for a script."""
    sizes = sorted((found, *others), key=lambda one: max(one.samples.values()))
    table = costfile.table_of(found.costs)
    return {
        "origin": found.costs.origin,
        "stages": {name: [one.of_stages()[name] for one in sizes] for name in found.of_stages()},
        "edges": table.get("edges", {}),
        "machine": table.get("machine", {}),
        "split": dict(found.split),
        "spread": dict(found.spread),
        "memory": {str(rank): attrs.asdict(of) for rank, of in found.memory.items()},
        "costs": in_toml(found.costs),
    }


def in_toml(costs: Costs) -> str:
    """Return costs as the text of a file without comments."""
    return tomlkit.dumps(costfile.table_of(costs))


# -- turns -------------------------------------------------------------------------------------------------


@attrs.frozen
class Reading:
    """Seconds of an action: from begin to end, without those in which others had the core, and those of computing."""

    lasted: float
    worked: float


@attrs.frozen(eq=False)
class Clock:
    """Reads how long this thread has been at something."""

    device: Device

    def now(self) -> tuple[float, float]:
        """Return seconds without those spent waiting for a core, and seconds of computing.

        Linux tells how long a thread has waited for a core; elsewhere nobody does, and the machine must be quiet.
        """
        self.device.finish()
        now = _at_work()
        return now, time.perf_counter() if self.device.is_asynchronous else time.thread_time()

    def since(self, begin: tuple[float, float]) -> Reading:
        """Return what has passed since `now` gave `begin`."""
        lasted, worked = (there - here for here, there in zip(begin, self.now(), strict=True))
        return Reading(max(lasted, 0.0), worked)


def _at_work() -> float:
    """Return the clock, less what this thread has waited for a core until that very moment.

    Who loses the core between the two readings would have waited by one and not by the other: a wait longer than the
    action makes it last nothing. So both are read until no wait has come between.
    """
    before = _waited_for_a_core()
    while True:
        now = time.perf_counter()
        waited = _waited_for_a_core()
        if waited == before:
            return now - waited
        before = waited


def _waited_for_a_core() -> float:
    try:
        return int(Path("/proc/thread-self/schedstat").read_text(encoding="ascii").split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


@attrs.frozen(eq=False)
class Turns:
    """Runs a rank's program in turns: as many actions as `counts` say, then wait for everybody, and so on."""

    counts: tuple[int, ...]
    group: dist.ProcessGroup
    clock: Clock
    readings: dict[Action, Reading] = attrs.field(factory=dict[Action, Reading])

    def __call__(
        self,
        actions: tuple[Action, ...],
        stages: Mapping[Stage, StageRunner],
        transport: Transport,
        finisher: Finisher,
        pulse: Pulse,
    ) -> tuple[Timed, ...]:
        """Run the program; return its timeline."""
        timeline: list[Timed] = []
        left = len(actions) - sum(self.counts)
        for turn, count in enumerate((*self.counts, left)):
            if turn:
                dist.barrier(self.group)
            for action in actions[len(timeline) : len(timeline) + count]:
                begin = self.clock.now()
                timeline += execute((action,), stages, transport, finisher, pulse, first=len(timeline))
                self.readings[action] = self.clock.since(begin)
        return tuple(timeline)


def turns_of(program: Program) -> Mapping[int, tuple[int, ...]]:
    """Return, for each rank, how many of its actions it does in each turn; what is left follows at once.

    Turn 0 has what comes before anybody computes. Each further one begins with one action that computes or joins
    ranks, on all of its ranks, and goes on with what a walk over the program starts before the next such action.
    """
    ranks = program.topology.ranks
    started = replay(program, {rank: program.of(rank) for rank in ranks}).started
    turns: dict[tuple[tuple[int, ...], Action], int] = {}
    counts: dict[int, defaultdict[int, int]] = {rank: defaultdict(int) for rank in ranks}
    for rank, action in started:
        if isinstance(action, Update):  # all ranks take the step at once, as they do in training
            continue
        turn = len(turns)
        if isinstance(action, Compute | Tie | Norm):
            key = program.joint(rank, action), meeting(action)
            turn = turns.setdefault(key, len(turns) + 1)
        counts[rank][turn] += 1
    return {rank: tuple(of[turn] for turn in range(len(turns) + 1)) for rank, of in counts.items()}


# -- steps in turns ----------------------------------------------------------------------------------------


@attrs.frozen
class Steps:
    """Steps in turns on one rank: of each action a reading per repetition, and seconds of planning a step."""

    actions: Mapping[Action, list[Reading]] = attrs.field(factory=lambda: defaultdict(list))
    planning: list[float] = attrs.field(factory=list)

    def lasted(self, action: Action) -> float:
        """Return how long an action takes."""
        return _usual([reading.lasted for reading in self.actions[action]])

    def worked(self, action: Action) -> float:
        """Return how long an action computes."""
        return _usual([reading.worked for reading in self.actions[action]])


def _usual(seconds: Sequence[float]) -> float:
    """Return the median of the faster half: what else a machine does only ever makes things slower."""
    return statistics.median(sorted(seconds)[: (len(seconds) + 1) // 2])


def _in_turns(crew: Crew, jobs: Sequence[Job], repeat: int) -> list[Steps]:
    """Run steps of a job under several schedules, one after the other, so that all have the same machine."""
    found = [Steps() for _ in jobs]
    for index in range(WARM_UP + repeat):
        for job, steps in zip(jobs, found, strict=True):
            step = job.step(index)
            turns = Turns(turns_of(plan_step(step))[crew.rank], crew.group, Clock(crew.device))
            dist.barrier(crew.group)
            begin = time.thread_time()
            following = job.step(index + 1)
            plan_step(following).of(crew.rank)
            planned = time.thread_time() - begin
            crew.run(index, step, following, runs=turns)
            if index >= WARM_UP:
                steps.planning.append(planned)
                for action, reading in turns.readings.items():
                    steps.actions[action].append(reading)
    return found


@attrs.frozen(kw_only=True)
class OfRank:
    """What a rank found: its own steps in turns, those with backwards the other way, if there are any, and sums."""

    rank: int
    host: str
    own: Steps
    others: Sequence[Steps]
    sums: Mapping[Stage, float]
    core_s: float | None
    peak: int


def _other_way(job: Job, program: Program) -> Job | None:
    """Return the job under a schedule that splits its backwards if its own does not, and whole ones if it does."""
    stages = program.order.backward
    if not any(may_split(job.topology, stage) for stage in stages):
        return None
    name = WHOLE if program.order.split else HALVES
    try:
        return open_job(job.path, (*job.overrides, f"schedule.name={name}"))
    except PlanError:
        return None


# -- all at once -------------------------------------------------------------------------------------------


def _core_seconds(crew: Crew, job: Job, repeat: int) -> float:
    """Return the seconds of all threads of this rank that a step takes when ranks do not take turns."""
    seconds: list[float] = []
    following = job.step(0)
    for index in range(repeat):
        begin = time.process_time()
        step, following = following, job.step(index + 1)
        crew.run(index, step, following)
        seconds.append(time.process_time() - begin)
    return _usual(seconds)


def _cores(program: Program, ranks: Sequence[OfRank]) -> float | None:
    """Return how many ranks can compute at once at full speed; None if all can, or there is no number for all of them.

    That is so on several hosts, and where it is not cores that compute. A rank that is busy for a part of the time
    only leaves the rest of its core to others. And what a step takes more of the cores than in turns makes them fewer:
    threads that carry messages, ranks that share a memory or a cache.
    """
    in_turns = together = busy = lasted = 0.0
    for of in ranks:
        if of.core_s is None or of.host != ranks[0].host:
            return None
        together += of.core_s - _planning(of)
        for action in of.own.actions:
            worked = of.own.worked(action)
            match action:
                case Compute():
                    crowded = len(program.joint(of.rank, action)) > _affine()
                    busy += worked
                    lasted += worked if crowded else of.own.lasted(action)
                    in_turns += worked
                case Send() | Recv():
                    in_turns += worked
                case Reduce() | WaitReduce() | Tie() | Norm() | Update():
                    together -= worked
                case Wait():
                    pass
    if not busy:
        return None
    cores = _affine() * min(in_turns / together, 1.0) / min(busy / lasted, 1.0)
    return None if cores >= UNHINDERED * len(ranks) else cores


def _affine() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


# -- edges -------------------------------------------------------------------------------------------------


def _edges(session: Session, crew: Crew, program: Program) -> dict[str, EdgeCosts]:
    """Measure every link between the first two ranks that it joins."""
    found: dict[str, EdgeCosts] = {}
    transport = Transport(crew.topology, session.groups, session.device)
    for link in crew.topology.links:
        sent = _first_message(program, link)
        if sent is not None and str(link.edge or link) not in found:
            found[str(link.edge or link)] = _pinged(crew, program, transport, *sent)
    return found


def _first_message(program: Program, link: Link) -> tuple[Send, Any] | None:
    for k in range(program.topology.modules[link.target.module].microbatches):
        send = Send(link.source, Direction.FORWARD, k, link.target)
        for message in program.messages(send):
            if message_bytes(program.routes.step, message):
                return send, message
    return None


def _pinged(crew: Crew, program: Program, transport: Transport, send: Send, message: Any) -> EdgeCosts:
    """Send one value, and as many as the job does, there and one value back, and take the line through the two."""
    dtype = crew.stages[next(iter(crew.stages))].dtype
    size = max(message_bytes(program.routes.step, message), LEAST_BYTES) // dtype.itemsize
    recv = Recv(send.peer, send.direction, send.microbatch, send.stage)
    ends = message.rank_source, message.rank_target
    seconds: list[float] = []
    for count in (1, size):
        dist.barrier(crew.group)
        values = torch.zeros(count, dtype=dtype, device=crew.device.torch)
        answer = torch.zeros(1, device=crew.device.torch)
        rounds: list[float] = []
        for _ in range(PINGS):
            begin = time.perf_counter()
            if crew.rank == ends[0]:
                transport.send(send, [(message, values)])
                transport.wait(send)
                dist.recv(answer, src=ends[1], group=crew.group)
            elif crew.rank == ends[1]:
                transport.receive(recv, [(message, (count,))], dtype)
                transport.wait(recv)
                dist.send(answer, dst=ends[0], group=crew.group)
            rounds.append(time.perf_counter() - begin)
        mine = torch.tensor([_usual(rounds)], dtype=torch.float64, device=crew.device.torch)
        seconds.append(float(crew.gather(mine)[crew.topology.ranks.index(ends[0])]))
    latency, carried = seconds[0] / 2, seconds[1] - seconds[0]
    rate = (size - 1) * dtype.itemsize / carried if carried > 0 else math.inf
    return EdgeCosts(latency=_rounded(latency), bytes_per_s=_rounded(rate))


# -- sums --------------------------------------------------------------------------------------------------


def _summing(crew: Crew, stage: Stage, repeat: int) -> float:
    """Return how long all sums of a stage's gradients take, posted one after the other and then waited for."""
    program = plan_step(crew.job.step(0))
    buckets = [reduce.bucket for reduce in program.sums(crew.rank) if reduce.stage == stage]
    seconds: list[float] = []
    for _ in range(WARM_UP + repeat):
        dist.barrier(crew.group)
        begin = time.perf_counter()
        for bucket in buckets:
            crew.buffers[stage].buffers[bucket].reduce()
        for bucket in buckets:
            crew.buffers[stage].buffers[bucket].wait()
        crew.device.finish()
        seconds.append(time.perf_counter() - begin if buckets else 0.0)
    return _usual(seconds[WARM_UP:])


# -- on every rank -----------------------------------------------------------------------------------------


def in_world(place: Place, job: Job, repeat: int) -> Probed | None:
    """Measure a job on every rank of its world; the first rank of the job returns what was found."""
    before = _fresh_peak()
    with open_session(place, job) as session:
        crew = session.crew
        if crew is None:
            return None
        program = plan_step(job.step(0))
        other = _other_way(job, program)
        own, *others = _in_turns(crew, [job, other] if other else [job], repeat)
        core_s = None if session.device.is_asynchronous else _core_seconds(crew, job, repeat)
        peak = _peak() - before
        edges = _edges(session, crew, program)
        sums = {stage: _summing(crew, stage, repeat) for stage in crew.topology.stages}
        ranks = crew.hand_over(
            OfRank(
                rank=crew.rank,
                host=platform.node(),
                own=own,
                others=others,
                sums=sums,
                core_s=core_s,
                peak=peak,
            )
        )
        return _put_together(job, program, ranks, edges) if ranks else None


def _fresh_peak() -> int:
    """Give back what was freed, and forget the peak of what was resident; return what is resident now.

    A process that has run another job before would else reuse its memory, and remember its peak.
    """
    with contextlib.suppress(AttributeError, OSError):  # not every C library can, nor may everybody
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _peak()


def _peak() -> int:
    """Return the most bytes that were resident at once."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM"))


# -- putting it together -----------------------------------------------------------------------------------


def _put_together(
    job: Job, program: Program, ranks: Sequence[OfRank], edges: Mapping[str, EdgeCosts]
) -> Probed:
    machine = (
        f"{platform.machine()} {platform.system()}, {_affine()} cores, Python {platform.python_version()}, "
        f"torch {torch.__version__}"
    )
    topology = job.topology
    cores = _cores(program, ranks)
    stages: dict[str, StageCosts] = {}
    split: dict[str, float] = {}
    spread: dict[str, float] = {}
    for stage in topology.stages:
        found = _OfStage(program, stage, ranks, cores)
        stages[str(stage)] = found.costs()
        spread[str(stage)] = found.spread()
        if (ratio := found.split_over_whole()) is not None:
            split[str(stage)] = ratio
    costs = Costs(
        stages=stages,
        edges=edges,
        cores=None if cores is None else _rounded(cores),
        origin=f"probed on {machine}",
    )
    planned = peak_bytes(simulate(program, costs))
    return Probed(
        samples={name: topology.samples_per_microbatch[name] for name in topology.modules},
        costs=costs,
        split=split,
        spread=spread,
        memory={of.rank: Memory(peak=of.peak, planned=planned[of.rank]) for of in ranks},
        machine=machine,
    )


@attrs.frozen(eq=False)
class _OfStage:
    """What all ranks found of a stage."""

    program: Program
    stage: Stage
    ranks: Sequence[OfRank]
    cores: float | None

    @property
    def holders(self) -> list[OfRank]:
        """The ranks that host the stage."""
        return [of for of in self.ranks if any(info.stage == self.stage for info in self._infos(of.rank))]

    def costs(self) -> StageCosts:
        """Return the seconds of the stage."""
        whole, first, second = (
            self._compute(kind) for kind in (Kind.BACKWARD, Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT)
        )
        if first is not None and second is not None:
            known = first + second
            scale = 1.0 if whole is None or self.stage in self.program.order.split else whole / known
            backward = {
                "input_gradient": _rounded(first * scale),
                "weight_gradient": _rounded(second * scale),
            }
        else:
            backward = {"backward": _rounded(whole or 0.0)}
        return StageCosts(
            forward=_rounded(self._compute(Kind.FORWARD) or 0.0),
            **backward,
            reduce=_rounded(max(of.sums[self.stage] for of in self.ranks) + self._longest(Tie(self.stage))),
            update=_rounded(max(self._ending(of) for of in self.holders)),
        )

    def split_over_whole(self) -> float | None:
        """Return the seconds of the two halves over those of a whole backward, if both were measured."""
        whole, first, second = (
            self._compute(kind) for kind in (Kind.BACKWARD, Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT)
        )
        return None if not whole or first is None or second is None else (first + second) / whole

    def spread(self) -> float:
        """Return how far the repetitions of an action of the stage are apart, relative to their median."""
        return statistics.median(
            (max(seconds) - min(seconds)) / max(statistics.median(seconds), 1e-9)
            for of in self.holders
            for action, readings in of.own.actions.items()
            if isinstance(action, Compute) and action.stage == self.stage
            for seconds in [[reading.lasted for reading in readings]]
        )

    def _compute(self, kind: Kind) -> float | None:
        """Return the mean over microbatches and lanes of an action, which is the longest over the ranks that join."""
        for which in range(1 + len(self.ranks[0].others)):
            seconds: dict[tuple[tuple[int, ...], int], float] = {}
            for of in self.holders:
                steps = (of.own, *of.others)[which]
                extra = self._posting(steps, kind)
                for action in steps.actions:
                    if isinstance(action, Compute) and (action.stage, action.kind) == (self.stage, kind):
                        joined = self.program.joint(of.rank, action)
                        enough = 1.0 if self.cores is None else min(1.0, self.cores / len(joined))
                        took = enough * steps.lasted(action) + extra
                        key = joined, action.microbatch
                        seconds[key] = max(seconds.get(key, 0.0), took)
            if seconds:
                return statistics.fmean(seconds.values())
        return None

    def _posting(self, steps: Steps, kind: Kind) -> float:
        """Return what posting messages adds to each action of a kind on a rank."""
        if kind is Kind.WEIGHT_GRADIENT:
            return 0.0
        direction = Direction.FORWARD if kind is Kind.FORWARD else Direction.BACKWARD
        posts = sum(
            steps.worked(action)
            for action in steps.actions
            if isinstance(action, Send | Recv) and (action.stage, action.direction) == (self.stage, direction)
        )
        count = sum(
            isinstance(action, Compute) and (action.stage, action.kind) == (self.stage, kind)
            for action in steps.actions
        )
        return posts / count if count else 0.0

    def _longest(self, action: Action) -> float:
        return max((of.own.lasted(action) for of in self.holders if action in of.own.actions), default=0.0)

    def _ending(self, of: OfRank) -> float:
        """A stage's part of what a rank does once per step, when all do.

        Who begins the next step must have planned it; the others have time for that until they hear from him.
        """
        parts = [self._at_once(of, one) for one in (_agreeing, _updating)]
        if any(info.first and not self._module(info.stage).inputs for info in self._infos(of.rank)):
            parts.append(self._at_once(of, _planning))
        return sum(parts) / len(self._infos(of.rank))

    def _at_once(self, of: OfRank, what: Callable[[OfRank], float]) -> float:
        """Return how long a rank is at something that all ranks of its host do at once, sharing the cores evenly."""
        mine = what(of)
        cores = min(_affine(), self.cores or math.inf)
        shared = sum(min(mine, what(other)) for other in self.ranks if other.host == of.host)
        return max(mine, shared / cores)

    def _infos(self, rank: int) -> Sequence[StageInfo]:
        return self.program.topology.stages_of(rank)

    def _module(self, stage: Stage) -> Module:
        return self.program.topology.modules[stage.module]


def _agreeing(of: OfRank) -> float:
    return of.own.worked(Norm())


def _updating(of: OfRank) -> float:
    return of.own.worked(Update())


def _planning(of: OfRank) -> float:
    return _usual(of.own.planning)


def _rounded(number: float) -> float:
    """Four digits are more than a measurement has."""
    return float(f"{number:.4g}")
