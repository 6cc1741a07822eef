"""Orders: the order of each schedule, by its name.

A schedule decides how far the forwards of a stage may run ahead of its backwards. The number of microbatches between
the two is *in flight*: the stage keeps their activations. One list scheduler makes all orders (`scheduler`) from
limits on what is in flight (`issue_policy`).

- GPipe (`gpipe`) runs all forwards of a step, then all backwards. Every microbatch is in flight.
- 1F1B (`1f1b`) runs forwards until a limit is in flight, and from then on one backward before each further forward.
  The limit of a stage is its depth, the number of stages from it to the loss on the longest path:

    depth 3 |  F0 F1 F2 B0 F3 B1 B2 B3
    depth 2 |  F0 F1 B0 F2 B1 F3 B2 B3
    depth 1 |  F0 B0 F1 B1 F2 B2 F3 B3

  Depth is counted from the loss, because encoders of unequal depth would deadlock if it were counted from the
  sources. It is counted in samples, so modules may have microbatches of different sizes.
- Interleaved 1F1B (`interleaved`, for modules with `chunks`): a rank has several virtual stages of a module. It runs
  a group of as many microbatches as the pipeline has ranks through its first virtual stage, then through the next
  one, and backwards in the opposite order. One limit counts the forwards of all its virtual stages.
- Zero bubble (`zb-h1`, `zb-h2`) splits backwards in two. The weight gradients fill gaps, because no other stage waits
  for them. ZB-H1 has the limits of 1F1B, and so its memory. ZB-H2 lets each stage run two microbatches ahead of the
  next one instead of one.
- `auto` tries orders on a clock (`tuning`).

The last backward of a step may be cut, whatever the schedule (`cuts`).

A stage without backward keeps an output until its readers have read it; a limit bounds how many outputs wait.

Stages on the same ranks run one at a time in the scheduler, so they agree on one order. The result has been executed
once, so ranks that follow it cannot deadlock.

Sources: PipeDream and Narayanan et al. 2021 (arXiv 2104.04473) for 1F1B and interleaving; GPipe (arXiv 1811.06965);
zero bubble (arXiv 2401.10241).
"""

import functools
from collections.abc import Callable, Sequence

import attrs

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.job.schedules import AUTO
from mimogrid.core.pricing.footprint import kept
from mimogrid.core.schedule.cuts import cuts_of
from mimogrid.core.schedule.issue_policy import ISSUE_POLICIES, IssuePolicy, IssueQueues, issue_queues_of
from mimogrid.core.schedule.order import Order
from mimogrid.core.schedule.scheduler import TimedWork, schedule
from mimogrid.core.schedule.tuning import GB, bytes_needed, tuned
from mimogrid.core.schedule.work import Work, unit_seconds, work_of
from mimogrid.core.topology.topology import COUNTS_KEPT, Topology


@attrs.frozen(eq=False)
class Orders:
    """The orders of a job's steps: one, or one for each number of microbatches that steps have.

    If the number varies, an order is made when the first step with so many comes, and the last `COUNTS_KEPT` are kept.
    Whether memory suffices is known before: the step with most microbatches has most in flight.
    """

    topology: Topology
    training: bool = True

    def of(self, topology: Topology) -> Order:
        """Return the order of steps over a topology. Raises PlanError if training needs more memory than the cap."""
        if not self.topology.tokens_per_cell:
            return self._only
        if self.training and self.topology.spec.schedule.memory_gb is not None:
            self._made(self.topology.most_microbatches)
        return self._made(topology.spec.batch.microbatches)

    @functools.cached_property
    def _only(self) -> Order:
        return order_of(self.topology, training=self.training)

    @functools.cached_property
    def _made(self) -> Callable[[int], Order]:
        return functools.lru_cache(COUNTS_KEPT)(self._order)

    def _order(self, count: int) -> Order:
        return order_of(self.topology.with_microbatches(count), training=self.training)


def order_of(topology: Topology, *, training: bool = True) -> Order:
    """Return the order of the job's schedule; without `training`, of the forwards only.

    Raises PlanError if training needs more memory than `schedule.memory_gb`.
    """
    name = topology.spec.schedule.name
    if name == AUTO and training:
        best = tuned(topology)
        order = _order(best.timed.work, best.order, best.queues, training=True)
    else:
        policy = ISSUE_POLICIES.get(name, IssuePolicy())
        work = work_of(topology, training=training, splits=policy.splits)
        queues = issue_queues_of(work, policy)
        issued = schedule(TimedWork(work, unit_seconds(work)), queues.by_pp_rank)
        order = _order(work, issued, queues, training=training)
    if training:
        _check_memory(order, topology)
    return order


def _order(work: Work, issued: Sequence[int], queues: IssueQueues, *, training: bool) -> Order:
    actions = tuple(work.actions[i] for i in issued)
    return Order(
        topology=work.topology,
        training=training,
        actions=actions,
        backward=work.backward,
        split=work.split,
        gradients=work.gradients,
        max_in_flight={**queues.unread_outputs, **work.in_flight(issued)},
        cuts=cuts_of(work.topology, actions) if training else {},
    )


def _check_memory(order: Order, topology: Topology) -> None:
    """Raise PlanError if an order needs more memory on a rank than the job's cap, in GB."""
    cap, name = topology.spec.schedule.memory_gb, topology.spec.schedule.name
    if cap is None:
        return
    needed = bytes_needed(topology, order.max_in_flight, order.split)
    rank = max(needed, key=needed.__getitem__)
    if needed[rank] <= cap * GB:
        return
    stages = [info.stage for info in topology.role(rank).stages]
    in_flight = ", ".join(f"{order.max_in_flight[s]} of {s}" for s in stages if s in order.backward)
    fixed = kept(topology, rank).bytes / GB
    fact = (
        f"{name} needs {needed[rank] / GB:.3g} GB on rank {rank}: {fixed:.3g} GB for weights, gradients and "
        f"optimizer, the rest for microbatches in flight ({in_flight or 'none'}); the cap is {cap:g} GB."
    )
    or_auto = "" if name == AUTO else f" Or use {AUTO}, which looks for an order that fits."
    remedy = f"Use smaller microbatches, recompute, or more tp, pp or ranks.{or_auto}"
    raise PlanError([Problem("schedule.memory_gb", fact, remedy)])
