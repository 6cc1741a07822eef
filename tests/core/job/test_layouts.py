"""Layouts: a world takes the largest that fits, and none of them changes what is computed."""

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layouts import job, layouts
from mimogrid.core.job.changes import refused
from mimogrid.core.job.layouts import chosen, laid_out, layout_of, layout_problems, layouts_of
from mimogrid.core.job.placement import place
from mimogrid.core.job.spec import (
    BatchLayoutSpec,
    GpuSpec,
    GridSpec,
    JobSpec,
    LayoutSpec,
    ModuleLayoutSpec,
    OptimizerLayoutSpec,
    ScheduleLayoutSpec,
)
from mimogrid.core.schedule.layer_split import problems_of_layouts


SPEC = job("enc(1,1,2)@0 lm(1,2,1)@2")
PAIR = LayoutSpec(
    ranks=2,
    modules={"enc": ModuleLayoutSpec(), "lm": ModuleLayoutSpec(grid=GridSpec(offset=1))},
    batch=BatchLayoutSpec(microbatches=2),
)


def with_layouts(*layouts: LayoutSpec) -> JobSpec:
    """A job of four ranks, with further layouts."""
    return attrs.evolve(SPEC, layouts=layouts)


def bare(spec: JobSpec) -> JobSpec:
    """A job without a layout: one rank for each module, one microbatch."""
    own = ModuleLayoutSpec(recompute="none")
    layout = LayoutSpec(
        ranks=1,
        modules=dict.fromkeys(spec.modules, own),
        batch=BatchLayoutSpec(microbatches=1),
        schedule=ScheduleLayoutSpec(name="gpipe"),
        optimizer=OptimizerLayoutSpec(sharded=False),
    )
    return attrs.evolve(laid_out(spec, layout), world_size=None)


@given(layouts())
def test_a_layout_is_all_of_a_job_that_says_where_it_runs(spec: JobSpec) -> None:
    """Laid over the bare job it gives the job again."""
    again = laid_out(bare(spec), layout_of(spec, 8))
    assert place(spec) == place(again)
    assert attrs.evolve(spec, world_size=None) == again


@given(layouts())
def test_no_layout_changes_what_is_computed(spec: JobSpec) -> None:
    """A run of the job may go on under it."""
    assert not list(refused(bare(spec), laid_out(bare(spec), layout_of(spec, 8)), accepted=()))


@given(st.sets(st.integers(5, 40), max_size=5), st.integers(1, 50))
def test_a_world_takes_the_largest_layout_that_fits(sizes: set[int], ranks: int) -> None:
    """And none where all are too large."""
    spec = with_layouts(*(LayoutSpec(ranks=size) for size in sizes))
    expected = max((size for size in {4, *sizes} if size <= ranks), default=None)
    found = chosen(spec, ranks)
    assert expected == (found.ranks if found else None)


def test_without_a_number_of_ranks_the_tables_count() -> None:
    """With `world_size` it is the layout for so many, and the ranks that it leaves idle."""
    spec = with_layouts(PAIR)
    found = chosen(spec, None), chosen(attrs.evolve(spec, world_size=3), None)
    assert [SPEC, 4] == [found[0].spec, found[0].ranks] if found[0] else found
    assert found[1] is not None
    assert (2, 3, 2) == (found[1].ranks, found[1].spec.world_size, found[1].spec.batch.microbatches)


def test_a_module_that_a_layout_names_has_nothing_of_its_own_layout() -> None:
    """Its split does not fit another grid; what it recomputes stays."""
    own = attrs.evolve(SPEC.modules["lm"], split=(1, 1), microbatches=8, recompute="full")
    spec = attrs.evolve(SPEC, modules={**SPEC.modules, "lm": own})
    module = laid_out(spec, PAIR).modules["lm"]
    assert (None, None, 1, "full") == (module.split, module.microbatches, module.chunks, module.recompute)


@pytest.mark.parametrize(
    ("spec", "where", "fact"),
    [
        (with_layouts(PAIR, PAIR), "layouts[1].ranks", "as layouts[0]"),
        (with_layouts(attrs.evolve(PAIR, ranks=4)), "layouts[0].ranks", "as the tables of the modules"),
        (
            with_layouts(LayoutSpec(ranks=2, modules={"ln": ModuleLayoutSpec()})),
            "layouts[0].modules.ln",
            "there is no module 'ln'",
        ),
        (attrs.evolve(SPEC, layouts="plans"), "layouts", "is 'plans'"),
        (attrs.evolve(SPEC, layouts="plan"), "layouts", "for which GPUs"),
    ],
)
def test_a_list_of_layouts_that_is_wrong(spec: JobSpec, where: str, fact: str) -> None:
    """Each mistake has its place."""
    (problem,) = layout_problems(spec)
    assert where == problem.where
    assert fact in problem.message


def test_every_layout_is_checked_as_a_job() -> None:
    """A mistake that only it makes has its place in front; one of the job is told once."""
    wide = LayoutSpec(ranks=2, modules={"lm": ModuleLayoutSpec(grid=GridSpec(dp=3))})
    spec = with_layouts(PAIR, wide)
    assert {"layouts[1].modules.lm.grid"} == {p.where for p in problems_of_layouts(spec, None)}
    wrong = attrs.evolve(spec, batch=attrs.evolve(spec.batch, global_size=0))
    found = [p.where for p in problems_of_layouts(wrong, None)]
    assert 1 == sum(where.endswith("batch.global_size") for where in found), found


def test_planned_layouts_need_the_kind_of_gpu() -> None:
    """And then there is nothing to say of them before they are planned."""
    spec = attrs.evolve(SPEC, layouts="plan", gpu=GpuSpec(name="h100"))
    assert not list(layout_problems(spec))
    assert [4] == [layout.ranks for layout in layouts_of(spec)]
