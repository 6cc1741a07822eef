"""Simulated: a step of megatron-core's schedule and one of ours on H100s, where no host's cores bind.

    python benchmarks/peer/simulated.py [--host-us MICROSECONDS ...] [--out FILE]

Nothing runs here. `mimogrid.core.simulate` times two programs of the same job with the same costs, which are assumed
from data sheets (`core/pricing`): products at half of the peak, messages at 0.8 of a link. Ours is the job's own
program, the schedule 1f1b. Theirs is what megatron-core 0.19.2 does, read in its source, as a listing of the same
actions:

- *order*: 1F1B by depth from the source. A rank runs as many forwards first as there are stages behind it.
- *waits*: a rank computes nothing from posting a message until it has arrived, sends included. Around a forward or a
  backward it sends to and receives from one neighbour, and waits for both.
- *leaders*: at a bridge one rank of a dp rank sends and receives all of its rows, over one link. Afterwards it
  broadcasts them to the tp ranks. (With ours every tp rank sends and receives a part, and the parts are gathered.)
- *shapes*: before every message goes one with its shape, which the host reads before it posts the data; between two
  stages of a module it then waits for the device once more. The leader broadcasts the shape, too, also to itself alone.
  Every such wait costs `--host-us`: the time in which the device has nothing to compute, because the host has not
  launched it yet. This number is assumed. Our executor waits for the device only at the end of a step.

Each column of the report has one more of these in it. In the last one ours is zb-h1, which has the memory of 1f1b;
megatron-core's schedule for several modules splits no backward.

All microbatches are alike: one image and text up to the full sequence in every sample. What ragged data cost on top is
in `peer.py`. Neither side counts the time of Python, memory copies, or gradient all-reduces that overlap computation.
"""

import argparse
import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs

from mimogrid.core.base.samples import Sample
from mimogrid.core.job.costs import Costs, EdgeCosts
from mimogrid.core.job.models import Gpt, Vit
from mimogrid.core.job.schedules import ONE_F_ONE_B, ZB_H1
from mimogrid.core.job.spec import (
    BatchSpec,
    DataSpec,
    GridSpec,
    JobSpec,
    ModuleSpec,
    ScheduleSpec,
    SourceFacts,
)
from mimogrid.core.pricing.collectives import is_near
from mimogrid.core.pricing.machine import Machine, machine_of
from mimogrid.core.pricing.on_machine import on_machine
from mimogrid.core.program.lower import Program, plan_step
from mimogrid.core.schedule.actions import Action, Compute, Direction, Kind, Recv, Send, Transfer, Wait
from mimogrid.core.schedule.orders import order_of
from mimogrid.core.simulate.rank_classes import alike_in_time
from mimogrid.core.simulate.simulation import simulate
from mimogrid.core.step.step import step_of
from mimogrid.core.step.traffic import message_bytes
from mimogrid.core.topology.parse import parse
from mimogrid.core.topology.topology import Link, Stage, Topology


CLIP = Vit(layers=24, hidden=1024, heads=16, features=588)
LARGE = Vit(layers=48, hidden=3072, heads=24, features=588)
SEVEN = Gpt(layers=32, hidden=4096, heads=32, ffn=16384, vocab=32000)
SEVENTY = Gpt(layers=80, hidden=8192, heads=64, kv_heads=8, ffn=43008, vocab=32000)
PATCHES, SEQUENCE = 1024, 4096
MICROBATCHES = 32


@attrs.frozen
class Layout:
    """Two models on their grids; a microbatch has so many samples for each dp rank of the language model."""

    vision: Vit
    vision_grid: GridSpec
    language: Gpt
    language_grid: GridSpec
    samples: int = 1

    def __str__(self) -> str:
        grids = " -> ".join(map(_extents, (self.vision_grid, self.language_grid)))
        return f"{'ViT-L, 7B' if self.language is SEVEN else 'ViT-5B, 70B'}: {grids}"


def _extents(grid: GridSpec) -> str:
    return " ".join(f"{axis}{getattr(grid, axis)}" for axis in ("tp", "pp", "dp") if getattr(grid, axis) > 1)


LAYOUTS = (
    Layout(CLIP, GridSpec(tp=2, dp=2), SEVEN, GridSpec(tp=2, dp=2)),
    Layout(CLIP, GridSpec(dp=4), SEVEN, GridSpec(tp=2, pp=4, dp=2), samples=2),
    Layout(CLIP, GridSpec(tp=2, dp=4), SEVEN, GridSpec(tp=2, pp=4, dp=4)),
    Layout(CLIP, GridSpec(tp=4, dp=8), SEVEN, GridSpec(tp=4, pp=4, dp=8)),
    Layout(LARGE, GridSpec(tp=8, dp=8), SEVENTY, GridSpec(tp=8, pp=5, dp=8)),
    Layout(LARGE, GridSpec(tp=8, dp=14), SEVENTY, GridSpec(tp=8, pp=8, dp=14)),
)


def program_of(layout: Layout, schedule: str = ONE_F_ONE_B) -> Program:
    """Return our program of a step."""
    modules = {
        "vision": ModuleSpec(
            model="vit", options=layout.vision, feeds=("language",), grid=layout.vision_grid
        ),
        "language": ModuleSpec(
            model="gpt",
            options=layout.language,
            grid=attrs.evolve(layout.language_grid, sequence_parallel=True),
        ),
    }
    size = layout.samples * layout.language_grid.dp * MICROBATCHES
    spec = JobSpec(
        modules=modules,
        data=DataSpec(source="none"),
        batch=BatchSpec(global_size=size, microbatches=MICROBATCHES),
        schedule=ScheduleSpec(name=schedule),
        precision="bf16",
    )
    topology = parse(spec, SourceFacts(sequence=SEQUENCE, features={"vision": 588}))
    samples = tuple(Sample(id=i, length=SEQUENCE - PATCHES, rows={"vision": PATCHES}) for i in range(size))
    # Both sum gradients beside the last backward. What is compared is the order, so no backward is cut.
    return plan_step(step_of(topology, samples), attrs.evolve(order_of(topology), cuts={}))


# -- the order of megatron-core ----------------------------------------------------------------------------


def megatron(program: Program, rank: int) -> tuple[Action, ...]:
    """Return what `forward_backward_pipelining_without_interleaving` does on a rank, which has one stage.

    The names of its calls stand beside what they do.
    """
    topology = program.topology
    (info,) = topology.role(rank).stages
    stage, count = info.stage, topology.modules[info.stage.module].microbatches
    before, behind = topology.links_into(stage), topology.links_from(stage)
    gradients_in = [link for link in behind if link in program.order.gradients]
    gradients_out = [link for link in before if link in program.order.gradients]

    def messages(links: list[Link] | tuple[Link, ...], direction: Direction, k: int) -> Iterator[Transfer]:
        """Yield the ends on this rank of the messages of a microbatch."""
        for link in links:
            sends = (link.source == stage) == (direction is Direction.FORWARD)
            peer = link.target if link.source == stage else link.source
            transfer = (Send if sends else Recv)(stage, direction, k, peer)
            if program.messages_of(rank, transfer):
                yield transfer

    def exchange(*posted: Iterator[Transfer]) -> Iterator[Action]:
        """Yield a batch of messages, and the wait for every one of them."""
        transfers = tuple(itertools.chain(*posted))
        yield from transfers
        yield from map(Wait, transfers)

    def inputs(k: int) -> Iterator[Transfer]:
        return messages(before, Direction.FORWARD, k)

    def outputs(k: int) -> Iterator[Transfer]:
        return messages(behind, Direction.FORWARD, k)

    def gradients(k: int) -> Iterator[Transfer]:
        return messages(gradients_in, Direction.BACKWARD, k)

    def input_gradients(k: int) -> Iterator[Transfer]:
        return messages(gradients_out, Direction.BACKWARD, k)

    actions: list[Action] = []
    warm_up = min(_stages_behind(topology, stage), count)
    for k in range(warm_up):
        actions += exchange(inputs(k))  # recv_forward
        actions.append(Compute(Kind.FORWARD, stage, k))
        actions += exchange(outputs(k))  # send_forward
    if warm_up < count:
        actions += exchange(inputs(warm_up))  # recv_forward
    for k in range(count - warm_up):
        actions.append(Compute(Kind.FORWARD, stage, k + warm_up))
        actions += exchange(outputs(k + warm_up), gradients(k))  # send_forward_recv_backward
        actions.append(Compute(Kind.BACKWARD, stage, k))
        following = inputs(k + warm_up + 1) if k + warm_up + 1 < count else iter(())
        actions += exchange(input_gradients(k), following)  # send_backward_recv_forward
    for k in range(count - warm_up, count):
        actions += exchange(gradients(k))  # recv_backward
        actions.append(Compute(Kind.BACKWARD, stage, k))
        actions += exchange(input_gradients(k))  # send_backward
    return (*actions, *program.sums(rank), *program.finish(rank))


def _stages_behind(topology: Topology, stage: Stage) -> int:
    """Return how many stages there are in all without those up to this one, along the longest path to it."""

    def up_to(one: Stage) -> int:
        return 1 + max((up_to(link.source) for link in topology.links_into(one)), default=0)

    return max(map(up_to, topology.stages)) - up_to(stage)


# -- what its messages cost --------------------------------------------------------------------------------


def gathered(program: Program, costs: Costs, machine: Machine) -> Costs:
    """Return costs with what tp ranks gather from each other behind a bridge, which the pricing leaves out."""
    within = machine.link(within=True)

    def gather_s(size: float, tp: int) -> float:
        return within.carry_s(size * (tp - 1) / tp) + within.latency if tp > 1 else 0.0

    found = costs
    for link in program.topology.links:
        if link.edge:
            for stage, size, tp in _ends(program, link):
                found = _slower(found, stage, gather_s(size, tp), is_forward=stage == link.target)
    return found


def leaders(program: Program, costs: Costs, machine: Machine) -> Costs:
    """Return costs in which a leader moves all rows of a dp rank over its link, and broadcasts them."""
    within, found = machine.link(within=True), costs
    for link in program.topology.links:
        if link.edge:
            ends = _ends(program, link)
            wire = machine.link(within=is_near(program.topology, link, machine))
            size = max(size for _, size, _ in ends)
            found = _edge(found, link, wire.latency + wire.carry_s(size))
            for stage, size, tp in ends:
                broadcast_s = within.latency + within.carry_s(size) if tp > 1 else 0.0
                found = _slower(found, stage, broadcast_s, is_forward=stage == link.target)
    return found


def shapes(program: Program, costs: Costs, machine: Machine, host_s: float) -> Costs:
    """Return costs with a message for the shape before each one, its broadcast, and the waits of the host."""
    found, within = costs, machine.link(within=True)
    for link in program.topology.links:
        wire = machine.link(within=is_near(program.topology, link, machine))
        before = found.on(link, link.edge)
        waits = 1 if link.edge else 2
        found = attrs.evolve(
            found,
            edges={
                **found.edges,
                str(link): attrs.evolve(before, latency=before.latency + wire.latency + waits * host_s),
            },
        )
        if link.edge:
            for stage, _, tp in _ends(program, link):
                broadcast_s = within.latency + (host_s if tp > 1 else 0.0)
                found = _slower(found, stage, broadcast_s, is_forward=stage == link.target)
    return found


def _ends(program: Program, link: Link) -> tuple[tuple[Stage, float, int], tuple[Stage, float, int]]:
    """Return the stages at both ends of a bridge, with the bytes of a dp rank in a microbatch, and its tp ranks."""
    step = program.routes.step
    whole = sum(message_bytes(step, message) for message in program.routes.messages(link, 0))
    source, target = (
        (stage, whole / module.dp_size, module.grid.extent("tp"))
        for stage in (link.source, link.target)
        for module in (program.topology.modules[stage.module],)
    )
    return source, target


def _edge(costs: Costs, link: Link, seconds: float) -> Costs:
    whole = EdgeCosts(latency=seconds, bytes_per_s=math.inf)
    return attrs.evolve(costs, edges={**costs.edges, str(link): whole})


def _slower(costs: Costs, stage: Stage, seconds: float, *, is_forward: bool) -> Costs:
    """Return costs in which a stage takes longer: what it does with a message before it computes."""
    before = costs.of(stage)
    if is_forward:
        after = attrs.evolve(before, forward=before.forward + seconds)
    elif before.splits:
        after = attrs.evolve(before, input_gradient=(before.input_gradient or 0.0) + seconds)
    else:
        after = attrs.evolve(before, backward=before.whole_backward + seconds)
    return attrs.evolve(costs, stages={**costs.stages, str(stage): after})


# -- compared ----------------------------------------------------------------------------------------------


def compared(layout: Layout, hosts_s: Sequence[float]) -> tuple[int, list[float]]:
    """Return the ranks, and seconds of a step: of ours; of theirs with one cause more each time; of ours as zb-h1."""
    program = program_of(layout)
    machine = machine_of("h100", "bf16")
    bare = on_machine(program.routes.step, machine)
    cut, whole = gathered(program, bare, machine), leaders(program, bare, machine)
    classes = alike_in_time(program, bare)
    listing = {rank: megatron(program, rank) for rank in classes.members}
    with_shapes = (shapes(program, whole, machine, host_s) for host_s in hosts_s)
    theirs = [
        simulate(program, costs, listing, classes=classes).step_s for costs in (cut, whole, *with_shapes)
    ]
    ours, split = (simulate(each, cut).step_s for each in (program, program_of(layout, ZB_H1)))
    return len(program.topology.ranks), [ours, *theirs, split]


def lines(hosts_us: Sequence[float]) -> Iterator[str]:
    """Simulate, and yield the report."""
    yield "SIMULATED, not run, on H100s: benchmarks/peer/simulated.py says what is in it and what is not"
    yield str(machine_of("h100", "bf16"))
    yield f"bf16; {MICROBATCHES} microbatches; {SEQUENCE} positions in a sample, {PATCHES} of them rows of its image"
    yield "a step of megatron-core 0.19.2 by one of ours, both 1f1b, with one of its causes more in each column;"
    yield "in the last column ours is zb-h1, which has the memory of 1f1b"
    yield ""
    columns = ("order, waits", "+ leaders", *(f"+ shapes, {us:g} us" for us in hosts_us), "and zb-h1")
    yield f"{'layout':39}{'ranks':>7}{'ours, ms':>10}" + "".join(f"{column:>18}" for column in columns)
    for layout in LAYOUTS:
        ranks, (ours, *theirs, split) = compared(layout, [1e-6 * us for us in hosts_us])
        ratios = [*(seconds / ours for seconds in theirs), theirs[-1] / split]
        yield f"{layout!s:39}{ranks:7,}{1e3 * ours:10,.0f}" + "".join(f"{ratio:18.3f}" for ratio in ratios)


def main() -> None:
    """Simulate, print, and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--host-us", type=float, nargs="+", default=[50.0, 200.0])
    parser.add_argument("--out", type=Path, metavar="FILE")
    given = parser.parse_args()
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(given.out.open("w", encoding="utf-8")) if given.out else None
        for line in lines(given.host_us):
            print(line, flush=True)
            if out:
                print(line, file=out, flush=True)


if __name__ == "__main__":
    main()
