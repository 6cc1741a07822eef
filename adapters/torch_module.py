"""Embedded: a job inside a world that a host has initialized, as one object with a `step`.

A host is any program that calls ``torch.distributed.init_process_group`` and has a training loop of its own:

    embedded = Embedded(open_job("job.toml"))
    for batch in loader:
        outcome = embedded.step(batch)
    embedded.close()

Every rank of the host's default process group makes one and calls the same methods in the same order; ranks
that the job has no use for idle. Nothing of the host's is owned or changed: the process group stays as it is,
and so do the number of threads, the default dtype, the settings of determinism, warnings, the environment and
the random states. What an `Embedded` opens, its process groups, it closes. The numbers are those of `mimogrid
train`, to the last bit where the host computes on as many threads (``train.threads``; torch's default is all
cores).

A module of the job may be an object of the host's instead of something that is built by name:

    [modules.ears]
    model = "mimogrid.shell.job.host:module"
    width = 48

    Embedded(job, modules={"ears": network})

It keeps to `shell.modules.OwnNetwork`, and its grid has dp ranks only. On every dp rank it begins with the
weights of the first, as under torch's DistributedDataParallel.

A module with a built-in model may be computed by networks of the host's, too, one for each stage, on any grid
(`shell.modules.HostNetwork`; with several chunks, an `nn.ModuleList` of one for each). The plan is that of the
built-in model: layers, heads, tokens, costs; the parameters are the networks' own. Such networks often need the
job's process groups, so instead of a mapping `modules` may be a function that is called with the `Embedded` once
these are open, and returns the mapping.

**Samples** come from the job's source, or from the host, step by step (a job that has none of its own names
`mimogrid.shell.job.host:samples`). A host gives each rank the same `Example` objects in the same order: all samples
of the step. Their descriptions are read on every rank, their tensors only where a rank needs them, module by
module, so a mapping that loads when it is asked keeps every rank to its own share. With torch's DataLoader that
is ``batch_size = global_size``, a sampler that is the same on every rank (no DistributedSampler), and
``collate_fn=list``.

**Updates** are the job's (its `[optimizer]`), or the host's: with ``optimizer="host"`` a step ends with the
finished gradients in ``.grad``, summed over all ranks that have to be, not clipped. Every rank that holds a
weight has the same gradient of it, so any optimizer that treats each weight (or each element) by itself does
the same on all of them. ``outcome.gradient_norm`` is the norm over all modules and all ranks; where
``outcome.taken`` is False (on every rank) the host lets the step go; ``outcome.skipped`` says why. This is for
fp32 and fp64, where the weights themselves are what is updated.
"""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, TypeVar

import attrs
import torch
import torch.distributed as dist
from torch import nn

from mimogrid.core.base.errors import PlanError, Problem, WorldError, nearest
from mimogrid.core.base.hashing import draw_bits
from mimogrid.core.base.samples import Sample
from mimogrid.core.job.models import BuiltIn, Own
from mimogrid.core.job.spec import ModuleSpec
from mimogrid.core.program.digest import digest_of
from mimogrid.core.step.seeds import SEEDS
from mimogrid.core.step.step import Step, step_of
from mimogrid.core.topology.roles import RankRole, role_of
from mimogrid.core.update.decision import is_passed_over
from mimogrid.shell.checkpoint.state import facts_of, gather, restore, scatter
from mimogrid.shell.device import device as devices
from mimogrid.shell.job.host import Handed
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.megatron.cpu import on_device
from mimogrid.shell.modules.loss import Loss, weighted_cross_entropy
from mimogrid.shell.runtime.agreement import Outcome
from mimogrid.shell.runtime.rank import RankRuntime
from mimogrid.shell.world.groups import Groups, open_groups
from mimogrid.shell.world.heartbeat import Heartbeat
from mimogrid.shell.world.preemption import StopRequest
from mimogrid.shell.world.world import World, first_failure, visit


T = TypeVar("T")
Networks = Mapping[str, nn.Module]

WHOLE = ("fp32", "fp64")
"""Precisions in which the weights themselves are updated."""
FACTS = "facts"
"""Under this name a state holds, besides tensors, the number of the next step and what decisions hang on."""


@attrs.frozen(eq=False)
class Example:
    """One sample of the host's: what it is, known to all, and its tensors by module, read only where needed.

    The tensors of a module are those that `shell.job.sources.Source.load` returns. `sample.id` need not be its
    place in the global order, only the same everywhere.
    """

    sample: Sample
    tensors: Mapping[str, Mapping[str, torch.Tensor]]


class Embedded:
    """A job in a host's world; made, stepped and closed by every rank of it. See the top of this file."""

    def __init__(
        self,
        job: Job,
        modules: "Networks | Callable[[Embedded], Networks] | None" = None,
        groups: Groups | None = None,
        *,
        ranks: Sequence[int] | None = None,
        optimizer: Literal["job", "host"] = "job",
        device: torch.device | str = "cpu",
    ) -> None:
        """Enter the host's world and build what this rank hosts.

        Args:
            job: The job; the same on every rank.
            modules: Networks of the host's by the names of the modules that this rank hosts, or what builds them.
            groups: The planned groups, where the host has opened them already (`shell.world.groups.open_groups`);
                they stay open.
            ranks: The ranks of the host's on which the job's lie, ascending; else the first ones.
            optimizer: Who updates the weights.
            device: Where this rank computes. CUDA talks through NCCL, the CPU through gloo.

        Raises PlanError where the job does not fit the host's world or the modules do not fit the job, and
        WorldError where another rank has another plan.
        """
        _check(job, {} if callable(modules) else modules or {}, ranks, optimizer)
        self.job = job
        self.index = 0
        """The number of the next step."""
        self.device = devices.of(torch.device(device))
        self._closing = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            self.world: World = visit(
                ranks=range(job.topology.world_size) if ranks is None else ranks,
                timeout_s=job.spec.train.timeout_s,
                digest=digest_of(job.step(0), job.order),
            )
            stack.enter_context(first_failure(self.world))
            self.groups = groups or stack.enter_context(open_groups(job.topology, self.world, self.device))
            self._closing = stack
            with self._ours(), _same_environment():
                if callable(modules):
                    modules = self._built(modules)
                self.runtime = self._runtime(modules or {}, steps_itself=optimizer == "job")
            self._closing = stack.pop_all()
        # Optimizers like to set gradients to None; ours are views of one buffer and are put back.
        buffers = self.runtime.buffers.values() if self.runtime else ()
        self._gradients = [(w, w.grad) for buffer in buffers for w in buffer.weights.values()]
        self._upcoming: tuple[int, Step] | None = None

    def enter(self, context: AbstractContextManager[T]) -> T:
        """Open something that is closed with this; for what builds `modules`."""
        return self._closing.enter_context(context)

    def _built(self, build: "Callable[[Embedded], Networks]") -> "Networks":
        """Let the host build its networks, with draws that follow from the job and the stages of this rank."""
        stages = [str(info.stage) for info in self.job.topology.role(self.world.rank).stages]
        torch.manual_seed(draw_bits(self.job.spec.seed, " ".join(stages), "host") % SEEDS)
        networks = build(self)
        _check(self.job, networks, None, "job")
        return networks

    def _runtime(self, modules: Mapping[str, nn.Module], *, steps_itself: bool) -> RankRuntime | None:
        rank = self.world.rank
        if rank not in self.job.topology.ranks:
            return None
        self._agree_on(modules)
        return RankRuntime(
            self.job,
            rank,
            self.groups,
            self.device,
            heartbeat=Heartbeat(rank),
            stop_request=StopRequest(),  # signals are the host's
            given=modules,
            steps_itself=steps_itself,
        )

    def _agree_on(self, modules: Networks) -> None:
        """All ranks of a module have a network of the host's for it, or none has: else they would wait for ever."""
        ranks = self.job.topology.ranks
        every: list[Any] = [None] * len(ranks)
        dist.all_gather_object(every, sorted(modules), group=self.groups.by_ranks[ranks])
        given = dict(zip(ranks, every, strict=True))
        for name, module in self.job.topology.modules.items():
            without = [rank for rank in module.grid.ranks if name not in given[rank]]
            if 0 < len(without) < module.grid.size:
                raise WorldError(
                    f"the host gave a network for '{name}' on some ranks, and none on {without}. "
                    f"Give one on each rank that hosts it: {list(module.grid.ranks)}."
                )

    @property
    def role(self) -> RankRole | None:
        """What this rank does in the job; None where the job does not reach it."""
        rank, topology = self.world.rank, self.job.topology
        return role_of(topology, rank) if rank < topology.world_size else None

    def step(
        self, batch: Sequence[Example] | None = None, *, loss: Loss = weighted_cross_entropy
    ) -> Outcome | None:
        """Train one step, on a batch or on the job's own next samples; an idle rank returns None.

        `loss` is that of language models: any sum over tokens of what the last stage predicts.

        Raises PlanError where a sample does not fit the job, WorldError where the ranks were given different
        batches or what is loaded is not as described, and what a module raises; on the other ranks EchoError.
        """
        index = self.index if batch is not None else self._next(self.index)
        self.index = index + 1
        self._check_batch(batch, index)
        if self.runtime is None:
            return None
        for weight, gradient in self._gradients:
            weight.grad = gradient
        with first_failure(self.world), self._ours():
            if batch is None:
                upcoming = self._upcoming
                step = upcoming[1] if upcoming and upcoming[0] == index else self.job.step(index)
                following = self._next(index + 1)
                self._upcoming = following, self.job.step(following)
                return self.runtime.run(index, step, self._upcoming[1], loss=loss)
            step, source = self._given(self.runtime, batch)
            return self.runtime.run(index, step, step, source=source, loss=loss)

    def evaluate(
        self, batch: Sequence[Example] | None = None, *, loss: Loss = weighted_cross_entropy
    ) -> Mapping[str, float] | None:
        """Return each module's loss of a batch, or of the job's own next samples, which stay the next; train nothing.

        Networks are in evaluation mode. The losses are the same on every rank; an idle one returns None.
        """
        self._check_batch(batch, self._next(self.index))
        if self.runtime is None:
            return None
        with first_failure(self.world), self._ours():
            return self.runtime.judge(*self._given(self.runtime, batch), loss)

    def answers(self, batch: Sequence[Example] | None = None) -> tuple[torch.Tensor, ...]:
        """Return the logits [tokens, V] of each microbatch, on the first rank of each dp rank of a last stage."""
        self._check_batch(batch, self._next(self.index))
        if self.runtime is None:
            return ()
        with first_failure(self.world), self._ours():
            return self.runtime.answer(*self._given(self.runtime, batch))

    @contextlib.contextmanager
    def preparing(self) -> Iterator[None]:
        """Make the batch of the next call. Where a rank fails in it, the others are told by that call (EchoError)."""
        try:
            yield
        except Exception:
            if self.runtime is not None:
                with contextlib.suppress(RuntimeError):  # They are gone, or wait for something else.
                    self.runtime.has_nothing()
            raise

    def _check_batch(self, batch: Sequence[Example] | None, index: int) -> None:
        if batch is not None and len(batch) != self.job.spec.batch.global_size:
            fact = f"the host gave {len(batch)} samples, a step takes {self.job.spec.batch.global_size}."
            raise PlanError([Problem("batch.global_size", fact, "Give every rank all samples of the step.")])
        if batch is None and isinstance(self.job.source, Handed):
            self.job.source.load(index, "")

    def _given(self, runtime: RankRuntime, batch: Sequence[Example] | None) -> "tuple[Step, _Batch | None]":
        """Lay a batch over the job; compare what the ranks were given."""
        if batch is None:
            return self.job.step(self._next(self.index)), None
        runtime.agree_on(step_of(self.job.topology, tuple(example.sample for example in batch)))
        samples = tuple(attrs.evolve(example.sample, id=i) for i, example in enumerate(batch))
        return step_of(self.job.topology, samples), _Batch(batch)

    def _next(self, index: int) -> int:
        """Return the first step from `index` on whose samples are not passed over (`train.skip_steps`)."""
        train = self.job.spec.train
        return next(step for step in itertools.count(index) if not is_passed_over(train, step))

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the weights of this rank that are trained, by layout-independent name, ``module.parameter``.

        Under tp and ep a weight is this rank's part of it.
        """
        for stage, buffer in self.runtime.buffers.items() if self.runtime else ():
            for name, weight in buffer.weights.items():
                yield f"{stage.module}.{name}", weight

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the weights of this rank that are trained."""
        for _, weight in self.named_parameters():
            yield weight

    def state_dict(self) -> dict[str, Any]:
        """Return weights, what the optimizer keeps, and the number of the next step; all ranks call it.

        The first rank of the job gets full tensors on the CPU by layout-independent name, which any layout of
        the same model can load; the others get nothing. A host's optimizer keeps its own.
        """
        if self.runtime is None:
            return {}
        full: dict[str, Any] = dict(gather(self.runtime))
        if self.runtime.group.rank() == 0:
            full[FACTS] = {"step": self.index, **facts_of(self.runtime)}
        return full

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned; all ranks call it, and what the job's first one gives counts.

        Mere weights (such as a run's ``weights.safetensors``) leave all else as it is. Raises WorldError where
        names or shapes are of another model; where they are those of a weight, before anything is changed.
        """
        if self.runtime is None:
            return
        told = [state.get(FACTS)]
        dist.broadcast_object_list(told, group=self.runtime.group, group_src=0)
        tensors = {name: tensor for name, tensor in state.items() if name != FACTS}
        scatter(self.runtime, tensors, told[0])
        if told[0] is not None:
            restore(self.runtime, told[0])
            self.index = told[0]["step"]

    def close(self) -> None:
        """Destroy the process groups that were made for the job; the host's stay. May be called twice."""
        self._closing.close()

    def __enter__(self) -> "Embedded":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _ours(self) -> Iterator[None]:
        """Let megatron-core work on this device, and draw without the host's random states noticing."""
        cuda = [self.device.torch] if self.device.torch.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda), on_device(self.device.torch, seed=self.job.spec.seed):
            yield


@attrs.frozen(eq=False)
class _Batch:
    """The examples of a step as the half of a source that loads, by their place in the batch."""

    examples: Sequence[Example]

    def load(self, sample_id: int, module: str) -> Mapping[str, torch.Tensor]:
        """Return what a module reads of an example."""
        return self.examples[sample_id].tensors[module]


@contextlib.contextmanager
def _same_environment() -> Iterator[None]:
    """Undo what is set in the environment meanwhile: a GPTModel sets which attention transformer-engine takes."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _check(job: Job, modules: Mapping[str, nn.Module], ranks: Sequence[int] | None, optimizer: str) -> None:
    problems: list[Problem] = []
    if optimizer == "host" and (job.spec.precision not in WHOLE or job.spec.optimizer.sharded):
        message = "the host updates the weights; in half precision or shared by dp ranks, they follow others."
        remedy = "Take precision = 'fp32' and optimizer.sharded = false, or let the job update them."
        problems.append(Problem("precision", message, remedy))
    needed = job.topology.world_size
    if ranks is not None and len(ranks) != needed:
        message = f"the host gives {len(ranks)} ranks, the job needs {needed}."
        problems.append(Problem("ranks", message, f"Name {needed} ranks, or change the job's grids."))
    if ranks is None and dist.is_initialized() and dist.get_world_size() < needed:
        message = f"the host's world has {dist.get_world_size()} ranks, the job needs {needed}."
        problems.append(Problem("world_size", message, "Start more, or make the grids smaller."))
    for name in modules:
        if name not in job.topology.modules:
            remedy = nearest(name, tuple(job.topology.modules))
            problems.append(Problem("modules", f"the job has no module '{name}'.", remedy))
        else:
            problems += _mismatches(
                name, job.topology.modules[name].model, job.spec.modules[name], modules[name]
            )
    if problems:
        raise PlanError(problems)


def _mismatches(
    name: str, model: BuiltIn | Own, written: ModuleSpec, network: nn.Module
) -> Iterator[Problem]:
    """Say what of a built-in module a network of the host's cannot take over."""
    if isinstance(model, Own):
        return
    where = f"modules.{name}"
    chunks = list(network) if written.chunks > 1 and isinstance(network, nn.ModuleList) else [network]
    if len(chunks) != written.chunks:
        message = f"is {written.chunks}; the host gave {len(chunks)} networks for each pipeline rank."
        yield Problem(f"{where}.chunks", message, "Give an nn.ModuleList with one for each chunk.")
    elif any(not hasattr(one, "table") for one in chunks):
        message = (
            f"is built in ('{written.model}'); a network was handed over for it that has no table of weights."
        )
        remedy = (
            "Set model = 'mimogrid.shell.job.host:module' and the width of its rows, "
            "or see shell.modules.HostNetwork."
        )
        yield Problem(f"{where}.model", message, remedy)
    if written.recompute != "none":
        message = f"is '{written.recompute}', which a host's network decides for itself."
        yield Problem(f"{where}.recompute", message, "Leave it out, and configure the network.")
    for key, value in (("trainable", written.trainable), ("frozen", written.frozen)):
        if isinstance(value, tuple):
            message = "has patterns for the parameters of the built-in model; the host's network has others."
            yield Problem(f"{where}.{key}", message, "Leave it out, and set requires_grad in the network.")
