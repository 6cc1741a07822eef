"""Cells: samples assigned to microbatches and lanes by their cost, within the memory of an even cut."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import job, program_for, step_with
from mimogrid.core.base.errors import PlanError
from mimogrid.core.base.samples import Sample
from mimogrid.core.job.costs import Costs, StageCosts
from mimogrid.core.pricing.balance import Balance
from mimogrid.core.pricing.footprint import Computed, most_samples
from mimogrid.core.program.verify import verify
from mimogrid.core.step.cells import CellAssignment, assign_samples, even_most, samples_per_cell
from mimogrid.core.step.step import Step, step_of
from mimogrid.core.topology.groups import channels_of
from mimogrid.core.topology.parse import parse
from mimogrid.core.topology.topology import Topology
from scale import drawn


def balanced(topology: Topology, **changes: Any) -> Topology:
    """The topology of the same job with its samples assigned by cost, and other changes of the spec."""
    spec = topology.spec
    changed = attrs.evolve(spec, batch=attrs.evolve(spec.batch, balance="cost"), **changes)
    return parse(changed, topology.source)


def dealt(
    costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], *, joined: int = 1, **grid: int
) -> CellAssignment:
    """Samples assigned within the memory of an even cut."""
    most = even_most(sizes, math.prod(grid.values()))
    assigned = assign_samples(costs, sizes, most, joined=(joined,) * len(costs[0]), **grid)
    assert assigned is not None
    return assigned


def cells_of(assigned: CellAssignment) -> list[tuple[int, ...]]:
    """The places of the samples of each cell."""
    return [assigned.order[a:b] for a, b in itertools.pairwise(assigned.cells)]


SAMPLES = st.tuples(st.integers(0, 40), st.integers(1, 40))


@settings(max_examples=drawn(60))
@given(
    st.lists(SAMPLES, min_size=12, max_size=60), st.sampled_from([(1, 1), (2, 3), (4, 3), (12, 1), (1, 12)])
)
def test_every_sample_is_in_one_cell_and_none_is_too_large(
    samples: list[tuple[int, int]], grid: tuple[int, int]
) -> None:
    """Cells hold a permutation of the samples, and no more positions than as many of the largest as an even cut has.

    Costs rise against sizes here, so that the limit is met.
    """
    microbatches, lanes = grid
    costs = [(1.0 / (1 + a + b), float(a)) for a, b in samples]
    assigned = dealt(costs, samples, microbatches=microbatches, lanes=lanes)
    assert list(range(len(samples))) == sorted(assigned.order)
    each = samples_per_cell(len(samples), microbatches * lanes)
    for module, largest in enumerate(map(max, zip(*samples, strict=True))):
        assert each * largest >= max(sum(samples[i][module] for i in cell) for cell in cells_of(assigned))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_equal_samples_are_cut_evenly(microbatches: int, lanes: int, each: int) -> None:
    """Cells of equal samples have equally many."""
    count = microbatches * lanes * each
    assigned = dealt([(1.0,)] * count, [(1,)] * count, microbatches=microbatches, lanes=lanes)
    assert tuple(range(0, count + 1, each)) == assigned.cells


@settings(max_examples=drawn(40))
@given(st.lists(st.floats(0.1, 9.0), min_size=24, max_size=80))
def test_no_lane_is_heavier_than_the_mean_by_more_than_a_sample(costs: list[float]) -> None:
    """Longest first, the last sample that a lane gets goes to the least loaded one, which is below the mean."""
    cells = cells_of(
        dealt([(c,) for c in costs], [(1 + int(9 * c),) for c in costs], microbatches=4, lanes=3)
    )
    lanes = [sum(costs[i] for cell in cells[lane::3] for i in cell) for lane in range(3)]
    assert sum(costs) / 3 + max(costs) >= max(lanes)


def test_the_heaviest_cells_are_in_the_microbatch_in_the_middle() -> None:
    """Cells that one long sample makes heavy meet in one microbatch, which is neither the first nor the last."""
    costs = [(9.0,), (9.0,)] + [(1.0,)] * 8
    cells = cells_of(dealt(costs, [(1,)] * 10, microbatches=5, lanes=2))
    heavy = [number for number, cell in enumerate(cells) if set(cell) & {0, 1}]
    assert [4, 5] == heavy


def test_cells_fall_from_a_sample_that_is_longer_than_a_cell_should_be() -> None:
    """Of one sample of 8 and 120 of 0.1 a cell should get 4; the others get from 7 to 1, the least at the ends."""
    costs = [(8.0,)] + [(0.1,)] * 120
    cells = cells_of(dealt(costs, [(round(10 * c),) for (c,) in costs], microbatches=5, lanes=1))
    loads = [sum(costs[i][0] for i in cell) for cell in cells]
    assert loads[:3] == sorted(loads[:3])
    assert loads[2:] == sorted(loads[2:], reverse=True)
    assert loads[2] == pytest.approx(8.0)
    assert sorted(loads)[-2] > 1.2 * 4
    assert min(loads) < 0.5 * 4


def test_heavy_cells_meet_light_ones_where_a_dp_rank_has_both_lanes() -> None:
    """One sample in each cell: on two lanes of one dp rank the longest goes with a short one, and so on."""
    costs = [(float(i),) for i in range(1, 9)]
    assigned = dealt(costs, [(1,)] * 8, microbatches=4, lanes=2, joined=2)
    shares = [sum(costs[i][0] for i in assigned.order[k : k + 2]) for k in range(0, 8, 2)]
    assert [8.0, 10.0, 10.0, 8.0] == shares


# -- steps -------------------------------------------------------------------------------------------------

JOBS = (
    "v vit dp2 > l; l gpt dp2",
    "v vit dp3 m8 > l; l gpt dp2 m4",
    "v vit dp2 m2 > l; a vit > l; l gpt dp4 pp2",
    "v vit dp4 @0 > l; l gpt tp2 dp2 @0",
    "l gpt dp2 ep2 x2",
)


@settings(max_examples=drawn(60))
@given(st.sampled_from(JOBS), st.lists(st.integers(0, 30), min_size=1, max_size=24), st.integers(1, 7))
def test_a_balanced_step_is_a_step(text: str, rows: list[int], longest: int) -> None:
    """It has the same samples, its program is proved, messages stay within the groups, memory within the estimate."""
    topology = balanced(job(text, batch=72))
    samples = tuple(
        Sample(i, 1 + i * i % longest, {"v": rows[i % len(rows)], "a": rows[i % len(rows) // 2]})
        for i in range(72)
    )
    step = Balance(topology).step(samples)
    assert samples == tuple(sorted(step.samples, key=lambda sample: sample.id))
    program = program_for(step)
    verify(program)
    pairs = set(channels_of(topology))
    for link in topology.links:
        for k in range(topology.modules[link.target.module].microbatches):
            for message in program.routes.messages(link, k):
                assert (message.rank_source, message.rank_target) in pairs
    for name, module in topology.modules.items():
        most = most_samples(topology, module) * max(of.positions[name] for of in step.sizes)
        for dp_rank in range(module.dp_size):
            for k in range(module.microbatches):
                held = Computed.of(step, module, dp_rank, k).positions
                assert module.row_shape(most)[0] // module.cp >= held


def spread_of(step: Step, module: str) -> float:
    """The largest share of a dp rank over the mean, in positions."""
    here = step.topology.modules[module]
    shares = [
        sum(step.share(module, dp_rank, k).positions)
        for dp_rank in range(here.dp_size)
        for k in range(here.microbatches)
    ]
    return max(shares) * len(shares) / sum(shares)


RAGGED = tuple(Sample(i, 1 + (i * 37) ** 2 % 61, {"v": (i * 53) ** 3 % 47}) for i in range(192))


def test_shares_become_alike() -> None:
    """Shares of a language model that differ by a tenth in order differ by a hundredth when they are assigned."""
    topology = job("v vit dp4 > l; l gpt dp4", batch=192)
    assert spread_of(step_of(topology, RAGGED), "l") > 1.1
    assert spread_of(Balance(balanced(topology)).step(RAGGED), "l") < 1.02


def test_without_balance_samples_stay_in_their_order() -> None:
    """The default leaves every sample where it was."""
    step = Balance(job("v vit dp4 > l; l gpt dp4", batch=192)).step(RAGGED)
    assert RAGGED == step.samples
    assert () == step.cells


def test_costs_of_the_job_say_which_module_counts() -> None:
    """By a costs file in which the encoder takes all the time, its shares become alike; else those of the other."""
    topology = job("v vit dp4 > l; l gpt dp4", batch=192)

    def spreads(**seconds: float) -> tuple[float, float]:
        costs = Costs(stages={f"{name}.0": StageCosts(forward=s, backward=s) for name, s in seconds.items()})
        schedule = attrs.evolve(topology.spec.schedule, costs=costs)
        step = Balance(balanced(topology, schedule=schedule)).step(RAGGED)
        return spread_of(step, "v"), spread_of(step, "l")

    of_encoder, of_language = spreads(v=1.0), spreads(l=1.0)
    assert of_encoder[0] < of_language[0]
    assert of_language[1] < of_encoder[1]


def test_every_rank_deals_alike() -> None:
    """It follows from the job and the descriptions alone: another topology of the same job assigns the same."""
    one, other = (Balance(balanced(job(JOBS[1], batch=192))).step(RAGGED) for _ in range(2))
    assert (one.samples, one.cells) == (other.samples, other.cells)


def test_like_samples_stay_alike() -> None:
    """A balanced step of like samples has one kind of microbatch, so planning it costs no more than one of them."""
    topology = balanced(job("v vit dp2 > l; l gpt dp2", batch=32))
    step = Balance(topology).step(step_with(topology).samples)
    assert (0, 0, 0, 0) == step.alike(4)


def test_too_few_samples_for_the_cells() -> None:
    """Dp sizes that do not divide each other take more lanes than a microbatch has samples; the error counts both."""
    with pytest.raises(
        PlanError, match="16 samples of a step are assigned to 24 cells: 4 microbatches on 6 lanes"
    ) as raised:
        balanced(job("v vit dp3 > l; l gpt dp2", batch=16))
    assert "batch.global_size >= 24" in str(raised.value)


def test_an_unknown_balance_is_refused() -> None:
    """Only two words are known."""
    topology = job("l gpt", batch=8)
    batch = attrs.evolve(topology.spec.batch, balance="costs")
    with pytest.raises(PlanError, match=r"batch\.balance"):
        parse(attrs.evolve(topology.spec, batch=batch), topology.source)
