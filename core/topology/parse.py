"""Parsing: from a spec to a topology, with every problem of the job at once.

`parse` validates a spec and raises all its problems together. `assemble` builds the topology of a spec that is known
to be legal.
"""

import functools
from collections.abc import Iterator, Mapping

from mimogrid.core.base.errors import PlanError
from mimogrid.core.base.experts import expert_view
from mimogrid.core.base.grid import Grid
from mimogrid.core.job.graph import ModuleGraph
from mimogrid.core.job.layer_engines import FP8_MULTIPLE
from mimogrid.core.job.lora import Lora, lora_parameters
from mimogrid.core.job.models import FIRST, LAST, BuiltIn, Own, Parameter
from mimogrid.core.job.placement import (
    edge_shape,
    graph_of,
    layer_ranges,
    model_of,
    place,
    stages_of,
    trainable_names,
)
from mimogrid.core.job.projectors import deepstack_layers
from mimogrid.core.job.spec import GridSpec, JobSpec, ModuleSpec, SourceFacts
from mimogrid.core.job.tokens import most_microbatches
from mimogrid.core.job.validation.problems import problems_of
from mimogrid.core.topology.stages import stage_at
from mimogrid.core.topology.topology import UNKNOWN, Edge, Link, Module, Stage, StageInfo, Topology


def parse(spec: JobSpec, source: SourceFacts) -> Topology:
    """Return the topology of a spec. Raises PlanError with every problem of the job."""
    problems = problems_of(spec, source)
    if problems:
        raise PlanError(problems)
    return assemble(spec, source)


def assemble(spec: JobSpec, source: SourceFacts) -> Topology:
    """Return the topology of a spec that is legal; nothing is checked."""
    graph = graph_of(spec)
    grids = place(spec)
    models = {name: model_of(name, spec, source) for name in spec.modules}
    depths = _module_depths(graph, spec)
    microbatches = spec.batch.microbatches
    if spec.batch.tokens_per_microbatch:
        microbatches = most_microbatches(spec, source.sequence or 1)
    modules: dict[str, Module] = {}
    for name in graph.order:
        upstream = any(
            info.trains_up_to(Link(info.stage, Stage(name, 0), edge))
            for feeder in graph.nodes[name].feeders
            for info in modules[feeder].stages[-1:]
            for edge in modules[feeder].outputs
            if edge.target == name
        )
        modules[name] = _module(
            name,
            spec=spec,
            graph=graph,
            grids=grids,
            models=models,
            depths=depths,
            trains_upstream=upstream,
            microbatches=microbatches,
        )
    return Topology(
        spec=spec,
        source=source,
        graph=graph,
        modules={name: modules[name] for name in spec.modules},
        world_size=spec.world_size or max(grid.offset + grid.size for grid in grids.values()),
    )


def _module(
    name: str,
    *,
    spec: JobSpec,
    graph: ModuleGraph,
    grids: Mapping[str, Grid],
    models: Mapping[str, BuiltIn | Own],
    depths: Mapping[str, int],
    trains_upstream: bool,
    microbatches: int,
) -> Module:
    written = spec.modules[name]
    edges = [_edge(s, t, spec, models) for s in graph.nodes for t in graph.nodes[s].feeds]
    outputs = tuple(edge for edge in edges if edge.source == name)
    return Module(
        name=name,
        model=models[name],
        grid=grids[name],
        experts=_expert_view(written.grid, grids[name], models[name]),
        sequence_parallel=written.grid.sequence_parallel,
        microbatches=written.microbatches or microbatches,
        loss_weight=written.loss_weight,
        inputs=tuple(edge for edge in edges if edge.target == name),
        outputs=outputs,
        stages=_stages(
            name,
            written=written,
            model=models[name],
            outputs=outputs,
            depth=depths[name],
            trains_upstream=trains_upstream,
        ),
        multiple=_row_multiple(written),
        lora=written.lora,
    )


def _row_multiple(written: ModuleSpec) -> int:
    """Return what the length of a rank's row is a multiple of: tp parts under sp, each of which fp8 can multiply."""
    parts = written.grid.tp if written.grid.sequence_parallel else 1
    return parts * (1 if written.fp8 == "none" else FP8_MULTIPLE)


def _expert_view(written: GridSpec, grid: Grid, model: BuiltIn | Own) -> Grid | None:
    if isinstance(model, Own) or not model.experts:
        return None
    return expert_view(grid, expert_tp=written.expert_tp, ep=written.ep)


def _edge(source: str, target: str, spec: JobSpec, models: Mapping[str, BuiltIn | Own]) -> Edge:
    written = spec.modules[source].projector.get(target)
    width, projector = edge_shape(models[source], models[target], written)
    parts = 1 + len(deepstack_layers(models[source]))
    return Edge(source, target, width * parts, projector, parts)


def _module_depths(graph: ModuleGraph, spec: JobSpec) -> Mapping[str, int]:
    """Return for each module the number of stages from its first stage to the end of the longest path."""
    depths: dict[str, int] = {}
    for name in reversed(graph.order):
        below = max((depths[target] for target in graph.nodes[name].feeds), default=0)
        depths[name] = stages_of(spec.modules[name]) + below
    return depths


def _stages(
    name: str,
    *,
    written: ModuleSpec,
    model: BuiltIn | Own,
    outputs: tuple[Edge, ...],
    depth: int,
    trains_upstream: bool,
) -> tuple[StageInfo, ...]:
    """Return the stages of a module; the first one is `depth` stages from the end of the longest path."""
    parameters = (*_parameters(model, written.lora), *_projectors(model, outputs))
    trains = trainable_names(written, tuple(p.name for p in parameters))
    if isinstance(model, Own) and written.frozen is not True:
        trains |= {UNKNOWN}
    infos: list[StageInfo] = []
    places = _places(parameters)
    ranges = layer_ranges(written, model.layers)
    for i, layers in enumerate(ranges):
        first, last = i == 0, i == len(ranges) - 1
        layers_held = (*layers, *([FIRST] if first else []), *([LAST] if last else []))
        held = tuple(
            parameters[i] for i in sorted({i for layer in layers_held for i in places.get(layer, ())})
        )
        info = StageInfo(
            stage=stage_at(name, i % written.grid.pp, i // written.grid.pp),
            layers=layers,
            first=first,
            last=last,
            depth=depth - i,
            parameters=held,
            trainable=trains & {UNKNOWN, *(p.name for p in held)},
            trains_upstream=trains_upstream,
        )
        infos.append(info)
        trains_upstream = info.backward
    return tuple(infos)


@functools.lru_cache(maxsize=64)
def _parameters(model: BuiltIn | Own, lora: Lora | None) -> tuple[Parameter, ...]:
    """Return the parameters of a model, and those beside it. Planning parses thousands of jobs with the same ones."""
    beside = () if lora is None or isinstance(model, Own) else lora_parameters(model, lora)
    return (*model.parameters(), *beside)


def _projectors(model: BuiltIn | Own, outputs: tuple[Edge, ...]) -> Iterator[Parameter]:
    """Yield the parameters of the projections to other modules."""
    for edge in outputs:
        if edge.projector and model.hidden:
            yield from edge.projector.parameters(edge.target, model, edge.width // edge.parts)


def _places(parameters: tuple[Parameter, ...]) -> Mapping[int | str, list[int]]:
    """Return the numbers of the parameters that a stage with each layer, or with either end, holds; copies count."""
    places: dict[int | str, list[int]] = {}
    for i, parameter in enumerate(parameters):
        places.setdefault(parameter.layer, []).append(i)
        if parameter.copy == LAST != parameter.layer:
            places.setdefault(LAST, []).append(i)
    return places
