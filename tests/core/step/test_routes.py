"""Routes: every row crosses once, from the rank that has it to the rank that wants it, for any two grids."""

import collections

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import CASES
from jobs import job, step_with
from mimogrid.core.base.samples import share
from mimogrid.core.step.routes import Routes, row_ranges
from mimogrid.core.step.step import Step
from mimogrid.core.topology.topology import Module, Stage
from scale import drawn


SAMPLES = 40


@st.composite
def grids(draw: st.DrawFn) -> str:
    """The grid of a module in words: up to 32 ranks, anywhere, with microbatches of its own."""
    tp, cp, pp = draw(
        st.sampled_from([(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (3, 1, 1), (1, 1, 2), (2, 1, 2)])
    )
    order = draw(st.sampled_from(["tp,cp,dp,pp", "tp,cp,pp,dp", "dp,cp,tp,pp"]))
    counts = draw(st.sampled_from(["m2", "m4", "m8"]))
    dp, offset = draw(st.integers(1, 5)), draw(st.integers(0, 12))
    return f"tp{tp} cp{cp} pp{pp} dp{dp} @{offset} {counts} order={order}"


ROWS = st.lists(st.sampled_from((0, 0, 1, 2, 7)), min_size=SAMPLES, max_size=SAMPLES)


def owners(step: Step, module: Module, stage: Stage, rows: list[int]) -> list[tuple[int, int]]:
    """Return (microbatch, rank) of every row at one end of a bridge, by plain counting."""
    dp_ranks: dict[tuple[int, int], int] = collections.defaultdict(int)
    size = len(step.samples) // module.microbatches
    for sample, count in enumerate(rows):
        microbatch, place = divmod(sample, size)
        dp_rank = next(i for i in range(module.dp_size) if place in share(i, module.dp_size, size))
        dp_ranks[microbatch, dp_rank] += count
    return [
        (microbatch, module.tp_cp_ranks(stage, dp_rank)[part])
        for (microbatch, dp_rank), count in dp_ranks.items()
        for part in range(len(module.tp_cp_ranks(stage, dp_rank)))
        for _ in share(part, len(module.tp_cp_ranks(stage, dp_rank)), count)
    ]


@settings(max_examples=drawn(30))
@given(grids(), grids(), ROWS)
def test_every_row_goes_once_from_owner_to_owner(source: str, target: str, rows: list[int]) -> None:
    """The pieces of all messages are what counting row by row gives: nothing is lost, doubled or sent astray."""
    topology = job(f"v vit {source} > l; l gpt {target}", batch=SAMPLES)
    step = step_with(topology, {"v": rows})
    (bridge,) = (link for link in topology.links if link.edge)
    given_by = owners(step, topology.modules["v"], bridge.source, rows)
    wanted_by = owners(step, topology.modules["l"], bridge.target, rows)
    expected = [(k, source, j, target) for (j, source), (k, target) in zip(given_by, wanted_by, strict=True)]
    routes = Routes(step)
    moved: dict[int, tuple[int, int, int, int]] = {}
    for k in range(topology.modules["l"].microbatches):
        for message in routes.messages(bridge, k):
            for piece in message.pieces:
                for row in range(piece.start, piece.stop):
                    assert row not in moved
                    moved[row] = (k, message.rank_source, piece.microbatch, message.rank_target)
    assert expected == [moved[row] for row in sorted(moved)]


@settings(max_examples=drawn(40))
@given(grids(), grids(), ROWS)
def test_row_ranges_are_covered(source: str, target: str, rows: list[int]) -> None:
    """The rows that reach a rank are its range, sorted, and each message is in order."""
    topology = job(f"v vit {source} > l; l gpt {target}", batch=SAMPLES)
    step = step_with(topology, {"v": rows})
    (bridge,) = (link for link in topology.links if link.edge)
    routes, module = Routes(step), topology.modules["l"]
    for k in range(module.microbatches):
        for dp_rank in range(module.dp_size):
            for held in row_ranges(step, module, bridge, k, dp_rank):
                messages = routes.sent_to(held.rank, bridge, k)
                pieces = [(p.start, p.stop) for message in messages for p in message.pieces]
                assert list(range(held.start, held.stop)) == [
                    row for start, stop in sorted(pieces) for row in range(start, stop)
                ]
                assert all(m.pieces == tuple(sorted(m.pieces, key=lambda p: p.start)) for m in messages)
                assert held.stop - held.start == sum(message.rows for message in messages)


@settings(max_examples=drawn(40))
@given(grids(), grids(), ROWS)
def test_both_ends_see_the_same_messages(source: str, target: str, rows: list[int]) -> None:
    """The messages that leave the ranks equal those that reach them, so the backward is the transpose."""
    topology = job(f"v vit {source} > l; l gpt {target}", batch=SAMPLES)
    routes = Routes(step_with(topology, {"v": rows}))
    for link in topology.links:
        for k in range(topology.modules[link.target.module].microbatches):
            every = routes.messages(link, k)
            leaving = [
                m
                for r in ranks_of(topology.modules[link.source.module], link.source)
                for m in routes.sent_by(r, link, k)
            ]
            reaching = [
                m
                for r in ranks_of(topology.modules[link.target.module], link.target)
                for m in routes.sent_to(r, link, k)
            ]
            assert sorted(every, key=repr) == sorted(leaving, key=repr) == sorted(reaching, key=repr)


def ranks_of(module: Module, stage: Stage) -> list[int]:
    """Return the ranks of a stage."""
    return [rank for dp_rank in range(module.dp_size) for rank in module.tp_cp_ranks(stage, dp_rank)]


@settings(max_examples=drawn(30))
@given(grids(), ROWS)
def test_pipeline_links_have_one_message_per_rank(grid: str, rows: list[int]) -> None:
    """On a pipeline link each rank sends to the rank at its own position, if its dp rank has rows."""
    topology = job(f"v vit {grid.replace('pp1', 'pp2')} > l; l gpt", batch=SAMPLES)
    step = step_with(topology, {"v": rows})
    module, pipeline_link = topology.modules["v"], topology.links[0]
    for k in range(module.microbatches):
        expected = [
            ends
            for dp_rank in range(module.dp_size)
            if step.has_rows("v", dp_rank, k)
            for ends in zip(
                module.tp_cp_ranks(pipeline_link.source, dp_rank),
                module.tp_cp_ranks(pipeline_link.target, dp_rank),
                strict=True,
            )
        ]
        assert expected == [(m.rank_source, m.rank_target) for m in Routes(step).messages(pipeline_link, k)]


MEETING = {
    "dp4 1": {0: {0}, 1: {0}, 2: {0}, 3: {0}},
    "dp4 tp2pp2": {0: {0}, 1: {0}, 2: {0}, 3: {0}},
    "dp4 dp2": {0: {0}, 1: {0}, 2: {1}, 3: {1}},
    "1 dp2": {0: {0, 1}},
    "tp2pp2 dp4": {0: {0, 1, 2, 3}},
    "tp2dp2 dp4": {0: {0, 1}, 1: {2, 3}},
    "dp4 dp4": {0: {0}, 1: {1}, 2: {2}, 3: {3}},
    "dp3 dp2": {0: {0}, 1: {0, 1}, 2: {1}},
    "dp2 dp3": {0: {0, 1}, 1: {1, 2}},
    "colocated tp2dp4 tp4dp2": {0: {0}, 1: {0}, 2: {1}, 3: {1}},
    "colocated tp4dp2 tp2dp4": {0: {0, 1}, 1: {2, 3}},
}


@pytest.mark.parametrize("case", MEETING)
def test_fan_in_and_fan_out(case: str) -> None:
    """Dp ranks meet if they share samples: k to one, one to k, or across if neither size divides the other."""
    topology = job(CASES[case], batch=24)
    routes = Routes(step_with(topology))
    (bridge,) = (link for link in topology.links if link.edge)
    source, target = topology.modules[bridge.source.module], topology.modules[bridge.target.module]
    met: dict[int, set[int]] = collections.defaultdict(set)
    for message in routes.messages(bridge, 0):
        met[source.dp_rank_of(message.rank_source)].add(target.dp_rank_of(message.rank_target))
    assert MEETING[case] == dict(met)


BOUNDARIES = {
    "tp2 pp2 dp2": ([[2, 3], [6, 7]], [[0, 1], [4, 5]]),
    "tp4 pp2": ([[4, 5, 6, 7]], [[0, 1, 2, 3]]),
    "pp2 dp4": ([[1], [3], [5], [7]], [[0], [2], [4], [6]]),
    "tp2 pp4": ([[6, 7]], [[0, 1]]),
}


@pytest.mark.parametrize("grid", BOUNDARIES)
def test_boundary_stages(grid: str) -> None:
    """A source sends from its last stage and a target receives at its first, dp rank by dp rank."""
    order = "order=tp,cp,pp,dp"
    topology = job(f"v vit {grid} {order} @0 > l; l gpt {grid} {order} @0", batch=16)
    (bridge,) = (link for link in topology.links if link.edge)
    last, first = (
        [
            list(topology.modules[name].tp_cp_ranks(stage, dp_rank))
            for dp_rank in range(topology.modules[name].dp_size)
        ]
        for name, stage in (("v", bridge.source), ("l", bridge.target))
    )
    assert BOUNDARIES[grid] == (last, first)


def test_ranks_carry_equal_shares() -> None:
    """Eight rows between four and two ranks: four messages of two rows, and each rank's in order."""
    topology = job("v vit tp4 > l; l gpt tp2", batch=4)
    routes = Routes(step_with(topology, {"v": (8,)}))
    (bridge,) = topology.links
    assert [(0, 4, 2), (1, 4, 2), (2, 5, 2), (3, 5, 2)] == [
        (m.rank_source, m.rank_target, m.rows) for m in routes.messages(bridge, 0)
    ]


class _Counting(Step):
    """A step that notes whose rows it is asked for."""

    def rows_of(self, module: str, samples: range) -> tuple[int, int]:
        ASKED[module] += 1
        return super().rows_of(module, samples)


ASKED: collections.Counter[str] = collections.Counter()


@pytest.mark.parametrize("dp", [1, 50])
def test_a_rank_makes_its_own_messages_only(dp: int) -> None:
    """Asking for one rank of a wide world looks at the rows of its own dp ranks, not at those of all."""
    topology = job(f"v vit dp{dp} > l; l gpt dp{dp}", batch=200)
    (bridge,) = topology.links
    ASKED.clear()
    routes = Routes(_Counting(topology, step_with(topology).samples))
    assert (2 * dp - 1,) == tuple(m.rank_target for m in routes.sent_by(dp - 1, bridge, 0))
    assert {"v": 2} == ASKED  # those of the source and those of the target


class _Unlike(Step):
    """A step in which no two microbatches are alike."""

    def alike(self, parts: int) -> tuple[int, ...]:
        return tuple(range(parts))


@settings(max_examples=drawn(40))
@given(grids(), grids(), st.lists(st.integers(0, 3), min_size=1, max_size=5))
def test_what_is_known_of_like_microbatches_holds(source: str, target: str, rows: list[int]) -> None:
    """Messages, shapes and active microbatches are the same with and without the shortcut for like microbatches."""
    topology = job(f"a vit {source} > z; z gpt {target}", batch=SAMPLES, microbatches=4)
    step = step_with(topology, {"a": rows})
    alike, unlike = Routes(step), Routes(_Unlike(topology, step.samples))
    for link in topology.links:
        module = topology.modules[link.target.module]
        for k in range(module.microbatches):
            assert unlike.messages(link, k) == alike.messages(link, k)
            for dp_rank in range(module.dp_size):
                assert unlike.step.hidden_shape(link.target, dp_rank, k) == step.hidden_shape(
                    link.target, dp_rank, k
                )
    for name, module in topology.modules.items():
        for dp_rank in range(module.dp_size):
            assert unlike.step.active(name, dp_rank) == step.active(name, dp_rank)
