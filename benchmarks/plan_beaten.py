"""Try to beat plans: random legal layouts of small drawn jobs, in the simulator that the search itself uses.

    python benchmarks/plan_beaten.py [--jobs 60] [--tries 2000] [--seed 0] [--out FILE]

A try draws grids, places, chunks, recomputation, microbatches and the order of all modules; one in two changes a few of
these in the best layout so far. The last column is the seconds of the best try over those of the plan: below 1 the plan
is beaten. Jobs are those of `plan_search`, on 8 to 64 GPUs.
"""

import argparse
import random
import tempfile
from pathlib import Path

import attrs
from plan_search import drawn

from mimogrid.core.job.schedules import SCHEDULES
from mimogrid.core.job.spec import BatchSpec, JobSpec, ModuleSpec
from mimogrid.core.plan.evaluation import Evaluator
from mimogrid.core.plan.layouts import SLOWER, Layout, Question, shown
from mimogrid.core.plan.planner import plan
from mimogrid.shell.job.jobs import open_job


GPUS = (8, 12, 16, 24, 32, 64)
KEPT = 0.8
"""A try that changes the best layout keeps each choice with this probability."""


def main() -> None:
    """Print a row for each job, then how often the plan was beaten and by how much at most."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=60)
    parser.add_argument("--tries", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write all there, too")
    args = parser.parse_args()
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    say(f"seed {args.seed}, {args.tries:,} tries per job")
    ratios: list[float] = []
    for number in range(1, args.jobs + 1):
        draw = random.Random(f"{args.seed} {number}")
        question = question_of(args.seed, number, draw.choice(GPUS))
        found = plan(question)
        if found.best is None:
            say(f"{number:>4}  {question.gpus:>3} GPUs  nothing fits: {found.nearest_fit}")
            continue
        best = tried(question, found.main, draw, args.tries)
        if best is None:
            say(
                f"{number:>4}  {question.gpus:>3} GPUs  no try is legal and fits; plan {shown(found.best.spec)}"
            )
            continue
        ratios.append(best.step_s / found.best.step_s)
        say(f"{number:>4}  {question.gpus:>3} GPUs  {ratios[-1]:6.3f}  {shown(best.spec)}")
    beaten = sum(ratio < 1 for ratio in ratios)
    say(f"{beaten} of {len(ratios)} plans are beaten, at most by {1 - min([*ratios, 1.0]):.1%}")
    if args.out:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def question_of(seed: int, number: int, gpus: int) -> Question:
    """Return what is asked for a drawn job."""
    text, _ = drawn(seed, number)
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(text)
        file.flush()
        job = open_job(file.name)
        samples = job.step(0).samples
    return Question(spec=job.spec, facts=job.topology.source, samples=samples, gpus=gpus)


def tried(question: Question, main: str, draw: random.Random, tries: int) -> Layout | None:
    """Return the fastest of some layouts at random that are legal and fit."""
    evaluator, best = Evaluator(question, main), None
    for _ in range(tries):
        layout = evaluator.evaluated(
            changed(question, draw, best.spec if best and draw.random() < KEPT else None)
        )
        if layout.kind == SLOWER and (best is None or layout.step_s < best.step_s):
            layout = evaluator.fitted(layout)
            best = layout if layout.kind == SLOWER else best
    return best


def changed(question: Question, draw: random.Random, base: JobSpec | None) -> JobSpec:
    """Draw a layout, or draw some of its choices anew."""
    samples = len(question.samples)
    divisors = [count for count in range(1, samples + 1) if samples % count == 0]
    spec = base or question.spec

    def drawn_anew() -> bool:
        return base is None or draw.random() > KEPT

    modules: dict[str, ModuleSpec] = {}
    for name, module in spec.modules.items():
        modules[name] = module_anew(module, question.gpus, draw) if drawn_anew() else module
    count = draw.choice(divisors) if drawn_anew() else spec.batch.microbatches
    order = (
        draw.choice([name for name in SCHEDULES if name != "auto"]) if drawn_anew() else spec.schedule.name
    )
    return attrs.evolve(
        spec,
        modules=modules,
        batch=BatchSpec(global_size=samples, microbatches=count),
        schedule=attrs.evolve(spec.schedule, name=order),
        optimizer=attrs.evolve(spec.optimizer, sharded=True),
        world_size=question.gpus,
    )


def module_anew(module: ModuleSpec, gpus: int, draw: random.Random) -> ModuleSpec:
    """Draw the grid of a module, its place, its chunks and its recomputation."""
    tp, cp = draw.choice((1, 1, 2, 4, 8)), draw.choice((1, 1, 2, 4))
    pp = draw.choice((1, 1, 2, 3, 4, 6, 8))
    dp = draw.randint(1, max(gpus // (tp * cp * pp), 1))
    grid = attrs.evolve(
        module.grid,
        tp=tp,
        cp=cp,
        pp=pp,
        dp=dp,
        sequence_parallel=tp > 1,
        offset=draw.choice((0, gpus // 2, gpus * 3 // 4)),
    )
    return attrs.evolve(
        module,
        grid=grid,
        chunks=draw.choice((1, 1, 2)) if pp > 1 else 1,
        split=None,
        microbatches=None,
        recompute=draw.choice(("none", "full")),
    )


if __name__ == "__main__":
    main()
