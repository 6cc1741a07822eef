"""Forward-only programs: losses, next tokens, logits and predictions of a step, without backward or update."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch

from mimogrid.core.base.samples import Sample
from mimogrid.core.job.models import Gpt
from mimogrid.core.program.lower import plan_step
from mimogrid.core.step.step import Step
from mimogrid.shell.megatron.cache import Cache
from mimogrid.shell.modules.loss import Loss, weighted_cross_entropy
from mimogrid.shell.runtime.data import Loads
from mimogrid.shell.runtime.exchange import compact, gather_objects, gather_values
from mimogrid.shell.runtime.execute import execute
from mimogrid.shell.runtime.rank import Caches, RankRuntime, begin_program
from mimogrid.shell.runtime.stage import StageStep, losses_of


def evaluate(
    runtime: RankRuntime,
    step: Step,
    source: Loads | None = None,
    loss: Loss = weighted_cross_entropy,
) -> Mapping[str, float]:
    """Return each module's loss of a step, divided by its count, on every rank."""
    sums = loss_sums(runtime, step, source, loss)
    return {name: total / step.units[name] if step.units[name] else 0.0 for name, total in sums.items()}


def loss_sums(
    runtime: RankRuntime,
    step: Step,
    source: Loads | None = None,
    loss: Loss = weighted_cross_entropy,
) -> Mapping[str, float]:
    """Return the sum of each module's loss over a step, on every rank; `Step.units` has what to divide by."""
    mine = losses_of(_forward(runtime, step, source, loss=loss), step)
    sums = torch.tensor([*mine.values()], dtype=torch.float64, device=runtime.device.torch)
    totals = gather_values(runtime, sums).sum(dim=0).tolist()
    return {n: total for n, total in zip(mine, totals, strict=True) if n in runtime.topology.modules}


Choose = Callable[[Sequence[Sample], torch.Tensor], torch.Tensor]
"""What chooses a token for each of some samples from the logits [B, V] behind them."""


def likeliest(samples: Sequence[Sample], logits_BV: torch.Tensor) -> torch.Tensor:
    """Choose the likeliest tokens."""
    return logits_BV.argmax(dim=-1)


def predict(
    runtime: RankRuntime,
    step: Step,
    source: Loads | None = None,
    *,
    choose: Choose = likeliest,
    caches: Caches | None = None,
) -> list[int]:
    """Return the next token of every sample of a step, on every rank.

    With `caches` the samples go on from what is there, with one token each; where nothing is there, they begin.
    """
    tokens = torch.zeros(len(step.samples), dtype=torch.float64, device=runtime.device.torch)
    for stage in _forward(runtime, step, source, caches=caches):
        for microbatch in stage.logits:
            samples, logits_BV = stage.last_logits(microbatch)
            chosen = choose(step.samples[samples.start : samples.stop], logits_BV)
            tokens[samples.start : samples.stop] = chosen
    return [int(token) for token in gather_values(runtime, tokens).sum(dim=0).tolist()]


@contextlib.contextmanager
def caching(runtime: RankRuntime) -> Iterator[Caches | None]:
    """Give new caches for the stages of the language model that this rank has; all ranks call it.

    Gives None on all ranks where a network keeps none (that of a host program, or layers of transformer-engine), and
    where there are several language models.
    """
    stages = {s: runner for s, runner in runtime.stages.items() if isinstance(runner.module.model, Gpt)}
    mine = len(runtime.topology.graph.texts) == 1 and all(r.network.can_cache for r in stages.values())
    told = torch.tensor([mine], dtype=torch.float64, device=runtime.device.torch)
    try:
        yield {stage: Cache() for stage in stages} if gather_values(runtime, told).all() else None
    finally:
        for runner in stages.values():
            runner.network.cache = None


def logits(runtime: RankRuntime, step: Step, source: Loads | None = None) -> tuple[torch.Tensor, ...]:
    """Return the logits [T, V] of each microbatch, sample after sample.

    They are on the first rank of each dp rank of a last stage; other ranks have none.
    """
    stages = _forward(runtime, step, source)
    return tuple(stage.logits[microbatch] for stage in stages for microbatch in sorted(stage.logits))


def sample_logits(runtime: RankRuntime, step: Step, source: Loads | None = None) -> dict[int, torch.Tensor]:
    """Return the logits [T, V] of each sample by its place in the step, on the first rank of the job, on the CPU."""
    mine = {
        place: compact(logits_TV)
        for stage in _forward(runtime, step, source)
        for microbatch in stage.logits
        for place, logits_TV in stage.sample_logits(microbatch)
    }
    return {place: found for of_rank in gather_objects(runtime, mine) for place, found in of_rank.items()}


def generate(
    runtime: RankRuntime, step: Step, source: Loads | None = None
) -> dict[int, Mapping[str, torch.Tensor]]:
    """Return what the user's modules generate for each sample, by its place in the step and by module.

    It is on the first rank of the job, on the CPU.
    """
    mine = [
        (place, stage.runner.module.name, compact(prediction))
        for stage in _forward(runtime, step, source, generates=True)
        for microbatch in stage.predictions
        for place, prediction in stage.sample_predictions(microbatch)
    ]
    found: dict[int, dict[str, torch.Tensor]] = {}
    for of_rank in gather_objects(runtime, mine):
        for place, module, prediction in of_rank:
            found.setdefault(place, {})[module] = prediction
    return {**found}


def _forward(
    runtime: RankRuntime,
    step: Step,
    source: Loads | None,
    *,
    loss: Loss | None = None,
    generates: bool = False,
    caches: Caches | None = None,
) -> Iterable[StageStep]:
    """Run the forwards of a step; return the stages of this rank in it."""
    runtime.complete_weights()
    program = plan_step(step, runtime.job.forward_orders.of(step.topology))
    actions = program.of(runtime.rank)
    context = begin_program(
        runtime, program, actions, source=source, loss=loss, generates=generates, caches=caches or {}
    )
    runtime.heartbeat.begin_program(runtime.job.spec.train.steps, len(actions), training=False)
    execute(actions, context)
    return context.stages.values()
