"""Megatron: its grids, roles, groups, models and training loop, in terms of ours and back.

For programs written for megatron-core (0.16 and 0.19), piece by piece:

| theirs | ours | here |
|---|---|---|
| `HyperCommGrid` and its views | `core.grid.Grid` | `from_hyper_comm_grid`, `to_hyper_comm_grid` |
| `RankRole` of pull request 3211, asked of process groups | the same answers for any rank, anywhere | `role_of_grids` |
| `ProcessGroupCollection` of a module | the groups of a job, and what these lack | `open_collections` |
| `MimoModelConfig` with its grids | a job, or its file | `open_job_of`, `job_of`, `job_file_of` |
| `MimoModel` | the same parts, those of this rank's stages | `from_specs` |
| such a model | networks that a job's program calls, stage by stage | `networks_of` |
| its state dict | weights of such a job, whatever its grids | `ForwardBackward.load_state_dict` |
| `forward_backward_func` | one step of a job's program | `forward_backward_func` |

A module's name is its key in Megatron's maps, and that of the language model is `LANGUAGE`. Axes go by the same
names but for the experts': `expt_tp` and `expt_dp` there are `expert_tp` and `expert_dp` here.

Shapes in names: S positions, B samples, H hidden, R rows.
"""

import contextlib
import copy
import inspect
import itertools
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.distributed as dist
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.transformer.spec_utils import ModuleSpec as MegatronSpec
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_block import TransformerBlock, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor, nn

from mimogrid.adapters.megatron_stages import (
    Arrange,
    LanguageStage,
    ModalityNetwork,
    continued,
    to_job_state,
    to_megatron_state,
)
from mimogrid.adapters.torch_module import Embedded, Example, Networks
from mimogrid.core.errors import PlanError, Problem
from mimogrid.core.grid import Axis, Grid
from mimogrid.core.groups import Ranks, groups_of, in_slots
from mimogrid.core.models import BuiltIn, Gpt, Vit
from mimogrid.core.roles import ModuleLayout, ModuleStageInfo, RankRole, role_of
from mimogrid.core.spec import BatchSpec, DataSpec, GridSpec, JobSpec, ModuleSpec
from mimogrid.core.topology import Module, Topology
from mimogrid.shell import jobfile
from mimogrid.shell.agreement import Outcome
from mimogrid.shell.device import Device
from mimogrid.shell.groups import Groups
from mimogrid.shell.jobs import Job, open_job
from mimogrid.shell.ledger import Ledger
from mimogrid.shell.megatron import ProcessGroupCollection
from mimogrid.shell.megatron.layers import block_spec
from mimogrid.shell.world import World


LANGUAGE = "language"
"""Megatron's key of the language model."""
EXPERT_VIEW = "expert"
"""Megatron's name of the view under which a grid's experts lie."""

_OURS = {"expt_tp": "expert_tp", "expt_dp": "expert_dp"}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}


# -- grids -------------------------------------------------------------------------------------------------


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


# -- roles -------------------------------------------------------------------------------------------------


def role_of_grids(
    grids: Mapping[str, HyperCommGrid], rank: int, *, modalities: Iterable[str] | None = None
) -> RankRole:
    """Return what a rank does under Megatron's grids, without a process group; in no grid it idles.

    Where all grids cover the same ranks Megatron runs every module whole on each of them; here, too, each rank
    is told its stage. Where grids overlap in part, Megatron forgets the language model on the shared ranks;
    here they have all of their modules.

    Raises ValueError unless the grids are of `modalities` and the language model.
    """
    _check_keys(grids, modalities)
    ours = {name: from_hyper_comm_grid(grid) for name, grid in grids.items()}
    modules = {}
    for name, grid in ours.items():
        if rank in grid:
            pp = grid.position_along("pp", rank)
            modules[name] = ModuleStageInfo(
                module=name,
                pp=pp,
                is_first_stage=pp == 0,
                is_last_stage=pp == grid.extent("pp") - 1,
                position=grid.position(rank),
            )
    return RankRole(rank, _layout(tuple(ours.values())), modules, (LANGUAGE,))


def _layout(grids: Sequence[Grid]) -> ModuleLayout:
    if all(grid == grids[0] for grid in grids):
        return ModuleLayout.UNIFIED
    overlap = any(not set(a.ranks).isdisjoint(b.ranks) for a, b in itertools.combinations(grids, 2))
    return ModuleLayout.COLOCATED if overlap else ModuleLayout.NON_COLOCATED


def _check_keys(grids: Mapping[str, Any], modalities: Iterable[str] | None) -> None:
    wanted = {LANGUAGE, *(grids if modalities is None else modalities)}
    if set(grids) != wanted:
        raise ValueError(
            f"the keys of the grids must be the modalities and '{LANGUAGE}'. "
            f"Missing: {sorted(wanted - set(grids))}, Extra: {sorted(set(grids) - wanted)}"
        )


# -- groups ------------------------------------------------------------------------------------------------


_ALONG = {
    "tp": ("tp",),
    "cp": ("cp",),
    "pp": ("pp",),
    "dp": ("dp",),
    "mp": ("tp", "pp"),
    "tp_cp": ("tp", "cp"),
    "dp_cp": ("cp", "dp"),
    "intra_dp_cp": ("cp", "dp"),
    "tp_dp_cp": ("tp", "cp", "dp"),
    "intra_dist_opt": ("tp", "cp", "dp", "pp"),
}
"""Along which axes of a module's grid Megatron wants a group, by the name it has in a collection."""
_ALONG_EXPERTS = {
    "ep": ("ep",),
    "expt_tp": ("expert_tp",),
    "expt_dp": ("expert_dp",),
    "intra_expt_dp": ("expert_dp",),
    "tp_ep": ("expert_tp", "ep"),
    "tp_ep_pp": ("expert_tp", "ep", "pp"),
}
_DENSE = {"expt_tp": "tp", "expt_dp": "dp_cp", "intra_expt_dp": "dp_cp", "tp_ep": "tp", "tp_ep_pp": "mp"}
"""What stands for the groups of experts where a module has none; Megatron asks for them all the same."""


@contextlib.contextmanager
def open_collections(
    topology: Topology, groups: Groups, world: World, device: Device
) -> Iterator[Mapping[str, ProcessGroupCollection]]:
    """Return a collection for each module that this rank hosts; all ranks of the world call it.

    Of the groups those of the job are used where their ranks are the same. The others (pp, mp, dp beside cp)
    are made here, and destroyed on exit. `embd` joins the two ends of the pipeline and `pos_embd` is the
    first; other ranks have None.
    """
    planned = {ranks for slot in groups_of(topology) for ranks in slot}
    lacking = [ranks for ranks in _wanted(topology) if len(ranks) > 1 and ranks not in planned]
    by_ranks = dict(groups.by_ranks)
    opened: list[dist.ProcessGroup] = []
    try:
        for slot in in_slots(lacking):
            made = world.make_groups(slot, backend=device.backend, purpose="megatron")
            opened.extend(made.values())
            by_ranks |= {ranks: group for ranks, group in made.items() if ranks not in by_ranks}
        hosted = [module for module in topology.modules.values() if world.rank in module.grid]
        yield {module.name: _collection(module, world.rank, by_ranks) for module in hosted}
    finally:
        for group in reversed(opened):
            dist.destroy_process_group(group)


def _wanted(topology: Topology) -> Iterator[Ranks]:
    for module in topology.modules.values():
        for axes in _ALONG.values():
            yield from module.grid.ranks_along(axes)
        for axes in _ALONG_EXPERTS.values() if module.experts else ():
            yield from module.experts.ranks_along(axes)  # type: ignore[union-attr]
        yield from map(_ends, module.grid.ranks_along("pp"))


def _ends(pipeline: Ranks) -> Ranks:
    return tuple(dict.fromkeys((pipeline[0], pipeline[-1])))


def _collection(
    module: Module, rank: int, by_ranks: Mapping[Ranks, dist.ProcessGroup]
) -> ProcessGroupCollection:
    found = {name: by_ranks[module.grid.group_of(rank, axes)] for name, axes in _ALONG.items()}
    if module.experts:
        experts = module.experts
        found |= {name: by_ranks[experts.group_of(rank, axes)] for name, axes in _ALONG_EXPERTS.items()}
    else:
        found |= {"ep": by_ranks[rank,]} | {name: found[dense] for name, dense in _DENSE.items()}
    pipeline = module.grid.group_of(rank, "pp")
    collection = ProcessGroupCollection(**found)
    collection.embd = by_ranks[_ends(pipeline)] if rank in _ends(pipeline) else None
    collection.pos_embd = by_ranks[rank,] if rank == pipeline[0] else None
    return collection


# -- job files ---------------------------------------------------------------------------------------------


def job_of(
    config: Any,
    grids: Mapping[str, HyperCommGrid] | None = None,
    *,
    batch: BatchSpec,
    data: DataSpec | None = None,
    **fields: Any,
) -> JobSpec:
    """Return the job of a `MimoModelConfig` on its grids (its `module_to_grid_map`, unless given).

    The language model becomes a `gpt`. A modality with one transformer (whose specification has a
    `TransformerConfig` among its parameters) becomes a `vit` of that size, any other a network of the host's
    that emits rows as wide as the language model. The plan counts by these sizes; the networks are Megatron's
    where `forward_backward_func` is given a model. Without `data` the samples are the host's, too. `fields` are
    further ones of the job.

    Raises ValueError for keys that do not match, and PlanError with everything that a job cannot say.
    """
    grids = grids or config.module_to_grid_map
    _check_keys(grids, config.modality_submodules_spec)
    problems: list[Problem] = []
    placed = {name: _grid_spec(name, grid, problems) for name, grid in grids.items()}
    params = config.language_model_spec.params
    language = _language(params, problems)
    if problems:
        raise PlanError(problems)
    modules = {
        name: _modality(spec, placed[name], language.hidden)
        for name, spec in config.modality_submodules_spec.items()
    }
    modules[LANGUAGE] = ModuleSpec(model="gpt", options=language, **_cut(params["config"], placed[LANGUAGE]))
    options = {"sequence": params["max_sequence_length"]}
    data = data or DataSpec(source="mimogrid.shell.host:samples", options=options)
    return JobSpec(modules=modules, data=data, batch=batch, **fields)


def job_file_of(config: Any, grids: Mapping[str, HyperCommGrid] | None = None, **arguments: Any) -> str:
    """Return the text of the job file; see `job_of`."""
    return jobfile.dump(job_of(config, grids, **arguments))


def open_job_of(config: Any, grids: Mapping[str, HyperCommGrid] | None = None, **arguments: Any) -> Job:
    """Open the job; see `job_of`. Raises PlanError with everything that is wrong with it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "job.toml")
        path.write_text(job_file_of(config, grids, **arguments))
        return open_job(path)


def _grid_spec(name: str, grid: HyperCommGrid, problems: list[Problem]) -> GridSpec:
    base, order = from_hyper_comm_grid(grid), GridSpec().order
    where = f"modules.{name}.grid"
    for axis in base.axes:
        if axis.name not in order and axis.size > 1:
            fact = f"the axis '{axis.name}' of size {axis.size} has no counterpart."
            problems.append(Problem(where, fact, f"Axes are {', '.join(order)}; experts lie in a view."))
    known = [axis for axis in base.axes if axis.name in order]
    given = tuple(axis.name for axis in known)
    sizes: dict[str, Any] = {axis.name: axis.size for axis in known}
    if EXPERT_VIEW in vars(grid).get("_views", {}):
        experts = from_hyper_comm_grid(grid, EXPERT_VIEW)
        sizes |= {"ep": experts.extent("ep"), "expert_tp": experts.extent("expert_tp")}
    whole = (*given, *(axis for axis in order if axis not in given))
    return GridSpec(**sizes, offset=base.offset, order=whole)


def _cut(config: TransformerConfig, grid: GridSpec) -> dict[str, Any]:
    """Return how a transformer is cut: what a grid of Megatron's does not say, its configuration does."""
    config = copy.copy(config)
    config.pipeline_model_parallel_size = grid.pp
    layers = [get_num_layers_to_build(config, pp_rank=pp) for pp in range(grid.pp)]
    split = tuple(layers) if len(set(layers)) > 1 else None
    return {"grid": attrs.evolve(grid, sequence_parallel=config.sequence_parallel), "split": split}


def _sizes(config: TransformerConfig) -> dict[str, Any]:
    experts = config.num_moe_experts or 0
    return {
        "layers": config.num_layers,
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_query_groups,
        "ffn": config.ffn_hidden_size,
        "dropout": config.hidden_dropout,
        **({"experts": experts, "top_k": config.moe_router_topk} if experts else {}),
    }


def _language(params: Mapping[str, Any], problems: list[Problem]) -> Gpt:
    tied = bool(params.get("share_embeddings_and_output_weights", False))
    config = params["config"]
    if config.hidden_dropout != config.attention_dropout:
        fact = f"drops {config.hidden_dropout} of hidden states and {config.attention_dropout} of attention."
        problems.append(Problem(f"modules.{LANGUAGE}.options.dropout", fact, "Make them the same."))
    return Gpt(**_sizes(config), vocab=params["vocab_size"], tied_embeddings=tied)


def _modality(spec: MegatronSpec, grid: GridSpec, width: int) -> ModuleSpec:
    encoders = list((spec.submodules or {}).get("encoders", {}).values())
    configs = [
        value
        for encoder in encoders
        for value in (encoder.params or {}).values()
        if isinstance(value, TransformerConfig)
    ]
    if len(encoders) == len(configs) == 1:
        vit = Vit(**_sizes(configs[0]))
        return ModuleSpec(model="vit", options=vit, feeds=(LANGUAGE,), **_cut(configs[0], grid))
    model = "mimogrid.shell.host:module"
    return ModuleSpec(model=model, options={}, feeds=(LANGUAGE,), grid=grid, width=width)


# -- models ------------------------------------------------------------------------------------------------


def layer_spec(config: TransformerConfig, *, causal: bool = True) -> MegatronSpec:
    """Return megatron-core's layer with an attention and a norm that run on the CPU, and in any dtype.

    They are those of the job's own networks: a layer norm, and attention that turns queries and keys by itself, so
    the model has ``position_embedding_type="none"`` (or learned ones besides). For a causal or any other attention.
    """
    sizes = {**_sizes(config), "experts": 0}
    model: BuiltIn = Gpt(**sizes, vocab=1) if causal else Vit(**sizes)
    # On one rank too the linear layers are megatron's: ours have no place in its checkpoints.
    return block_spec(model, layers=1, tp=2, ledger=Ledger()).layer_specs[0]


def from_specs(
    language_model_spec: MegatronSpec,
    modality_submodules_spec: Mapping[str, MegatronSpec],
    special_token_ids: Mapping[str, int],
    *,
    role: RankRole,
    collections: Mapping[str, ProcessGroupCollection] | None = None,
) -> "MimoStages":
    """Build what this rank hosts of a model that is specified for Megatron's `MimoModel`.

    Nothing is built for modules of other ranks, projections only on a modality's last stage, embedding and
    output layer of the language model only on its ends. `collections` give each module its groups; without
    them Megatron's global state does. Its configurations must say the size of pp themselves, as ever there.

    Raises ValueError where the role is of other modules or a modality that is cut into stages has several
    encoders, RuntimeError where the rank is in no grid.
    """
    known = {LANGUAGE, *modality_submodules_spec}
    if not known.issuperset(role.modules):
        raise ValueError(
            f"the role names modules that are not specified. Missing: {sorted(set(role.modules) - known)}, "
            f"known: {sorted(known)}"
        )
    if role.is_idle:
        raise RuntimeError(f"rank {role.rank} is in no module's grid: it idles, and has no model.")
    collections = collections or {}
    submodules = {
        name: _modality_of(spec, role.modules[name], collections.get(name))
        for name, spec in modality_submodules_spec.items()
        if name in role.modules
    }
    language = None
    if role.has_language_module:
        language = _built(language_model_spec, role.modules[LANGUAGE], collections.get(LANGUAGE))
    return MimoStages(role, submodules, language, special_token_ids, collections)


def _built(spec: MegatronSpec, info: ModuleStageInfo, collection: ProcessGroupCollection | None) -> nn.Module:
    """Build a network for a stage; it is told of the stage as far as its constructor asks."""
    told: dict[str, Any] = {"pre_process": info.is_first_stage, "post_process": info.is_last_stage}
    if collection is not None:
        told["pg_collection"] = collection
    asked = inspect.signature(spec.module.__init__).parameters
    spec = copy.copy(spec)
    spec.params = {**(spec.params or {}), **{name: value for name, value in told.items() if name in asked}}
    return build_module(spec)  # type: ignore[no-any-return]


def _modality_of(
    spec: MegatronSpec, info: ModuleStageInfo, collection: ProcessGroupCollection | None
) -> nn.Module:
    parts = spec.submodules or {}
    if not (info.is_first_stage and info.is_last_stage) and len(parts.get("encoders", {})) != 1:
        raise ValueError(
            f"modality '{info.module}' is cut into stages: one encoder runs through them, "
            f"not {sorted(parts.get('encoders', {}))}"
        )

    def named(kind: str) -> dict[str, nn.Module]:
        return {name: _built(part, info, collection) for name, part in parts.get(kind, {}).items()}

    def listed(kind: str, *, wanted: bool) -> list[nn.Module]:
        return [_built(part, info, collection) for part in parts.get(kind, ())] if wanted else []

    stage = {"is_first_stage": info.is_first_stage, "is_last_stage": info.is_last_stage}
    asked = inspect.signature(spec.module.__init__).parameters
    return spec.module(  # type: ignore[no-any-return]
        encoders=named("encoders"),
        decoders=named("decoders"),
        input_projections=listed("input_projections", wanted=info.is_last_stage),
        output_projections=listed("output_projections", wanted=info.is_first_stage),
        **{name: value for name, value in stage.items() if name in asked},
        **(spec.params or {}),
    )


class MimoStages(nn.Module):
    """The parts of a multimodal model that one rank has, called as Megatron's schedules call its `MimoModel`.

    Parameters have the names that they have there (``language_model.*``, ``modality_submodules.NAME.*``), so a
    state dict of the one loads into the other.

    | the rank hosts | forward returns, beside `loss_mask` |
    |---|---|
    | modalities only | the output of each by its name: rows [R, H] from a last stage, else hidden states |
    | a stage of the language model that is not its last | its hidden states by the name `LANGUAGE` |
    | the last stage of the language model | what that model returns |
    | both | the same as the language model's; without its last stage, all outputs by name |
    """

    def __init__(
        self,
        role: RankRole,
        modality_submodules: Mapping[str, nn.Module],
        language_model: nn.Module | None,
        special_token_ids: Mapping[str, int],
        collections: Mapping[str, ProcessGroupCollection],
    ) -> None:
        super().__init__()
        self.role = role
        self.collections = dict(collections)
        self.special_token_ids = dict(special_token_ids)
        self.modality_submodules = nn.ModuleDict(dict(modality_submodules))
        self.language_model = language_model
        self.input_tensors: Mapping[str, Tensor] = {}

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return what Megatron's distributed checkpoints hold of this rank's parts, by the names that it gives."""
        found: dict[str, Any] = {}
        for module in self.role.modules:
            is_language = module == LANGUAGE
            part = self.language_model if is_language else self.modality_submodules[module]
            name = "language_model" if is_language else f"modality_submodules.{module}"
            groups = self.collections.get(module)
            # Otherwise Megatron's global state is asked who else holds the same.
            known = {} if groups is None else {"dp_cp_group": groups.dp_cp}
            found |= sharded_state_dict_default(
                part,
                f"{prefix}{name}.",
                sharded_offsets,
                {**(metadata or {}), **known},
                **({} if groups is None else {"tp_group": groups.tp}),
            )
        return found

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Take what earlier stages sent: tensors by the name of the module that made them.

        A single tensor is for the language model. Megatron's schedules wrap either into a list.
        """
        given = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        if given is None or isinstance(given, Tensor):
            given = {} if given is None else {LANGUAGE: given}
        self.input_tensors = {
            name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in given.items()
        }

    def forward(  # noqa: PLR0917 -- the order is Megatron's
        self,
        input_ids: Tensor | None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        loss_mask: Tensor | None = None,
        labels: Tensor | None = None,
        modality_inputs: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> tuple[Any, Tensor | None]:
        """Run the stages of this rank; see the table above, and `MimoModel.forward` for the arguments.

        Raises ValueError where rows and placeholders do not match, RuntimeError where a modality has
        placeholders and no input.
        """
        outputs: dict[str, Tensor] = {}
        for name in self.role.modality_module_names:
            output = self._modality(name, (modality_inputs or {}).get(name))
            if output is not None:
                outputs[name] = output
            elif input_ids is not None and self._places(input_ids, name).any():
                raise RuntimeError(f"there are placeholders for '{name}', and no input")
        if self.language_model is None:
            return outputs, loss_mask
        received = {name: tensor for name, tensor in self.input_tensors.items() if name != LANGUAGE}
        embedded, hidden = None, self.input_tensors.get(LANGUAGE)
        if self.role.is_first_stage(LANGUAGE):
            assert input_ids is not None
            embedded = self._embed(input_ids, position_ids, {**received, **outputs})
        elif hidden is not None:
            language: Any = self.language_model
            language.set_input_tensor(hidden)
        said = self.language_model(
            input_ids=None,
            position_ids=None,
            decoder_input=embedded,
            labels=labels,
            attention_mask=attention_mask,
        )
        return (said if self.role.is_last_stage(LANGUAGE) else {**outputs, LANGUAGE: said}), loss_mask

    def _modality(self, name: str, inputs: Mapping[str, Any] | None) -> Tensor | None:
        """Run this rank's stage of a modality: every stage runs its layers, not only the first."""
        submodule: Any = self.modality_submodules[name]
        hidden = self.input_tensors.get(name)
        if inputs is not None and hidden is not None:
            raise ValueError(f"'{name}' got inputs from the data and from an earlier stage")
        first, last = self.role.is_first_stage(name), self.role.is_last_stage(name)
        if (inputs if first else hidden) is None:
            return None
        if first and last and not any(isinstance(e, TransformerBlock) for e in submodule.encoders.values()):
            outputs = submodule.encode(inputs)
        else:
            ((key, encoder),) = submodule.encoders.items()
            output = encoder(**inputs[key]) if inputs is not None else continued(name, encoder, hidden)
            if not last:
                return output
            # Sample by sample; as it lies, [S, B, H] would give samples each other's rows.
            outputs = [(output.transpose(0, 1) if output.dim() > 2 else output).reshape(-1, output.shape[-1])]  # noqa: PLR2004
        rows: Tensor | None = submodule.project_embeddings(outputs, is_input=True) if outputs else None
        return rows

    def _embed(
        self, input_ids_BS: Tensor, position_ids_BS: Tensor | None, rows: Mapping[str, Tensor]
    ) -> Tensor:
        """Return [S, B, H]: embeddings of the text, and each modality's rows at its placeholders, in order."""
        text = torch.ones_like(input_ids_BS, dtype=torch.bool)
        for token in self.special_token_ids.values():
            text &= input_ids_BS != token
        positions = position_ids_BS[text][None] if position_ids_BS is not None else None
        model: Any = self.language_model
        embedded = model.embedding(input_ids=input_ids_BS[text][None], position_ids=positions).squeeze(1)
        places = torch.full_like(input_ids_BS, -1)
        places[text] = torch.arange(len(embedded), device=places.device)
        parts, begin = [embedded], len(embedded)
        for name, rows_RH in rows.items():
            if name not in self.special_token_ids:
                raise ValueError(f"there is no special token for modality '{name}'")
            where = self._places(input_ids_BS, name)
            if int(where.sum()) != len(rows_RH):
                raise ValueError(f"'{name}' has {int(where.sum())} placeholders and {len(rows_RH)} rows")
            places[where] = torch.arange(begin, begin + len(rows_RH), device=places.device)
            parts, begin = [*parts, rows_RH], begin + len(rows_RH)
        if (places < 0).any():
            lacking = sorted(n for n in self.special_token_ids if n not in rows)
            raise ValueError(f"there are placeholders without rows, of {lacking}")
        return torch.cat(parts)[places].transpose(0, 1).contiguous()

    def _places(self, input_ids_BS: Tensor, name: str) -> Tensor:
        if name not in self.special_token_ids:
            return torch.zeros_like(input_ids_BS, dtype=torch.bool)
        return input_ids_BS == self.special_token_ids[name]


# -- a model as networks of a job --------------------------------------------------------------------------


def networks_of(
    model: nn.Module, job: Job, rank: int, encoder_inputs: Mapping[str, str | Arrange] | None = None
) -> dict[str, nn.Module]:
    """Return the parts of a rank's `MimoStages` or `MimoModel` as the networks that a job's program calls.

    `encoder_inputs` says of each modality which argument of its encoder takes the rows of a microbatch, or what
    makes arguments of them. Raises PlanError for what a program cannot call (`megatron_stages`), and for parts
    that the rank should have and the model has not.
    """
    topology, inputs = job.topology, encoder_inputs or {}
    role = role_of(topology, rank)
    parts: Any = model
    networks: dict[str, nn.Module] = {}
    for name, info in role.modules.items():
        if name == LANGUAGE and parts.language_model is not None:
            gpt = _unwrapped(parts.language_model)
            networks[name] = LanguageStage(gpt, sequence=topology.sequence, name=name)
        elif name in parts.modality_submodules and name in inputs:
            modality = _unwrapped(parts.modality_submodules[name])
            networks[name] = ModalityNetwork(modality, inputs[name], stage=info)
        elif name in parts.modality_submodules:
            fact = "has an encoder, and nothing says which of its arguments takes the rows."
            remedy = f"Name it: encoder_inputs={{'{name}': 'ARGUMENT'}}."
            raise PlanError([Problem(f"modules.{name}", fact, remedy)])
        else:
            fact = f"is hosted by rank {rank}, whose model has no part of it."
            remedy = "Build the model on the grids that the job has."
            raise PlanError([Problem(f"modules.{name}", fact, remedy)])
    return networks


def _unwrapped(module: Any) -> nn.Module:
    """Return what Megatron's wrappers (`Float16Module`, `DistributedDataParallel`) hold."""
    while hasattr(module, "module") and isinstance(module.module, nn.Module):
        module = module.module
    return module  # type: ignore[no-any-return]


# -- the training loop -------------------------------------------------------------------------------------


class ForwardBackward:
    """A step of a job, called as Megatron's schedule functions are.

    `embedded` is the job in the world that Megatron initialized. Its program is what runs, with the networks of
    `model`; where that is None, the job's own. There is no `forward_step_func`: the program has the data, and the
    loss is the cross entropy of the tokens by their weights, summed and divided by the counts of the whole step.
    """

    def __init__(self, embedded: Embedded, model: nn.Module | None = None) -> None:
        self.embedded = embedded
        self.model = model

    def __call__(
        self,
        *,
        forward_step_func: None,
        data_iterator: Iterator[Sequence[Example]] | None,
        model: Any,
        num_microbatches: int,
        seq_length: int,
        micro_batch_size: int,
        decoder_seq_length: int | None = None,
        forward_only: bool = False,
        collect_non_loss_data: bool = False,
        first_val_step: bool | None = None,
        adjust_tensor_shapes_fn: Any = None,
        p2p_communicator: Any = None,
        pg_collection: Any = None,
        force_all_reduce: bool | None = False,
    ) -> list[dict[str, Tensor]]:
        """Run a step; return one dictionary of losses, the same on every rank of the job, and none where it idles.

        An iterator gives, microbatch by microbatch, all of its samples; without one they are the job's own.
        Gradients come out finished: summed over all ranks that have to be and divided by the global counts, so
        there is no `finalize_model_grads_func` to call. A job that updates its weights itself has done so.

        With `forward_only` nothing but the losses comes out, of networks in evaluation mode. With
        `collect_non_loss_data` besides, it is what the loss would judge: on one rank of each data lane of the
        last stage, for every microbatch the logits [tokens, V] of that lane, sample after sample, as
        ``{"logits": ...}``; nothing on other ranks. Megatron returns losses on the last stage only, one for every
        microbatch; their mean is the mean over tokens only where all have as many, and here it is always.

        Raises PlanError for a `forward_step_func`, whose loss would not be the one that trains, where the number of
        microbatches is not the job's, where another model is to be trained than the one that is embedded, and for
        `collect_non_loss_data` in training.
        """
        job = self.embedded.job
        problems = list(self._misfits(model, num_microbatches))
        if forward_step_func is not None:
            fact = "has a loss function of its own, which the job's program would not call."
            remedy = (
                "Pass None where the loss is the cross entropy of the labels by loss_weights; "
                "where it is another, make the language model a module of your own, which returns it "
                "(docs/own-modules.md)."
            )
            problems.append(Problem("forward_step_func", fact, remedy))
        if collect_non_loss_data and not forward_only:
            fact = "the loop asks for collect_non_loss_data of a training step, whose logits are not kept."
            problems.append(Problem("schedule", fact, "Ask with forward_only=True."))
        if problems:
            raise PlanError(problems)
        batch = None
        if data_iterator is not None:
            batch = [example for _ in range(num_microbatches) for example in next(data_iterator)]
        if collect_non_loss_data:
            return [{"logits": logits} for logits in self.embedded.answers(batch)]
        losses = self.embedded.evaluate(batch) if forward_only else _losses(self.embedded.step(batch))
        if losses is None:
            return []
        names = sorted(losses, key=lambda name: name != LANGUAGE)
        said = {("lm loss" if name == LANGUAGE else f"{name} loss"): losses[name] for name in names}
        exact = torch.float64 if job.spec.precision == "fp64" else torch.float32
        return [{name: torch.tensor(loss, dtype=exact) for name, loss in said.items()}]

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up the weights of a whole `MimoModel`, by Megatron's names; all ranks call it, the first one's count.

        See `megatron_stages.to_job_state`. For a job with networks of a model; raises WorldError where names or
        shapes are of another.
        """
        self.embedded.load_state_dict(to_job_state(state, LANGUAGE))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights of the whole model by Megatron's names, on the job's first rank; all ranks call it."""
        return to_megatron_state(self.embedded.state_dict(), LANGUAGE, self.embedded.job.topology.modules)

    def _misfits(self, model: Any, microbatches: int) -> Iterator[Problem]:
        planned = self.embedded.job.spec.batch.microbatches
        if microbatches != planned:
            fact = f"the loop asks for {microbatches} microbatches, the job has {planned}."
            yield Problem("batch.microbatches", fact, f"Set it to {microbatches}.")
        asked = [_unwrapped(m) for m in (model if isinstance(model, list) else [model]) if m is not None]
        if any(m is not self.model for m in asked):
            fact = f"the loop trains a {type(asked[0]).__name__} that the job's program does not call."
            yield Problem("model", fact, "Say so before: forward_backward_func(job, model=model).")


def _losses(outcome: Outcome | None) -> Mapping[str, float] | None:
    return None if outcome is None else outcome.losses


def forward_backward_func(
    job: Job | Embedded,
    model: Any = None,
    *,
    encoder_inputs: Mapping[str, str | Arrange] | None = None,
    **options: Any,
) -> ForwardBackward:
    """Return a drop-in for what megatron-core's `get_forward_backward_func` returns.

    A job is embedded in the process group that Megatron initialized, with these options (`Embedded`); who
    calls this closes it: ``function.embedded.close()``.

    `model` is what trains: a `MimoStages` or `MimoModel` that this rank has built (None on a rank in no grid), or a
    `MimoModelConfig`, of which this rank's part is built here, over the job's groups; it is then
    ``function.model``. Without one the job builds its own networks, of the sizes that the job says. For
    `encoder_inputs` see `networks_of`.
    """
    if isinstance(job, Embedded):
        return ForwardBackward(job)
    built: list[nn.Module] = [_unwrapped(model)] if isinstance(model, nn.Module) else []

    def networks(embedded: Embedded) -> Networks:
        collections = embedded.enter(
            open_collections(job.topology, embedded.groups, embedded.world, embedded.device)
        )
        role = embedded.role
        if role is None or role.is_idle:
            return {}
        if not built:
            for collection in collections.values():
                # A stage would begin by summing tied weights over it, on CUDA. The job ties its own way.
                collection.embd = None
            made = from_specs(
                model.language_model_spec,
                model.modality_submodules_spec,
                model.special_token_ids or {},
                role=role,
                collections=collections,
            )
            built.append(made)
        return networks_of(built[0], job, role.rank, encoder_inputs)

    embedded = Embedded(job, **options) if model is None else Embedded(job, networks, **options)
    return ForwardBackward(embedded, *built)
