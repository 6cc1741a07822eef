"""Megatron's grids as ours and back, and what a rank does under them.

A module's name is its key in Megatron's maps, and that of the language model is `LANGUAGE`. Axes go by the same
names but for the experts': `expt_tp` and `expt_dp` there are `expert_tp` and `expert_dp` here.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from megatron.core.hyper_comm_grid import HyperCommGrid

from mimogrid.core.base.grid import Axis, Grid
from mimogrid.core.topology.roles import RankRole, role_of, role_on
from mimogrid.core.topology.topology import Topology


LANGUAGE = "language"
"""Megatron's key of the language model."""
EXPERT_VIEW = "expert"
"""Megatron's name of the view under which a grid's experts lie."""

_OURS = {"expt_tp": "expert_tp", "expt_dp": "expert_dp"}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}


def from_hyper_comm_grid(grid: HyperCommGrid, view: str | None = None) -> Grid:
    """Return Megatron's grid, or one of its views, as ours; `ranks_along` then equals `get_rank_enum`.

    Raises KeyError for a view that is not registered.
    """
    names, shape = grid.dim_names, grid.shape
    if view is not None:
        views = vars(grid).get("_views", {})  # megatron-core 0.16 has none
        if view not in views:
            raise KeyError(f"View {view!r} is not registered. Registered views: {sorted(views)}")
        names, shape = views[view].dim_names, views[view].shape
    axes = tuple(Axis(_OURS.get(name, name), int(size)) for name, size in zip(names, shape, strict=True))
    return Grid(axes, offset=grid.rank_offset)


def to_hyper_comm_grid(
    grid: Grid, experts: Grid | None = None, *, backend: str | None = None
) -> HyperCommGrid:
    """Return our grid as Megatron's, the experts' as its view `EXPERT_VIEW`.

    Megatron looks up the size of the world in the environment or in torch.distributed. Raises ValueError for
    a grid that renumbers its ranks, which Megatron's cannot, and for experts where it knows no views (0.16).
    """
    made = HyperCommGrid(**_shape(grid), rank_offset=grid.offset, backend=backend)
    if experts is not None:
        if not hasattr(made, "register_view"):
            raise ValueError("this megatron-core has no views: make a grid of the experts' own, or take 0.19")
        shared = ["pp"] if grid.ranks_along("pp") == experts.ranks_along("pp") else []
        made.register_view(EXPERT_VIEW, **_shape(experts), shared_dims=shared)
    return made


def _shape(grid: Grid) -> dict[str, Any]:
    if grid.ranks != tuple(range(grid.offset, grid.offset + grid.size)):
        raise ValueError(
            f"a grid with ranks {grid.ranks} is none of Megatron's: those count up. Put pp last in grid.order."
        )
    names = [_THEIRS.get(axis.name, axis.name) for axis in grid.axes]
    return {"shape": [axis.size for axis in grid.axes], "dim_names": names}


def role_of_grids(
    grids: Mapping[str, HyperCommGrid], rank: int, *, modalities: Iterable[str] | None = None
) -> RankRole:
    """Return what a rank does under Megatron's grids, without a process group; in no grid it idles.

    Where all grids cover the same ranks Megatron runs every module whole on each of them; here, too, each rank
    is told its stage. Where grids overlap in part, Megatron forgets the language model on the shared ranks;
    here they have all of their modules.

    Raises ValueError unless the grids are of `modalities` and the language model.
    """
    check_keys(grids, modalities)
    ours = {name: from_hyper_comm_grid(grid) for name, grid in grids.items()}
    return role_on(ours, rank, language_modules=(LANGUAGE,))


def roles_by_chunk(topology: Topology, rank: int) -> tuple[RankRole, ...]:
    """Return a rank's role in each of its chunks (Megatron's virtual stages); one role where it has one of each.

    First and last are then said of the chunk's stage. A module is in as many roles as it has chunks.
    """
    role = role_of(topology, rank)
    chunks = 1 + max((info.stage.chunk for info in role.stages), default=0)
    return tuple(role.of_chunk(chunk) for chunk in range(chunks))


def check_keys(grids: Mapping[str, Any], modalities: Iterable[str] | None) -> None:
    """Raise ValueError unless the keys are `modalities` (None: any) and the language model."""
    wanted = {LANGUAGE, *(grids if modalities is None else modalities)}
    if set(grids) != wanted:
        raise ValueError(
            f"the keys of the grids must be the modalities and '{LANGUAGE}'. "
            f"Missing: {sorted(wanted - set(grids))}, Extra: {sorted(set(grids) - wanted)}"
        )
