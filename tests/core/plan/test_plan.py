"""Plans: what is printed is legal, fits, and is not beaten by what could be found by trying everything."""

import functools
import itertools
import re

import attrs
import pytest

from hashseeds import printed
from jobs import program_for
from mimogrid.core.base.samples import Sample
from mimogrid.core.job.models import Gpt, Vit
from mimogrid.core.job.placement import balanced
from mimogrid.core.job.spec import BatchSpec, DataSpec, GpuSpec, GridSpec, JobSpec, ModuleSpec, SourceFacts
from mimogrid.core.job.validation.problems import problems_of
from mimogrid.core.plan import evaluation
from mimogrid.core.plan.evaluation import Evaluator
from mimogrid.core.plan.layouts import BEST, ILLEGAL, SLOWER, TOO_LARGE, Question, kind_of, shown
from mimogrid.core.plan.neighbours import neighbours
from mimogrid.core.plan.planner import CONFIRMED, plan
from mimogrid.core.plan.search_space import enough, search_space_of
from mimogrid.core.plan.walk import BUDGET
from mimogrid.core.pricing.even import even_costs
from mimogrid.core.pricing.on_machine import on_machine
from mimogrid.core.simulate.memory import peak_bytes
from mimogrid.core.simulate.simulation import simulate
from mimogrid.core.step.step import step_of
from scale import nightly_only
from timed import rank_by_rank


FACTS = SourceFacts(sequence=512)
GB = 1e9


def question(gpus=4, *, gpu="h100", memory=80 * GB, batch=8, rows=256, **vision):
    """A language model that sees images, laid out on one GPU for each."""
    modules = {
        "vision": ModuleSpec(
            model="vit",
            options=Vit(layers=4, hidden=1024, heads=16, features=588),
            feeds=("language",),
            **vision,
        ),
        "language": ModuleSpec(
            model="gpt", options=Gpt(layers=4, hidden=2048, heads=16, vocab=32000), grid=GridSpec(pp=2)
        ),
    }
    spec = JobSpec(
        modules=modules,
        data=DataSpec(source="none"),
        batch=BatchSpec(global_size=batch, microbatches=4),
        gpu=GpuSpec(name=gpu, memory_gb=memory / GB),
        precision="bf16",
    )
    samples = tuple(Sample(id=i, length=512 - rows, rows={"vision": rows}) for i in range(batch))
    return Question(spec=spec, facts=FACTS, samples=samples, gpus=gpus)


@functools.lru_cache
def planned(gpus=4, *, memory=80 * GB, batch=8, budget=BUDGET):
    """A question and its plan, made once."""
    asked = question(gpus, memory=memory, batch=batch)
    return asked, plan(asked, budget=budget)


def test_what_is_printed_is_legal_and_fits():
    """Every layout that has a time can be parsed, and those that fit do."""
    asked, found = planned()
    assert BEST == found.layouts[0].kind
    for layout in found.layouts:
        if layout.kind in {BEST, SLOWER}:
            assert () == problems_of(layout.spec, FACTS)
            assert max(layout.peak_bytes.values()) <= asked.memory_bytes
        assert (layout.kind == ILLEGAL) == bool(problems_of(layout.spec, FACTS))
    steps = [layout.step_s for layout in found.layouts if layout.kind in {BEST, SLOWER}]
    assert sorted(steps) == steps


def test_the_same_job_gives_the_same_plan():
    """To the last layout, in other processes with other hash seeds."""
    assert 1 == len(printed("from test_plan import plan, question; print(plan(question()))", __file__))


def test_every_layout_has_a_reason():
    """And the job's own is among them."""
    _, found = planned(gpus=3)
    assert all(layout.reason for layout in found.layouts)
    assert "the job's own layout" in found.own.reason
    assert found.own in found.layouts


def test_less_memory_is_respected():
    """With less memory, the fastest layout of before is too large, and the plan says by how much."""
    _, free = planned()
    cap = min(max(free.best.peak_bytes.values()) * 0.9, 80 * GB)
    _, tight = planned(memory=cap)
    assert max(tight.best.peak_bytes.values()) <= cap
    assert tight.best.step_s >= free.best.step_s
    assert any("short by" in layout.reason for layout in tight.layouts if layout.kind == TOO_LARGE)


def least_memory(asked):
    """The bytes of the layout of equal shares that needs fewest, of some that one would try by hand."""
    evaluator, least = Evaluator(asked, "language"), float("inf")
    for vision, language, count in itertools.product((1, 2), (1, 2), (1, 8)):
        grids = {"vision": GridSpec(dp=vision, offset=0), "language": GridSpec(pp=language, offset=vision)}
        modules = {
            name: attrs.evolve(module, grid=grids[name]) for name, module in asked.spec.modules.items()
        }
        spec = attrs.evolve(asked.spec, modules=modules, batch=BatchSpec(global_size=8, microbatches=count))
        layout = evaluator.evaluated(spec)
        if layout.kind == SLOWER:
            least = min(least, max(evaluator.measured(layout).peak_bytes.values()))
    return least


def test_where_a_plain_layout_fits_the_plan_finds_one():
    """However tight the memory is: a candidate that does not fit hides none that does."""
    memory = least_memory(question(gpus=3))
    assert 0 < memory < 80 * GB
    assert plan(question(gpus=3, memory=memory)).best is not None


def test_the_layout_that_one_would_write_first_is_named():
    """One grid for all modules, with what it loses by; layouts that are shown are of different kinds."""
    _, found = planned()
    [standard] = [layout for layout in found.layouts if "one grid for all (tp=" in layout.reason]
    assert "x slower" in standard.reason or standard.kind in {BEST, TOO_LARGE}
    grids = [
        kind_of(layout.spec, "language") for layout in found.fitting if layout not in (found.own, standard)
    ]
    assert len(grids) == len(set(grids))


def test_padding_is_what_rounds_rows_up():
    """Of 511 positions tp = 4 makes 512; a module that no axis cuts has none, and neither have samples."""
    asked = question()
    short = tuple(attrs.evolve(sample, length=255) for sample in asked.samples)
    asked = attrs.evolve(asked, samples=short)
    grids = {"vision": GridSpec(offset=0), "language": GridSpec(tp=4, sequence_parallel=True, offset=0)}
    modules = {name: attrs.evolve(module, grid=grids[name]) for name, module in asked.spec.modules.items()}
    spec = attrs.evolve(asked.spec, modules=modules, batch=BatchSpec(global_size=8, microbatches=8))
    evaluator = Evaluator(asked, "language")
    found = evaluator.with_padding(evaluator.evaluated(spec))
    assert pytest.approx(1 - (256 + 511) / (256 + 512)) == found.padding


def test_slower_links_and_more_rows_take_longer():
    """The plan says how long the winner takes then, and whether another layout would be faster."""
    _, found = planned()
    for line in found.sensitivity:
        assert line.winner_s >= found.best.step_s * (1 - 1e-9)
        assert line.fastest_s <= line.winner_s
    assert ["links 20% slower", "20% more rows"] == [line.what for line in found.sensitivity]
    assert found.sensitivity[1].winner_s > found.best.step_s


def test_where_nothing_fits_the_nearest_layout_is_named():
    """With the stage, what it needs and what is missing."""
    _, found = planned(memory=0.5 * GB)
    assert found.best is None
    assert "short by" in found.nearest_fit
    assert "language" in found.nearest_fit or "vision" in found.nearest_fit


@pytest.mark.parametrize(("gpus", "memory"), [(1, 1.5 * GB), (2, 0.5 * GB)])
def test_the_nearest_layout_lacks_no_more_than_one_that_is_shown(gpus, memory):
    """Also where configurations are ruled out without a price; with the memory that would do."""
    found = plan(question(gpus, memory=memory, batch=64))
    assert found.best is None
    needed = float(re.search(r"needs ([\d.]+) GB", found.nearest_fit)[1])
    peaks = [max(each.peak_bytes.values()) for each in found.layouts if each.peak_bytes]
    assert all(needed <= peak / GB + 0.05 for peak in peaks)
    enough = float(re.search(r"On GPUs of ([\d.]+) GB or more \(h100", found.nearest_fit)[1])
    assert plan(question(gpus, memory=enough * GB, batch=64)).best is not None
    more = int(re.search(r"On (\d+) of these GPUs", found.nearest_fit)[1])
    assert plan(question(more, memory=memory, batch=64)).best is not None


@pytest.mark.parametrize("gpus", [2, 4])
def test_a_plan_agrees_with_a_simulation(gpus):
    """The time and the memory of the best layouts are those of the whole program with every rank."""
    asked, found = planned(gpus, batch=32)
    for place, layout in enumerate(found.fitting):
        costs = even_costs(step_of(asked.topology(layout.spec), asked.samples), asked.machine)
        timeline = rank_by_rank(program_for(step_of(asked.topology(layout.spec), asked.largest)), costs)
        if place < CONFIRMED:
            assert timeline.step_s == pytest.approx(layout.step_s, rel=1e-12)
        assert timeline.step_s <= layout.step_s * (1 + 1e-9)
        assert timeline.step_s == pytest.approx(layout.step_s, rel=0.03)
        peaks = peak_bytes(timeline)
        for name, module in asked.topology(layout.spec).modules.items():
            assert layout.peak_bytes[name] == max(peaks[rank] for rank in module.grid.ranks)


def test_orders_are_tried_on_the_best_layouts():
    """Those with split backwards and `auto`, whose costs and cap stand in the job; none twice under two names."""
    layouts = plan(question(4, gpu="l40s", batch=32, memory=20 * GB)).fitting
    names = {layout.spec.schedule.name for layout in layouts}
    assert names & {"zb-h1", "zb-h2", "auto"}
    for layout in layouts:
        assert (layout.spec.schedule.name == "auto") == (layout.spec.schedule.costs is not None)
        assert (layout.spec.schedule.name == "auto") == (layout.spec.schedule.memory_gb is not None)
        chunks = any(module.chunks > 1 for module in layout.spec.modules.values())
        assert not (chunks and layout.spec.schedule.name == "1f1b")


def test_idle_gpus_are_paid_for():
    """Tokens per second count over all that are allocated."""
    _, found = planned()
    best = found.best
    assert 8 * 512 / best.step_s / 4 == pytest.approx(best.tokens_per_s_per_gpu)


def everything(asked):
    """The fastest of all grids of tp, dp and pp, at all places of the encoder, with all counts of microbatches."""
    best = float("inf")
    sizes = [g for g in itertools.product((1, 2, 4), repeat=3) if g[0] * g[1] * g[2] <= asked.gpus]
    for count, vision, language in itertools.product((1, 2, 4, 8), sizes, sizes):
        taken = language[0] * language[1] * language[2]
        for offset in {0, taken}:
            grids = {
                "vision": GridSpec(tp=vision[0], dp=vision[1], pp=vision[2], offset=offset),
                "language": GridSpec(tp=language[0], dp=language[1], pp=language[2], offset=0),
            }
            modules = {
                name: attrs.evolve(
                    module,
                    grid=attrs.evolve(grids[name], sequence_parallel=grids[name].tp > 1),
                )
                for name, module in asked.spec.modules.items()
            }
            batch = BatchSpec(global_size=len(asked.samples), microbatches=count)
            spec = attrs.evolve(asked.spec, modules=modules, batch=batch, world_size=asked.gpus)
            if not problems_of(spec, FACTS):
                step = step_of(asked.topology(spec), asked.samples)
                best = min(best, simulate(program_for(step), on_machine(step, asked.machine)).step_s)
    return best


@pytest.mark.parametrize("vision", [{}, {"frozen": True}])
def test_nothing_is_faster_in_a_small_world(vision):
    """Trying every grid on three GPUs finds nothing better than the gap allows."""
    asked = question(gpus=3, **vision)
    found = plan(asked, budget=1_000_000)
    assert found.best.step_s <= everything(asked) * (1 + found.gap + 1e-9)


def test_no_single_change_of_a_plan_is_clearly_faster():
    """Of no axis, place, number of chunks or microbatches, recomputation or order of any module."""
    asked = question(4, batch=16, rows=64)
    found, evaluator = plan(asked), Evaluator(asked, "language")
    changed = [evaluator.evaluated(spec) for spec in neighbours(found.best.spec)]
    faster = [each for each in changed if each.kind == SLOWER and each.step_s < 0.99 * found.best.step_s]
    assert [] == [shown(each.spec) for each in faster if evaluator.fitted(each).kind == SLOWER]
    assert 10 < sum(each.kind == SLOWER for each in changed)


def test_experts_may_be_split_over_ranks():
    """Neighbours of a layout have them on more ranks by `ep` and by `expert_tp`; dense layers have neither."""
    asked = question()
    sparse = attrs.evolve(asked.spec.modules["language"].options, experts=4, top_k=2)
    language = attrs.evolve(asked.spec.modules["language"], options=sparse, grid=GridSpec(tp=2))
    spec = attrs.evolve(asked.spec, modules={**asked.spec.modules, "language": language})
    grids = {name: {each.modules[name].grid for each in neighbours(spec)} for name in spec.modules}
    assert {1, 2} == {grid.ep for grid in grids["language"]} == {grid.expert_tp for grid in grids["language"]}
    assert {(1, 1)} == {(grid.ep, grid.expert_tp) for grid in grids["vision"]}


def test_bounds_are_below_what_is_simulated():
    """No layout is faster than what was promised of the best that was left out."""
    _, found = planned()
    for layout in found.layouts:
        if layout.step_s:
            assert layout.lower_bound_s <= layout.step_s * (1 + 1e-9)


@pytest.mark.parametrize(("gpus", "batch"), [(256, 32), *nightly_only([(1024, 128)])])
def test_hundreds_of_gpus_are_planned(gpus, batch):
    """On all of them or on fewer, never on more."""
    _, found = planned(gpus, batch=batch, budget=10_000)
    assert 0 < found.best.active <= gpus


def test_layers_are_dealt_so_that_the_slowest_stage_is_fastest():
    """Against all ways to cut."""
    for seconds in ([1, 1, 1, 1, 1, 3], [5, 1, 1, 1], [0, 0, 2, 2, 2, 4, 1], [1] * 7):
        for parts in range(1, len(seconds) + 1):
            found = balanced(seconds, parts)
            assert (parts, len(seconds)) == (len(found), sum(found))
            assert min(found) >= 1
            cuts = (
                (0, *chosen, len(seconds))
                for chosen in itertools.combinations(range(1, len(seconds)), parts - 1)
            )
            best = min(max(sum(seconds[a:b]) for a, b in itertools.pairwise(cut)) for cut in cuts)
            ends = list(itertools.accumulate(found, initial=0))
            assert best == max(sum(seconds[a:b]) for a, b in itertools.pairwise(ends))


def test_counts_that_make_no_difference_are_left_out():
    """Of ten things four parts have three at most; three parts have four, and so have none fewer."""
    for things in range(1, 40):
        largest = {count: -(-things // count) for count in range(1, things + 1)}
        expected = [c for c in largest if all(largest[d] > largest[c] for d in range(1, c))]
        assert tuple(expected) == enough(things, things)


def test_a_search_says_how_far_it_is():
    """More and more is examined and simulated, and the best time falls."""
    told = []
    found = plan(question(), watch=lambda progress: not told.append(progress))
    assert not found.stopped
    best = [progress.best_s for progress in told if progress.simulated]
    assert sorted(best, reverse=True) == best
    assert 0 < told[-1].simulated <= found.simulated


def test_a_search_that_is_stopped_has_a_layout_and_a_gap():
    """At once: the first layout that fits; the gap allows for all that was not looked at."""
    found, whole = plan(question(), watch=lambda _: False), plan(question())
    assert found.stopped
    assert found.best.step_s <= whole.best.step_s * (1 + found.gap) * (1 + 1e-9)
    assert found.simulated < whole.simulated


def test_what_a_configuration_is_said_to_take_at_least_is_no_more_than_its_price():
    """So none is left out for less than it costs: ranks, seconds, seconds of a microbatch, bytes."""
    asked = question(8, batch=8)
    shared = attrs.evolve(asked.spec, optimizer=attrs.evolve(asked.spec.optimizer, sharded=True))
    step = step_of(asked.topology(shared), asked.samples)
    for name in asked.spec.modules:
        space = search_space_of(
            name, step=step, machine=asked.machine, ranks=8, spec=step.topology.spec, facts=FACTS
        )
        for count in (1, 2, 8):
            for least, config in space.rated(count, 8, (1, 2)):
                rates = space.priced(config).rates
                assert all(low <= found * (1 + 1e-9) for low, found in zip(least, rates, strict=True))


def test_few_dp_ranks_are_timed_for_many(monkeypatch):
    """A layout takes as long by some of its dp ranks as by all of them, computes as much, and needs as much memory."""
    asked = question(256, batch=128)
    grids = {"vision": GridSpec(tp=2, dp=64, offset=0), "language": GridSpec(tp=2, pp=2, dp=32, offset=0)}
    modules = {name: attrs.evolve(module, grid=grids[name]) for name, module in asked.spec.modules.items()}
    spec = attrs.evolve(asked.spec, modules=modules, batch=BatchSpec(global_size=128, microbatches=2))
    few = Evaluator(asked, "language")
    part = few.measured(few.evaluated(spec))
    monkeypatch.setattr(evaluation, "WHOLE_WORLD", 256)
    every = Evaluator(asked, "language")
    whole = every.measured(every.evaluated(spec))
    assert (whole.active, whole.peak_bytes) == (part.active, part.peak_bytes)
    for number in ("step_s", "bubble", "mfu", "exchange_s", "lower_bound_s"):
        assert getattr(whole, number) == pytest.approx(getattr(part, number), rel=1e-5)
    assert every.confirmed(whole).step_s == pytest.approx(few.confirmed(part).step_s, rel=1e-5)


def test_what_was_evaluated_before_does_not_matter():
    """Layouts of equal stages on other grids share an order, but not where its last backwards are cut."""
    asked = question(6)
    spec = attrs.evolve(asked.spec, optimizer=attrs.evolve(asked.spec.optimizer, cut_mb=1.0))
    before, layout = (
        attrs.evolve(
            spec,
            modules={
                "vision": attrs.evolve(spec.modules["vision"], grid=GridSpec(dp=dp, offset=0)),
                "language": attrs.evolve(spec.modules["language"], grid=GridSpec(offset=2)),
            },
            batch=BatchSpec(global_size=8, microbatches=4),
        )
        for dp in (1, 2)
    )
    used, fresh = Evaluator(asked, "language"), Evaluator(asked, "language")
    assert used.evaluated(before).step_s != used.evaluated(layout).step_s
    assert fresh.evaluated(layout).step_s == used.evaluated(layout).step_s


def test_a_module_that_interleaves_its_own_microbatches_is_timed():
    """The short step, by which a layout is timed, fills its chunks, too."""
    asked = question(2, batch=96)
    modules = {
        "vision": attrs.evolve(asked.spec.modules["vision"], grid=GridSpec(offset=0)),
        "language": attrs.evolve(
            asked.spec.modules["language"], grid=GridSpec(pp=2, offset=0), chunks=2, microbatches=16
        ),
    }
    schedule = attrs.evolve(asked.spec.schedule, name="interleaved")
    batch = BatchSpec(global_size=96, microbatches=96)
    spec = attrs.evolve(asked.spec, modules=modules, batch=batch, schedule=schedule)
    assert () == problems_of(spec, FACTS)
    evaluator = Evaluator(asked, "language")
    layout = evaluator.evaluated(spec)
    assert SLOWER == layout.kind
    assert layout.step_s == pytest.approx(evaluator.whole(layout).step_s, rel=0.2)
