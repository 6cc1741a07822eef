"""Dropout: masks agree where ranks hold the same values, differ everywhere else, and follow from the plan alone."""

from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any

import attrs
import pytest

from draws import Told
from layouts import job as job_of
from mimogrid.core.base.errors import PlanError
from mimogrid.core.job.spec import JobSpec
from mimogrid.core.job.validation import parity_problems
from mimogrid.shell.cli import start
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.world.launch import Pool


pytestmark = pytest.mark.world

LAYERS, MICROBATCHES = 2, 2
Telling = Callable[..., list[Told]]


def spec_of(
    grids: str, *, dropout: float = 0.3, changes: Mapping[str, Any] | None = None, **axes: Any
) -> JobSpec:
    """Return a job with dropout in every module; `axes` are those of the language model's grid."""
    names = [word.split("(")[0] for word in grids.split()]
    options = {name: {"options": {"dropout": dropout}, **(changes or {})} for name in names}
    data = {"absent": dict.fromkeys((n for n in names if n == "enc"), 0.0)}
    spec = job_of(grids, microbatches=MICROBATCHES, samples=2, data=data, changes=options)
    model = spec.modules["lm"]
    modules = {**spec.modules, "lm": attrs.evolve(model, grid=attrs.evolve(model.grid, **axes))}
    longer = attrs.evolve(spec.data, options={**spec.data.options, "sequence": 16})
    return attrs.evolve(spec, modules=modules, data=longer)


@pytest.fixture(scope="module")
def told(pool: Pool, opened: Callable[[JobSpec], Job]) -> Telling:
    """Run steps of a job; return what each rank that works has to tell."""

    def run(spec: JobSpec, *steps: int, update: bool = False) -> list[Told]:
        job = opened(spec)
        said = pool.run("draws:tell", job.topology.world_size, job, steps or (0,), update)
        return [one for one in said if one is not None]

    return run


def states(told: Told, kind: str, stage: str = "lm") -> list[str]:
    """The states of a rank's draws of a kind in a module, in order."""
    return [draw.state for draw in told.draws if draw.kind == kind and draw.stage.startswith(stage)]


# -- who draws what ----------------------------------------------------------------------------------------


def test_every_layer_draws(told: Telling) -> None:
    """Twice for values and once for attention in a layer, and once for the text's embedding."""
    (alone,) = told(spec_of("lm(1,1,1)@0"))
    assert MICROBATCHES * (2 * LAYERS + 1) == len(states(alone, "dropout"))
    assert MICROBATCHES * LAYERS == len(states(alone, "attention"))
    assert len(alone.draws) == len({draw.state for draw in alone.draws})


def test_tensor_parallel_ranks_mask_what_they_share_alike(told: Telling) -> None:
    """Hidden values are the same on every tp rank, and so are their masks; each has heads of its own."""
    one, other = told(spec_of("lm(2,1,1)@0"))
    assert states(one, "dropout") == states(other, "dropout")
    assert not set(states(one, "attention")) & set(states(other, "attention"))


def test_sequence_parallel_ranks_mask_their_positions_apart(told: Telling) -> None:
    """The embedding is drawn before the sequence is cut, all else after it."""
    one, other = told(spec_of("lm(2,1,1)@0", sequence_parallel=True))
    each = 2 * LAYERS + 1
    for start_ in range(0, MICROBATCHES * each, each):
        mine, yours = (states(rank, "dropout")[start_ : start_ + each] for rank in (one, other))
        assert mine[0] == yours[0]
        assert not set(mine[1:]) & set(yours[1:])
    assert not set(states(one, "attention")) & set(states(other, "attention"))


@pytest.mark.parametrize(
    ("grids", "axes"),
    [
        ("lm(1,1,2)@0", {}),
        ("lm(1,1,1)@0", {"cp": 2}),
        ("lm(1,2,1)@0", {}),
        ("enc(1,1,1)@0 lm(1,1,1)@0", {}),
        ("enc(1,1,2)@0 lm(2,2,1)@0", {"cp": 2, "sequence_parallel": True}),
    ],
)
def test_all_others_draw_apart(told: Telling, grids: str, axes: Mapping[str, Any]) -> None:
    """Dp ranks, parts of a sequence, stages, modules, microbatches and steps."""
    ranks = told(spec_of(grids, **axes), 0, 1)
    for rank in ranks:
        assert len(rank.draws) == len({draw.state for draw in rank.draws}) > 0
    for one, other in combinations(ranks, 2):
        shared = {draw.state for draw in one.draws} & {draw.state for draw in other.draws}
        alike = [
            name
            for name, mine in one.positions.items()
            if name in other.positions
            and all(mine[axis] == other.positions[name][axis] for axis in ("cp", "dp", "pp"))
        ]
        assert bool(shared) <= bool(alike), (one.positions, other.positions)


# -- repeatable --------------------------------------------------------------------------------------------


def test_two_runs_are_the_same_to_the_last_bit(told: Telling) -> None:
    """Nothing but the plan decides what is drawn."""
    spec = spec_of("enc(1,1,2)@0 lm(2,2,1)@2", sequence_parallel=True)
    first, second = told(spec, 0, 1, 2, update=True), told(spec, 0, 1, 2, update=True)
    assert first == second
    assert len(set(first[0].losses)) == 3


def test_a_step_does_not_depend_on_what_ran_before(told: Telling) -> None:
    """Step 2 alone draws what step 2 after two others draws: a resumed run goes on as it would have."""
    spec = spec_of("enc(1,1,1)@0 lm(1,2,1)@0")
    after, alone = told(spec, 0, 1, 2), told(spec, 2)
    assert [rank.gradients for rank in after] == [rank.gradients for rank in alone]
    assert [rank.losses[-1] for rank in after] == [rank.losses[-1] for rank in alone]


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("axes", [{}, {"cp": 2}, {"sequence_parallel": True}])
def test_recomputation_draws_the_same_again(told: Telling, recompute: str, axes: Mapping[str, Any]) -> None:
    """Each recomputed draw begins at the state of the first one, and the gradients are the same bit by bit."""
    grids = "lm(2,1,1)@0"
    usual = told(spec_of(grids, **axes))
    twice = told(spec_of(grids, changes={"recompute": recompute}, **axes))
    for one, again in zip(usual, twice, strict=True):
        assert {draw.state for draw in one.draws} == {draw.state for draw in again.draws}
        assert len(again.draws) > len(one.draws)
        assert one.losses == again.losses
        assert one.gradients == again.gradients


# -- where there is none -----------------------------------------------------------------------------------


def test_evaluation_draws_nothing(told: Telling) -> None:
    """Forward-only programs run without dropout."""
    assert all(rank.evaluated == () for rank in told(spec_of("enc(1,1,1)@0 lm(2,1,1)@0")))


def test_without_dropout_nothing_is_drawn(told: Telling) -> None:
    """And dropout changes the loss."""
    grids = "lm(1,1,1)@0"
    (without,), (with_some,) = told(spec_of(grids, dropout=0.0)), told(spec_of(grids))
    assert () == without.draws
    assert without.losses != with_some.losses


def test_parity_refuses_dropout(opened: Callable[[JobSpec], Job]) -> None:
    """Layouts draw different masks, so there is nothing that they could be compared with."""
    spec = spec_of("enc(1,1,1)@0 lm(1,1,1)@0")
    assert () == parity_problems(spec_of("lm(1,1,1)@0", dropout=0.0))
    assert ["modules.enc.options.dropout", "modules.lm.options.dropout"] == [
        problem.where for problem in parity_problems(spec)
    ]
    with pytest.raises(PlanError, match=r"--set modules\.enc\.options\.dropout=0"):
        start.parity(opened(spec), steps=1, as_json=False)
