"""Questions for `plan`, and layouts of them that are drawn at random."""

import random

import attrs

from mimogrid.core.base.samples import Sample
from mimogrid.core.job.models import Gpt, Vit
from mimogrid.core.job.placement import place
from mimogrid.core.job.spec import BatchSpec, DataSpec, GpuSpec, GridSpec, JobSpec, ModuleSpec, SourceFacts
from mimogrid.core.plan.evaluation import Evaluator
from mimogrid.core.plan.layouts import SLOWER, Question
from mimogrid.core.plan.pins import parse


MODULES = ("vision", "language")


def question(*words, gpus=4, limit=1024, count=1, balance="none", batch=12, memory_gb=80, seed=0):
    """A language model that sees images, in samples of 40 to 512 tokens, on so many GPUs, with pins.

    Its microbatches have a limit of tokens, or, without one, are `count`.
    """
    draw = random.Random(seed)
    options = Gpt(layers=4, hidden=1024, heads=16, vocab=32000)
    modules = {
        "vision": ModuleSpec(
            model="vit",
            options=Vit(layers=4, hidden=1024, heads=16, features=588),
            feeds=("language",),
        ),
        "language": ModuleSpec(model="gpt", options=options),
    }
    spec = JobSpec(
        modules=modules,
        data=DataSpec(source="none"),
        batch=BatchSpec(global_size=batch, microbatches=count, tokens_per_microbatch=limit, balance=balance),
        gpu=GpuSpec(name="h100", memory_gb=memory_gb),
        precision="bf16",
    )
    samples = tuple(
        Sample(id=i, length=draw.randint(8, 256), rows={"vision": 32 * draw.randint(1, 8)})
        for i in range(batch)
    )
    return Question(
        spec=spec, facts=SourceFacts(sequence=512), samples=samples, gpus=gpus, pins=parse(words, MODULES)
    )


def drawn_layouts(asked, seed, count):
    """Legal layouts with random grids, places, chunks and recomputation, as `Evaluator` gives them."""
    draw, evaluator, found = random.Random(seed), Evaluator(asked, "language"), []
    while len(found) < count:
        modules = {name: _drawn(draw, module) for name, module in asked.spec.modules.items()}
        optimizer = attrs.evolve(asked.spec.optimizer, sharded=True)
        spec = attrs.evolve(
            asked.spec,
            modules=modules,
            optimizer=optimizer,
            schedule=attrs.evolve(asked.spec.schedule, name=draw.choice(("1f1b", "interleaved", "gpipe"))),
            world_size=asked.gpus,
        )
        if max(grid.offset + grid.size for grid in place(spec).values()) > asked.gpus:
            continue
        layout = evaluator.evaluated(spec)
        if layout.kind == SLOWER:
            found.append(layout)
    return found


def _drawn(draw, module):
    tp, cp, pp, dp = (draw.choice((1, 1, 2, 3, 4)) for _ in range(4))
    grid = GridSpec(tp=tp, cp=cp, pp=pp, dp=dp, offset=draw.randint(0, 4), sequence_parallel=tp > 1)
    chunks = draw.choice((1, 2)) if 1 < pp <= 2 else 1
    return attrs.evolve(module, grid=grid, chunks=chunks, recompute=draw.choice(("none", "full")))
