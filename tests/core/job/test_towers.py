"""Options of towers, edges and language models that do not go together are refused, each with its reason."""

import itertools
from collections.abc import Mapping
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimogrid.core.base.errors import Problem
from mimogrid.core.job.models import Block, Gpt, Vit
from mimogrid.core.job.projectors import Projector
from mimogrid.core.job.spec import (
    BatchSpec,
    DataSpec,
    GridSpec,
    JobSpec,
    ModuleSpec,
    ScheduleSpec,
    SourceFacts,
)
from mimogrid.core.job.validation.problems import problems_of
from mimogrid.core.job.validation.towers import tower_problems
from mimogrid.core.models.positions import windows
from mimogrid.core.schedule.layer_split import topology_of
from mimogrid.core.topology.parse import assemble


Table = Mapping[str, Any]
SIZES: Table = {"layers": 4, "hidden": 16, "heads": 2}
DEEP: Table = {"deepstack_layers": (2, 3)}
MERGER = {"language": Projector(kind="merger")}


def job(vision: Table, language: Table, tower: Table, reader: Table) -> JobSpec:
    """A tower that feeds a language model: options of both, and other keys of their tables."""
    return JobSpec(
        modules={
            "vision": attrs.evolve(
                ModuleSpec(
                    model="vit", options=Vit(**{**SIZES, "features": 12, **vision}), feeds=("language",)
                ),
                **tower,
            ),
            "language": attrs.evolve(
                ModuleSpec(model="gpt", options=Gpt(**{**SIZES, "vocab": 16, **language})), **reader
            ),
        },
        data=DataSpec(source="none"),
        batch=BatchSpec(global_size=4, microbatches=2),
    )


def found(spec: JobSpec) -> list[Problem]:
    """What is wrong with its modules by themselves."""
    return [problem for name in spec.modules for problem in tower_problems(name, spec)]


LEGAL: dict[str, tuple[Table, Table, Table, Table]] = {
    "CLIP": (
        {"positions": "learned", "position_count": 5, "class_token": True, "pre_norm": True, "heads": 16},
        {},
        {"projector": {"language": Projector(kind="mlp", ffn=7, bias=False)}},
        {},
    ),
    "Whisper": ({"stem": "whisper", "positions": "learned", "position_count": 9, "pool": 2}, {}, {}, {}),
    "windows": (
        {"positions": "rotary_2d", "window": 2, "merge": 2, "full_layers": (1, 3)},
        {"rotary_sections": (2, 1, 1)},
        {"projector": MERGER, "grid": GridSpec(pp=2, tp=2)},
        {},
    ),
    "deepstack": (
        {
            "positions": "rotary_2d",
            "position_count": 4,
            "position_interpolation": "bilinear",
            "merge": 2,
            **DEEP,
        },
        {"deepstack": 2},
        {"projector": MERGER, "grid": GridSpec(pp=2)},
        {"grid": GridSpec(pp=2)},
    ),
    "layers with and without experts": ({}, {"experts": 4, "expert_ffn": 6, "dense_layers": (0,)}, {}, {}),
}


@pytest.mark.parametrize("options", LEGAL.values(), ids=LEGAL)
def test_published_towers_are_legal(options: tuple[Table, Table, Table, Table]) -> None:
    """What families combine is not refused."""
    assert [] == found(job(*options))


WRONG: dict[str, tuple[Table, Table, Table, Table, str, str]] = {
    "an unknown stem": ({"stem": "wisper"}, {}, {}, {}, "vision.options.stem", "'wisper' is not known"),
    "no table": ({"positions": "learned"}, {}, {}, {}, "vision.options.position_count", "is 0"),
    "no square": (
        {"position_count": 5, "position_interpolation": "bilinear"},
        {},
        {},
        {},
        "vision.options.position_count",
        "is 5, and a table that is interpolated is a square",
    ),
    "heads that do not turn": (
        {"positions": "rotary_2d", "head_width": 6},
        {},
        {},
        {},
        "vision.options.positions",
        "heads of width 6",
    ),
    "merged sound": ({"stem": "whisper", "merge": 2}, {}, {}, {}, "vision.options.stem", "merge needs them"),
    "a class token in a plane": (
        {"class_token": True, "window": 2, "merge": 2, "positions": "rotary_2d"},
        {},
        {},
        {},
        "vision.options.class_token",
        "no place in a window, positions of height and width",
    ),
    "no class token to emit": (
        {"emit_class_token": True},
        {},
        {},
        {},
        "vision.options.emit_class_token",
        "there is no class token",
    ),
    "a merged class token": (
        {"class_token": True, "emit_class_token": True, "merge": 2},
        {},
        {},
        {},
        "vision.options.emit_class_token",
        "are patches",
    ),
    "a layer that is not there": (
        {"full_layers": (1, 4), "window": 2},
        {},
        {},
        {},
        "vision.options.full_layers",
        "has 4, and the layers are 0 to 3",
    ),
    "no experts to leave out": (
        {},
        {"dense_layers": (1,)},
        {},
        {},
        "language.options.dense_layers",
        "none has any",
    ),
    "inner rows before the last stage": (
        DEEP,
        {"deepstack": 2},
        {"projector": MERGER, "grid": GridSpec(pp=4)},
        {},
        "vision.options.deepstack_layers",
        "has layer 2, and the last stage, where rows leave, begins at layer 3",
    ),
    "inner rows without a merger": (
        DEEP,
        {"deepstack": 2},
        {},
        {},
        "vision.options.deepstack_layers",
        "the projector to 'language' is none",
    ),
    "inner rows that are not added": (
        DEEP,
        {},
        {"projector": MERGER},
        {},
        "vision.options.deepstack_layers",
        "module 'language' has deepstack = 0",
    ),
    "inner rows out of order": (
        {"deepstack_layers": (3, 2)},
        {"deepstack": 2},
        {"projector": MERGER},
        {},
        "vision.options.deepstack_layers",
        "is [3, 2]",
    ),
    "a first stage that is too small": (
        DEEP,
        {"deepstack": 2},
        {"projector": MERGER},
        {"split": (1, 3), "grid": GridSpec(pp=2)},
        "language.options.deepstack",
        "the first stage, where rows come in, has 1 layers",
    ),
    "nothing to add": ({}, {"deepstack": 1}, {}, {}, "language.options.deepstack", "no module that feeds"),
    "sections that do not add up": (
        {},
        {"rotary_sections": (2, 2, 1)},
        {},
        {},
        "language.options.rotary_sections",
        "is [2, 2, 1], and a head of width 8 has 4 angles",
    ),
    "two sections": ({}, {"rotary_sections": (2, 2)}, {}, {}, "language.options.rotary_sections", "[2, 2]"),
    "a projector to nobody": (
        {},
        {},
        {"projector": {"langage": Projector()}},
        {},
        "vision.projector.langage",
        "does not feed 'langage'",
    ),
    "an unknown projector": (
        {},
        {},
        {"projector": {"language": Projector(kind="mpl")}},
        {},
        "vision.projector.language.kind",
        "'mpl' is not known",
    ),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_contradictions_are_refused(case: tuple[Table, Table, Table, Table, str, str]) -> None:
    """One problem, at the option, says why."""
    *options, where, message = case
    (problem,) = found(job(*options))
    assert f"modules.{where}" == problem.where
    assert message in problem.message
    assert problem in problems_of(job(*options), SourceFacts(sequence=8))


def test_a_merger_merges_patches() -> None:
    """A block has none."""
    spec = job({}, {}, {}, {})
    block = ModuleSpec(model="block", options=Block(**SIZES), feeds=("language",), projector=MERGER)
    spec = attrs.evolve(spec, modules={**spec.modules, "block": block})
    assert ["modules.block.projector.language.kind"] == [problem.where for problem in found(spec)]


def test_rows_of_inner_layers_lie_beside_those_of_the_last() -> None:
    """One tensor crosses the edge, and the projector has a merger for each."""
    spec = job(*LEGAL["deepstack"])
    topology = assemble(spec, SourceFacts(sequence=8))
    (edge,) = topology.edges
    assert (3 * 16, 3) == (edge.width, edge.parts)
    held = {parameter.name for parameter in topology.modules["vision"].stages[-1].parameters}
    assert {f"projector.language.deepstack.{i}.norm.weight" for i in range(2)} < held


@given(grid=st.tuples(*[st.integers(1, 5)] * 3), merge=st.integers(1, 3), window=st.integers(1, 4))
def test_windows_have_the_lengths_of_their_rows(grid: tuple[int, int, int], merge: int, window: int) -> None:
    """The lengths that are priced and computed are those of the rows in the order of windows."""
    frames, height, width = grid
    patches = frames, merge * height, merge * width
    bounds = windows([patches], merge, window).bounds
    model = Vit(**SIZES, merge=merge, window=window)
    lengths = tuple(stop - start for start, stop in itertools.pairwise(bounds))
    assert (lengths, sum(n * n for n in lengths)) == (model.windows(patches), model.window_pairs(patches))


@pytest.mark.parametrize(("tp", "ok"), [(1, True), (2, True), (4, False)])
def test_dense_layers_beside_experts_are_split_too(tp: int, ok: bool) -> None:
    """Their features divide over tp."""
    options = {"experts": 4, "expert_ffn": 6, "dense_layers": (0,), "ffn": 6, "heads": 4, "vocab": 16}
    spec = job({}, options, {}, {"grid": GridSpec(tp=tp)})
    where = [problem.where for problem in problems_of(spec, SourceFacts(sequence=8))]
    assert ok == ("modules.language.grid.tp" not in where)


def test_layers_are_not_balanced_away_from_deepstack() -> None:
    """The schedule auto would give a frozen tower's reader fewer first layers than it adds rows after."""
    vision = {"deepstack_layers": (1, 2, 3), "layers": 4}
    language = {"deepstack": 3, "layers": 6}
    reader = {"grid": GridSpec(pp=2), "trainable": ("layers.0.*", "layers.1.*")}
    spec = job(vision, language, {"projector": MERGER}, reader)
    spec = attrs.evolve(spec, schedule=ScheduleSpec(name="auto"))
    topology = topology_of(spec, SourceFacts(sequence=8))
    assert len(topology.modules["language"].stages[0].layers) == 3
    free = attrs.evolve(spec.modules["language"], options=Gpt(**{**SIZES, "vocab": 16, "layers": 6}))
    vision_alone = attrs.evolve(spec.modules["vision"], options=Vit(**{**SIZES, "features": 12}))
    spec = attrs.evolve(spec, modules={"vision": vision_alone, "language": free})
    assert len(topology_of(spec, SourceFacts(sequence=8)).modules["language"].stages[0].layers) != 3
