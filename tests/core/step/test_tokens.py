"""Tokens: steps cut by a limit of tokens, in a number of microbatches that varies from step to step."""

import itertools
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import job, program_for
from mimogrid.core.base.errors import PlanError
from mimogrid.core.base.samples import Sample
from mimogrid.core.job.tokens import microbatch_multiple
from mimogrid.core.pricing.balance import Balance
from mimogrid.core.pricing.even import fullest_step
from mimogrid.core.pricing.footprint import Computed, most_computed
from mimogrid.core.program.verify import verify
from mimogrid.core.schedule.orders import Orders
from mimogrid.core.step.step import Step, step_of
from mimogrid.core.step.tokens import cut_by_tokens
from mimogrid.core.topology.groups import channels_of
from mimogrid.core.topology.parse import parse
from mimogrid.core.topology.topology import COUNTS_KEPT, Topology
from scale import drawn


SEQUENCE = 40


def limited(text: str, tokens: int, *, batch: int = 24, **changes: Any) -> Topology:
    """The topology of a job whose microbatches have a limit of tokens; `changes` are of its batch."""
    topology = job(text, batch=batch, microbatches=2 if batch % 2 == 0 else 1)
    spec, facts = topology.spec, attrs.evolve(topology.source, sequence=SEQUENCE)
    changed = attrs.evolve(spec.batch, **{"microbatches": 1, "tokens_per_microbatch": tokens} | changes)
    return parse(attrs.evolve(spec, batch=changed), facts)


def counted(step: Step) -> int:
    """The number of microbatches of a step."""
    return step.topology.most_microbatches


def held(step: Step, name: str) -> list[int]:
    """The tokens that the dp ranks of a language model have in the microbatches of a step."""
    module = step.topology.modules[name]
    return [
        sum(step.share(name, dp_rank, k).positions)
        for k in range(module.microbatches)
        for dp_rank in range(module.dp_size)
    ]


# -- numbers -----------------------------------------------------------------------------------------------

TOKENS = st.lists(st.integers(0, 9), min_size=1, max_size=40)


@settings(max_examples=drawn(300))
@given(TOKENS, st.integers(9, 30), st.integers(1, 3), st.integers(1, 3))
def test_a_cut_keeps_the_limit_with_as_few_microbatches_as_it_can(
    tokens: list[int], limit: int, lanes: int, multiple: int
) -> None:
    """Cells are whole microbatches of samples in their order; with a multiple fewer the samples do not fit."""
    cells = cut_by_tokens(tokens, limit=limit, lanes=lanes, multiple=multiple)
    assert (0, len(tokens)) == (cells[0], cells[-1])
    assert list(cells) == sorted(cells)
    microbatches, rest = divmod(len(cells) - 1, lanes)
    assert (0, 0) == (rest, microbatches % multiple)
    assert limit >= max(sum(tokens[a:b]) for a, b in itertools.pairwise(cells))
    filled, level = 1, 0
    for count in tokens:
        filled, level = (filled, level + count) if level + count <= limit else (filled + 1, count)
    assert filled > (microbatches - multiple) * lanes


@settings(max_examples=drawn(200))
@given(TOKENS, st.integers(9, 30), st.integers(1, 3))
def test_no_cut_in_as_many_cells_has_a_smaller_largest_cell(
    tokens: list[int], limit: int, lanes: int
) -> None:
    """The limit that the cells keep cannot be lowered: filled up to one token less, there are more cells."""
    cells = cut_by_tokens(tokens, limit=limit, lanes=lanes)
    largest = max(sum(tokens[a:b]) for a, b in itertools.pairwise(cells))
    if largest > max(tokens):
        fewer = cut_by_tokens(tokens, limit=largest - 1, lanes=1)
        assert len(fewer) > len(cells)


# -- steps -------------------------------------------------------------------------------------------------

JOBS = (
    "v vit dp2 > l; l gpt dp2",
    "v vit dp4 > l; l gpt dp2 pp2",
    "v vit dp2 > l; a vit > l; l gpt dp4 pp2",
    "v vit dp2 @0 > l; l gpt tp2 @0",
    "v vit dp3 > l; l gpt dp2",
    "l gpt dp2 ep2 x2",
    "v vit dp2 pp2 chunks2 > l; l gpt pp2 dp2",
    "v vit > b; b block dp2 > l; l gpt dp2 > g; g regressor",
)
LENGTHS = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 16)), min_size=1, max_size=24)


def samples_of(lengths: list[tuple[int, int]], batch: int = 24) -> tuple[Sample, ...]:
    """Samples of these rows and lengths of text, repeated."""
    drawn_of = itertools.islice(itertools.cycle(lengths), batch)
    return tuple(Sample(i, text, {"v": rows, "a": rows // 2}) for i, (rows, text) in enumerate(drawn_of))


@settings(max_examples=drawn(80))
@given(st.sampled_from(JOBS), LENGTHS, st.integers(120, 200), st.sampled_from(["none", "cost"]))
def test_a_step_cut_by_tokens_is_a_step(
    text: str, lengths: list[tuple[int, int]], tokens: int, balance: str
) -> None:
    """It has all samples, keeps the limit and the most microbatches, is proved, and stays in the groups of the job."""
    topology, samples = limited(text, tokens, balance=balance), samples_of(lengths)
    step = Balance(topology).step(samples)
    assert samples == tuple(sorted(step.samples, key=lambda sample: sample.id))
    assert counted(step) <= topology.most_microbatches
    assert 0 == counted(step) % microbatch_multiple(topology.spec)
    assert tokens >= max(held(step, "l"))
    program = program_for(step)
    verify(program)
    pairs = set(channels_of(topology))
    for link in topology.links:
        for k in range(counted(step)):
            for message in program.routes.messages(link, k):
                assert (message.rank_source, message.rank_target) in pairs


def test_numbers_of_microbatches_vary_with_the_samples() -> None:
    """Long samples give a step more microbatches than short ones, of the same job."""
    topology = limited(JOBS[0], 40)
    short, long = (step_of(topology, samples_of([(1, text)])) for text in (3, 19))
    assert (2, 6) == (counted(short), counted(long))


def test_like_samples_are_cut_evenly() -> None:
    """Samples of which four fill a microbatch are cut as by a number: four for each dp rank."""
    step = step_of(limited(JOBS[0], 40), samples_of([(4, 6)]))
    assert tuple(range(0, 25, 4)) == step.cells


def test_the_most_microbatches_are_met() -> None:
    """If every sample is as long as the sequence, a step has as many microbatches as the job says at most."""
    topology = limited("l gpt dp2", 100)
    assert 6 == topology.most_microbatches
    assert 6 == counted(step_of(topology, samples_of([(0, SEQUENCE)])))


def test_assigning_takes_more_microbatches_where_samples_do_not_fit() -> None:
    """In order 30 30 20 20 20 fills two cells of 60; longest first the 30 part, and there is no room for a 20."""
    topology = limited("l gpt", 60, batch=5, balance="cost")
    samples = samples_of([(0, text) for text in (30, 30, 20, 20, 20)], 5)
    assert 2 == counted(step_of(topology, samples))
    assert [40, 50, 30] == sorted(held(Balance(topology).step(samples), "l"), key=[40, 50, 30].index)


def test_every_number_has_its_order() -> None:
    """Steps of equal numbers share topology and order; of other numbers a few are kept, whatever comes between."""
    topology = limited(JOBS[0], 40)
    orders = Orders(topology)
    steps = [step_of(topology, samples_of([(1, text)])) for text in (3, 19, 3)]
    one, other, same = (orders.of(step.topology) for step in steps)
    assert one is same
    assert steps[0].topology is steps[2].topology
    assert {a.microbatch for a in other.actions} == set(range(6))
    for count in range(1, COUNTS_KEPT + 8):
        orders.of(topology.with_microbatches(count))
    assert one.actions == orders.of(steps[0].topology).actions


@settings(max_examples=drawn(60))
@given(st.sampled_from(JOBS[:5]), LENGTHS)
def test_no_dp_rank_holds_more_than_the_fullest_step(text: str, lengths: list[tuple[int, int]]) -> None:
    """What `check` counts in a microbatch is at least what any step of samples no denser has in one."""
    topology, samples = limited(text, 160), samples_of(lengths)
    step = step_of(topology, samples)
    fullest = fullest_step(step)
    assert counted(fullest) == topology.most_microbatches
    for module in topology.modules.values():
        most = Computed.of(fullest, module, 0, 0).positions
        for dp_rank in range(module.dp_size):
            for k in range(counted(step)):
                assert most >= Computed.of(step, module, dp_rank, k).positions, module.name


def test_what_the_source_says_bounds_a_cell() -> None:
    """Full cells follow from the largest sample alone: the encoder may have as many positions as there are tokens."""
    topology = limited("v vit dp2 > l; l gpt dp2", 160)
    facts = attrs.evolve(topology.source, rows={"v": 12}, length=20)
    found = parse(topology.spec, facts)
    assert (160, 160) == tuple(most_computed(found, m).positions for m in found.modules.values())


# -- what is refused ---------------------------------------------------------------------------------------


def refused(text: str, tokens: int, **changes: Any) -> str:
    """What is said of a job that cannot have a limit of tokens."""
    with pytest.raises(PlanError) as raised:
        limited(text, tokens, **changes)
    return str(raised.value)


def test_a_limit_and_a_number_exclude_each_other() -> None:
    """The error names both keys, for the job and for a module."""
    assert "batch.microbatches: is 4, and batch.tokens_per_microbatch cuts" in refused(
        JOBS[0], 80, microbatches=4
    )
    assert "modules.v.microbatches: is 1" in refused("v vit m1 > l; l gpt", 80)


def test_the_longest_sample_must_fit() -> None:
    """A lane has its part of the limit; the error has the least limit with which a sample fits."""
    assert "Use 40 or more" in refused("l gpt dp2", 39)
    said = refused("v vit dp4 > l; l gpt dp2", 79)
    assert "is 79, and a sample may have 40 tokens for each of the 2 lanes that a dp rank has (of 4)" in said
    assert "Use 80 or more" in said


def test_tokens_must_bound_every_module() -> None:
    """A job without a language model, or with an encoder that does not lead to one, is refused by name."""
    assert "the job has none" in refused("v vit > r; r regressor", 80)
    said = refused("v vit > l; l gpt; w vit > r; r regressor", 80)
    assert "does not bound the rows of module 'w'" in said


def test_numbers_below_zero_are_refused() -> None:
    """0 is for no limit."""
    assert "batch.tokens_per_microbatch: is -1" in refused(JOBS[0], -1)
