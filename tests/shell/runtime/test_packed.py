"""Packed is each sample alone: a row of segments of any lengths has the losses and gradients of its samples one by one.

Segments of length 0 and 1, samples without text or without rows, and whatever stands beside them.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layouts import job as job_of
from mimogrid.core.job.models import Block, Gpt, Regressor, Vit
from mimogrid.core.job.spec import JobSpec, ModuleSpec
from mimogrid.core.topology.topology import Topology
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.modules.interface import StageModule
from mimogrid.shell.run.parity import compare
from mimogrid.shell.world.launch import Pool
from ragged import Drawn, each_alone, step_with, weighed
from scale import drawn, nightly_only
from stages import Alone, build, gradients, run, topology_of, world_of_one


CLOSE = 1e-9
LENGTHS = (0, 1, 1, 2, 3, 5, 8, 13)


@pytest.fixture(scope="module")
def alone() -> Iterator[Alone]:
    """A world of one, on one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with world_of_one() as groups:
        yield groups
    torch.set_num_threads(threads)


# -- in one process, over drawn lengths --------------------------------------------------------------------


def fed() -> Topology:
    """Two encoders feed a block and a language model, which feeds a regressor."""
    options = {"layers": 1, "hidden": 8, "heads": 2}

    def module(model: object, *feeds: str) -> ModuleSpec:
        kind = type(model).__name__.lower()
        return ModuleSpec(model=kind, options=model, feeds=feeds)

    modules = {
        "vision": module(Vit(**options), "mixer", "language"),
        "audio": module(Vit(**options), "mixer"),
        "mixer": module(Block(**options), "language"),
        "language": module(Gpt(**options, kv_heads=1, vocab=12, experts=3, aux_loss=0.1), "head"),
        "head": module(Regressor(**options, outputs=3)),
    }
    return topology_of(modules, sequence=400, features={"vision": 5, "audio": 3})


SEGMENTS = st.lists(st.sampled_from(LENGTHS), max_size=4)
SAMPLES = st.tuples(st.integers(0, 9), st.fixed_dictionaries({"vision": SEGMENTS, "audio": SEGMENTS}))


@attrs.frozen(repr=False)
class Built:
    """The stages of the modules, one of each."""

    topology: Topology
    stages: Mapping[str, list[StageModule]]


@pytest.fixture(scope="module")
def built(alone: Alone) -> Built:
    """Build them once."""
    topology = fed()
    return Built(topology, build(topology, alone))


@settings(max_examples=drawn(10), deadline=None)
@given(st.lists(SAMPLES, min_size=1, max_size=5))
def test_a_row_is_its_samples_one_by_one(built: Built, samples: list[Drawn]) -> None:
    """Losses and every gradient, whatever lengths stand beside each other."""
    topology, stages = built.topology, built.stages
    step, batch = step_with(topology, samples)
    expected_loss, expected = each_alone(topology, step, samples, batch)
    for stage in itertools.chain(*stages.values()):
        stage.zero_grad()
    outputs = run(topology, stages, step, batch)
    losses = {name: given["loss"] for name, given in outputs.items() if "loss" in given}
    weighed(topology, step, losses).backward()
    losses["language.aux"] = outputs["language"]["language.aux"]
    loss = float(weighed(topology, step, losses).detach())
    found = {f"{m}.{name}": g for m, own in gradients(stages).items() for name, g in own.items()}
    report = compare((loss, expected_loss), found, expected, precision="fp64")
    assert max(report.loss, report.gradients) <= CLOSE, report


# -- over ranks --------------------------------------------------------------------------------------------

LAYOUTS = [
    # Sequence and context parallelism cut rows that nothing divides.
    ("enc(2,1,1)@0 lm(2,1,1)@0", {"enc": {"sp": True, "cp": 2}, "lm": {"sp": True, "cp": 2}}),
    ("enc(1,1,2)@0 aud(2,1,1)@2 lm(1,2,1)@0", {"lm": {"cp": 2}, "aud": {"cp": 2}}),
    *nightly_only(
        [
            ("enc(1,1,1)@0 lm(1,1,1)@0", {"enc": {"cp": 4}, "lm": {"cp": 4}}),
            (
                "enc(4,1,1)@0->mid mid(2,2,1)@0 lm(1,2,2)@0->gen gen(2,1,2)@0",
                {"enc": {"sp": True}, "gen": {"sp": True}},
            ),
        ]
    ),
]


def spec_of(line: str, cuts: Mapping[str, Mapping[str, Any]], **changes: Any) -> JobSpec:
    """Return the job of a line with grids that cut positions."""
    spec = job_of(line, samples=3, microbatches=2, data={"sequence": 400}, changes=changes)
    modules = dict(spec.modules)
    for name, cut in cuts.items():
        grid = attrs.evolve(modules[name].grid, cp=cut.get("cp", 1), sequence_parallel=cut.get("sp", False))
        modules[name] = attrs.evolve(modules[name], grid=grid)
    return attrs.evolve(spec, modules=modules)


def steps_of(spec: JobSpec, count: int) -> list[list[Drawn]]:
    """Draw samples for some steps; the first has segments of one position only, and most have few."""
    draws, names = random.Random(count), [n for n, m in spec.modules.items() if m.model == "vit"]

    def lengths(of: Sequence[int]) -> list[int]:
        return draws.choices(of, k=draws.randrange(5))

    return [
        [
            (draws.randrange(10), {name: lengths((1,) if step == 0 else LENGTHS) for name in names})
            for _ in range(spec.batch.global_size)
        ]
        for step in range(count)
    ]


@pytest.mark.world
@pytest.mark.parametrize(("line", "cuts"), LAYOUTS)
def test_layouts_cut_a_row_of_any_lengths(
    pool: Pool, opened: Callable[[JobSpec], Job], line: str, cuts: Mapping[str, Mapping[str, Any]]
) -> None:
    """Positions go round the ranks, experts get none that pads, and every layout is each sample alone."""
    experts = {"options": {"experts": 4, "aux_loss": 0.1}}
    spec = spec_of(line, cuts, lm=experts, enc={"recompute": "full"})
    job = opened(spec)
    said = pool.run("ragged:against_each_alone", job.topology.world_size, job, steps_of(spec, drawn(2)))
    (reports,) = [one for one in said if one is not None]
    for report in reports:
        assert max(report.loss, report.gradients) <= CLOSE, report
