"""Jobs: small topologies and steps from one line each, without files and without torch.

    vision vit tp2 dp2 @0 m8 frozen > language; language gpt pp2 order=tp,pp,cp,dp @4

A module is its name and its model, then in any order: sizes of axes (`tp2`), `@` its offset, `m` microbatches of
its own, `chunks`, `layers`, `x` experts, `frozen`, `tied`, `sp`, the order of its axes, and last, after `>`, whom it
feeds.
"""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence

import attrs

from mimogrid.core.base.samples import Sample
from mimogrid.core.job.models import Block, BuiltIn, Gpt, Regressor, Vit
from mimogrid.core.job.spec import (
    BatchSpec,
    DataSpec,
    GridSpec,
    JobSpec,
    ModuleSpec,
    OptimizerSpec,
    ScheduleSpec,
    SourceFacts,
)
from mimogrid.core.job.validation.problems import problems_of
from mimogrid.core.program.listing import Listing
from mimogrid.core.program.lower import Program, plan_step
from mimogrid.core.schedule.actions import Action, Compute, Kind, Send, parse
from mimogrid.core.schedule.order import Order
from mimogrid.core.schedule.orders import order_of
from mimogrid.core.step.step import Step, step_of
from mimogrid.core.topology.parse import assemble
from mimogrid.core.topology.topology import Topology


SEQUENCE = 1 << 20
"""Long enough for any rows, and a multiple of what cuts it."""
_SIZE = re.compile(r"(tp|cp|dp|pp|ep|expert_tp|m|x|width|chunks|layers)(\d+)")


def job(
    text: str,
    *,
    batch: int = 8,
    microbatches: int = 4,
    schedule: str = "1f1b",
    world: int | None = None,
    bucket_mb: float = 25.0,
    cut_mb: float = 4.0,
    sharded: bool = False,
) -> Topology:
    """Return the topology of a job in the notation above."""
    spec, facts = _written(text, batch, microbatches, schedule, world)
    spec = attrs.evolve(spec, optimizer=OptimizerSpec(bucket_mb=bucket_mb, cut_mb=cut_mb, sharded=sharded))
    problems = problems_of(spec, facts)
    assert not problems, "\n".join(map(str, problems))
    return assemble(spec, facts)


def legal(text: str, *, schedule: str) -> bool:
    """Whether a job is legal and all that it asks for is there."""
    return not list(problems_of(*_written(text, 8, 4, schedule, None)))


def _written(
    text: str, batch: int, microbatches: int, schedule: str, world: int | None
) -> tuple[JobSpec, SourceFacts]:
    modules = dict(_module(line.strip()) for line in text.split(";"))
    spec = JobSpec(
        modules=modules,
        data=DataSpec(source="none"),
        batch=BatchSpec(global_size=batch, microbatches=microbatches),
        schedule=ScheduleSpec(name=schedule),
        world_size=world,
    )
    return spec, SourceFacts(
        sequence=SEQUENCE, features={n: 8 for n, m in modules.items() if m.model == "vit"}
    )


def step_with(topology: Topology, rows: Mapping[str, Sequence[int]] | None = None, *, text: int = 3) -> Step:
    """Return a step; `rows` has those of each sample per source module, repeated (default: two of each)."""
    given = {name: (rows or {}).get(name, (2,)) for name in topology.graph.sources}
    length = text if topology.graph.texts else 0
    return step_of(
        topology,
        tuple(
            Sample(
                id=i, length=length, rows={name: counts[i % len(counts)] for name, counts in given.items()}
            )
            for i in range(topology.spec.batch.global_size)
        ),
    )


def program_of(text: str, rows: Mapping[str, Sequence[int]] | None = None, **options: int | str) -> Program:
    """Return the program of a job's step."""
    return program_for(step_with(job(text, **options), rows))  # type: ignore[arg-type]


def program_for(step: Step, *, training: bool = True) -> Program:
    """Return the program of a step in the order of its topology's schedule."""
    return plan_step(step, _order(step.topology, training))


@functools.lru_cache(maxsize=8)
def _order(topology: Topology, training: bool) -> Order:
    return order_of(topology, training=training)


def edited(listing: Listing, rank: int, *lines: str) -> Listing:
    """Return a listing in which a rank does these lines instead."""
    return {**listing, rank: tuple(map(parse, lines))}


def halved(listing: Listing) -> Listing:
    """Return a listing in which every backward is in two: a stage sends on between the two."""
    return {rank: tuple(_halves(actions)) for rank, actions in listing.items()}


def _halves(actions: Sequence[Action]) -> Iterator[Action]:
    second: Compute | None = None
    for action in actions:
        if second and not isinstance(action, Send):
            yield second
            second = None
        if isinstance(action, Compute) and action.kind is Kind.BACKWARD:
            second = attrs.evolve(action, kind=Kind.WEIGHT_GRADIENT)
            yield attrs.evolve(action, kind=Kind.INPUT_GRADIENT)
        else:
            yield action


def _module(text: str) -> tuple[str, ModuleSpec]:
    words, _, feeds = text.partition(">")
    name, kind, *rest = words.split()
    sizes: dict[str, int] = {}
    grid = GridSpec()
    flags: set[str] = set()
    for word in rest:
        if found := _SIZE.fullmatch(word):
            sizes[found[1]] = int(found[2])
        elif word.startswith("@"):
            grid = attrs.evolve(grid, offset=int(word[1:]))
        elif word.startswith("order="):
            grid = attrs.evolve(grid, order=tuple(word[6:].split(",")))
        else:
            assert word in {"frozen", "tied", "sp"}, word
            flags.add(word)
    axes = {axis: sizes.get(axis, 1) for axis in ("tp", "cp", "dp", "pp", "ep", "expert_tp")}
    return name, ModuleSpec(
        model=kind,
        options=_model(kind, sizes, flags),
        feeds=tuple(target.strip() for target in feeds.split(",") if target.strip()),
        grid=attrs.evolve(grid, **axes, sequence_parallel="sp" in flags),
        frozen="frozen" in flags,
        microbatches=sizes.get("m"),
        chunks=sizes.get("chunks", 1),
    )


def _model(kind: str, sizes: Mapping[str, int], flags: set[str]) -> BuiltIn:
    tp = sizes.get("tp", 1)
    common = {
        "layers": sizes.get("layers", sizes.get("pp", 1) * sizes.get("chunks", 1)),
        "heads": tp,
        "hidden": sizes.get("width", 8) * tp,
        "experts": sizes.get("x", 0),
        "top_k": 1,
        "ffn": 16 * tp * sizes.get("expert_tp", 1),
    }
    match kind:
        case "vit":
            return Vit(**common, features=8)
        case "block":
            return Block(**common)
        case "gpt":
            return Gpt(**common, vocab=16 * tp, tied_embeddings="tied" in flags)
        case "regressor":
            return Regressor(**common)
        case _:
            raise AssertionError(kind)
