"""The operations that the plan counts are those that torch counts in the networks that run."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mimogrid.core.base.samples import Sample
from mimogrid.core.job.models import BuiltIn, Gpt, Vit
from mimogrid.core.job.spec import ModuleSpec
from mimogrid.core.pricing.flops import stage_flops
from mimogrid.core.step.step import Step
from mimogrid.core.topology.topology import Stage, Topology
from mimogrid.shell.job.published import published
from stages import Alone, batch_of, build, inputs_of, step_with, topology_of, whole_share, world_of_one
from tiny_checkpoints import published_modules, save


VIT = Vit(layers=2, hidden=16, heads=4, kv_heads=2)
GPT = Gpt(layers=2, hidden=32, heads=4, kv_heads=2, ffn=40, vocab=24)
ROWS, TEXT = 6, 4


@pytest.fixture(scope="module")
def alone() -> Iterator[Alone]:
    """A world of one."""
    with world_of_one() as groups:
        yield groups


def counted(alone: Alone, topology: Topology, step: Step) -> dict[str, tuple[int, int]]:
    """What torch counts forward and backward in each module."""
    batch = batch_of(step)
    found: dict[str, tuple[int, int]] = {}
    fed: dict[str, Tensor] = {}
    for name, [stage] in build(topology, alone).items():
        reads = {**inputs_of(name, batch), **fed}
        forward, backward = FlopCounterMode(display=False), FlopCounterMode(display=False)
        with sdpa_kernel(SDPBackend.MATH):
            with forward:
                outputs = stage(reads, whole_share(step, name))
            with backward:
                torch.stack([output.sum() for output in outputs.values()]).sum().backward()
        found[name] = forward.get_total_flops(), backward.get_total_flops()
        wanted = topology.modules["language"].stages[0].trains_upstream
        fed = {
            feeder: rows.detach().requires_grad_(wanted)
            for feeder, rows in zip([name], outputs.values(), strict=True)
        }
    return found


def unmasked(model: BuiltIn, length: int, samples: int) -> int:
    """Operations of a causal attention's other half, which torch does not leave out of its count."""
    pairs = length * length - length * (length + 1) // 2 if model.causal else 0
    return model.layers * samples * 4 * pairs * model.heads * model.head_width


def mixed(model: BuiltIn, positions: int) -> int:
    """Operations of adding up what a token's experts give, which the plan leaves out."""
    return sum(
        2 * positions * model.top_k * model.hidden for n in range(model.layers) if model.has_experts(n)
    )


@pytest.mark.parametrize(
    ("vision", "language"),
    [
        ({}, {}),
        ({"trainable": ("projector.*",)}, {}),
        ({"trainable": ("layers.1.*",)}, {"frozen": True}),
        ({"trainable": ("layers.1.mlp.*",)}, {"trainable": ("layers.0.attention.out.*", "output.*")}),
    ],
)
def test_torch_counts_the_same(alone, vision, language):
    """In both directions, with whole and with partly frozen modules."""
    topology = topology_of(
        {
            "vision": ModuleSpec(model="vit", options=VIT, feeds=("language",), **vision),
            "language": ModuleSpec(model="gpt", options=GPT, **language),
        },
        sequence=ROWS + TEXT,
        features={"vision": 5},
    )
    step = step_with(topology, *(Sample(id=i, length=TEXT, rows={"vision": ROWS}) for i in range(8)))
    torch_counts = counted(alone, topology, step)
    for name, model, length in (("vision", VIT, ROWS), ("language", GPT, ROWS + TEXT)):
        planned = stage_flops(step)[Stage(name, 0)]
        more = unmasked(model, length, samples=8)
        backward = planned.input_gradient + planned.weight_gradient
        assert (planned.forward + more, backward + 2 * more) == torch_counts[name]


WHOLES = {
    "llava": {"vision": ((1, 3, 3),)},
    "qwen2.5-vl": {"vision": ((1, 4, 6), (1, 2, 2))},
    "qwen3-vl": {"vision": ((1, 4, 6), (2, 2, 2))},
    "qwen2-audio": {"audio": ((8,), (20,))},
    "qwen3-moe": {},
}


@pytest.mark.parametrize("name", WHOLES)
def test_torch_counts_the_same_in_published_models(alone: Alone, name: str, tmp_path: Path) -> None:
    """In stems, windows, mergers, deepstack and gated experts."""
    grids = WHOLES[name]
    modules = published_modules(published(save(name, tmp_path)).model)
    topology = topology_of(modules, sequence=64)
    rows = {module: sum(map(math.prod, of)) for module, of in grids.items()}
    step = step_with(topology, *(Sample(id=i, length=TEXT, rows=rows, segments=grids) for i in range(8)))
    for module, torch_count in counted(alone, topology, step).items():
        planned, model = stage_flops(step)[Stage(module, 0)], modules[module].options
        assert isinstance(model, BuiltIn)
        positions = step.sizes[0].positions[module]
        more = unmasked(model, positions, samples=8) + mixed(model, 8 * positions)
        backward = planned.input_gradient + planned.weight_gradient
        assert (planned.forward + more, backward + 2 * more) == torch_count
