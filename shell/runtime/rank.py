"""Steps on this rank: the stages it hosts, and what runs, ends and takes a step with them.

What the ranks tell each other before they take a step, and what follows from it, is in `agreement`.
"""

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import attrs
import torch
import torch.distributed as dist
from torch import nn

from mimogrid.core.base.errors import EchoError
from mimogrid.core.faults.injection import BETWEEN
from mimogrid.core.program.lower import Program, plan_step
from mimogrid.core.schedule.order import Order
from mimogrid.core.step.step import Step, aux_name
from mimogrid.core.topology.topology import Stage, Topology
from mimogrid.core.update.decision import SkipState
from mimogrid.core.update.reductions import exact_terms
from mimogrid.shell.device.device import DTYPES, Device
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.megatron import engine
from mimogrid.shell.modules import named_weights
from mimogrid.shell.modules.loss import Loss, weighted_cross_entropy
from mimogrid.shell.runtime import optimizer
from mimogrid.shell.runtime.agreement import (
    Agreed,
    Outcome,
    Record,
    agreed,
    check_digests,
    digest_of,
    means_of,
)
from mimogrid.shell.runtime.collect import Tensors, collect
from mimogrid.shell.runtime.data import Clocked, Loader, Loads
from mimogrid.shell.runtime.execute import Runs, Timed, busy_s, execute
from mimogrid.shell.runtime.gradients import Shard, StageBuffer
from mimogrid.shell.runtime.hosting import host_stages
from mimogrid.shell.runtime.stage import StageRunner
from mimogrid.shell.runtime.transport import Transport
from mimogrid.shell.world.groups import Groups
from mimogrid.shell.world.heartbeat import Heartbeat
from mimogrid.shell.world.preemption import StopRequest


T = TypeVar("T")


class RankRuntime:
    """The stages of this rank, with weights, gradients and optimizer.

    `steps_taken` counts the updates, and `skip_state` is what the decision on the next one hangs on; both are the same
    on every rank. `has_saved` is what this rank says in the next step about the save in flight, in a record that
    all ranks exchange there anyway (`shell.checkpoint.saving`). `given` are networks for modules of the user's own
    that are there already; `steps_itself` is False where somebody else updates the weights.
    """

    def __init__(
        self,
        job: Job,
        rank: int,
        groups: Groups,
        device: Device,
        *,
        heartbeat: Heartbeat,
        stop_request: StopRequest,
        given: Mapping[str, nn.Module] | None = None,
        steps_itself: bool = True,
    ) -> None:
        assert job.source is not None
        self.job = job
        self._source = Clocked(job.source, heartbeat.within)
        self.topology: Topology = job.topology
        self.rank = rank
        self.device = device
        self.heartbeat = heartbeat
        self.stop_request = stop_request
        self._before: tuple[tuple[Timed, ...], float] = (), 0.0
        self.stages_by_rank = {
            r: " ".join(str(info.stage) for info in self.topology.role(r).stages) for r in self.topology.ranks
        }
        self._groups = groups
        self._transport = Transport(self.topology, groups, device)
        built = {info.stage.module for info in self.topology.role(rank).stages} - (given or {}).keys()
        engine.agree(built, self.topology, self.group, device.torch)
        hosted = host_stages(job, rank, groups, device, given or {})
        self.stages: dict[Stage, StageRunner] = {stage: each.runner for stage, each in hosted.items()}
        self.buffers: dict[Stage, StageBuffer] = {stage: each.buffer for stage, each in hosted.items()}
        self.steps_itself = steps_itself
        self.optimizer = optimizer.build(job.spec.optimizer, self._shards()) if steps_itself else None
        self.steps_taken = 0
        self.skip_state = SkipState.first(job.spec.optimizer, job.spec.precision)
        self.has_saved = True

    def _shards(self) -> Iterator[tuple[str, Shard]]:
        """Yield what this rank updates, each with the name of its module."""
        for stage, of_stage in self.buffers.items():
            for buffer in of_stage.buffers:
                for shard in buffer.shards:
                    yield stage.module, shard

    def run(
        self,
        index: int,
        step: Step,
        following: Step,
        *,
        update: bool = True,
        source: Loads | None = None,
        loss: Loss = weighted_cross_entropy,
        runs: Runs = execute,
        order: Order | None = None,
    ) -> Outcome:
        """Train one step; without `update`, stop at the gradients.

        `following` is the next step: the ranks agree on its samples in this one. `source` has the samples
        where they are not the job's. `loss` is that of language models. `runs` runs the program. `order` is the order
        of the step where it is not the job's.
        """
        program = plan_step(step, order or self.job.order)
        self._begin(program, source or self._source, index, loss_scale=self.skip_state.scale, loss=loss)
        for buffer in self.buffers.values():
            buffer.clear()
        finish = _Finish(self, index, step, following, update=update)
        actions = program.of(self.rank)
        self.heartbeat.begin(index, len(actions))
        timeline = runs(actions, self.stages, self._transport, finish, self.heartbeat)
        self.heartbeat.at(BETWEEN)
        self._before = timeline, self._source.lap()
        assert finish.agreed is not None  # Every program of a training step has the action NORM.
        return attrs.evolve(finish.agreed.outcome, timeline=timeline)

    @property
    def step_times(self) -> tuple[float, float]:
        """Seconds that this rank was busy, and that it loaded data, in the step before; waits for that step's end."""
        timeline, loading_s = self._before
        return busy_s(timeline), loading_s

    def agree_on(self, step: Step) -> None:
        """Compare what a host gave the ranks for a step.

        Raises WorldError where it differs, and EchoError where another rank has nothing (`has_nothing`).
        """
        mine = torch.tensor(digest_of(step), dtype=torch.float64, device=self.device.torch)
        given = self.gather(mine).cpu()
        without = [rank for rank, row in zip(self.topology.ranks, given, strict=True) if row.isnan().any()]
        if without:
            raise EchoError(
                f"rank {self.rank} was cut off: ranks {without} have no batch for this step, and say why"
            )
        check_digests(
            self.topology.ranks, step, given, "give every rank the same batch, whole and in the same order"
        )

    def has_nothing(self) -> None:
        """Answer the ranks that are in `agree_on`: this one could not make its samples."""
        self.gather(torch.full((2,), torch.nan, dtype=torch.float64, device=self.device.torch))

    def choose(self, step: Step, source: Loads) -> list[int]:
        """Run a step forwards only; return the likeliest next token of every sample, on every rank."""
        self._only_forwards(step, source)
        mine = torch.zeros(len(step.samples), dtype=torch.float64, device=self.device.torch)
        for runner in self.stages.values():
            for microbatch, logits in runner.answers.items():
                where, tokens = runner.last_tokens(microbatch, logits)
                mine[where.start : where.stop] = tokens
        return [int(token) for token in self.gather(mine).sum(dim=0).tolist()]

    def judge(
        self, step: Step, source: Loads | None = None, loss: Loss = weighted_cross_entropy
    ) -> Mapping[str, float]:
        """Run a step forwards only; return each module's loss divided by its count, on every rank."""
        self._only_forwards(step, source or self._source, loss=loss)
        mine = torch.tensor([*self.losses(step).values()], dtype=torch.float64, device=self.device.torch)
        means = means_of(step, self.gather(mine).sum(dim=0).tolist())
        return {name: mean for name, mean in means.items() if name in self.topology.modules}

    def answer(self, step: Step, source: Loads | None = None) -> tuple[torch.Tensor, ...]:
        """Run a step forwards only; return what this rank has to say of each microbatch of its dp rank.

        These are the logits [T, V], sample after sample, on the first rank of a dp rank of a last stage.
        """
        self._only_forwards(step, source or self._source)
        said = (runner.answers for runner in self.stages.values())
        return tuple(answers[microbatch] for answers in said for microbatch in sorted(answers))

    def _only_forwards(self, step: Step, source: Loads, *, loss: Loss | None = None) -> None:
        program = plan_step(step, self.job.forward_order)
        self._begin(program, source, loss=loss)
        actions = program.of(self.rank)
        self.heartbeat.begin(self.job.spec.train.steps, len(actions), training=False)
        execute(actions, self.stages, self._transport, _NoFinish(), self.heartbeat)

    def _begin(
        self,
        program: Program,
        source: Loads,
        index: int = 0,
        *,
        loss_scale: float = 1.0,
        loss: Loss | None,
    ) -> None:
        loader = Loader(source, device=self.device.torch, dtype=DTYPES[self.job.spec.precision])
        for stage in self.stages.values():
            stage.begin(program, loader, index, loss_scale=loss_scale, loss=loss)

    def collect(self, tensors: Mapping[Stage, Tensors]) -> Tensors:
        """Put full tensors together on the first rank of the job; see `collect.collect`."""
        return collect(self.stages, tensors, self.group)

    def weights(self) -> dict[Stage, Tensors]:
        """Return this rank's weights, stage by stage."""
        return {stage: named_weights(runner.network) for stage, runner in self.stages.items()}

    def losses(self, step: Step) -> dict[str, float]:
        """Return this rank's part of each loss sum: under cp each has one, under tp all have the same.

        Of an auxiliary loss every rank has a part of its own.
        """
        losses = dict.fromkeys(step.units, 0.0)
        for runner in self.stages.values():
            name, position = runner.module.name, runner.module.grid.position(self.rank)
            if runner.loss is not None and not position["tp"]:
                losses[name] += float(runner.loss)
            if runner.aux is not None:
                losses[aux_name(name)] += float(runner.aux)
        return losses

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks that host a module."""
        return self._groups.by_ranks[self.topology.ranks]

    def hand_over(self, value: T) -> list[T]:
        """Gather a value of every rank on the first rank of the job; the others get nothing."""
        group = self.group
        every: list[Any] | None = [None] * group.size() if group.rank() == 0 else None
        dist.gather_object(value, every, group=group, group_dst=0)
        return every or []

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Gather a vector of each rank that hosts a module into [ranks, values], the same everywhere."""
        every = [torch.empty_like(values) for _ in self.topology.ranks]
        self.heartbeat.wait()
        dist.all_gather(every, values, group=self.group)
        return torch.stack(every)


class _Finish:
    """What ends a step: reductions, agreement, update."""

    def __init__(
        self, runtime: RankRuntime, index: int, step: Step, following: Step, *, update: bool
    ) -> None:
        self.runtime = runtime
        self.index = index
        self.step = step
        self.following = following
        self.updates = update
        self.agreed: Agreed | None = None

    def reduce(self, stage: Stage, bucket: int) -> None:
        """Post the sum of a bucket of a stage's gradients."""
        self.runtime.buffers[stage].buffers[bucket].reduce()

    def wait(self, stage: Stage, bucket: int) -> None:
        """Let what follows happen after the sum of a bucket."""
        self.runtime.heartbeat.wait()
        self.runtime.buffers[stage].buffers[bucket].wait()

    def tie(self, stage: Stage) -> None:
        """Sum the gradients of tied weights over the ends of a module."""
        self.runtime.heartbeat.wait()
        self.runtime.buffers[stage].tie()

    def agree(self) -> None:
        """Let all ranks see norm, losses and finiteness of all, and compare what comes next.

        Also a value that does not count in the norm, because another rank holds a copy of it, must be finite.
        """
        runtime, buffers = self.runtime, self.runtime.buffers.values()
        if runtime.skip_state.scale != 1:
            for buffer in buffers:
                buffer.scale(1 / runtime.skip_state.scale)
        mine = Record(
            finite=all(buffer.is_finite for buffer in buffers),
            has_saved=runtime.has_saved,
            terms=exact_terms(partial for buffer in buffers for partial in buffer.partials()),
            losses=runtime.losses(self.step),
            digest=digest_of(self.following),
            stops=runtime.stop_request.is_there,
            step_times=runtime.step_times,
        )
        packed = torch.tensor(mine.packed(), dtype=torch.float64, device=runtime.device.torch)
        self.agreed = agreed(
            runtime.gather(packed).cpu(),
            job=runtime.job,
            index=self.index,
            step=self.step,
            following=self.following,
            skip_state=runtime.skip_state,
            stages_by_rank=runtime.stages_by_rank,
        )

    def update(self) -> None:
        """Clip by the global norm and step; do nothing where the ranks agreed not to."""
        runtime, agreed_on = self.runtime, self.agreed
        assert agreed_on is not None  # NORM comes before UPDATE.
        if not self.updates:
            return
        runtime.skip_state = agreed_on.skip_state
        if not agreed_on.outcome.taken:
            return
        runtime.steps_taken += 1
        if runtime.steps_itself:
            self._step(agreed_on.outcome.gradient_norm)

    def _step(self, norm: float) -> None:
        runtime, spec = self.runtime, self.runtime.job.spec
        limit = spec.optimizer.clip_norm
        if limit and norm > limit:
            for buffer in runtime.buffers.values():
                buffer.scale(limit / norm)
        if runtime.optimizer is not None:
            optimizer.set_rates(runtime.optimizer, spec.optimizer, step=self.index, steps=spec.train.steps)
            runtime.optimizer.step()
        for buffer in runtime.buffers.values():
            buffer.copy_main_to_model()


class _NoFinish:
    """A program without training has nothing to finish."""

    def reduce(self, stage: Stage, bucket: int) -> None:
        """Never called."""
        raise AssertionError(stage, bucket)

    wait = reduce

    def tie(self, stage: Stage) -> None:
        """Never called."""
        raise AssertionError(stage)

    def agree(self) -> None:
        """Never called."""
        raise AssertionError

    update = agree
