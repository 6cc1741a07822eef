"""Roles: the layout of a job and the roles of its ranks, as tables and a map for people."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from mimogrid.core.base.units import in_bytes
from mimogrid.core.draw.rank_map import rank_map, runs, short
from mimogrid.core.job.models import FIRST, LAST, Own
from mimogrid.core.step.traffic import EdgeTraffic
from mimogrid.core.topology.roles import ModuleLayout, RankRole
from mimogrid.core.topology.topology import Module, Topology
from mimogrid.core.update.trained import trained_lines
from mimogrid.shell.cli.output import terminal


LAYOUTS = {
    ModuleLayout.UNIFIED: "all modules on all ranks under one grid",
    ModuleLayout.COLOCATED: "modules share ranks, with different grids",
    ModuleLayout.NON_COLOCATED: "every module on ranks of its own",
}
TABLE_RANKS = 128


def print_layout(topology: Topology, edges: Sequence[EdgeTraffic]) -> None:
    """Print the modules with their grids, the edges between them, and the idle ranks."""
    console = _console()
    console.print(_modules_table(topology))
    for line in trained_lines(topology):
        console.print(line, highlight=False)
    if topology.edges:
        console.print(_edges_table(topology, edges))
    console.print(_world_line(topology))


def print_roles(topology: Topology, roles: Sequence[RankRole]) -> None:
    """Print a table of the roles; for several ranks also the map of the ranks."""
    console = _console()
    table = _table("rank", "layout", "module", "stage", "first", "last", "position")
    for role in roles[:TABLE_RANKS]:
        layout = role.layout.value
        for info in role.modules.values():
            position = " ".join(f"{axis}={i}" for axis, i in info.position.items())
            first, last = (_mark(flag) for flag in (info.is_first_stage, info.is_last_stage))
            table.add_row(str(role.rank), layout, info.module, str(info.pp), first, last, position)
        if role.is_idle:
            table.add_row(str(role.rank), layout, "idle: in no grid", "", "", "", "")
    console.print(table)
    if len(roles) > TABLE_RANKS:
        console.print(f"... and {len(roles) - TABLE_RANKS} more ranks: use --rank R or --json.")
    if len(roles) > 1:
        console.print()
        for line in rank_map(topology):
            console.print(line)
    console.print(_world_line(topology))


def _modules_table(topology: Topology) -> Table:
    table = _table("module", "model", "ranks", "grid", "layers by stage", "parameters", "trains")
    for module in topology.modules.values():
        model = module.model
        table.add_row(
            module.name,
            model.path if isinstance(model, Own) else type(model).__name__.lower(),
            short(module.grid.ranks),
            " ".join(f"{a.name}={a.size}" for a in module.grid.axes if a.size > 1) or "1 rank",
            "?" if isinstance(model, Own) else _layers(module),
            "?" if isinstance(model, Own) else f"{_count(module, trainable=False):,}",
            _trained(module),
        )
    return table


def _layers(module: Module) -> str:
    """Return the number of layers of each stage: ``4 x 8`` where all are equal."""
    counts = [len(info.layers) for info in module.stages]
    if len(counts) > 1 and len(set(counts)) == 1:
        return f"{len(counts)} x {counts[0]}"
    return " + ".join(map(str, counts))


def _count(module: Module, *, trainable: bool) -> int:
    """Return how many parameters a module has; a tied copy counts once."""
    total = 0
    for info in module.stages:
        for parameter in info.parameters:
            is_copy = parameter.layer == FIRST and parameter.copy == LAST and not info.first
            if not is_copy and (not trainable or parameter.name in info.trainable):
                total += parameter.values
    return total


def _trained(module: Module) -> str:
    """Return which part of a module trains."""
    if isinstance(module.model, Own):
        return "yes" if any(info.trainable for info in module.stages) else "frozen"
    total, trained = _count(module, trainable=False), _count(module, trainable=True)
    if not trained:
        return "frozen"
    return "all" if trained == total else f"{trained / total:.1%}"


def _edges_table(topology: Topology, traffic: Sequence[EdgeTraffic]) -> Table:
    table = _table("edge", "width", "projector", "messages per step", "sent per step", "leader broadcast")
    traffic_of = {(edge.source, edge.target): edge for edge in traffic}
    for edge in topology.edges:
        found = traffic_of.get((edge.source, edge.target))
        numbers = (
            (f"{found.messages:,}", in_bytes(found.bytes), in_bytes(found.bytes_leader_broadcast))
            if found
            else ("?", "?", "?")
        )
        width = f"{edge.parts} x " * (edge.parts > 1) + str(edge.width // edge.parts)
        table.add_row(str(edge), width, edge.projector.kind if edge.projector else "no", *numbers)
    return table


def _world_line(topology: Topology) -> str:
    idle = topology.world_size - len(topology.ranks)
    ranks = f"{topology.world_size} rank{'s' if topology.world_size > 1 else ''}"
    layout, hosting = topology.role(0).layout, set(topology.ranks)
    idle_ranks = ", ".join(runs(rank for rank in range(topology.world_size) if rank not in hosting))
    idling = f"; {idle} idle ({idle_ranks})" if idle else ""
    return f"{ranks}, {layout.value}: {LAYOUTS[layout]}{idling}."


def _mark(flag: bool) -> str:
    return "yes" if flag else ""


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def _console() -> Console:
    """Return a console that writes plain text of any width into a pipe or a file."""
    file = terminal()
    console = Console(file=file, highlight=False, markup=False, soft_wrap=True)
    return console if console.is_terminal else Console(file=file, highlight=False, markup=False, width=200)
