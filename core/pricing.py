"""Pricing: the costs of a job that nobody has measured, and whether costs fit a job.

Two assumptions stand in for a measurement. By layers (`assumed`) every layer takes a second: enough to see the shape
of a schedule. On an accelerator (`on_machine`) seconds follow from what the job does:

    products       operations (`flops`, padding included, as it is computed) over ranks, at a part of the peak
    weights        never faster than reading those of the rank once
    tp, cp, ep     inside the compute action: two sums over tp per layer and direction, the keys and values that cp
                   gathers, the tokens that cross to experts and back
    links          bytes over the bandwidth of the node, or of the network where any of their ranks is in another
    reduce         the sum of gradients over data lanes: each byte twice over the slowest link
    update         Adam reads and writes weights, gradients and moments: memory bandwidth

Of a microbatch the lane that has most counts, since the others wait for it in the end; of microbatches their mean.
Nodes are filled in order of ranks. What is not known is not hidden: efficiency is one number that the user may set,
and a module of the user's own takes no time.

Sums over n ranks move 2 (n-1)/n of their bytes through each rank, gathers (n-1)/n, as rings do; each costs
log2 n latencies per direction, as trees do.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Sequence

import attrs

from mimogrid.core.accelerators import ACCELERATORS, Accelerator
from mimogrid.core.costs import Costs, EdgeCosts, StageCosts
from mimogrid.core.errors import PlanError, Problem, nearest
from mimogrid.core.flops import Flops, Load, lengths_of, module_units, of_units, padded_load
from mimogrid.core.footprint import VALUE_BYTES
from mimogrid.core.grid import Grid
from mimogrid.core.models import FIRST, LAST, BuiltIn, Gpt, Own, Parameter
from mimogrid.core.samples import lane_samples
from mimogrid.core.shards import local_size
from mimogrid.core.steps import Step
from mimogrid.core.topology import Link, Module, StageInfo, Topology


ASSUMED = (
    "per microbatch a layer takes 1 s forward, and backward 1 s for each gradient that is wanted of it, "
    "of its inputs and of its weights; sending takes no time"
)
"""What `assumed` assumes, in words."""

EFFICIENCY = 0.5
"""The part of its peak that an accelerator reaches in the products of a large model, communication apart."""
LINK_EFFICIENCY = 0.8
"""The part of its bandwidth that a link reaches with large messages."""
ADAM_VALUES = 7
"""Values that an update reads (weight, gradient, two moments) and writes (weight, two moments)."""


@attrs.frozen(kw_only=True)
class Machine:
    """Accelerators of one kind, and which part of their peaks they reach.

    `measured` has modules that take so many times as long as follows from that; the others are taken at their word.
    """

    accelerator: Accelerator
    precision: str
    efficiency: float = EFFICIENCY
    measured: tuple[tuple[str, float], ...] = ()

    @property
    def flops(self) -> float:
        """Operations per second that products reach."""
        return self.accelerator.flops[self.precision] * self.efficiency

    @property
    def value_bytes(self) -> int:
        """Bytes of a value that is computed with and sent."""
        return VALUE_BYTES[self.precision]

    @property
    def state_bytes(self) -> int:
        """Bytes of a value that is summed or kept by the optimizer: never fewer than those of fp32."""
        return max(self.value_bytes, VALUE_BYTES["fp32"])

    def times(self, module: str) -> float:
        """Return how many times as long as assumed a module takes."""
        return dict(self.measured).get(module, 1.0)

    def link(self, *, within: bool) -> EdgeCosts:
        """Return what a message costs, within a node or between two."""
        gpu = self.accelerator
        bandwidth = gpu.link_bytes_per_s if within else gpu.network_bytes_per_s
        latency = gpu.link_latency_s if within else gpu.network_latency_s
        return EdgeCosts(latency=latency, bytes_per_s=bandwidth * LINK_EFFICIENCY)

    def __str__(self) -> str:
        gpu = self.accelerator
        tera = gpu.flops[self.precision] / 1e12
        return (
            f"FLOPs at {self.efficiency:.0%} of the {tera:,.5g} TFLOP/s of {gpu.name} in {self.precision}, "
            f"messages at {LINK_EFFICIENCY:.0%} of {gpu.link_bytes_per_s / 1e9:,.4g} GB/s within a node of "
            f"{gpu.per_node} and of {gpu.network_bytes_per_s / 1e9:,.4g} GB/s between nodes "
            f"(peaks: {gpu.source})"
        )


def machine_of(gpu: str, precision: str, efficiency: float = EFFICIENCY) -> Machine:
    """Return the machine of an accelerator by its name. Raises PlanError for what is not known of it."""
    if gpu not in ACCELERATORS:
        message = f"'{gpu}' is not known."
        raise PlanError([Problem("--gpu", message, nearest(gpu, tuple(ACCELERATORS)))])
    if not 0 < efficiency <= 1:
        message = f"is {efficiency}: the part of its peak that an accelerator reaches."
        raise PlanError([Problem("--efficiency", message, "Use a number above 0 and up to 1, such as 0.5.")])
    return Machine(accelerator=ACCELERATORS[gpu], precision=precision, efficiency=efficiency)


def measured_on(machine: Machine, step: Step, costs: Costs) -> Machine:
    """Return the machine on which the modules of a job take as long as its costs say.

    Of each module all stages count, forward and backward: how it is cut may then be another. What nobody assumes
    anything of (a module of the user's own), or what took no time, stays as it is.
    """
    assumed_costs = on_machine(step, attrs.evolve(machine, measured=()))
    found: list[tuple[str, float]] = []
    for name, module in step.topology.modules.items():
        stages = [info.stage for info in module.stages]
        took, should = (
            math.fsum(_whole_s(each.of(stage)) for stage in stages) for each in (costs, assumed_costs)
        )
        if took and should:
            found.append((name, took / should))
    return attrs.evolve(machine, measured=tuple(found))


def _whole_s(costs: StageCosts) -> float:
    return costs.forward + costs.whole_backward


# -- by layers ---------------------------------------------------------------------------------------------


def assumed(topology: Topology) -> Costs:
    """Return costs for a job that nobody has measured: time goes by layers (see `ASSUMED`)."""
    return Costs(stages={str(stage): _assumed(topology, info) for stage, info in topology.stages.items()})


def _assumed(topology: Topology, info: StageInfo) -> StageCosts:
    module = topology.modules[info.stage.module]
    if isinstance(module.model, Own):
        trains = float(bool(info.trainable))
        return StageCosts(forward=1.0, input_gradient=float(info.trains_upstream), weight_gradient=trains)
    of_layers = assumed_of_layers(module)[info.layers.start : info.layers.stop]
    return StageCosts(
        forward=sum(each.forward for each in of_layers),
        input_gradient=sum(each.input_gradient or 0.0 for each in of_layers),
        weight_gradient=sum(each.weight_gradient or 0.0 for each in of_layers),
    )


def assumed_of_layers(module: Module) -> tuple[StageCosts, ...]:
    """Return what is assumed of every layer of a built-in model, wherever it is cut into stages."""
    train = {p.layer for p in module.parameters for info in module.stages if p.name in info.trainable}
    before = module.stages[0].trains_upstream or FIRST in train
    costs: list[StageCosts] = []
    for layer in range(module.model.layers):
        trains = layer in train
        costs.append(StageCosts(forward=1.0, input_gradient=float(before), weight_gradient=float(trains)))
        before = before or trains
    return tuple(costs)


# -- on an accelerator -------------------------------------------------------------------------------------


def on_machine(step: Step, machine: Machine, *, spread: bool = False) -> Costs:
    """Return the costs of a job on a machine.

    With `spread`, for a step in which every microbatch has rows of every module: what is there is spread over all.
    """
    topology = step.topology
    stages: dict[str, StageCosts] = {}
    for module in topology.modules.values():
        load = lane_load(module, lengths_of(step, module.name), topology.sequence, spread=spread)
        parts = unit_costs(
            module,
            load,
            machine,
            flops=module_units(topology, module, load),
            values=values_of_units(module),
            repeats=topology.spec.modules[module.name].recompute == "full",
        )
        for info in module.stages:
            stages[str(info.stage)] = joined(of_units(info, parts) if parts else ())
    edges = {str(link): machine.link(within=_is_near(topology, link, machine)) for link in topology.links}
    return Costs(stages=stages, edges=edges)


def lane_load(module: Module, lengths: Sequence[int], sequence: int, *, spread: bool = False) -> Load:
    """Return what the lane with most computes on in a microbatch, padded: the mean over those where it has any.

    With `spread`, the mean over all. `lengths` are the positions of every sample of the step.
    """
    lanes = (_of_lane(module, lane, lengths, sequence, spread=spread) for lane in range(module.lanes))
    return max(lanes, key=_size)


def _size(load: Load) -> tuple[float, float, float]:
    return load.positions, load.pairs, load.rows


def _of_lane(module: Module, lane: int, lengths: Sequence[int], sequence: int, *, spread: bool) -> Load:
    count, whole = 0, Load()
    for k in range(module.microbatches):
        chosen = lane_samples(
            lane=lane,
            lanes=module.lanes,
            microbatch=k,
            microbatches=module.microbatches,
            total=len(lengths),
        )
        share = lengths[chosen.start : chosen.stop]
        if any(share):
            count, whole = count + 1, whole + padded_load(module, share, sequence)
    return whole * (1 / (module.microbatches if spread else max(count, 1)))


@attrs.frozen
class Values:
    """How many values of weights a rank holds; of these, how many train, without experts and of experts."""

    held: float = 0.0
    trained: float = 0.0
    trained_experts: float = 0.0


def unit_costs(
    module: Module,
    load: Load,
    machine: Machine,
    *,
    flops: Sequence[Flops],
    values: Sequence[Values],
    repeats: bool,
) -> tuple[StageCosts, ...]:
    """Return the seconds of a module in parts that no stage cuts (see `flops.units`), for a load of one lane.

    `flops` and `values` are of these parts; `repeats` says that layers are computed anew in the backward, with
    all that their ranks exchange. Nothing for a module of the user's own.
    """
    if isinstance(module.model, Own):
        return ()
    model, last = module.model, module.model.layers + 1
    times = machine.times(module.name)
    kinds: dict[object, StageCosts] = {}  # most layers are alike
    costs: list[StageCosts] = []
    for i, (work, held) in enumerate(zip(flops, values, strict=True)):
        in_layers = 0 < i < last
        kind = work, held, in_layers, i == 0
        if kind not in kinds:
            shards = module.cp * (_tp(module) if in_layers or isinstance(model, Gpt) else 1)
            forward, inputs, weights = _computing_s(
                work,
                machine=machine,
                shards=shards,
                reads_s=held.held * machine.value_bytes / machine.accelerator.memory_bytes_per_s,
                sums=_sums(module, model, load, machine, entry=i == 0, leaves=i == last),
                repeats=repeats and in_layers,
            )
            kinds[kind] = StageCosts(
                forward=times * forward,
                input_gradient=times * inputs,
                weight_gradient=times * weights,
                reduce=_reduce_s(module, held, machine),
                update=_update_s(held, machine),
            )
        costs.append(kinds[kind])
    return tuple(costs)


def joined(parts: Iterable[StageCosts]) -> StageCosts:
    """Return the costs of a stage that consists of these parts."""
    parts = tuple(parts)
    return StageCosts(
        forward=math.fsum(part.forward for part in parts),
        input_gradient=math.fsum(part.input_gradient or 0.0 for part in parts),
        weight_gradient=math.fsum(part.weight_gradient or 0.0 for part in parts),
        reduce=math.fsum(part.reduce for part in parts),
        update=math.fsum(part.update for part in parts),
    )


def _computing_s(
    flops: Flops, *, machine: Machine, shards: int, reads_s: float, sums: tuple[float, float], repeats: bool
) -> tuple[float, float, float]:
    """Return the seconds of a forward, of the gradients of inputs, and of those of weights.

    Each takes at least as long as it takes to read the weights. `sums` are the seconds of those over ranks, forward and
    backward. What is computed anew goes before the first gradient.
    """

    def seconds(operations: float, least: float) -> float:
        return max(operations / shards / machine.flops, least) if operations else 0.0

    forward_sums, backward_sums = sums
    inputs, weights = seconds(flops.input_gradient, reads_s), seconds(flops.weight_gradient, reads_s)
    again = seconds(flops.recomputed, 0.0) + (forward_sums if repeats and flops.recomputed else 0.0)
    if inputs:
        inputs += backward_sums + again
    elif weights:
        weights += again
    return seconds(flops.forward, reads_s) + forward_sums, inputs, weights


# -- what ranks hold and say to each other -----------------------------------------------------------------


def _tp(module: Module) -> int:
    return module.grid.extent("tp")


def _sums(
    module: Module, model: BuiltIn, load: Load, machine: Machine, *, entry: bool, leaves: bool
) -> tuple[float, float]:
    """Return the seconds of what ranks of a lane exchange in a part, forward and backward."""
    block = load.positions / module.cp * model.hidden * machine.value_bytes
    tp = _all_reduce_s(block, module.grid, ("tp",), machine)
    if entry or leaves:
        # Forward the embedding is summed, backward the gradient of what the head reads.
        return (tp * entry, tp * leaves) if isinstance(model, Gpt) else (0.0, 0.0)
    keys = load.positions * 2 * model.kv_heads * model.head_width / _tp(module) * machine.value_bytes
    both = 2 * tp + _gather_s(keys, module.grid, ("cp",), machine)
    if module.experts is not None:
        tokens = block * model.top_k / _tp(module)
        both += 2 * _gather_s(tokens, module.experts, ("expert_tp", "ep"), machine)
    return both, both


def _all_reduce_s(size_bytes: float, grid: Grid, axes: tuple[str, ...], machine: Machine) -> float:
    return 2 * _gather_s(size_bytes, grid, axes, machine)


def _gather_s(size_bytes: float, grid: Grid, axes: tuple[str, ...], machine: Machine) -> float:
    """Return the seconds in which the ranks along some axes gather so many bytes in all."""
    size = math.prod(grid.extent(axis) for axis in axes)
    if size == 1:
        return 0.0
    latency = _link_along(grid, axes, machine).latency
    return _moved_s(size_bytes, grid, axes, machine) + math.ceil(math.log2(size)) * latency


def _moved_s(size_bytes: float, grid: Grid, axes: tuple[str, ...], machine: Machine) -> float:
    size = math.prod(grid.extent(axis) for axis in axes)
    return _link_along(grid, axes, machine).carry_s(size_bytes * (size - 1) / size) if size > 1 else 0.0


def _link_along(grid: Grid, axes: tuple[str, ...], machine: Machine) -> EdgeCosts:
    return machine.link(within=_is_within(grid, axes, machine.accelerator.per_node))


@functools.lru_cache(maxsize=1 << 12)
def _is_within(grid: Grid, axes: tuple[str, ...], per_node: int) -> bool:
    """Whether every group of ranks along some axes is within a node."""
    known = tuple(axis.name for axis in grid.axes if axis.name in axes)
    return all(len({rank // per_node for rank in ranks}) == 1 for ranks in grid.ranks_along(known))


def _is_near(topology: Topology, link: Link, machine: Machine) -> bool:
    """Whether all that a link joins is within a node: for a hop each pair of ranks, for a seam all ranks."""
    per_node = machine.accelerator.per_node
    ends = [_ranks(topology, stage.module, stage.pp) for stage in (link.source, link.target)]
    if link.edge is None:
        pairs = zip(*ends, strict=True)
        return all(source // per_node == target // per_node for source, target in pairs)
    return len({rank // per_node for ranks in ends for rank in ranks}) == 1


def _ranks(topology: Topology, module: str, pp: int) -> tuple[int, ...]:
    return _stage_ranks(topology.modules[module].grid)[pp]


@functools.lru_cache(maxsize=1 << 10)
def _stage_ranks(grid: Grid) -> tuple[tuple[int, ...], ...]:
    return grid.ranks_along(tuple(axis.name for axis in grid.axes if axis.name != "pp"))


def values_of_units(module: Module) -> tuple[Values, ...]:
    """Return what a rank holds of each part of a module that no stage cuts (see `flops.units`)."""
    if isinstance(module.model, Own):
        return ()
    last = module.model.layers + 1
    held, trained, experts = ([0.0] * (last + 1) for _ in range(3))
    for info in module.stages:
        for parameter in info.parameters:
            size = _values_of(module, parameter)
            for unit in _units_with(parameter, info, last):
                held[unit] += size
                if parameter.name in info.trainable:
                    (trained if parameter.expert is None else experts)[unit] += size
    return tuple(map(Values, held, trained, experts))


def _units_with(parameter: Parameter, info: StageInfo, last: int) -> Iterator[int]:
    if isinstance(parameter.layer, int):
        yield 1 + parameter.layer
    if parameter.layer == FIRST and info.first:
        yield 0
    if LAST in (parameter.layer, parameter.copy) and info.last:
        yield last


def _values_of(module: Module, parameter: Parameter) -> float:
    """Return how many values of a parameter a rank holds; of an expert, the mean over ranks."""
    size = local_size(module, parameter)
    return size / module.experts.extent("ep") if parameter.expert is not None and module.experts else size


def _reduce_s(module: Module, values: Values, machine: Machine) -> float:
    """Return the seconds that sum gradients over lanes; in buffers so large that latency does not count."""
    copies = 0.0
    if module.experts is not None:
        size = values.trained_experts * machine.state_bytes
        copies = _moved_s(size, module.experts, ("expert_dp",), machine)
    return 2 * (copies + _moved_s(values.trained * machine.state_bytes, module.grid, ("cp", "dp"), machine))


def _update_s(values: Values, machine: Machine) -> float:
    size = (values.trained + values.trained_experts) * machine.state_bytes
    return ADAM_VALUES * size / machine.accelerator.memory_bytes_per_s


# -- costs and jobs ----------------------------------------------------------------------------------------


def misfits(costs: Costs, topology: Topology) -> Iterator[Problem]:
    """Yield what costs say of things that the job does not have."""
    stages = [str(stage) for stage in topology.stages]
    links = list(dict.fromkeys(str(name) for link in topology.links for name in (link.edge or link, link)))
    for table, named, known in (("stages", costs.stages, stages), ("edges", costs.edges, links)):
        for name in named:
            if name not in known:
                kind = "stage" if table == "stages" else "edge"
                yield Problem(f'{table}."{name}"', f"the job has no {kind} '{name}'.", nearest(name, known))
