"""Try to beat plans: random legal layouts of small drawn jobs, in the simulator that the search itself uses.

    python benchmarks/plan_beaten.py [--jobs 60] [--first 1] [--tries 2000] [--seed 0] [--out FILE]

Jobs are those of `plan_search`, on 8 to 64 GPUs and with fewer samples. One try in four draws a layout anew: grids with
ep and expert_tp, places, chunks, splits, recomputation, own microbatches and the order. The others change one or two of
these choices in the best layout so far, which at first is the plan itself. So the tries look both far from the plan and
beside it. The ratio is the seconds of the fastest layout found over those of the plan, both as `simulate` times them:
below 1 the plan is beaten.
"""

import argparse
import os
import random
import re
import tempfile
import time
from pathlib import Path

import attrs
from plan_search import drawn
from printed import printer

from mimogrid.core.job.placement import place
from mimogrid.core.job.schedules import AUTO, SCHEDULES
from mimogrid.core.job.spec import BatchSpec, GridSpec, JobSpec, ModuleSpec
from mimogrid.core.plan.evaluation import Evaluator
from mimogrid.core.plan.layouts import SLOWER, Layout, Question, shown
from mimogrid.core.plan.planner import Plan
from mimogrid.shell.job.jobs import open_job
from mimogrid.shell.job.planning import searched, without_garbage_collection


ORDERS = tuple(name for name in SCHEDULES if name != AUTO)
GPUS = (8, 12, 16, 24, 32, 64)
SAMPLES = (24, 48, 64, 100, 128)
ANEW, AGAIN = 0.25, 0.3
"""How often a try draws a whole layout, and how often it changes one more choice of the best one."""
CLOSE = 0.02
"""The plan may be slower than the best layout found by this part."""


def main() -> None:
    """Print a row for each job, then how often the plan was beaten and by how much at most."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=60)
    parser.add_argument("--first", type=int, default=1, help="the number of the first job")
    parser.add_argument("--tries", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write all there, too")
    args = parser.parse_args()
    say = printer(args.out)
    say(f"seed {args.seed}, {args.tries:,} tries per job; load {os.getloadavg()[0]:.1f}")
    say(f"{'job':>4}{'GPUs':>5}{'ratio':>8}{'plan':>11}{'plan CPU s':>11}  layout")
    ratios: list[float] = []
    for number in range(args.first, args.first + args.jobs):
        draw = random.Random(f"{args.seed} {number}")
        question = question_of(args.seed, number, draw.choice(GPUS), draw.choice(SAMPLES))
        begin = time.process_time()
        found = searched(question)
        seconds = time.process_time() - begin
        with without_garbage_collection():
            best = tried(question, found, draw, args.tries)
        row = f"{number:>4}{question.gpus:>5}"
        if found.best is None:
            missed = f", but {shown(best.spec)} does" if best else ""
            ratios += [0.0] * bool(best)
            say(f"{row}  nothing fits{missed}: {found.nearest_fit}")
            continue
        assert best is not None
        ratios.append(best.step_s / found.best.step_s)
        row += f"{ratios[-1]:8.4f}{found.best.step_s:9.4g} s{seconds:11.1f}  {shown(found.best.spec)}"
        say(row if ratios[-1] == 1 else f"{row}\n{'beaten by':>39}  {shown(best.spec)}")
    beaten = sum(ratio < 1 - CLOSE for ratio in ratios)
    say(
        f"{len(ratios)} plans: {beaten} are slower than the best layout found by more than {CLOSE:.0%}, "
        f"{sum(ratio < 1 for ratio in ratios)} by anything; at most by {1 - min([*ratios, 1.0]):.1%}"
    )


def question_of(seed: int, number: int, gpus: int, samples: int) -> Question:
    """Return what is asked for a drawn job of so many samples."""
    text = re.sub(r"global_size = \d+", f"global_size = {samples}", drawn(seed, number)[0])
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(text)
        file.flush()
        job = open_job(file.name)
        step = job.step(0)
    return Question(spec=job.spec, facts=job.topology.source, samples=step.samples, gpus=gpus)


def tried(question: Question, found: Plan, draw: random.Random, tries: int) -> Layout | None:
    """Return the fastest of the plan and of some layouts that are legal and fit, as `simulate` times it."""
    evaluator, best, known = Evaluator(question, found.main), found.best, set[str]()
    for _ in range(tries):
        base = best.spec if best and draw.random() > ANEW else None
        spec = beside(question, draw, base) if base else anew(question, draw)
        if (text := repr(spec)) in known:
            continue
        known.add(text)
        layout = evaluator.evaluated(spec)
        if layout.kind != SLOWER or (best and layout.step_s >= best.step_s):
            continue
        layout = evaluator.fitted(layout)
        if layout.kind == SLOWER:
            layout = evaluator.confirmed(layout)
        if layout.kind == SLOWER and (best is None or layout.step_s < best.step_s):
            best = layout
    return best


def anew(question: Question, draw: random.Random) -> JobSpec:
    """Draw a whole layout."""
    spec, samples = question.spec, len(question.samples)
    spec = attrs.evolve(
        spec,
        batch=BatchSpec(global_size=samples, microbatches=draw.choice(divisors(samples))),
        schedule=attrs.evolve(spec.schedule, name=draw.choice(ORDERS), costs=None),
        optimizer=attrs.evolve(spec.optimizer, sharded=True),
        world_size=question.gpus,
    )
    for name in spec.modules:
        spec = with_module(spec, name, module_anew(spec.modules[name], question.gpus, draw))
    return spec


def beside(question: Question, draw: random.Random, spec: JobSpec) -> JobSpec:
    """Change a choice of a layout, and perhaps more."""
    spec = attrs.evolve(spec, schedule=attrs.evolve(spec.schedule, costs=None))
    while True:
        spec = changed(question, draw, spec)
        if draw.random() > AGAIN:
            return spec


def changed(question: Question, draw: random.Random, spec: JobSpec) -> JobSpec:
    """Draw one choice of a layout anew."""
    samples, name = len(question.samples), draw.choice(list(spec.modules))
    module, grid = spec.modules[name], spec.modules[name].grid
    axis = draw.choice(("tp", "cp", "ep", "expert_tp", "pp", "dp"))
    near = (1, 2, max(getattr(grid, axis) // 2, 1), 2 * getattr(grid, axis), max(getattr(grid, axis) - 1, 1))
    size = draw.choice((*near, getattr(grid, axis) + 1))
    pp_of = {axis: size}.get("pp", grid.pp)
    choices = (
        lambda: with_module(
            spec, name, resized(module, attrs.evolve(grid, **{axis: size}), module.chunks if pp_of > 1 else 1)
        ),
        lambda: with_module(spec, name, traded(module, draw)),
        lambda: with_module(spec, name, module_anew(module, question.gpus, draw)),
        lambda: with_module(
            spec, name, attrs.evolve(module, grid=attrs.evolve(grid, offset=place_of(question, spec, draw)))
        ),
        lambda: with_module(spec, name, resized(module, grid, draw.choice((1, 2, 4)) if grid.pp > 1 else 1)),
        lambda: with_module(spec, name, moved(module, draw)),
        lambda: with_module(spec, name, attrs.evolve(module, recompute=draw.choice(("none", "full")))),
        lambda: with_module(
            spec, name, attrs.evolve(module, microbatches=draw.choice((None, *divisors(samples))))
        ),
        lambda: attrs.evolve(
            spec, batch=attrs.evolve(spec.batch, microbatches=draw.choice(divisors(samples)))
        ),
        lambda: attrs.evolve(spec, schedule=attrs.evolve(spec.schedule, name=draw.choice(ORDERS))),
    )
    return draw.choice(choices)()


def with_module(spec: JobSpec, name: str, module: ModuleSpec) -> JobSpec:
    """Return a job with a module in place of the one of that name."""
    return attrs.evolve(spec, modules={**spec.modules, name: module})


def module_anew(module: ModuleSpec, gpus: int, draw: random.Random) -> ModuleSpec:
    """Draw the grid of a module, its place, its chunks and its recomputation."""
    tp, cp = draw.choice((1, 1, 2, 4, 8)), draw.choice((1, 1, 2, 4))
    pp = draw.choice((1, 1, 2, 3, 4, 6, 8))
    most = max(gpus // (tp * cp * pp), 1)
    experts = getattr(module.options, "experts", 0)
    grid = attrs.evolve(
        module.grid,
        tp=tp,
        cp=cp,
        pp=pp,
        dp=draw.choice((most, draw.randint(1, most))),
        ep=draw.choice(divisors(experts)) if experts else 1,
        expert_tp=draw.choice((1, 1, tp)) if experts else 1,
        sequence_parallel=tp > 1,
        offset=draw.choice((0, 0, gpus // 2, gpus * 3 // 4)),
    )
    found = resized(module, grid, draw.choice((1, 1, 2)) if pp > 1 else 1)
    return attrs.evolve(found, microbatches=None, recompute=draw.choice(("none", "full")))


def resized(module: ModuleSpec, grid: GridSpec, chunks: int) -> ModuleSpec:
    """Return a module on a grid, its layers split into stages as equal as can be."""
    layers, stages = module.options.layers, grid.pp * chunks
    split = tuple(layers // stages + (i < layers % stages) for i in range(stages))
    grid = attrs.evolve(grid, sequence_parallel=grid.tp > 1)
    return attrs.evolve(module, grid=grid, chunks=chunks, split=split if layers % stages else None)


def traded(module: ModuleSpec, draw: random.Random) -> ModuleSpec:
    """Move a factor of two from one axis of a grid to another."""
    less, more = draw.sample(("tp", "cp", "pp", "dp"), 2)
    sizes = {axis: getattr(module.grid, axis) for axis in (less, more)}
    if sizes[less] % 2:
        return module
    grid = attrs.evolve(module.grid, **{less: sizes[less] // 2, more: 2 * sizes[more]})
    return resized(module, grid, module.chunks if grid.pp > 1 else 1)


def moved(module: ModuleSpec, draw: random.Random) -> ModuleSpec:
    """Move a layer from one stage to another."""
    stages = module.grid.pp * module.chunks
    if stages == 1:
        return module
    split = list(module.split or (module.options.layers // stages,) * stages)
    less, more = draw.sample(range(stages), 2)
    split[less] -= 1
    split[more] += 1
    return attrs.evolve(module, split=tuple(split)) if split[less] else module


def place_of(question: Question, spec: JobSpec, draw: random.Random) -> int:
    """Draw a first rank: where a module begins or ends, or any."""
    known = [place for grid in place(spec).values() for place in (grid.offset, grid.offset + grid.size)]
    return draw.choice((*known, draw.randrange(question.gpus)))


def divisors(number: int) -> list[int]:
    """Return the divisors of a number."""
    return [count for count in range(1, number + 1) if number % count == 0]


if __name__ == "__main__":
    main()
