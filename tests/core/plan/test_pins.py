"""Pins: every layout that a search evaluates has them, and pins that no layout has together are refused in words."""

import random

import attrs
import pytest

from mimogrid.core.base.errors import PlanError
from mimogrid.core.base.samples import Sample
from mimogrid.core.job.models import Gpt, Vit
from mimogrid.core.job.spec import BatchSpec, DataSpec, GpuSpec, GridSpec, JobSpec, ModuleSpec, SourceFacts
from mimogrid.core.plan.conflicts import conflicts
from mimogrid.core.plan.evaluation import Evaluator
from mimogrid.core.plan.layouts import Question
from mimogrid.core.plan.pins import Pin, Pins, parse
from mimogrid.core.plan.planner import plan


MODULES = ("vision", "language")


def question(*words, gpus=4, memory_gb=80, batch=8, experts=0):
    """A language model that sees images, on so many GPUs, with pins."""
    options = Gpt(layers=4, hidden=2048, heads=16, vocab=32000, experts=experts)
    modules = {
        "vision": ModuleSpec(
            model="vit",
            options=Vit(layers=4, hidden=1024, heads=16, features=588),
            feeds=("language",),
        ),
        "language": ModuleSpec(model="gpt", options=options, grid=GridSpec(pp=2)),
    }
    spec = JobSpec(
        modules=modules,
        data=DataSpec(source="none"),
        batch=BatchSpec(global_size=batch, microbatches=4),
        gpu=GpuSpec(name="h100", memory_gb=memory_gb),
        precision="bf16",
    )
    samples = tuple(Sample(id=i, length=256, rows={"vision": 256}) for i in range(batch))
    facts = SourceFacts(sequence=512)
    return Question(spec=spec, facts=facts, samples=samples, gpus=gpus, pins=parse(words, MODULES))


def drawn_pins(seed):
    """Some pins, each possible alone."""
    draw = random.Random(seed)
    each = [
        f"{module}.{axis}={draw.choice((1, 2))}" for module in MODULES for axis in ("tp", "cp", "pp", "dp")
    ]
    each += [f"{module}.recompute={draw.choice(('none', 'selective', 'full'))}" for module in MODULES]
    each += [f"{module}.microbatches={draw.choice((1, 2, 4, 8))}" for module in MODULES]
    each += [f"vision.chunks={draw.choice((1, 2))}", f"microbatches={draw.choice((1, 2, 4, 8))}"]
    each += [f"schedule={draw.choice(('1f1b', 'interleaved', 'gpipe', 'zb-h1', 'zb-h2', 'auto'))}"]
    return draw.sample(each, draw.randint(1, 4))


@pytest.mark.parametrize("seed", range(12))
def test_every_layout_that_is_evaluated_has_the_pins(monkeypatch, seed):
    """All but the job's own, and those on the way to `auto`; if pins are possible, a layout with them is found."""
    asked = question(*drawn_pins(seed))
    if problems := conflicts(asked, "language"):
        with pytest.raises(PlanError) as caught:
            plan(asked)
        assert problems == caught.value.problems
        return
    seen, evaluated = [], Evaluator.evaluated
    monkeypatch.setattr(Evaluator, "evaluated", lambda self, spec: seen.append(spec) or evaluated(self, spec))
    found = plan(asked, budget=20_000)
    assert [] == [*asked.pins.broken_by(found.best.spec)]
    pins = asked.pins.without(Pin("", "schedule", "auto"))
    assert [] == [spec for spec in seen if spec != asked.spec and pins.broken_by(spec)]


def test_without_pins_nothing_is_refused():
    """And no layout is marked."""
    assert () == conflicts(question(), "language")
    assert not any("not as pinned" in layout.reason for layout in plan(question(), budget=20_000).layouts)


def test_all_choices_of_the_winner_lead_to_it():
    """Pinned together they leave it, and nothing faster is missed."""
    best = plan(question()).best
    count, modules = best.spec.batch.microbatches, best.spec.modules
    words = [
        f"{name}.{axis}={getattr(module.grid, axis)}"
        for name, module in modules.items()
        for axis in ("tp", "cp", "pp", "dp")
    ]
    words += [f"{name}.microbatches={module.microbatches or count}" for name, module in modules.items()]
    again = plan(question(*words, f"microbatches={count}", f"schedule={best.spec.schedule.name}")).best
    assert modules["language"].grid == again.spec.modules["language"].grid
    assert again.step_s <= best.step_s * 1.01


def test_values_that_no_search_tries_may_be_pinned():
    """Experts split by `expert_tp`, five dp ranks of eight samples, attention recomputed."""
    asked = question("language.expert_tp=2", "language.recompute=selective", "vision.dp=5", gpus=8, experts=4)
    best = plan(asked, budget=20_000).best
    language, vision = best.spec.modules["language"], best.spec.modules["vision"]
    assert (2, "selective", 5) == (language.grid.expert_tp, language.recompute, vision.grid.dp)


def test_modules_may_be_pinned_to_overlapping_ranks():
    """Six and six of eight GPUs: one lies on the other's. So do eight stages of two modules of all ranks."""
    asked = question("vision.dp=3", "vision.tp=2", "language.pp=3", "language.dp=2", gpus=8, batch=12)
    assert plan(asked, budget=20_000).best is not None
    asked = question("vision.pp=2", "vision.dp=3", "language.tp=4", "language.dp=1", gpus=7, batch=12)
    assert plan(asked, budget=20_000).best is not None


def test_the_microbatches_of_the_job_are_those_of_its_main_module():
    """Unless its own are pinned, too."""
    pins = Pins((Pin("", "microbatches", 4),), main="language")
    spec = question().spec
    own = attrs.evolve(spec.modules["language"], microbatches=2)
    other = attrs.evolve(spec, modules={**spec.modules, "language": own})
    assert () == pins.broken_by(spec)
    assert pins.chosen == pins.broken_by(other)
    both = Pins((*pins.chosen, Pin("language", "microbatches", 2)), main="language")
    assert () == both.broken_by(other)


def test_a_layout_without_the_pins_is_marked():
    """The job's own is shown, and is not the winner."""
    found = plan(question("language.pp=1"), budget=20_000)
    assert found.own.reason.startswith("not as pinned (language.pp=1); the job's own layout: ")
    assert 1 == found.best.spec.modules["language"].grid.pp


def test_the_pin_in_the_way_is_named_where_nothing_fits():
    """With a layout that fits without it."""
    found = plan(question("language.dp=4", "language.recompute=none", memory_gb=4, batch=4))
    free = plan(question("language.recompute=none", memory_gb=4, batch=4))
    assert found.best is None
    assert (free.best is not None) == ("Without --pin language.dp=4 this fits: " in found.nearest_fit)
    assert free.best is not None


@pytest.mark.parametrize(
    ("words", "message", "remedy"),
    [
        (["language.tp=3"], "splits 16 attention heads over tp=3", "language.tp=4"),
        (["language.pp=7"], "makes 7 stages, and module 'language' has 4 layers", "language.pp=4"),
        (["language.pp=4", "language.chunks=2"], "x chunks=2 makes 8 stages", "language.chunks=1"),
        (["language.chunks=4"], "language.chunks=4 makes 8 stages at least", "language.chunks=2"),
        (["language.ep=2"], "lays experts over 2 ranks and has none", "language.ep=1"),
        (["language.dp=8"], "needs 8 GPUs of 4", "language.dp=4. Or use --gpus 8"),
        (
            ["vision.tp=2", "vision.cp=2", "vision.dp=2"],
            "vision.tp=2 x cp=2 x dp=2 needs 8 GPUs of 4",
            "cp=1",
        ),
        (["microbatches=3"], "8 samples of a step do not divide into 3", "microbatches=4"),
        (["microbatches=8", "language.dp=2"], "has 1 samples (8 / 8) for dp=2", "microbatches=4"),
        (["schedule=1f1b", "language.chunks=2"], "1f1b is without chunks", "schedule=interleaved"),
        (["language.pp=1", "language.chunks=2"], "nothing to interleave", "language.chunks=1"),
        (
            ["language.pp=3", "language.chunks=1", "vision.pp=3", "vision.tp=2"],
            "needs 6 GPUs of 4",
            "vision.tp=1",
        ),
    ],
)
def test_pins_that_no_layout_has_are_refused(words, message, remedy):
    """With the fewest that collide, the numbers, and the nearest change."""
    [problem] = conflicts(question(*words), "language")
    assert message in problem.message
    assert remedy in problem.remedy
    assert all(f"--pin {word}" in problem.where for word in words) or words[0] == "language.pp=3"


def test_numbers_of_microbatches_go_together():
    """A module's own divide the job's, or are a multiple."""
    [problem] = conflicts(question("microbatches=4", "vision.microbatches=6", batch=12), "language")
    assert "their ratio is not an integer" in problem.message
    assert "vision.microbatches=4" in problem.remedy
    assert () == conflicts(question("language.microbatches=4", "vision.microbatches=6", batch=12), "language")


def test_a_change_that_is_named_is_possible():
    """Of drawn pins, most of which collide."""
    draw, refused = random.Random(1), 0
    for _ in range(30):
        axes = draw.sample(["tp", "cp", "pp", "dp", "microbatches", "chunks"], 3)
        words = [f"language.{axis}={draw.choice((2, 3, 4, 6))}" for axis in axes]
        problems = conflicts(question(*words), "language")
        refused += bool(problems)
        for problem in problems[:1] if len(problems) == 1 else ():
            nearest, _, _ = problem.remedy.partition(". ")
            for change in nearest.rstrip(".").removeprefix("The nearest that fits: ").split(", or "):
                axis = change.partition("=")[0]
                changed = [change if word.startswith(f"{axis}=") else word for word in words]
                assert () == conflicts(question(*changed), "language")
    assert refused > 10


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("langage.tp=2", "the job has no module 'langage'"),
        ("language.tq=2", "'tq' is no axis of a module"),
        ("tokens=2", "'tokens' is no axis of the job"),
        ("tp=2", "tp is of a module, and this names none"),
        ("language.schedule=1f1b", "schedule is of the job"),
        ("language.tp", "is no pin"),
        ("language.tp=0", "'0' is no whole number from 1"),
        ("language.tp=2.0", "'2.0' is no whole number"),
        (f"language.tp={'9' * 5000}", "is no whole number"),
        ("schedule=1F1B", "'1F1B' is no schedule"),
        ("language.recompute=some", "'some' is no recompute"),
    ],
)
def test_what_is_no_pin_is_said(word, message):
    """As a problem of that word."""
    with pytest.raises(PlanError) as caught:
        parse([word], MODULES)
    [problem] = caught.value.problems
    assert f"--pin {word}" == problem.where
    assert message in problem.message


def test_an_axis_has_one_value():
    """The same one may be pinned twice, also for all modules."""
    assert parse(["*.tp=2", "vision.tp=2"], MODULES) == parse(["*.tp=2"], MODULES)
    with pytest.raises(PlanError, match=r"pins language.tp to 4, and --pin \*.tp=2 to 2"):
        parse(["*.tp=2", "language.tp=4"], MODULES)


def test_pins_are_read_as_they_are_printed():
    """Parsing and printing are inverse."""
    for seed in range(30):
        words = drawn_pins(seed)
        assert words == [str(pin) for pin in parse(words, MODULES).chosen]
