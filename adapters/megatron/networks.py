"""The parts of a `MimoStages` or `MimoModel` on this rank as networks that a job's program calls, stage by stage."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from mimogrid.adapters.megatron.experts import unable_experts
from mimogrid.adapters.megatron.grids import LANGUAGE, roles_by_chunk
from mimogrid.adapters.megatron.language import LanguageStage
from mimogrid.adapters.megatron.modality import Arrange, ModalityNetwork
from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.topology.roles import RankRole
from mimogrid.core.topology.topology import Module, Topology
from mimogrid.shell.job.jobs import Job


def networks_of(
    model: nn.Module | Sequence[nn.Module],
    job: Job,
    rank: int,
    encoder_inputs: Mapping[str, str | Arrange] | None = None,
) -> dict[str, nn.Module]:
    """Return the parts of a `MimoStages` or `MimoModel` on this rank as networks by module.

    On a rank with several chunks of a module (virtual stages) `model` is a list with one model for each chunk; modules
    with one chunk are in the first. `encoder_inputs` has for a modality the name of the encoder's argument that takes
    the rows of a microbatch, or a function from rows to arguments. Without it the encoder gets the tensors of the
    samples by name. Raises PlanError for parts that a program cannot call (`LanguageStage`, `ModalityNetwork`), and for
    parts that the rank hosts and the model lacks.
    """
    models = [model] if isinstance(model, nn.Module) else list(model)
    roles = roles_by_chunk(job.topology, rank)
    if len(models) != len(roles):
        fact = f"rank {rank} has {len(roles)} chunks in the job, and {len(models)} models."
        remedy = "Give a list with one for each, in order; see virtual_pipeline_model_parallel_size."
        raise PlanError([Problem("model", fact, remedy)])
    found: dict[str, list[nn.Module]] = {}
    for parts, role in zip(models, roles, strict=True):
        for name, network in _of_chunk(parts, role, job.topology, encoder_inputs or {}):
            found.setdefault(name, []).append(network)
    chunks = {name: written.chunks for name, written in job.spec.modules.items()}
    return {name: nn.ModuleList(of) if chunks[name] > 1 else of[0] for name, of in found.items()}


def _of_chunk(
    parts: Any, role: RankRole, topology: Topology, inputs: Mapping[str, str | Arrange]
) -> Iterator[tuple[str, nn.Module]]:
    for name, info in role.modules.items():
        if name == LANGUAGE and parts.language_model is not None:
            gpt = unwrapped(parts.language_model)
            yield name, LanguageStage(gpt, topology=topology, name=name, rank=role.rank)
        elif name in parts.modality_submodules:
            modality = unwrapped(parts.modality_submodules[name])
            _check_experts(modality, topology, name, info.position)
            network = ModalityNetwork(modality, inputs.get(name), stage=info)
            _check_cut(network, topology.modules[name])
            yield name, network
        else:
            fact = f"is hosted by rank {role.rank}, whose model has no part of it."
            remedy = "Build the model on the grids that the job has."
            raise PlanError([Problem(f"modules.{name}", fact, remedy)])


def _check_experts(modality: nn.Module, topology: Topology, name: str, position: Mapping[str, int]) -> None:
    """Raise PlanError if a program cannot train the experts of an encoder."""
    module = topology.modules[name]
    problems = list(unable_experts(modality, module, position, topology.samples_per_microbatch[name]))
    if module.aux_loss:
        fact = "has an auxiliary loss, which in a job's program only Megatron's language model can have."
        problems.append(Problem(f"modules.{name}.options.aux_loss", fact, "Set moe_aux_loss_coeff=0."))
    if problems:
        raise PlanError(problems)


def _check_cut(network: ModalityNetwork, module: Module) -> None:
    """Raise PlanError if an encoder and the plan split positions over different numbers of cp ranks."""
    if network.cut.size != module.cp:
        fact = (
            f"has cp={module.cp} in the job, and the transformer block of its encoder cp={network.cut.size}."
        )
        remedy = "Build it over the job's groups; an encoder without a transformer block has dp ranks only."
        raise PlanError([Problem(f"modules.{module.name}.grid.cp", fact, remedy)])


def unwrapped(module: Any) -> nn.Module:
    """Return the model inside Megatron's wrappers (`Float16Module`, `DistributedDataParallel`)."""
    while hasattr(module, "module") and isinstance(module.module, nn.Module):
        module = module.module
    return module  # type: ignore[no-any-return]
