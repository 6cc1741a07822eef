"""Cut backwards: the gradients of a step whose last backwards are cut, beside those of the same step without cuts."""

from unittest.mock import patch

import attrs
import torch

from mimogrid.core.schedule.actions import Compute, Kind
from mimogrid.core.schedule.order import Order
from mimogrid.shell.device.place import RankPlace
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.runtime.rank import RankRuntime
from mimogrid.shell.runtime.session import open_session
from mimogrid.shell.runtime.train_step import train_step


@attrs.frozen
class Compared:
    """What two steps on a rank came to.

    `apart` has, relative to the largest value, how far gradients are that are not the same bits, by stage and name.
    `parts` is how many parts of backwards ran, and `runs` how many pieces all backwards of the step ran in.
    """

    apart: dict[str, float]
    parts: int
    runs: int


def compared_in_world(place: RankPlace, job: Job) -> Compared:
    """Run on every rank: a step with the cuts of the job, and one without."""
    with open_session(place, job) as session:
        runtime = session.runtime
        if runtime is None:
            return Compared({}, 0, 0)
        order = job.order_of(job.step(0))
        whole = _gradients(runtime, job, attrs.evolve(order, cuts={}))
        with patch.object(torch.autograd, "backward", wraps=torch.autograd.backward) as ran:
            cut = _gradients(runtime, job, order)
        parts = [t.action for t in runtime.last_timeline if isinstance(t.action, Compute)]
    assert whole.keys() == cut.keys()
    return Compared(
        {
            name: float((gradient - cut[name]).abs().max() / gradient.abs().max())
            for name, gradient in whole.items()
            if not torch.equal(gradient, cut[name])
        },
        sum(action.kind is Kind.BACKWARD_PART for action in parts),
        ran.call_count,
    )


def _gradients(runtime: RankRuntime, job: Job, order: Order) -> dict[str, torch.Tensor]:
    train_step(runtime, 0, job.step(0), job.step(0), update=False, order=order)
    for buffer in runtime.buffers.values():
        buffer.gather_gradients()
    return {
        f"{stage}.{name}": weight.grad.clone()
        for stage, buffer in runtime.buffers.items()
        for name, weight in buffer.weights.items()
        if weight.grad is not None
    }
