"""Costs files: reads `Costs` from TOML.

origin = "probed on ..."   # where the numbers come from; optional
[stages."vision.0"]        # seconds per microbatch
forward = 1.0
backward = 2.0             # or input_gradient and weight_gradient
[edges]                    # all edges
latency = 0.0
[edges."vision -> language"]
bytes_per_s = 1e9
[machine]
cores = 2                  # how many compute actions run at once at most
"""

import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.job.costs import Costs, EdgeCosts, StageCosts
from mimogrid.core.pricing.unknown_names import unknown_names
from mimogrid.core.topology.topology import Topology
from mimogrid.shell.job.tables import TableProblem, converted, new_converter
from mimogrid.shell.job.textfiles import TooMuch, read_text, toml_of


@attrs.frozen(kw_only=True)
class _Machine:
    cores: float | None = None


@attrs.frozen(kw_only=True)
class _File:
    stages: Mapping[str, StageCosts] = attrs.field(factory=dict[str, StageCosts])
    edges: Mapping[str, Any] = attrs.field(factory=dict[str, Any])
    machine: _Machine = _Machine()
    origin: str = ""


def read(path: Path, topology: Topology) -> Costs:
    """Read the costs of a job. Raises PlanError with every problem of the file."""
    costs, problems = costs_of(load(path, "Check --costs."))
    problems += unknown_names(costs, topology) if costs else ()
    if problems or costs is None:
        raise PlanError(problems)
    return costs


def load(path: Path, remedy: str) -> dict[str, Any]:
    """Return the tables of a file. Raises PlanError, with a remedy for a file that is not there."""
    text = read_text(path, remedy)
    try:
        return toml_of(text)
    except (tomllib.TOMLDecodeError, TooMuch) as error:
        raise PlanError([Problem(str(path), f"is not TOML: {error}.", "Correct it there.")]) from None


def costs_of(table: Mapping[str, Any], at: str = "") -> tuple[Costs | None, list[Problem]]:
    """Return the costs of a table, if it can be read, and all of its problems; `at` is the place of the table."""
    converter = new_converter()
    file = converted(converter, table, _File)
    problems = list(file.problems)
    if file.value is None:
        return None, _problems(problems, at)
    common = {key: value for key, value in file.value.edges.items() if not isinstance(value, dict)}
    edge = converted(converter, common, EdgeCosts, ("edges",))
    problems += edge.problems
    edges: dict[str, EdgeCosts] = {}
    for name, own in file.value.edges.items():
        if isinstance(own, dict):
            found = converted(converter, common | own, EdgeCosts, ("edges", name))
            problems += found.problems if edge.value else ()
            edges |= {name: found.value} if found.value else {}
    costs = Costs(
        stages=file.value.stages,
        edge=edge.value or EdgeCosts(),
        edges=edges,
        cores=file.value.machine.cores,
        origin=file.value.origin,
    )
    impossible = [attrs.evolve(problem, where=at + problem.where) for problem in _impossible(costs)]
    return costs, [*_problems(problems, at), *impossible]


def table_of(costs: Costs) -> dict[str, Any]:
    """Return the table of some costs, without defaults; `costs_of` reads it back."""
    converter = new_converter()
    edges = {name: converter.unstructure(edge) for name, edge in costs.edges.items()}
    table = {
        "origin": costs.origin,
        "stages": {name: converter.unstructure(stage) for name, stage in costs.stages.items()},
        "edges": converter.unstructure(costs.edge) | edges,
        "machine": {} if costs.cores is None else {"cores": costs.cores},
    }
    return {key: value for key, value in table.items() if value}


def _problems(problems: list[TableProblem], at: str) -> list[Problem]:
    return [Problem(at + problem.where, problem.message, problem.remedy) for problem in problems]


def _impossible(costs: Costs) -> Iterator[Problem]:
    """Yield what no machine can cost."""
    for name, of_stage in costs.stages.items():
        seconds: dict[str, float | None] = attrs.asdict(of_stage)
        for key, value in seconds.items():
            if value is not None and not 0 <= value < float("inf"):
                yield Problem(f'stages."{name}".{key}', f"{value} seconds.", "Use 0 or more.")
        if of_stage.backward is not None and of_stage.splits:
            message = "has a backward and also halves of it."
            yield Problem(
                f'stages."{name}"', message, "Give backward, or input_gradient and weight_gradient."
            )
    for name, edge in (("", costs.edge), *costs.edges.items()):
        where = f'edges."{name}"' if name else "edges"
        if not 0 <= edge.latency < float("inf"):
            yield Problem(f"{where}.latency", f"{edge.latency} seconds.", "Use 0 or more.")
        if not edge.bytes_per_s > 0:
            yield Problem(f"{where}.bytes_per_s", f"{edge.bytes_per_s}.", "Use more than 0, or inf.")
    if costs.cores is not None and not costs.cores > 0:
        yield Problem("machine.cores", f"{costs.cores}.", "Use more than 0, or leave it out.")
