"""Megatron's grids as grids of a job and back, and the role of a rank under them.

The name of a module is its key in Megatron's maps; the language model is `LANGUAGE`. Axes have the same names, except
that `expt_tp` and `expt_dp` in Megatron are `expert_tp` and `expert_dp` here.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from megatron.core.hyper_comm_grid import HyperCommGrid

from mimogrid.core.base.grid import Axis, Grid
from mimogrid.core.topology.roles import RankRole, role_of, role_on
from mimogrid.core.topology.topology import Topology


LANGUAGE = "language"
"""The key of the language model in Megatron."""
EXPERT_VIEW = "expert"
"""The name of the view of a grid under the axes of its experts, in Megatron."""

_OURS = {"expt_tp": "expert_tp", "expt_dp": "expert_dp"}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}


def from_hyper_comm_grid(grid: HyperCommGrid, view: str | None = None) -> Grid:
    """Return a `HyperCommGrid`, or one of its views, as a `Grid`; `ranks_along` then equals `get_rank_enum`.

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
    """Return a `Grid` as a `HyperCommGrid`, and the view of its experts as the view `EXPERT_VIEW`.

    Megatron reads the size of the world from the environment or from torch.distributed. Raises ValueError for a grid
    that renumbers its ranks, which Megatron's cannot, and for experts with megatron-core 0.16, which has no views.
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
    """Return the role of a rank under Megatron's grids, without a process group.

    Roles differ from Megatron's in three cases. A rank in no grid idles. If all grids cover the same ranks, a rank has
    its stage of each module, not all of it. If grids overlap in part, the shared ranks host all their modules; Megatron
    drops the language model there.

    Raises ValueError unless the grids are those of `modalities` and the language model.
    """
    check_keys(grids, modalities)
    ours = {name: from_hyper_comm_grid(grid) for name, grid in grids.items()}
    return role_on(ours, rank, language_modules=(LANGUAGE,))


def roles_by_chunk(topology: Topology, rank: int) -> tuple[RankRole, ...]:
    """Return the role of a rank in each of its chunks (virtual stages).

    `is_first_stage` and `is_last_stage` are then about the stage of the chunk. A module is in as many roles as it has
    chunks.
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
