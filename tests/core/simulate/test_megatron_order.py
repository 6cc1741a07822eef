"""The order of megatron-core that `benchmarks/peer/simulated.py` times: it ends, and differs from ours by messages."""

import functools
import runpy
from pathlib import Path
from typing import Any

import attrs
import pytest

from mimogrid.core.job.costs import Costs, EdgeCosts
from mimogrid.core.job.models import Gpt, Vit
from mimogrid.core.job.spec import GridSpec
from mimogrid.core.pricing.machine import machine_of
from mimogrid.core.pricing.on_machine import on_machine
from mimogrid.core.program.lower import Program
from mimogrid.core.schedule.actions import Compute, Kind
from mimogrid.core.simulate.rank_classes import alike_in_time
from mimogrid.core.simulate.simulation import simulate


PEER: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[3] / "benchmarks" / "peer" / "simulated.py"))
VISION = Vit(layers=2, hidden=1024, heads=16, features=588)
LANGUAGE = Gpt(layers=4, hidden=2048, heads=16, vocab=1024)
GRIDS = [
    (GridSpec(), GridSpec()),
    (GridSpec(dp=2), GridSpec(pp=2)),
    (GridSpec(tp=2, dp=2), GridSpec(tp=2, pp=4, dp=2)),
    (GridSpec(pp=2), GridSpec(tp=4, pp=2, dp=2)),
]
cases = pytest.mark.parametrize(("vision", "language"), GRIDS)


@functools.cache
def program_of(vision: GridSpec, language: GridSpec) -> Program:
    """Our program of a layout."""
    program: Program = PEER["program_of"](PEER["Layout"](VISION, vision, LANGUAGE, language, samples=2))
    return program


def theirs_s(program: Program, costs: Costs) -> float:
    """The time of a step in megatron-core's order."""
    listing = {rank: PEER["megatron"](program, rank) for rank in program.topology.ranks}
    return simulate(program, costs, listing).step_s


@cases
def test_where_messages_are_free_it_takes_as_long_as_ours(vision: GridSpec, language: GridSpec) -> None:
    """On a chain, depth from the source and depth from the loss are one 1F1B."""
    program = program_of(vision, language)
    costs = attrs.evolve(on_machine(program.routes.step, machine_of("h100", "bf16")), edges={})
    costs = attrs.evolve(costs, edge=EdgeCosts())
    assert pytest.approx(simulate(program, costs).step_s, rel=1e-9) == theirs_s(program, costs)


@cases
def test_every_cause_takes_time(vision: GridSpec, language: GridSpec) -> None:
    """Waits for messages, then leaders that move all rows, then shapes: no step is shorter for any of them."""
    program, machine = program_of(vision, language), machine_of("h100", "bf16")
    costs = on_machine(program.routes.step, machine)
    cut, whole = (PEER[name](program, costs, machine) for name in ("gathered", "leaders"))
    with_shapes = PEER["shapes"](program, whole, machine, 1e-4)
    steps = [
        simulate(program, cut).step_s,
        *(theirs_s(program, each) for each in (cut, whole, with_shapes)),
    ]
    assert sorted(steps) == steps
    assert steps[-2] < steps[-1]


def test_one_rank_of_a_class_stands_for_all() -> None:
    """The classes of our program are those of theirs."""
    program = program_of(*GRIDS[2])
    costs = on_machine(program.routes.step, machine_of("h100", "bf16"))
    classes = alike_in_time(program, costs)
    assert len(classes.members) < len(program.topology.ranks)
    listing = {rank: PEER["megatron"](program, rank) for rank in classes.members}
    assert theirs_s(program, costs) == simulate(program, costs, listing, classes=classes).step_s


def test_forwards_come_first_by_depth_from_the_source() -> None:
    """As many as there are stages behind."""
    program = program_of(*GRIDS[1])
    for rank, warm_up in ((0, 2), (2, 1), (3, 0)):
        computes = [action for action in PEER["megatron"](program, rank) if isinstance(action, Compute)]
        first = next(i for i, action in enumerate(computes) if action.kind is Kind.BACKWARD)
        assert warm_up + 1 == first
