"""Embedding: a job inside a host program that has its own training loop.

The program calls ``torch.distributed.init_process_group``, and then on every rank, in the same order:

    embedded = Embedded(open_job("job.toml"))
    for batch in loader:
        outcome = embedded.step(batch)
    embedded.close()

Losses and weights are bitwise equal to those of `mimogrid train` if the program computes on ``train.threads`` threads.
The job changes nothing of the program: process group, threads, default dtype, determinism settings, random states,
warnings and environment stay as they are. docs/adapters.md shows how a program brings its own networks, samples and
optimizer.
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
from mimogrid.shell.job.fitted import Fitted, fit
from mimogrid.shell.job.host import HostSource
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.megatron.cpu import on_device
from mimogrid.shell.modules.loss import Loss, weighted_cross_entropy
from mimogrid.shell.runtime.agreement import Outcome, check_batch, report_no_batch
from mimogrid.shell.runtime.forward_only import evaluate, logits
from mimogrid.shell.runtime.rank import RankRuntime, build_runtime
from mimogrid.shell.runtime.train_step import train_step, update_weights
from mimogrid.shell.world.groups import ProcessGroups, open_groups
from mimogrid.shell.world.heartbeat import Heartbeat
from mimogrid.shell.world.preemption import StopRequest
from mimogrid.shell.world.world import World, first_failure, visit


T = TypeVar("T")
Networks = Mapping[str, nn.Module]

WHOLE = ("fp32", "fp64")
"""The precisions in which the optimizer updates the weights of the networks directly."""
FACTS = "facts"
"""The key of a state that holds no tensor: the number of the next step, and the state that decides on updates."""


@attrs.frozen(eq=False)
class Example:
    """One sample of the host program: its description, and its tensors by module.

    Every rank reads the description. It reads the tensors of a module only where it needs them, so a mapping that loads
    lazily loads this rank's share only. The tensors of a module are those that `shell.job.sources.source.Source.load`
    returns.
    `sample.id` may be any number that is the same on every rank.
    """

    sample: Sample
    tensors: Mapping[str, Mapping[str, torch.Tensor]]


class Embedded:
    """A job in the process group of a host program. Every rank of the group creates, steps and closes one."""

    def __init__(
        self,
        job: Job,
        modules: "Networks | Callable[[Embedded], Networks] | None" = None,
        groups: ProcessGroups | None = None,
        *,
        ranks: Sequence[int] | None = None,
        optimizer: Literal["job", "host"] = "job",
        device: torch.device | str = "cpu",
    ) -> None:
        """Open the process groups of the job and build the stages of this rank.

        Args:
            job: The job, the same on every rank.
            modules: Networks for modules that this rank hosts, by the name of the module, or a function that returns
                them. The function is called with this object once the process groups are open. For a custom module
                (its model is ``mimogrid.shell.job.host:module``) a network is an `OwnNetwork`; all dp ranks start with
                the weights of the first. For a built-in module it is a `HostNetwork`, on any grid, or an
                `nn.ModuleList` with one for each chunk.
            groups: The process groups of the job, if they are open already (`shell.world.groups.open_groups`); they
                stay open.
            ranks: The ranks of the host program on which the job runs, ascending; None: the first ones.
            optimizer: "job": the job updates the weights by its `[optimizer]`. "host": a step ends with complete
                gradients in ``.grad``, not clipped and equal on all ranks that hold the weight, for an optimizer that
                updates each weight separately, unless ``outcome.taken`` is False. Only for fp32 and
                fp64 without a sharded update.
            device: The device of this rank. CUDA communicates through NCCL, the CPU through gloo.

        Raises PlanError if the job does not fit the host program or the modules do not fit the job, and WorldError if
        another rank has another plan.
        """
        _check(job, {} if callable(modules) else modules or {}, ranks, optimizer)
        self.job = job
        self.index = 0
        """The number of the next step."""
        self.outcome: Outcome | None = None
        """The result of the last training step; None before the first one and on an idle rank."""
        self.device = devices.of(torch.device(device))
        self._closing = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            self.world: World = visit(
                ranks=range(job.topology.world_size) if ranks is None else ranks,
                timeout_s=job.spec.train.timeout_s,
                digest=digest_of(job.program_of(job.step(0))),
            )
            stack.enter_context(first_failure(self.world))
            self.groups = groups or stack.enter_context(open_groups(job.topology, self.world, self.device))
            self._closing = stack
            with self._ours(), _same_environment():
                if callable(modules):
                    modules = self._built(modules)
                self.runtime = self._runtime(modules or {}, updates_weights=optimizer == "job")
            self._closing = stack.pop_all()
        # Optimizers set gradients to None; these are views of a buffer, so they are put back before each step.
        buffers = self.runtime.buffers.values() if self.runtime else ()
        self._gradients = [(w, w.grad) for buffer in buffers for w in buffer.weights.values()]
        self._upcoming: tuple[int, Step] | None = None

    def enter(self, context: AbstractContextManager[T]) -> T:
        """Enter a context that `close` leaves; for a function that builds `modules`."""
        return self._closing.enter_context(context)

    def _built(self, build: "Callable[[Embedded], Networks]") -> "Networks":
        """Build the networks of the host program under a random state that depends on the job and the stages only."""
        stages = [str(info.stage) for info in self.job.topology.role(self.world.rank).stages]
        torch.manual_seed(draw_bits(self.job.spec.seed, " ".join(stages), "host") % SEEDS)
        networks = build(self)
        _check(self.job, networks, None, "job")
        return networks

    def _runtime(self, modules: Mapping[str, nn.Module], *, updates_weights: bool) -> RankRuntime | None:
        rank = self.world.rank
        if rank not in self.job.topology.ranks:
            return None
        self._agree_on(modules)
        # Networks of the host program compute padded blocks.
        self.job = attrs.evolve(self.job, topology=self.job.topology.with_padded(modules))
        return build_runtime(
            self.job,
            rank,
            self.groups,
            self.device,
            heartbeat=Heartbeat(rank),
            stop_request=StopRequest(),  # signals are the host's
            user_modules=modules,
            updates_weights=updates_weights,
        )

    def _agree_on(self, modules: Networks) -> None:
        """Check that all ranks of a module have a network for it, or none has; otherwise they would wait forever."""
        ranks = self.job.topology.ranks
        every: list[Any] = [None] * len(ranks)
        dist.all_gather_object(every, sorted(modules), group=self.groups.by_ranks[ranks])
        names = dict(zip(ranks, every, strict=True))
        for name, module in self.job.topology.modules.items():
            without = [rank for rank in module.grid.ranks if name not in names[rank]]
            if 0 < len(without) < module.grid.size:
                raise WorldError(
                    f"the host gave a network for '{name}' on some ranks, and none on {without}. "
                    f"Give one on each rank that hosts it: {list(module.grid.ranks)}."
                )

    @property
    def role(self) -> RankRole | None:
        """What this rank does in the job; None on a rank beyond the world of the job."""
        rank, topology = self.world.rank, self.job.topology
        return role_of(topology, rank) if rank < topology.world_size else None

    def step(
        self, batch: Sequence[Example] | None = None, *, loss: Loss = weighted_cross_entropy
    ) -> Outcome | None:
        """Train one step, on a batch or on the next samples of the job; an idle rank returns None.

        A batch has all samples of the step, the same on every rank and in the same order. `loss` is that of language
        models: any sum over tokens of the predictions of the last stage.

        Raises PlanError if a sample does not fit the job, WorldError if ranks have different batches or loaded tensors
        differ from their descriptions, and the errors of modules. The other ranks then raise EchoError.
        """
        index = self.index if batch is not None else self._next(self.index)
        self.index, self.outcome = index + 1, None
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
                return self._trained(self.runtime, index, step, self._upcoming[1], loss=loss)
            step, source = self._step_of(self.runtime, batch)
            return self._trained(self.runtime, index, step, step, source=source, loss=loss)

    def _trained(self, runtime: RankRuntime, *step: Any, **options: Any) -> Outcome:
        """Train a step; the host program finds its weights complete."""
        self.outcome = train_step(runtime, *step, **options)
        runtime.complete_weights()
        return self.outcome

    def defer_updates(self) -> None:
        """From here on a step ends with complete gradients, which `update` applies; every rank calls it.

        In between the host may set the rates of ``runtime.optimizer``, or another optimizer of torch over the same main
        parameters. Raises PlanError if the host updates the weights.
        """
        if self.runtime is None:
            return
        if not self.runtime.updates_weights:
            fact = "the host updates the weights by itself (optimizer='host')."
            raise PlanError([Problem("optimizer", fact, "Leave it to the job: optimizer='job'.")])
        self.runtime.defers_update = True

    def update(self, norm: float, *, limit: float) -> None:
        """Apply the gradients of the last step, clipped to the norm `limit` (0: not); `norm` is theirs.

        Every rank of the job calls it, and with the same numbers, because ranks that share the update gather weights.
        """
        if self.runtime is not None:
            with first_failure(self.world):
                self.runtime.steps_taken += 1
                update_weights(self.runtime, norm, limit=limit)
                self.runtime.complete_weights()

    def evaluate(
        self, batch: Sequence[Example] | None = None, *, loss: Loss = weighted_cross_entropy
    ) -> Mapping[str, float] | None:
        """Return the loss of each module on a batch, or on the next samples of the job, without training.

        Networks are in evaluation mode. The next samples stay the next ones. Losses are the same on every rank; an idle
        rank returns None.
        """
        self._check_batch(batch, self._next(self.index))
        if self.runtime is None:
            return None
        with first_failure(self.world), self._ours():
            return evaluate(self.runtime, *self._step_of(self.runtime, batch), loss)

    def answers(self, batch: Sequence[Example] | None = None) -> tuple[torch.Tensor, ...]:
        """Return the logits [tokens, V] of each microbatch, on the first tp rank of each dp rank of a last stage."""
        self._check_batch(batch, self._next(self.index))
        if self.runtime is None:
            return ()
        with first_failure(self.world), self._ours():
            return logits(self.runtime, *self._step_of(self.runtime, batch))

    @contextlib.contextmanager
    def preparing(self) -> Iterator[None]:
        """Prepare the batch of the next call. If that fails on a rank, the next call of the others raises EchoError."""
        try:
            yield
        except Exception:
            if self.runtime is not None:
                with contextlib.suppress(RuntimeError):  # They are gone, or wait for something else.
                    report_no_batch(self.runtime)
            raise

    def _check_batch(self, batch: Sequence[Example] | None, index: int) -> None:
        if batch is not None and len(batch) != self.job.spec.batch.global_size:
            fact = f"the host gave {len(batch)} samples, a step has {self.job.spec.batch.global_size}."
            raise PlanError([Problem("batch.global_size", fact, "Give every rank all samples of the step.")])
        if batch is None and isinstance(self.job.source, HostSource):
            self.job.source.load(index, "")

    def _step_of(self, runtime: RankRuntime, batch: Sequence[Example] | None) -> tuple[Step, Fitted | None]:
        """Return the step of a batch and its tensors; check that all ranks have the same batch."""
        if batch is None:
            return self.job.step_in_order(self._next(self.index)), None
        topology = self.job.topology
        check_batch(runtime, step_of(topology, tuple(fit(example.sample, topology) for example in batch)))
        source = Fitted(_Batch(batch), topology)
        return step_of(topology, tuple(map(source.describe, range(len(batch))))), source

    def _next(self, index: int) -> int:
        """Return the first step from `index` on whose samples are not skipped (`train.skip_steps`)."""
        train = self.job.spec.train
        return next(step for step in itertools.count(index) if not is_passed_over(train, step))

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the trainable weights of this rank by layout-independent name (``module.parameter``).

        Under tp and ep each is this rank's shard.
        """
        for stage, buffer in self.runtime.buffers.items() if self.runtime else ():
            for name, weight in buffer.weights.items():
                yield f"{stage.module}.{name}", weight

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the trainable weights of this rank."""
        for _, weight in self.named_parameters():
            yield weight

    def state_dict(self) -> dict[str, Any]:
        """Return weights, optimizer states and the number of the next step; all ranks call it.

        The first rank of the job gets full tensors on the CPU by layout-independent name, which any layout of
        the same model can load. The others get nothing. The state of an optimizer of the host program is not included.
        """
        if self.runtime is None:
            return {}
        full: dict[str, Any] = dict(gather(self.runtime))
        if self.runtime.group.rank() == 0:
            full[FACTS] = {"step": self.index, **facts_of(self.runtime)}
        return full

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned; all ranks call it, and the state of the job's first rank is used.

        A state of weights alone (such as ``weights.safetensors`` of a run) leaves the rest unchanged. Raises WorldError
        if names or shapes differ from those of the model; for weights, before anything is changed.
        """
        if self.runtime is None:
            return
        first: list[Any] = [state.get(FACTS)]
        dist.broadcast_object_list(first, group=self.runtime.group, group_src=0)
        (facts,) = first
        tensors = {name: tensor for name, tensor in state.items() if name != FACTS}
        scatter(self.runtime, tensors, facts)
        if facts is not None:
            restore(self.runtime, facts)
            self.index = facts["step"]

    def close(self) -> None:
        """Destroy the process groups of the job, and no others. May be called twice."""
        self._closing.close()

    def __enter__(self) -> "Embedded":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _ours(self) -> Iterator[None]:
        """Let megatron-core use this device, and restore the random states of the host program afterwards."""
        cuda = [self.device.torch] if self.device.torch.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda), on_device(self.device.torch, seed=self.job.spec.seed):
            yield


@attrs.frozen(eq=False)
class _Batch:
    """The examples of a step as a source that loads them, by their place in the batch."""

    examples: Sequence[Example]

    def describe(self, sample_id: int) -> Sample:
        """Return the description of an example, numbered by its place."""
        return attrs.evolve(self.examples[sample_id].sample, id=sample_id)

    def load(self, sample_id: int, module: str) -> Mapping[str, torch.Tensor]:
        """Return the tensors of an example for a module."""
        return self.examples[sample_id].tensors[module]


@contextlib.contextmanager
def _same_environment() -> Iterator[None]:
    """Restore the environment: a GPTModel sets variables that choose the attention of transformer-engine."""
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
    if optimizer == "host" and job.spec.optimizer.ema:
        message = "is a mean over updates of the job, and the host updates the weights."
        problems.append(
            Problem("optimizer.ema", message, "Let the host keep the mean, or the job update them.")
        )
    needed = job.topology.world_size
    if ranks is not None and len(ranks) != needed:
        message = f"the host gives {len(ranks)} ranks, the job needs {needed}."
        problems.append(Problem("ranks", message, f"Name {needed} ranks, or change the job's grids."))
    if ranks is None and dist.is_initialized() and dist.get_world_size() < needed:
        message = f"the host's world has {dist.get_world_size()} ranks, the job needs {needed}."
        problems.append(Problem("world_size", message, "Start more, or make the grids smaller."))
    if modules and job.topology.tokens_per_cell:
        message = "counts the positions of samples, and networks of a host pad samples to one length."
        problems.append(Problem("batch.tokens_per_microbatch", message, "Use batch.microbatches."))
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
    """Yield why a network of the host program cannot compute a built-in module."""
    if isinstance(model, Own):
        return
    where = f"modules.{name}"
    chunks = list(network) if written.chunks > 1 and isinstance(network, nn.ModuleList) else [network]
    if len(chunks) != written.chunks:
        message = f"is {written.chunks}; the host gave {len(chunks)} networks for each pipeline rank."
        yield Problem(f"{where}.chunks", message, "Give an nn.ModuleList with one for each chunk.")
    elif any(not hasattr(one, "table") for one in chunks):
        message = (
            f"is built in ('{written.model}'), and the network of the host for it has no table of weights."
        )
        remedy = (
            "Set model = 'mimogrid.shell.job.host:module' and the width of its rows, "
            "or see shell.modules.interface.HostNetwork."
        )
        yield Problem(f"{where}.model", message, remedy)
    if written.recompute != "none":
        message = f"is '{written.recompute}', which a host's network decides for itself."
        yield Problem(f"{where}.recompute", message, "Leave it out, and configure the network.")
    for key, value in (("trainable", written.trainable), ("frozen", written.frozen)):
        if isinstance(value, tuple):
            message = "has patterns for the parameters of the built-in model; the host's network has others."
            yield Problem(f"{where}.{key}", message, "Leave it out, and set requires_grad in the network.")
