"""Dropout: masks are equal for equal values of different ranks, differ otherwise, and depend on the plan only."""

from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any

import attrs
import pytest

from draws import RankDraws
from layouts import job as job_of
from mimogrid.core.base.errors import PlanError
from mimogrid.core.job.spec import JobSpec
from mimogrid.core.job.validation.problems import parity_problems
from mimogrid.shell.cli import start
from mimogrid.shell.cli.arguments import ParityArgs
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.world.launch import Pool


pytestmark = pytest.mark.world

LAYERS, MICROBATCHES = 2, 2
Drawing = Callable[..., list[RankDraws]]


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
def draws_of(pool: Pool, opened: Callable[[JobSpec], Job]) -> Drawing:
    """Run steps of a job; return what each rank with a stage drew."""

    def run(spec: JobSpec, *steps: int, update: bool = False) -> list[RankDraws]:
        job = opened(spec)
        said = pool.run("draws:tell", job.topology.world_size, job, steps or (0,), update)
        return [one for one in said if one is not None]

    return run


def states(rank: RankDraws, kind: str, stage: str = "lm") -> list[str]:
    """The states of a rank's draws of a kind in a module, in order."""
    return [draw.state for draw in rank.draws if draw.kind == kind and draw.stage.startswith(stage)]


# -- who draws what ----------------------------------------------------------------------------------------


def test_every_layer_draws(draws_of: Drawing) -> None:
    """Twice for values in a layer, at least once for attention, and once for the text's embedding."""
    (alone,) = draws_of(spec_of("lm(1,1,1)@0"))
    assert MICROBATCHES * (2 * LAYERS + 1) == len(states(alone, "dropout"))
    assert MICROBATCHES * LAYERS <= len(states(alone, "attention"))
    assert len(alone.draws) == len({draw.state for draw in alone.draws})


def test_tensor_parallel_ranks_mask_what_they_share_alike(draws_of: Drawing) -> None:
    """Hidden values are the same on every tp rank, and so are their masks; each has heads of its own."""
    one, other = draws_of(spec_of("lm(2,1,1)@0"))
    assert states(one, "dropout") == states(other, "dropout")
    assert not set(states(one, "attention")) & set(states(other, "attention"))


def test_sequence_parallel_ranks_mask_their_positions_apart(draws_of: Drawing) -> None:
    """The embedding is masked before the sequence is cut, everything else after it."""
    one, other = draws_of(spec_of("lm(2,1,1)@0", sequence_parallel=True))
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
def test_all_others_draw_apart(draws_of: Drawing, grids: str, axes: Mapping[str, Any]) -> None:
    """Dp ranks, parts of a sequence, stages, modules, microbatches and steps."""
    ranks = draws_of(spec_of(grids, **axes), 0, 1)
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


def test_two_runs_are_the_same_to_the_last_bit(draws_of: Drawing) -> None:
    """Draws depend on the plan only."""
    spec = spec_of("enc(1,1,2)@0 lm(2,2,1)@2", sequence_parallel=True)
    first, second = draws_of(spec, 0, 1, 2, update=True), draws_of(spec, 0, 1, 2, update=True)
    assert first == second
    assert len(set(first[0].losses)) == 3


def test_a_step_does_not_depend_on_what_ran_before(draws_of: Drawing) -> None:
    """Step 2 by itself draws what step 2 draws after two others, so a resumed run continues exactly."""
    spec = spec_of("enc(1,1,1)@0 lm(1,2,1)@0")
    after, alone = draws_of(spec, 0, 1, 2), draws_of(spec, 2)
    assert [rank.gradients for rank in after] == [rank.gradients for rank in alone]
    assert [rank.losses[-1] for rank in after] == [rank.losses[-1] for rank in alone]


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("axes", [{}, {"cp": 2}, {"sequence_parallel": True}])
def test_recomputation_draws_the_same_again(
    draws_of: Drawing, recompute: str, axes: Mapping[str, Any]
) -> None:
    """Each recomputed draw starts at the state of the first one, and the gradients are bitwise equal."""
    grids = "lm(2,1,1)@0"
    usual = draws_of(spec_of(grids, **axes))
    twice = draws_of(spec_of(grids, changes={"recompute": recompute}, **axes))
    for one, again in zip(usual, twice, strict=True):
        assert {draw.state for draw in one.draws} == {draw.state for draw in again.draws}
        assert len(again.draws) > len(one.draws)
        assert one.losses == again.losses
        assert one.gradients == again.gradients


# -- where there is none -----------------------------------------------------------------------------------


def test_evaluation_draws_nothing(draws_of: Drawing) -> None:
    """Forward-only programs run without dropout."""
    assert all(rank.evaluated == () for rank in draws_of(spec_of("enc(1,1,1)@0 lm(2,1,1)@0")))


def test_without_dropout_nothing_is_drawn(draws_of: Drawing) -> None:
    """And dropout changes the loss."""
    grids = "lm(1,1,1)@0"
    (without,), (with_some,) = draws_of(spec_of(grids, dropout=0.0)), draws_of(spec_of(grids))
    assert () == without.draws
    assert without.losses != with_some.losses


def test_parity_refuses_dropout(opened: Callable[[JobSpec], Job]) -> None:
    """Layouts draw different masks, so parity cannot compare them."""
    spec = spec_of("enc(1,1,1)@0 lm(1,1,1)@0")
    assert () == parity_problems(spec_of("lm(1,1,1)@0", dropout=0.0))
    assert ["modules.enc.options.dropout", "modules.lm.options.dropout"] == [
        problem.where for problem in parity_problems(spec)
    ]
    job = opened(spec)
    with pytest.raises(PlanError, match=r"--set modules\.enc\.options\.dropout=0"):
        start.parity(job, ParityArgs(job=job.path))
