"""Token limits: what `plan` searches keeps them, its numbers of microbatches are bounds, and pins go with them."""

import pytest

from mimogrid.core.base.errors import PlanError
from mimogrid.core.job.tokens import lanes_per_dp_rank
from mimogrid.core.plan.conflicts import conflicts
from mimogrid.core.plan.evaluation import Evaluator
from mimogrid.core.plan.layouts import SLOWER
from mimogrid.core.plan.planner import plan
from mimogrid.core.plan.token_limit import TokenLimit, token_limit_of
from mimogrid.core.pricing.balance import Balance
from mimogrid.core.step.step import step_of
from planned import drawn_layouts, question


COUNTED = "batch.tokens_per_microbatch gives the number of microbatches."


def cut(asked, spec):
    """A step of a layout, as the job cuts it."""
    return Balance(asked.topology(spec)).step(asked.samples)


def tokens_of_dp_ranks(step):
    """The tokens of every dp rank of the language model in every microbatch."""
    language = step.topology.modules["language"]
    return [
        sum(step.sample_tokens[i] for i in step.samples_of("language", dp_rank, k))
        for dp_rank in range(language.dp_size)
        for k in range(language.microbatches)
    ]


@pytest.mark.parametrize(("limit", "balance"), [(512, "none"), (700, "cost"), (2048, "cost")])
def test_every_layout_keeps_the_limit(monkeypatch, limit, balance):
    """In the step that is timed no dp rank of the language model has more tokens."""
    asked, seen, evaluated = question(limit=limit, balance=balance), [], Evaluator.evaluated
    monkeypatch.setattr(
        Evaluator, "evaluated", lambda self, spec: seen.append(evaluated(self, spec)) or seen[-1]
    )
    plan(asked, budget=20_000)
    ran = [layout.spec for layout in seen if layout.kind == SLOWER]
    assert len(ran) > 5
    for spec in ran:
        assert lanes_per_dp_rank(spec) <= limit // 512
        assert max(tokens_of_dp_ranks(cut(asked, spec))) <= limit


@pytest.mark.parametrize("seed", range(6))
def test_the_number_by_the_limit_is_a_lower_bound(seed):
    """No layout has fewer microbatches than the search counts, and one on a single lane has as many."""
    asked = question(seed=seed, gpus=8, balance=("none", "cost")[seed % 2], limit=(512, 1024, 1500)[seed % 3])
    limit, equal = asked.limit, 0
    for layout in drawn_layouts(asked, seed, 12):
        step = cut(asked, layout.spec)
        assert limit.microbatches_of(layout.spec) <= step.topology.most_microbatches
        equal += limit.microbatches_of(layout.spec) == step.topology.most_microbatches
    assert equal
    alone = step_of(asked.topology(asked.spec), asked.samples)
    assert limit.bins == alone.topology.most_microbatches == token_limit_of(alone).bins


@pytest.mark.parametrize(("multiple", "of"), [(1, 1), (1, 3), (2, 1), (4, 3)])
def test_dp_sizes_have_their_number_of_microbatches(multiple, of):
    """All that are offered for a number have it. Of those that have it the least and the largest are offered."""
    limit = TokenLimit(bins=37, lanes=2, samples=64)
    for count in range(1, 40):
        having = [
            dp
            for dp in range(of, 41, of)
            if count % multiple == 0 and limit.microbatches(dp, multiple) == count
        ]
        sizes = limit.text_dp_sizes(count, multiple=multiple, of=of, most=40)
        assert set(sizes) <= set(having)
        assert [*having[:1], *having[-1:]] == [*sizes[:1], *sizes[-1:]]


@pytest.mark.parametrize("beside", [5, 7, 12, 18])
def test_a_dp_size_goes_with_one_that_is_known(beside):
    """If any with the same number of microbatches has room for the lanes that the two make."""
    limit = TokenLimit(bins=37, lanes=2, samples=64)
    for count in range(1, 38):
        having = [
            dp for dp in range(1, 41) if limit.microbatches(dp) == count and limit.allows([dp], [beside])
        ]
        sizes = limit.text_dp_sizes(count, multiple=1, of=1, most=40, beside=[beside])
        assert bool(having) == any(limit.allows([dp], [beside]) for dp in sizes)


def test_lanes_have_room_for_the_longest_sample():
    """Whatever dp size is offered beside a language model."""
    for lanes in (1, 2, 3):
        limit = TokenLimit(bins=24, lanes=lanes, samples=64)
        assert all(limit.allows([6], [dp]) for dp in limit.other_dp_sizes(4, most=64))
        assert all(limit.allows([7], [dp]) for dp in limit.other_dp_sizes(4, most=64, text=7))


@pytest.mark.parametrize(("gpus", "seed", "balance"), [(4, 0, "none"), (6, 1, "cost")])
def test_random_layouts_do_not_beat_the_winner(gpus, seed, balance):
    """By more than 2 %, of those that fit."""
    asked = question(gpus=gpus, seed=seed, balance=balance)
    best, evaluator = plan(asked).best, Evaluator(asked, "language")
    others = [evaluator.confirmed(layout) for layout in drawn_layouts(asked, seed, 40)]
    fitting = [layout.step_s for layout in others if layout.kind == SLOWER]
    assert len(fitting) > 30
    assert best.step_s <= 1.02 * min(fitting)


def test_more_dp_ranks_than_a_number_of_microbatches_needs():
    """They are taken where they help: eight have less to do in each of two microbatches than five."""
    pins = ("vision.dp=1", "language.tp=1", "language.cp=1", "language.pp=1")
    asked = question(*pins, gpus=12, limit=2048, batch=60)
    assert asked.limit.microbatches(5) == asked.limit.microbatches(8)
    assert 8 == plan(asked, budget=20_000).best.spec.modules["language"].grid.dp


@pytest.mark.parametrize(
    "words",
    [["language.dp=2", "vision.dp=4"], ["language.chunks=2", "schedule=interleaved"], ["vision.dp=3"]],
)
def test_pins_are_kept(words):
    """As in jobs that count their microbatches."""
    asked = question(*words)
    best = plan(asked, budget=20_000).best
    assert () == asked.pins.broken_by(best.spec)
    assert max(tokens_of_dp_ranks(cut(asked, best.spec))) <= 1024


@pytest.mark.parametrize("word", ["microbatches=4", "language.microbatches=4", "*.microbatches=2"])
def test_numbers_of_microbatches_cannot_be_pinned(word):
    """The limit gives them; the way out is said, and other conflicts beside it."""
    with pytest.raises(PlanError) as caught:
        plan(question(word, "language.tp=3"))
    *counted, other = caught.value.problems
    assert {COUNTED} == {problem.message for problem in counted}
    assert "--set batch.tokens_per_microbatch=0" in counted[0].remedy
    assert "splits 16 attention heads over tp=3" in other.message


@pytest.mark.parametrize(
    ("words", "limit"),
    [
        (["language.dp=2", "vision.dp=3"], 1024),
        (["language.dp=3", "vision.dp=4"], 1024),
        (["language.dp=1", "vision.dp=2"], 700),
        (["language.dp=2", "vision.dp=4"], 512),
        (["language.dp=2", "vision.dp=4", "vision.tp=2"], 1000),
    ],
)
def test_lanes_that_are_too_small_are_refused(words, limit):
    """The longest sample does not fit; each change that is named is possible, and the last of them has a layout."""
    asked = question(*words, limit=limit, gpus=8)
    [problem] = conflicts(asked, "language")
    assert "lanes" in problem.message
    nearest, _, _ = problem.remedy.partition(". ")
    changes = nearest.rstrip(".").removeprefix("The nearest that fits: ").split(", or ")
    for change in changes:
        changed = [change if word.startswith(change.partition("=")[0]) else word for word in words]
        other = question(*changed, limit=limit, gpus=8)
        assert () == conflicts(other, "language")
    assert () == other.pins.broken_by(plan(other, budget=2_000).best.spec)


def test_nothing_fits():
    """What lacks least is said, and what would fit."""
    found = plan(question(memory_gb=0.5), budget=20_000)
    assert found.best is None
    assert "of 500 MB per GPU, short by " in found.nearest_fit
    assert "or more (h100, " in found.nearest_fit
