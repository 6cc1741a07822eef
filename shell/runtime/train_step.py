"""The training step: forwards and backwards by the program, one agreement of all ranks, one update."""

import attrs

from mimogrid.core.program.lower import plan_step
from mimogrid.core.schedule.order import Order
from mimogrid.core.step.step import Step
from mimogrid.shell.modules.loss import Loss, weighted_cross_entropy
from mimogrid.shell.runtime import optimizer
from mimogrid.shell.runtime.agreement import Agreed, Outcome, agree
from mimogrid.shell.runtime.data import Loads
from mimogrid.shell.runtime.execute import Executor, StepEnd, execute
from mimogrid.shell.runtime.rank import RankRuntime, begin_program
from mimogrid.shell.world.phases import BETWEEN


def train_step(
    runtime: RankRuntime,
    index: int,
    step: Step,
    following: Step,
    *,
    update: bool = True,
    source: Loads | None = None,
    loss: Loss = weighted_cross_entropy,
    executor: Executor = execute,
    order: Order | None = None,
) -> Outcome:
    """Train step `index`, and agree on the samples of the `following` step; without `update` stop at the gradients.

    Samples are from `source`, or else from the job. `loss` is the loss of language models. `order` replaces the order
    of the job. Raises WorldError if loaded data are not as described, or if ranks describe the samples of the following
    step differently.
    """
    agreed: list[Agreed] = []
    program = plan_step(step, order or runtime.job.order_of(step))
    actions = program.of(runtime.rank)
    context = begin_program(
        runtime,
        program,
        actions,
        source=source,
        index=index,
        loss_scale=runtime.skip_state.scale,
        loss=loss,
        end=StepEnd(
            agree=lambda stages: agreed.append(agree(runtime, stages, index, step, following)),
            update=lambda: _take(runtime, agreed[0], index) if update else None,
        ),
    )
    for buffer in runtime.buffers.values():
        buffer.clear()
    runtime.heartbeat.begin_program(index, len(actions))
    runtime.last_timeline = executor(actions, context)
    runtime.heartbeat.enter(BETWEEN)
    runtime.last_load_s = runtime.source.lap()
    return attrs.evolve(agreed[0].outcome, timeline=runtime.last_timeline)


def _take(runtime: RankRuntime, agreed: Agreed, index: int) -> None:
    """Update the weights, if the ranks agreed to."""
    runtime.skip_state = agreed.skip_state
    if not agreed.outcome.taken or runtime.defers_update:
        return
    runtime.steps_taken += 1
    if runtime.updates_weights:
        spec = runtime.job.spec
        if runtime.optimizer is not None:
            optimizer.set_rates(runtime.optimizer, spec.optimizer, step=index, steps=spec.train.steps)
        update_weights(runtime, agreed.outcome.gradient_norm, limit=spec.optimizer.clip_norm)


def update_weights(runtime: RankRuntime, norm: float, *, limit: float) -> None:
    """Clip by the global norm (limit 0: not), update the main parameters, and copy them to the model.

    If ranks share the update, weights are stale after it; the next step gathers them (`gradients`).
    """
    buffers = runtime.buffers.values()
    if limit and norm > limit:
        for buffer in buffers:
            buffer.scale(limit / norm)
    if runtime.optimizer is not None:
        runtime.optimizer.step()
        if ema := runtime.job.spec.optimizer.ema:
            optimizer.average(runtime.optimizer, ema)
    for buffer in buffers:
        buffer.copy_main_to_model()
