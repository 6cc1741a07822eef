"""Steps on this rank: the stages it hosts, and what ends a step.

Before anything is updated, all ranks gather one small record from each (gradient norm, losses, finiteness, the
digest of the samples that the next step will use, a wish to stop, how long it computed). Every rank reads the same
records in the same order, so all clip by the same norm, and all take the step or none does; no two ranks go on to
different samples, and all stop after the same step.
"""

import hashlib
from collections.abc import Mapping
from typing import Any, TypeVar

import attrs
import torch
import torch.distributed as dist
from torch import nn

from mimogrid.core.decision import Watch, decide
from mimogrid.core.errors import WorldError
from mimogrid.core.faults import BETWEEN
from mimogrid.core.gradients import NORM_TERMS, exact_terms, loss_weight, sum_of_terms
from mimogrid.core.rates import learning_rate
from mimogrid.core.schedule.lower import Program, plan_step
from mimogrid.core.steps import Step, aux_name
from mimogrid.core.stragglers import Pace
from mimogrid.core.topology import Stage, Topology
from mimogrid.shell import optimizer
from mimogrid.shell.collect import Tensors, collect
from mimogrid.shell.data import Clocked, Loader, Loads
from mimogrid.shell.device import DTYPES, Device
from mimogrid.shell.execute import Runs, Timed, busy_s, execute
from mimogrid.shell.gradients import StageBuffer
from mimogrid.shell.groups import Groups
from mimogrid.shell.jobs import Job
from mimogrid.shell.megatron import engine
from mimogrid.shell.modules import build_stage, named_weights
from mimogrid.shell.preemption import Wish
from mimogrid.shell.pulse import Pulse
from mimogrid.shell.stage import StageRunner
from mimogrid.shell.transport import Transport


T = TypeVar("T")


@attrs.frozen
class Outcome:
    """What a step came to, the same on every rank.

    `losses` are those of each module, and as ``NAME.aux`` what spreads its tokens over experts, divided by
    their counts and without weights. `skipped` says why nothing was updated; "": the step was taken.
    `loss_scale` is what the losses were multiplied by before their backward. `stops` says that a rank was asked
    to stop, `paces` how long each was busy in the step before. `all_saved`: see `Crew`.
    """

    loss: float
    losses: Mapping[str, float]
    gradient_norm: float
    learning_rate: float
    loss_scale: float
    skipped: str
    stops: bool
    all_saved: bool
    paces: tuple[Pace, ...]
    timeline: tuple[Timed, ...]

    @property
    def taken(self) -> bool:
        """Whether all ranks took the step; else none did."""
        return not self.skipped


class Crew:
    """The stages of this rank, with weights, gradients and optimizer.

    `steps_taken` counts the updates, and `watch` is what the decision on the next one hangs on; both are the
    same on every rank. `has_saved` is what this rank says in the next step about the save in flight, in a record
    that all ranks exchange there anyway (`shell.saving`). `given` are networks for modules of the user's own that
    are there already; `steps_itself` is False where somebody else updates the weights.
    """

    def __init__(
        self,
        job: Job,
        rank: int,
        groups: Groups,
        device: Device,
        *,
        pulse: Pulse,
        wish: Wish,
        given: Mapping[str, nn.Module] | None = None,
        steps_itself: bool = True,
    ) -> None:
        assert job.source is not None
        self.job = job
        self._source = Clocked(job.source, pulse.within)
        self.topology: Topology = job.topology
        self.rank = rank
        self.device = device
        self.pulse = pulse
        self.wish = wish
        self.pace = (0.0, 0.0)
        self.stages_by_rank = {
            r: " ".join(str(info.stage) for info in self.topology.stages_of(r)) for r in self.topology.ranks
        }
        self._groups = groups
        self._transport = Transport(self.topology, groups, device)
        dtype = DTYPES[job.spec.precision]
        self.stages: dict[Stage, StageRunner] = {}
        self.buffers: dict[Stage, StageBuffer] = {}
        rule = job.spec.optimizer
        built = {info.stage.module for info in self.topology.stages_of(rank)} - (given or {}).keys()
        engine.agree(built, self.topology, self.group, device.torch)
        for info in self.topology.stages_of(rank):
            module = self.topology.modules[info.stage.module]
            of_module = groups.of_module(module)
            network = build_stage(
                self.topology,
                info,
                of_module,
                device=device.torch,
                dtype=dtype,
                given=(given or {}).get(module.name),
            )
            full = {name: weight.detach() for name, weight in named_weights(network).items()}
            network.to(dtype)
            self.stages[info.stage] = StageRunner(
                rank=rank,
                module=module,
                info=network.info,
                network=network,
                groups=of_module,
                dtype=dtype,
            )
            self.buffers[info.stage] = StageBuffer(
                topology=self.topology,
                position=module.position(rank),
                info=network.info,
                weights=named_weights(network),
                full=full,
                groups=of_module,
                streams=device.streams,
                shared=rule.sharded,
            )
        shards = (
            (stage.module, shard)
            for stage, of_stage in self.buffers.items()
            for buffer in of_stage.buffers
            for shard in buffer.shards
        )
        self.steps_itself = steps_itself
        self.optimizer = optimizer.build(rule, shards) if steps_itself else None
        self.steps_taken = 0
        self.watch = Watch.first(rule, job.spec.precision)
        self.has_saved = True

    def run(
        self,
        index: int,
        step: Step,
        following: Step,
        *,
        update: bool = True,
        source: Loads | None = None,
        runs: Runs = execute,
    ) -> Outcome:
        """Train one step; without `update`, stop at the gradients.

        `following` is the next step: the ranks agree on its samples in this one. `source` has the samples
        where they are not the job's. `runs` runs the program.
        """
        program = plan_step(step)
        self._begin(program, source or self._source, index, loss_scale=self.watch.scale)
        for buffer in self.buffers.values():
            buffer.clear()
        finish = _Finish(self, index, step, following, update=update)
        actions = program.of(self.rank)
        self.pulse.begin(index, len(actions))
        timeline = runs(actions, self.stages, self._transport, finish, self.pulse)
        self.pulse.at(BETWEEN)
        self.pace = (busy_s(timeline), self._source.lap())
        return attrs.evolve(finish.outcome, timeline=timeline)

    def agree_on(self, step: Step) -> None:
        """Compare what the ranks take the samples of a step to be. Raises WorldError where they differ."""
        mine = torch.tensor(_digest(step), dtype=torch.float64, device=self.device.torch)
        _check_digests(self, step, self.gather(mine).cpu())

    def choose(self, step: Step, source: Loads) -> list[int]:
        """Run a step forwards only; return the likeliest next token of every sample, on every rank."""
        self._only_forwards(step, source)
        mine = torch.zeros(len(step.samples), dtype=torch.float64, device=self.device.torch)
        for runner in self.stages.values():
            for microbatch, logits in runner.answers.items():
                where, tokens = runner.last_tokens(microbatch, logits)
                mine[where.start : where.stop] = tokens
        return [int(token) for token in self.gather(mine).sum(dim=0)]

    def judge(self, step: Step, source: Loads | None = None) -> Mapping[str, float]:
        """Run a step forwards only; return each module's loss divided by its count, on every rank."""
        self._only_forwards(step, source or self._source, judges=True)
        mine = torch.tensor([*_losses(self, step).values()], dtype=torch.float64, device=self.device.torch)
        means = _means(step, self.gather(mine).sum(dim=0).tolist())
        return {name: mean for name, mean in means.items() if name in self.topology.modules}

    def answer(self, step: Step, source: Loads | None = None) -> tuple[torch.Tensor, ...]:
        """Run a step forwards only; return what this rank has to say of each microbatch of its lane.

        These are the logits [T, V], sample after sample, on the first rank of a lane of a last stage.
        """
        self._only_forwards(step, source or self._source)
        said = (runner.answers for runner in self.stages.values())
        return tuple(answers[microbatch] for answers in said for microbatch in sorted(answers))

    def _only_forwards(self, step: Step, source: Loads, *, judges: bool = False) -> None:
        program = plan_step(step, training=False)
        self._begin(program, source, judges=judges)
        actions = program.of(self.rank)
        self.pulse.begin(self.job.spec.train.steps, len(actions), training=False)
        execute(actions, self.stages, self._transport, _Nothing(), self.pulse)

    def _begin(
        self,
        program: Program,
        source: Loads,
        index: int = 0,
        *,
        loss_scale: float = 1.0,
        judges: bool = True,
    ) -> None:
        loader = Loader(source, device=self.device.torch, dtype=DTYPES[self.job.spec.precision])
        for stage in self.stages.values():
            stage.begin(program, loader, index, loss_scale=loss_scale, judges=judges)

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

    def hand_over(self, value: T) -> list[T]:
        """Gather a value of every rank on the first rank of the job; the others get nothing."""
        group = self.group
        every: list[Any] | None = [None] * group.size() if group.rank() == 0 else None
        dist.gather_object(value, every, group=group, group_dst=0)
        return every or []

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Gather a vector of each rank that hosts a module into [ranks, values], the same everywhere."""
        every = [torch.empty_like(values) for _ in self.topology.ranks]
        self.pulse.wait()
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
        self.index = index
        self.watch = crew.watch
        rate = learning_rate(spec.optimizer, step=index, steps=spec.train.steps)
        self.outcome = Outcome(
            0.0, {}, 0.0, rate, crew.watch.scale, "", stops=False, all_saved=False, paces=(), timeline=()
        )

    def reduce(self, stage: Stage, bucket: int) -> None:
        """Post the sum of a bucket of a stage's gradients."""
        self.crew.buffers[stage].buffers[bucket].reduce()

    def wait(self, stage: Stage, bucket: int) -> None:
        """Let what follows happen after the sum of a bucket."""
        self.crew.pulse.wait()
        self.crew.buffers[stage].buffers[bucket].wait()

    def tie(self, stage: Stage) -> None:
        """Sum the gradients of tied weights over the ends of a module."""
        self.crew.pulse.wait()
        self.crew.buffers[stage].tie()

    def agree(self) -> None:
        """Let all ranks see norm, losses and finiteness of all, and compare what comes next.

        Also a value that does not count in the norm, because another rank holds a copy of it, must be finite.
        """
        crew, losses, buffers = self.crew, _losses(self.crew, self.step), self.crew.buffers.values()
        if crew.watch.scale != 1:
            for buffer in buffers:
                buffer.scale(1 / crew.watch.scale)
        terms = exact_terms(partial for buffer in buffers for partial in buffer.partials())
        finite = all(buffer.is_finite for buffer in buffers)
        digest, notes = _digest(self.following), (crew.wish.is_there, *crew.pace)
        mine = torch.tensor(
            [finite, crew.has_saved, *terms, *losses.values(), *digest, *notes],
            dtype=torch.float64,
            device=crew.device.torch,
        )
        every = crew.gather(mine).cpu()
        sizes = [2, NORM_TERMS, len(losses), len(digest), len(notes)]
        flags, all_terms, all_losses, digests, all_notes = every.split(sizes, dim=1)
        all_finite, all_saved = flags.bool().all(dim=0).tolist()
        _check_digests(crew, self.following, digests)
        means = _means(self.step, all_losses.sum(dim=0).tolist())
        loss = sum(loss_weight(crew.topology, name) * mean for name, mean in means.items())
        norm = sum_of_terms(all_terms.flatten().tolist()) ** 0.5
        self.watch, skipped = decide(
            crew.watch,
            crew.job.spec.optimizer,
            loss=loss,
            norm=norm,
            finite=all_finite,
            half=crew.job.spec.precision == "fp16",
        )
        self.outcome = attrs.evolve(
            self.outcome,
            loss=loss,
            losses=means,
            gradient_norm=norm,
            skipped=skipped,
            stops=bool(all_notes[:, 0].any()),
            all_saved=all_saved,
            paces=tuple(
                Pace(rank, crew.stages_by_rank[rank], *pace)
                for rank, pace in zip(crew.topology.ranks, all_notes[:, 1:].tolist(), strict=True)
            ),
        )

    def update(self) -> None:
        """Clip by the global norm and step; do nothing where the ranks agreed not to."""
        crew, norm, spec = self.crew, self.outcome.gradient_norm, self.crew.job.spec
        limit = spec.optimizer.clip_norm
        if not self.updates:
            return
        crew.watch = self.watch
        if not self.outcome.taken:
            return
        crew.steps_taken += 1
        if not crew.steps_itself:
            return
        if limit and norm > limit:
            for buffer in crew.buffers.values():
                buffer.scale(limit / norm)
        if crew.optimizer is not None:
            optimizer.set_rates(crew.optimizer, spec.optimizer, step=self.index, steps=spec.train.steps)
            crew.optimizer.step()
        for buffer in crew.buffers.values():
            buffer.publish()


def _losses(crew: Crew, step: Step) -> dict[str, float]:
    """This rank's part of each loss sum: under cp each has one, under tp all have the same.

    Of an auxiliary loss every rank has a part of its own.
    """
    losses = dict.fromkeys(step.units, 0.0)
    for runner in crew.stages.values():
        position = runner.module.grid.position(crew.rank)
        if runner.loss is not None and not position["tp"]:
            losses[runner.module.name] += float(runner.loss)
        if runner.aux is not None:
            losses[aux_name(runner.module.name)] += float(runner.aux)
    return losses


def _means(step: Step, sums: list[float]) -> dict[str, float]:
    """Divide the sums of losses by their counts; a loss without anything to judge is 0."""
    return {
        name: total / units if units else 0.0
        for total, (name, units) in zip(sums, step.units.items(), strict=True)
    }


class _Nothing:
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


def _digest(step: Step) -> tuple[float, float]:
    """48 bits of each half of a hash of what a step's samples are described as; exact in fp64."""
    facts = [(s.id, s.length, s.rows, s.placeholders, s.units) for s in step.samples]
    half = hashlib.blake2b(repr(facts).encode(), digest_size=12).digest()
    return float(int.from_bytes(half[:6], "big")), float(int.from_bytes(half[6:], "big"))


def _check_digests(crew: Crew, step: Step, digests: torch.Tensor) -> None:
    """Compare the digests [ranks, 2] of what each rank takes the samples of a step to be."""
    ranks = crew.topology.ranks
    differ = [r for r, row in zip(ranks, digests, strict=True) if not row.equal(digests[0])]
    if differ:
        ids = f"{step.samples[0].id}..{step.samples[-1].id}"
        raise WorldError(
            f"ranks {differ} describe samples {ids} differently than rank {ranks[0]}: a source's "
            "describe must depend on nothing but the sample's id."
        )
