"""What a layer saves for its backward is what the plan says, within a tenth."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import stages
from mimogrid.core.base.samples import Sample
from mimogrid.core.job.models import Gpt
from mimogrid.core.job.spec import ModuleSpec
from mimogrid.core.pricing.footprint import Computed, saved_values
from stages import Alone, batch_of, build, step_with, topology_of, world_of_one


LENGTHS = (100, 30, 200, 64)


@pytest.fixture(scope="module")
def alone() -> Iterator[Alone]:
    """A world of one."""
    with world_of_one() as groups:
        yield groups


def saved(alone: Alone, layers: int, recompute: str, **options: Any) -> tuple[float, float]:
    """Return how many values a language model saves of some samples, and what the plan says."""
    model = Gpt(layers=layers, hidden=64, heads=4, vocab=32, **options)
    topology = topology_of({"l": ModuleSpec(model="gpt", options=model, recompute=recompute)}, sequence=256)
    step = step_with(topology, *(Sample(i, length, {}) for i, length in enumerate(LENGTHS)))
    built = build(topology, alone, torch.float32)
    weights = {w.untyped_storage().data_ptr() for w in built["l"][0].parameters()}
    seen: dict[int, torch.Tensor] = {}  # kept, so that no storage is taken for another one

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        stages.run(topology, built, step, batch_of(step, torch.float32))
    module = topology.modules["l"]
    planned = saved_values(module, module.stages[0], Computed.of(step, module, 0, 0), recompute)
    return sum(t.untyped_storage().nbytes() / 4 for p, t in seen.items() if p not in weights), planned


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("options", [{}, {"kv_heads": 2, "gated": True, "activation": "silu"}])
def test_a_layer_saves_what_the_plan_says(alone: Alone, recompute: str, options: dict[str, Any]) -> None:
    """Three layers beside one, so that the ends of the model do not count."""
    (few, few_planned), (many, planned) = (saved(alone, n, recompute, **options) for n in (1, 3))
    assert many - few == pytest.approx(planned - few_planned, rel=0.1)
