"""Layouts: jobs of small models on any grids, from one line of text or drawn at random.

A line names modules with their grids in the notation of the cases, ``name(tp,pp,dp)@offset``, with what they
feed, and how many microbatches they make for each of the job:

    enc(2,1,1)@0->mid,lm  mid(1,1,2)@2  lm(1,3,1)@4  aud(1,1,1)@7*2

The first letters of a name say what the module is: `enc`, `img`, `aud` a vit, `mid` a block, `lm` a gpt and
`gen` a regressor. Without an arrow, encoders and blocks feed `lm`. The models are tiny, of different widths, and
divide over tp = 4; a sequence is just long enough for the longest sample.
"""

import math
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import attrs
from hypothesis import strategies as st

from mimogrid.core.base.samples import Sample
from mimogrid.core.job.graph import ModuleGraph
from mimogrid.core.job.models import Block, BuiltIn, Gpt, Regressor, Vit
from mimogrid.core.job.placement import graph_of
from mimogrid.core.job.spec import (
    BatchSpec,
    DataSpec,
    GridSpec,
    JobSpec,
    ModuleSpec,
    OptimizerSpec,
    ScheduleSpec,
    TrainSpec,
)


RANKS = 8
ROWS, TEXT, ABSENT = (1, 4), (2, 5), 0.3
MODELS: dict[str, BuiltIn] = {
    "vit": Vit(layers=2, hidden=8, heads=4, features=5, ffn=12),
    "block": Block(layers=2, hidden=16, heads=4, ffn=20),
    "gpt": Gpt(layers=2, hidden=16, heads=4, vocab=12, ffn=20),
    "regressor": Regressor(layers=2, hidden=8, heads=4, outputs=3, ffn=12),
}
KINDS = {"enc": "vit", "img": "vit", "aud": "vit", "mid": "block", "lm": "gpt", "gen": "regressor"}
PIPELINE_LAST, PIPELINE_INSIDE = ("tp", "cp", "dp", "pp"), ("tp", "cp", "pp", "dp")

_MODULE = re.compile(
    r"(?P<name>(?P<kind>[a-z]+)\w*)\((?P<tp>\d),(?P<pp>\d),(?P<dp>\d)\)@(?P<offset>\d+)"
    r"(?:\*(?P<times>\d+))?(?:/(?P<over>\d+))?(?:->(?P<feeds>[\w,]+))?"
)


def job(
    line: str,
    *,
    microbatches: int = 4,
    samples: int | None = None,
    order: tuple[str, ...] = PIPELINE_LAST,
    schedule: str = "1f1b",
    data: Mapping[str, Any] | None = None,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
    **fields: Any,
) -> JobSpec:
    """Return the job of a line, with `samples` in each microbatch (default: shares come out uneven).

    `changes` are fields of a module by its name; its ``options`` are changes of the model's.
    """
    modules = {found["name"]: _module(found, order, microbatches) for found in _MODULE.finditer(line)}
    assert len(modules) == len(line.split()), line
    for name, change in (changes or {}).items():
        options = attrs.evolve(modules[name].options, **change.get("options", {}))
        modules[name] = attrs.evolve(modules[name], **{**change, "options": options})
    samples = samples or max(2, *(module.grid.dp for module in modules.values())) + 1
    return JobSpec(
        **{
            "modules": modules,
            "data": synthetic(modules, **(data or {})),
            "batch": BatchSpec(global_size=microbatches * samples, microbatches=microbatches),
            "schedule": ScheduleSpec(name=schedule),
            "precision": "fp64",
            "seed": 3,
            **fields,
        }
    )


def _module(found: re.Match[str], order: tuple[str, ...], microbatches: int) -> ModuleSpec:
    model = KINDS[found["kind"]]
    tp, pp, dp, offset = (int(found[key]) for key in ("tp", "pp", "dp", "offset"))
    own = Fraction(int(found["times"] or 1), int(found["over"] or 1)) * microbatches
    feeds = found["feeds"].split(",") if found["feeds"] else ["lm"] * (model in {"vit", "block"})
    return ModuleSpec(
        model=model,
        options=attrs.evolve(MODELS[model], layers=max(2, pp)),
        feeds=tuple(feeds),
        grid=GridSpec(tp=tp, dp=dp, pp=pp, offset=offset, order=order),
        microbatches=int(own) if own != microbatches else None,
    )


def synthetic(modules: Mapping[str, ModuleSpec], **options: Any) -> DataSpec:
    """Return random data for modules; a sequence holds the longest sample and not one position more."""
    graph = graph_of(JobSpec(modules=modules, data=DataSpec(source=""), batch=BatchSpec(global_size=1)))
    parts = math.lcm(*(_parts(modules[name].grid) for name in graph.texts))
    rows = {name: list(ROWS) for name in graph.sources} | dict(options.get("rows", {}))
    absent = dict.fromkeys(graph.sources, ABSENT) | dict(options.get("absent", {}))
    text = list(options.get("text", TEXT))
    sequence = options.get("sequence") or -(-_longest(graph, rows, text) // parts) * parts
    drawn = {"sequence": sequence, "rows": rows, "absent": absent}
    return DataSpec(source="synthetic", options=drawn | ({"text": text} if graph.texts else {}))


def _parts(grid: GridSpec) -> int:
    """Into how many parts a grid cuts a sequence of text."""
    return (grid.tp if grid.sequence_parallel else 1) * (2 * grid.cp if grid.cp > 1 else 1)


def _longest(graph: ModuleGraph, rows: Mapping[str, list[int]], text: list[int]) -> int:
    most = Sample(id=0, length=text[1], rows={name: high for name, (_, high) in rows.items()})
    emitted = graph.rows_out(most)
    return max((emitted[name] for name in graph.texts), default=1)


# -- at random ---------------------------------------------------------------------------------------------


@st.composite
def layouts(draw: st.DrawFn) -> JobSpec:
    """Draw a legal job of one to four modules on up to eight ranks."""
    feeds, kinds = draw(_graphs())
    base = draw(st.sampled_from((1, 2, 4, 6)))
    modules: dict[str, ModuleSpec] = {}
    for name, kind in kinds.items():
        modules[name] = draw(_modules(kind, feeds[name], base))
    counts = [module.microbatches or base for module in modules.values()]
    whole = math.lcm(base, *counts)
    least = max(
        -(-module.grid.dp * count // whole) for module, count in zip(modules.values(), counts, strict=True)
    )
    size = whole * (least + draw(st.integers(0, 1)))
    sources = [name for name, kind in kinds.items() if kind != "gpt" and not _feeders(name, feeds)]
    data = {
        "rows": {name: draw(st.sampled_from(([1, 3], [0, 4], [2, 2], [1, 1]))) for name in sources},
        "absent": {name: draw(st.sampled_from((0.0, 0.3, 0.8, 1.0))) for name in sources},
        "text": draw(st.sampled_from(([1, 4], [0, 2], [1, 1], [3, 3]))),
    }
    ends = [module.grid.offset + _size(module.grid) for module in modules.values()]
    return JobSpec(
        modules=modules,
        data=synthetic(modules, **data),
        batch=BatchSpec(global_size=size, microbatches=base),
        schedule=ScheduleSpec(name=draw(st.sampled_from(("1f1b", "gpipe", "zb-h1", "zb-h2")))),
        optimizer=OptimizerSpec(bucket_mb=draw(st.sampled_from((0.002, 25.0)))),
        train=TrainSpec(),
        seed=draw(st.integers(0, 99)),
        precision="fp64",
        world_size=draw(st.sampled_from((None, None, max(ends), RANKS))),
    )


def _feeders(name: str, feeds: Mapping[str, tuple[str, ...]]) -> list[str]:
    return [feeder for feeder, targets in feeds.items() if name in targets]


def _size(grid: GridSpec) -> int:
    return grid.tp * grid.cp * grid.dp * grid.pp


@st.composite
def _graphs(draw: st.DrawFn) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """Draw what feeds what, from what can only be fed back to what may be fed by all before it."""
    count = draw(st.integers(1, 4))
    last = draw(st.sampled_from(("gpt", "gpt", "regressor")))
    kinds = [draw(st.sampled_from(("vit", "vit", "block", "gpt", "regressor"))) for _ in range(count - 1)]
    kinds = [*sorted(kinds, key=("vit", "block", "gpt", "regressor").index), last]
    names = [f"{kind}{i}" for i, kind in enumerate(kinds)]
    feeds: dict[str, tuple[str, ...]] = {}
    for i, (name, kind) in enumerate(zip(names, kinds, strict=True)):
        legal = [t for t, k in zip(names[i + 1 :], kinds[i + 1 :], strict=True) if k != "vit"]
        fewest = 0 if kind in {"gpt", "regressor"} else 1
        most = min(len(legal), 2)
        drawn = st.lists(st.sampled_from(legal), min_size=fewest, max_size=most, unique=True)
        feeds[name] = tuple(draw(drawn)) if legal else ()
    shuffled = draw(st.permutations(names))  # The file may name a module before what feeds it.
    return {name: feeds[name] for name in shuffled}, {
        n: dict(zip(names, kinds, strict=True))[n] for n in shuffled
    }


ORDERS = (PIPELINE_LAST, PIPELINE_INSIDE, ("dp", "tp", "cp", "pp"), ("pp", "dp", "cp", "tp"))
FREEZING: tuple[dict[str, Any], ...] = (
    {},
    {},
    {},
    {"frozen": True},
    {"frozen": ("layers.0.*",)},
    {"trainable": ("*norm*",)},
    {"trainable": ("final_norm.bias",)},
)


@st.composite
def _modules(draw: st.DrawFn, kind: str, feeds: tuple[str, ...], base: int) -> ModuleSpec:
    grid = draw(_grids())
    split = draw(st.none() | st.lists(st.integers(1, 2), min_size=grid.pp, max_size=grid.pp))
    layers = sum(split) if split else grid.pp * draw(st.integers(1, 2))
    model = attrs.evolve(MODELS[kind], layers=layers, kv_heads=draw(st.sampled_from((grid.tp, 4))))
    if isinstance(model, Gpt):
        model = attrs.evolve(model, tied_embeddings=draw(st.booleans()))
    if kind == "block":
        model = attrs.evolve(model, hidden=draw(st.sampled_from((8, 16))))
    if draw(st.integers(0, 3)) == 0:
        experts = {
            "experts": 4,
            "top_k": draw(st.integers(1, 3)),
            "aux_loss": draw(st.sampled_from((0.0, 0.1))),
        }
        model, grid = attrs.evolve(model, **experts), draw(_expert_grids(grid))
    own = draw(st.sampled_from([None, None, base * 2] + [base // n for n in (2, 3) if base % n == 0]))
    weight = {"loss_weight": draw(st.sampled_from((1.0, 0.25, 3.0)))} if model.has_loss else {}
    return ModuleSpec(
        model=kind,
        options=model,
        feeds=feeds,
        grid=grid,
        microbatches=own,
        split=tuple(split) if split else None,
        recompute=draw(st.sampled_from(("none", "none", "none", "selective", "full"))),
        **draw(st.sampled_from(FREEZING)),
        **weight,
    )


@st.composite
def _expert_grids(draw: st.DrawFn, grid: GridSpec) -> GridSpec:
    """Draw how four experts lie over the ranks of a stage."""
    ranks = grid.tp * grid.cp * grid.dp
    legal = [(ep, tp) for ep in (1, 2, 4) for tp in (1, 2, 4) if ranks % (ep * tp) == 0]
    ep, expert_tp = draw(st.sampled_from(legal))
    return attrs.evolve(grid, ep=ep, expert_tp=expert_tp)


@st.composite
def _grids(draw: st.DrawFn) -> GridSpec:
    sizes = st.tuples(
        st.sampled_from((1, 1, 2, 4)), st.sampled_from((1, 1, 1, 2)), st.integers(1, 3), st.integers(1, 5)
    )
    tp, cp, pp, dp = draw(sizes.filter(lambda drawn: math.prod(drawn) <= RANKS))
    return GridSpec(
        tp=tp,
        cp=cp,
        pp=pp,
        dp=dp,
        offset=draw(st.integers(0, RANKS - tp * cp * pp * dp)),
        order=draw(st.sampled_from(ORDERS)),
        sequence_parallel=tp > 1 and draw(st.booleans()),
    )
