"""Steps on this rank: the stages it hosts, and what ends a step.

Before anything is updated, all ranks gather one small record from each (gradient norm, losses, finiteness,
and the digest of the samples that the next step will use). Every rank reads the same records in the same
order, so all clip by the same norm, and all take the step or none does; and no two ranks go on to different
samples.
"""

import hashlib
from collections.abc import Mapping
from typing import Any, TypeVar

import attrs
import torch
import torch.distributed as dist

from mimogrid.core.errors import WorldError
from mimogrid.core.gradients import loss_weight
from mimogrid.core.rates import learning_rate
from mimogrid.core.schedule.lower import Program, plan_step
from mimogrid.core.steps import Step, aux_name
from mimogrid.core.topology import Stage, Topology
from mimogrid.shell import optimizer
from mimogrid.shell.collect import Tensors, collect
from mimogrid.shell.data import Loader, Loads
from mimogrid.shell.device import DTYPES, Device
from mimogrid.shell.execute import Timed, execute
from mimogrid.shell.gradients import GradientBuffer
from mimogrid.shell.groups import Groups
from mimogrid.shell.jobs import Job
from mimogrid.shell.modules import build_stage, named_weights
from mimogrid.shell.stage import StageRunner
from mimogrid.shell.transport import Transport


T = TypeVar("T")


@attrs.frozen
class Outcome:
    """What a step came to, the same on every rank.

    `losses` are those of each module, and as ``NAME.aux`` what spreads its tokens over experts, divided by
    their counts and without weights; `taken` is False where a gradient or a loss was not finite, and then
    nothing was updated.
    """

    loss: float
    losses: Mapping[str, float]
    gradient_norm: float
    learning_rate: float
    taken: bool
    timeline: tuple[Timed, ...]


class Crew:
    """The stages of this rank, with weights, gradients and optimizer."""

    def __init__(self, job: Job, rank: int, groups: Groups, device: Device) -> None:
        assert job.source is not None
        self.job = job
        self._source = job.source
        self.topology: Topology = job.topology
        self.rank = rank
        self.device = device
        self._groups = groups
        self._transport = Transport(self.topology, groups, device)
        dtype = DTYPES[job.spec.precision]
        self.stages: dict[Stage, StageRunner] = {}
        self.buffers: dict[Stage, GradientBuffer] = {}
        for info in self.topology.stages_of(rank):
            module = self.topology.modules[info.stage.module]
            of_module = groups.of_module(module)
            network = build_stage(self.topology, info, of_module, device=device.torch, dtype=dtype)
            self.stages[info.stage] = StageRunner(
                rank=rank,
                module=module,
                info=info,
                network=network,
                groups=of_module,
                dtype=dtype,
            )
            weights = named_weights(network)
            self.buffers[info.stage] = GradientBuffer(module, module.position(rank), info, weights, of_module)
        trained = (w for buffer in self.buffers.values() for w in buffer.weights.values())
        self.optimizer = optimizer.build(job.spec.optimizer, trained)

    def run(self, index: int, step: Step, following: Step, *, update: bool = True) -> Outcome:
        """Train one step; without `update`, stop at the gradients.

        `following` is the next step: the ranks agree on its samples in this one.
        """
        program = plan_step(step)
        self._begin(program, self._source, index)
        for buffer in self.buffers.values():
            buffer.clear()
        finish = _Finish(self, index, step, following, update=update)
        timeline = execute(program.of(self.rank), self.stages, self._transport, finish)
        return attrs.evolve(finish.outcome, timeline=timeline)

    def choose(self, step: Step, source: Loads) -> list[int]:
        """Run a step forwards only; return the likeliest next token of every sample, on every rank."""
        program = plan_step(step, training=False)
        self._begin(program, source)
        execute(program.of(self.rank), self.stages, self._transport, _Nothing())
        mine = torch.zeros(len(step.samples), dtype=torch.float64, device=self.device.torch)
        for runner in self.stages.values():
            for microbatch, logits in runner.answers.items():
                where, tokens = runner.last_tokens(microbatch, logits)
                mine[where.start : where.stop] = tokens
        return [int(token) for token in self.gather(mine).sum(dim=0)]

    def _begin(self, program: Program, source: Loads, index: int = 0) -> None:
        loader = Loader(source, device=self.device.torch, dtype=DTYPES[self.job.spec.precision])
        for stage in self.stages.values():
            stage.begin(program, loader, index)

    def collect(self, tensors: Mapping[Stage, Tensors]) -> Tensors:
        """Put full tensors together on the first rank of the job; see `collect.collect`."""
        return collect(self.stages, tensors, self.group)

    def weights(self) -> dict[Stage, Tensors]:
        """Return this rank's weights, stage by stage."""
        return {stage: named_weights(runner.network) for stage, runner in self.stages.items()}

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks that host a module."""
        return self._groups.by_ranks[self.topology.ranks]

    @property
    def steps_taken(self) -> int:
        """How many steps the optimizer has taken."""
        return optimizer.steps_taken(self.optimizer) if self.optimizer else 0

    def hand_over(self, value: T) -> list[T]:
        """Gather a value of every rank on the first rank of the job; the others get nothing."""
        group = self.group
        every: list[Any] | None = [None] * group.size() if group.rank() == 0 else None
        dist.gather_object(value, every, group=group, group_dst=0)
        return every or []

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Gather a vector of each rank that hosts a module into [ranks, values], the same everywhere."""
        every = [torch.empty_like(values) for _ in self.topology.ranks]
        dist.all_gather(every, values, group=self.group)
        return torch.stack(every)


class _Finish:
    """What ends a step: reductions, agreement, update."""

    def __init__(self, crew: Crew, index: int, step: Step, following: Step, *, update: bool) -> None:
        self.crew = crew
        self.updates = update
        self.step = step
        self.following = following
        spec = crew.job.spec
        self.rate = learning_rate(spec.optimizer, step=index, steps=spec.train.steps)
        self.outcome = Outcome(0.0, {}, 0.0, self.rate, taken=False, timeline=())

    def reduce(self, stage: Stage) -> None:
        """Sum a stage's gradients over its data lanes."""
        self.crew.buffers[stage].reduce()

    def tie(self, stage: Stage) -> None:
        """Sum the gradients of tied weights over the ends of a module."""
        self.crew.buffers[stage].tie()

    def agree(self) -> None:
        """Let all ranks see norm, losses and finiteness of all, and compare what comes next."""
        losses = self._losses()
        squared = sum(buffer.norm_squared() for buffer in self.crew.buffers.values())
        mine = torch.tensor(
            [squared, *losses.values(), *_digest(self.following)],
            dtype=torch.float64,
            device=self.crew.device.torch,
        )
        every = self.crew.gather(mine).cpu()
        self._check_digests(every[:, 1 + len(losses) :])
        total = every[:, : 1 + len(losses)].sum(dim=0)
        means = {
            name: float(total[1 + i]) / units if units else 0.0
            for i, (name, units) in enumerate(self.step.units.items())
        }
        topology = self.crew.topology
        self.outcome = attrs.evolve(
            self.outcome,
            loss=sum(loss_weight(topology, name) * mean for name, mean in means.items()),
            losses=means,
            gradient_norm=float(total[0]) ** 0.5,
            taken=bool(total.isfinite().all()),
        )

    def update(self) -> None:
        """Clip by the global norm and step; do nothing where the ranks agreed not to."""
        crew, norm = self.crew, self.outcome.gradient_norm
        limit = crew.job.spec.optimizer.clip_norm
        if not self.updates or not self.outcome.taken or crew.optimizer is None:
            return
        if limit and norm > limit:
            for buffer in crew.buffers.values():
                buffer.scale(limit / norm)
        optimizer.set_rate(crew.optimizer, self.rate)
        crew.optimizer.step()

    def _losses(self) -> dict[str, float]:
        """This rank's part of each loss sum: under cp each has one, under tp all have the same.

        Of an auxiliary loss every rank has a part of its own.
        """
        losses = dict.fromkeys(self.step.units, 0.0)
        for runner in self.crew.stages.values():
            position = runner.module.grid.position(self.crew.rank)
            if runner.loss is not None and not position["tp"]:
                losses[runner.module.name] += float(runner.loss)
            if runner.aux is not None:
                losses[aux_name(runner.module.name)] += float(runner.aux)
        return losses

    def _check_digests(self, digests: torch.Tensor) -> None:
        ranks = self.crew.topology.ranks
        differ = [r for r, row in zip(ranks, digests, strict=True) if not row.equal(digests[0])]
        if differ:
            ids = f"{self.following.samples[0].id}..{self.following.samples[-1].id}"
            raise WorldError(
                f"ranks {differ} describe samples {ids} differently than rank {ranks[0]}: a source's "
                "describe must depend on nothing but the sample's id."
            )


class _Nothing:
    """A program without training has nothing to finish."""

    def reduce(self, stage: Stage) -> None:
        """Never called."""
        raise AssertionError(stage)

    tie = reduce

    def agree(self) -> None:
        """Never called."""
        raise AssertionError

    update = agree


def _digest(step: Step) -> tuple[float, float]:
    """48 bits of each half of a hash of what a step's samples are described as; exact in fp64."""
    facts = [(s.id, s.length, s.rows, s.placeholders, s.units) for s in step.samples]
    half = hashlib.blake2b(repr(facts).encode(), digest_size=12).digest()
    return float(int.from_bytes(half[:6], "big")), float(int.from_bytes(half[6:], "big"))
