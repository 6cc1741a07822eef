"""The base of LoRA may be held in half precision: a module is then the one whose matrices were rounded once."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import jobs
import stages
from mimogrid.core.job.lora import Lora
from mimogrid.core.job.models import Gpt
from mimogrid.core.job.spec import ModuleSpec
from mimogrid.core.pricing.footprint import kept
from mimogrid.core.step.step import Step
from mimogrid.core.topology.topology import Topology
from mimogrid.shell.modules.construction import round_weights
from mimogrid.shell.modules.interface import StageModule, named_weights
from stages import Alone


MODELS = {
    "dense": {"gated": True, "kv_heads": 2, "dropout": 0.1},
    "tied": {"tied_embeddings": True},
    "experts": {"experts": 4},
}
LORA = Lora(rank=2, targets=("q", "out"), alpha=5.0)


@pytest.fixture(scope="module")
def alone() -> Iterator[Alone]:
    """A world of this process."""
    with stages.world_of_one() as groups:
        yield groups


def topology_of(model: str, base: str, **fields: Any) -> Topology:
    """Return a language model with LoRA."""
    options = Gpt(layers=2, hidden=16, heads=4, vocab=32, **MODELS[model])
    lora = Lora(rank=2, targets=LORA.targets, alpha=LORA.alpha, base=base)
    return stages.topology_of(
        {"lm": ModuleSpec(model="gpt", options=options, lora=lora, **fields)}, sequence=16
    )


def built(topology: Topology, alone: Alone) -> StageModule:
    """Return its one stage in the precision of the job, with a pair that does something."""
    ((stage,),) = stages.build(topology, alone, torch.float32).values()
    round_weights(stage, topology)
    with torch.no_grad():
        for name, weight in named_weights(stage).items():
            if name.endswith(".b"):
                weight.fill_(0.1)
            if weight.requires_grad:
                weight.grad = torch.zeros_like(weight)
    return stage.eval()


def step_on(topology: Topology) -> tuple[Step, Any]:
    """Return a step and what a source loads for it."""
    step = jobs.step_with(topology, text=6)
    return step, stages.batch_of(step, torch.float32)


def loss_of(topology: Topology, stage: StageModule) -> torch.Tensor:
    """Return the loss of a step."""
    step, batch = step_on(topology)
    return stages.run(topology, {"lm": [stage]}, step, batch)["lm"]["loss"]


@pytest.mark.parametrize("model", MODELS)
def test_it_is_the_model_with_rounded_matrices(alone: Alone, model: str) -> None:
    """Loss and gradients are bitwise those of a module whose matrices were rounded; it holds the bytes of the plan."""
    narrow, wide = (topology_of(model, base) for base in ("bf16", ""))
    first, second = built(narrow, alone), built(wide, alone)
    halves = {n for n, w in named_weights(first).items() if w.dtype is torch.bfloat16}
    assert {n for n in halves if "lora" in n or "norm" in n or "router" in n or n.endswith(".bias")} == set()
    assert {"embedding.weight", "layers.1.attention.qkv.weight"} < halves
    held = sum(w.numel() * w.element_size() for w in named_weights(first).values())
    assert kept(narrow, 0).weights == held < 0.6 * kept(wide, 0).weights
    with torch.no_grad():
        for name in halves:
            weight = named_weights(second)[name]
            weight.copy_(weight.bfloat16())
    losses = [loss_of(of, stage) for of, stage in ((narrow, first), (wide, second))]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    found = [
        {n: w.grad for n, w in named_weights(stage).items() if w.requires_grad} for stage in (first, second)
    ]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())
    assert all(bool(grad.any()) for grad in found[0].values())


def test_a_backward_widens_the_matrices_again(alone: Alone) -> None:
    """Between forward and backward nothing but the half is kept: where the head becomes zero, so do all gradients."""
    topology = topology_of("dense", "bf16")
    stage = built(topology, alone)
    loss = loss_of(topology, stage)
    named_weights(stage)["output.weight"].data.zero_()
    loss.backward()
    assert not any(bool(w.grad.any()) for w in named_weights(stage).values() if w.grad is not None)
