"""Stages: a whole topology of stages chained by hand in one process, for tests of the modules alone."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import attrs
import torch
import torch.distributed as dist
from torch import Tensor

from mimogrid.core.base.samples import Sample
from mimogrid.core.job.models import Gpt, Regressor, Vit
from mimogrid.core.job.spec import BatchSpec, DataSpec, JobSpec, ModuleSpec, SourceFacts
from mimogrid.core.step.step import Share, Step, step_of
from mimogrid.core.topology.parse import parse
from mimogrid.core.topology.topology import Topology
from mimogrid.shell.megatron import cpu
from mimogrid.shell.modules.construction import build_stage
from mimogrid.shell.modules.interface import StageModule, named_weights
from mimogrid.shell.modules.weights import draw


CPU = torch.device("cpu")


@attrs.frozen
class Alone:
    """The groups of a module on one rank, or on the tp ranks of `tp`."""

    tp: dist.ProcessGroup
    cp: dist.ProcessGroup
    dp: dist.ProcessGroup
    pp: dist.ProcessGroup
    together: dist.ProcessGroup
    expert_tp: dist.ProcessGroup
    tie: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, tp: dist.ProcessGroup, one: dist.ProcessGroup) -> "Alone":
        """All axes but tp are of size 1."""
        return cls(tp, one, one, one, one, one)


@contextlib.contextmanager
def world_of_one() -> Iterator[Alone]:
    """A gloo world of one rank, with megatron on the CPU."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    world = dist.group.WORLD
    assert world is not None
    try:
        with cpu.on_device(CPU):
            yield Alone.of(tp=world, one=world)
    finally:
        dist.destroy_process_group()


def topology_of(modules: Mapping[str, ModuleSpec], **facts: object) -> Topology:
    """Parse a job of these modules with a batch large enough for all tests."""
    spec = JobSpec(modules=modules, data=DataSpec(source="none"), batch=BatchSpec(global_size=8), seed=7)
    return parse(spec, SourceFacts(**facts))


def build(
    topology: Topology, groups: Alone, dtype: torch.dtype = torch.float64
) -> dict[str, list[StageModule]]:
    """Build every stage of every module."""
    return {
        name: [build_stage(topology, info, groups, device=CPU, dtype=dtype) for info in module.stages]
        for name, module in topology.modules.items()
    }


def batch_of(
    step: Step, dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[dict[str, dict[str, Tensor]]]:
    """Draw what a source would load for each sample of a step; see `plain`."""
    generator = torch.Generator().manual_seed(seed)
    return [_sample(step, sample, dtype, generator) for sample in step.samples]


def _sample(
    step: Step, sample: Sample, dtype: torch.dtype, generator: torch.Generator
) -> dict[str, dict[str, Tensor]]:
    topology = step.topology
    emitted = topology.graph.rows_out(sample)
    data: dict[str, dict[str, Tensor]] = {}
    for name, module in topology.modules.items():
        model, node, count = module.model, topology.graph.nodes[name], emitted[name]
        given: dict[str, Tensor] = {}
        if node.is_source:
            width = model.features if isinstance(model, Vit) else model.hidden
            read = sample.rows.get(name, 0)
            given["rows"] = torch.randn(read, width, dtype=dtype, generator=generator)
        if isinstance(model, Gpt):
            rows = count - sample.length
            tokens = torch.randint(model.vocab, (count,), generator=generator)
            tokens[list(sample.placeholders.get(name, range(rows)))] = -1
            given["tokens"] = tokens
            given["labels"] = torch.randint(model.vocab, (count,), generator=generator)
            given["loss_weights"] = torch.rand(count, dtype=dtype, generator=generator)
            given["loss_weights"][tokens < 0] = 0
        if isinstance(model, Regressor):
            given["targets"] = torch.randn(count, model.outputs, dtype=dtype, generator=generator)
        data[name] = given
    return data


def inputs_of(name: str, batch: Sequence[Mapping[str, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """Return what a module gets of a batch, flat."""
    return {key: torch.cat([data[name][key] for data in batch]) for key in batch[0][name]}


def run(
    topology: Topology,
    stages: Mapping[str, Sequence[StageModule]],
    step: Step,
    batch: Sequence[Mapping[str, Mapping[str, Tensor]]],
) -> dict[str, dict[str, Tensor]]:
    """Run every stage of every module on all samples; what each last stage gives, by module."""
    outputs: dict[str, dict[str, Tensor]] = {}
    for name in topology.graph.order:
        share = whole_share(step, name)
        given = inputs_of(name, batch)
        fed = {f: outputs[f][name] for f in topology.graph.nodes[name].feeders}
        pipeline_link: dict[str, Tensor] = {}
        for stage in stages[name]:
            first = {k: v for k, v in given.items() if k in ("rows", "tokens")} | fed
            last = {k: v for k, v in given.items() if k not in ("rows", "tokens")}
            reads = (first if stage.info.first else pipeline_link) | (last if stage.info.last else {})
            pipeline_link = stage(reads, share)
            if not stage.info.last:
                assert pipeline_link[name].shape == step.hidden_shape(stage.info.stage, 0, 0)
        outputs[name] = pipeline_link
    return outputs


def whole_share(step: Step, name: str) -> Share:
    """Return the share of a module that has all samples in one microbatch."""
    return step.share(name, 0, 0)


def full_weights(topology: Topology, dtype: torch.dtype = torch.float64) -> dict[str, dict[str, Tensor]]:
    """Return every initial weight of every module at full size, as leaves that take gradients."""
    return {
        name: {
            p.name: draw(p, seed=topology.spec.seed, module=name).to(dtype).requires_grad_()
            for p in module.parameters
        }
        for name, module in topology.modules.items()
    }


def gradients(stages: Mapping[str, Sequence[StageModule]]) -> dict[str, dict[str, Tensor]]:
    """Return each module's gradients by name; copies of a tied weight are summed."""
    found: dict[str, dict[str, Tensor]] = {}
    for module, own in stages.items():
        sums = found.setdefault(module, {})
        for stage in own:
            for name, weight in named_weights(stage).items():
                assert weight.grad is not None, (module, name)
                sums[name] = sums[name] + weight.grad if name in sums else weight.grad
    return found


def step_with(topology: Topology, *samples: Sample) -> Step:
    """Return a step of these samples."""
    return step_of(topology, samples)
