"""The job of a `MimoModelConfig` and its grids: as a value, as a file, or opened."""

import copy
import itertools
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.transformer.spec_utils import ModuleSpec as MegatronSpec
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from mimogrid.adapters.megatron.experts import aux_weight
from mimogrid.adapters.megatron.grids import EXPERT_VIEW, LANGUAGE, check_keys, from_hyper_comm_grid
from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.job.models import Gpt, Vit
from mimogrid.core.job.spec import BatchSpec, DataSpec, GridSpec, JobSpec, ModuleSpec
from mimogrid.shell.job import jobfile
from mimogrid.shell.job.jobs import Job, open_job
from mimogrid.shell.megatron.names import GPTModel


def job_of(
    config: Any,
    grids: Mapping[str, HyperCommGrid] | None = None,
    *,
    batch: BatchSpec,
    data: DataSpec | None = None,
    **fields: Any,
) -> JobSpec:
    """Return the job of a `MimoModelConfig` on `grids` (default: its `module_to_grid_map`).

    The language model becomes a `gpt`. A modality with one transformer (its specification has a `TransformerConfig`
    among its parameters) becomes a `vit` of that size. Any other modality becomes a custom module of the host program,
    which emits rows as wide as the language model. The plan uses these sizes; `forward_backward_func` runs Megatron's
    networks. Without `data` the samples come from the host program, with rows as wide as the encoder that reads them.
    `fields` are further fields of the `JobSpec`.

    Raises ValueError for keys that do not match, and PlanError with everything that a job cannot express.
    """
    grids = grids or config.module_to_grid_map
    check_keys(grids, config.modality_submodules_spec)
    problems: list[Problem] = []
    placed = {name: _grid_spec(name, grid, problems) for name, grid in grids.items()}
    _check_kind(config.language_model_spec, problems)
    for name, spec in {**config.modality_submodules_spec, LANGUAGE: config.language_model_spec}.items():
        problems += _quantized(name, spec)
    params = config.language_model_spec.params
    language = _language(params, problems)
    if problems:
        raise PlanError(problems)
    modules = {
        name: _modality(spec, placed[name], language.hidden, has_view=_has_view(grids[name]))
        for name, spec in config.modality_submodules_spec.items()
    }
    # The plan needs some width for the rows that an encoder of Megatron reads.
    features = {name: spec.options.hidden for name, spec in modules.items() if isinstance(spec.options, Vit)}
    options = {"sequence": params["max_sequence_length"], "features": features}
    data = data or DataSpec(source="mimogrid.shell.job.host:samples", options=options)
    cut = _cut(params["config"], placed[LANGUAGE], has_view=_has_view(grids[LANGUAGE]))
    modules[LANGUAGE] = ModuleSpec(model="gpt", options=language, **cut)
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
    named = tuple(axis.name for axis in known)
    sizes: dict[str, Any] = {axis.name: axis.size for axis in known}
    if _has_view(grid):
        experts = from_hyper_comm_grid(grid, EXPERT_VIEW)
        sizes |= {"ep": experts.extent("ep"), "expert_tp": experts.extent("expert_tp")}
    whole = (*named, *(axis for axis in order if axis not in named))
    return GridSpec(**sizes, offset=base.offset, order=whole)


def _has_view(grid: HyperCommGrid) -> bool:
    return EXPERT_VIEW in vars(grid).get("_views", {})


def _cut(config: TransformerConfig, grid: GridSpec, *, has_view: bool) -> dict[str, Any]:
    """Return how a transformer is split, from its grid and its configuration.

    The place of experts is in a view of the grid, or in the configuration for megatron-core 0.16, which has no views.
    """
    config = copy.copy(config)
    config.pipeline_model_parallel_size = grid.pp
    chunks = config.virtual_pipeline_model_parallel_size if grid.pp > 1 else None
    layers = [
        get_num_layers_to_build(config, vp_stage=chunk if chunks else None, pp_rank=pp)
        for chunk in range(chunks or 1)
        for pp in range(grid.pp)
    ]
    split = tuple(layers) if len(set(layers)) > 1 else None
    grid = attrs.evolve(grid, sequence_parallel=config.sequence_parallel)
    if config.num_moe_experts and not has_view:
        cut = config.expert_tensor_parallel_size
        grid = attrs.evolve(grid, ep=config.expert_model_parallel_size, expert_tp=cut)
    return {"grid": grid, "split": split, "chunks": chunks or 1}


def sizes_of(config: TransformerConfig) -> dict[str, Any]:
    """Return the options that a `gpt` and a `vit` share, from Megatron's configuration."""
    routed: dict[str, Any] = {}
    if config.num_moe_experts:
        routed = {
            "experts": config.num_moe_experts,
            "top_k": config.moe_router_topk,
            "aux_loss": aux_weight(config),
        }
    return {
        "layers": config.num_layers,
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_query_groups,
        "ffn": config.moe_ffn_hidden_size if routed else config.ffn_hidden_size,
        "dropout": config.hidden_dropout,
        **routed,
    }


def _check_kind(spec: MegatronSpec, problems: list[Problem]) -> None:
    if not (isinstance(spec.module, type) and issubclass(spec.module, GPTModel)):
        name = getattr(spec.module, "__name__", str(spec.module))
        fact = f"is a {name}; a job's program runs the stages of a GPTModel, whose layers it knows."
        remedy = "Take a GPTModel; hybrid (Mamba) models have no plan yet."
        problems.append(Problem("language_model_spec", fact, remedy))


def _quantized(name: str, spec: MegatronSpec) -> Iterator[Problem]:
    """Yield settings of a module's networks by which they compute in other numbers than those of the job."""
    submodules = spec.submodules if isinstance(spec.submodules, Mapping) else {}
    encoders = [*submodules.get("encoders", {}).values(), *submodules.get("input_projections", ())]
    settings = {
        setting: value
        for config in itertools.chain.from_iterable(map(_configs, [spec, *encoders]))
        for setting, value in vars(config).items()
        if setting in _QUANTIZED and value
    }
    for setting, value in settings.items():
        fact = f"is set ({value}); a job computes in one precision, that of the job file."
        yield Problem(
            f"modules.{name}.{setting}", fact, f"Leave {setting} out; choose precision for all modules."
        )


_QUANTIZED = ("fp8", "fp4", "quant_recipe")
"""Settings of a `TransformerConfig` that quantize products, by module or by pattern."""


def _configs(spec: MegatronSpec) -> list[TransformerConfig]:
    """Return the configurations of transformers among the parameters of a specification."""
    return [value for value in (spec.params or {}).values() if isinstance(value, TransformerConfig)]


def _language(params: Mapping[str, Any], problems: list[Problem]) -> Gpt:
    tied = bool(params.get("share_embeddings_and_output_weights", False))
    config = params["config"]
    if config.hidden_dropout != config.attention_dropout:
        fact = f"drops {config.hidden_dropout} of hidden states and {config.attention_dropout} of attention."
        problems.append(Problem(f"modules.{LANGUAGE}.options.dropout", fact, "Make them the same."))
    return Gpt(**sizes_of(config), vocab=params["vocab_size"], tied_embeddings=tied)


def _modality(spec: MegatronSpec, grid: GridSpec, width: int, *, has_view: bool) -> ModuleSpec:
    encoders = list((spec.submodules or {}).get("encoders", {}).values())
    configs = list(itertools.chain.from_iterable(map(_configs, encoders)))
    if len(encoders) == len(configs) == 1:
        vit = Vit(**sizes_of(configs[0]))
        cut = _cut(configs[0], grid, has_view=has_view)
        return ModuleSpec(model="vit", options=vit, feeds=(LANGUAGE,), **cut)
    model = "mimogrid.shell.job.host:module"
    return ModuleSpec(model=model, options={}, feeds=(LANGUAGE,), grid=grid, width=width)
