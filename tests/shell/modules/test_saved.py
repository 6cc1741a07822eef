"""What a layer saves for its backward is what the plan says, within a tenth."""

import math
from collections.abc import Iterator
from typing import Any

import attrs
import pytest
import torch

import stages
from mimogrid.core.base.samples import Sample
from mimogrid.core.job.models import Gpt, Vit
from mimogrid.core.job.projectors import Projector
from mimogrid.core.job.spec import ModuleSpec
from mimogrid.core.pricing.footprint import Computed, saved_values
from mimogrid.core.topology.topology import Topology
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
    return seen_in(alone, topology, *(Sample(i, length, {}) for i, length in enumerate(LENGTHS)))


def seen_in(alone: Alone, topology: Topology, *samples: Sample) -> tuple[float, float]:
    """Return how many values all modules of one stage save of samples, and what the plan says."""
    step = step_with(topology, *samples)
    built = build(topology, alone, torch.float32)
    weights = {w.untyped_storage().data_ptr() for (stage,) in built.values() for w in stage.parameters()}
    seen: dict[int, torch.Tensor] = {}  # kept, so that no storage is taken for another one

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        stages.run(topology, built, step, batch_of(step, torch.float32))
    planned = sum(
        saved_values(
            module,
            module.stages[0],
            Computed.of(step, module, 0, 0),
            topology.spec.modules[name].recompute,
        )
        for name, module in topology.modules.items()
    )
    return sum(t.untyped_storage().nbytes() / 4 for p, t in seen.items() if p not in weights), planned


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("options", [{}, {"kv_heads": 2, "gated": True, "activation": "silu"}])
def test_a_layer_saves_what_the_plan_says(alone: Alone, recompute: str, options: dict[str, Any]) -> None:
    """Three layers beside one, so that the ends of the model do not count."""
    (few, few_planned), (many, planned) = (saved(alone, n, recompute, **options) for n in (1, 3))
    assert many - few == pytest.approx(planned - few_planned, rel=0.1)


IMAGES, SOUNDS = ((1, 8, 12), (1, 4, 16)), ((120,), (81,))
PLAIN = Vit(layers=1, hidden=32, heads=4, features=4, final_norm=False)
TOWERS = {
    "norms, wide rows and an mlp": (
        IMAGES,
        PLAIN,
        Vit(layers=1, hidden=32, heads=4, features=200, pre_norm=True),
        Projector(kind="mlp", ffn=300),
    ),
    "a merger": (
        IMAGES,
        attrs.evolve(PLAIN, merge=2),
        attrs.evolve(PLAIN, merge=2, features=96),
        Projector(kind="merger"),
    ),
    "a merger for inner rows too": (
        IMAGES,
        attrs.evolve(PLAIN, merge=2, deepstack_layers=(0,)),
        attrs.evolve(PLAIN, merge=2, deepstack_layers=(0,), pre_norm=True),
        Projector(kind="merger", ffn=500),
    ),
    "convolutions": (
        SOUNDS,
        Vit(layers=1, hidden=32, heads=4, features=4, stem="whisper", position_count=64, positions="learned"),
        Vit(
            layers=1, hidden=32, heads=4, features=80, stem="whisper", position_count=64, positions="learned"
        ),
        Projector(kind="mlp", ffn=64),
    ),
}


@pytest.mark.parametrize(("grids", "plain", "rich", "projector"), TOWERS.values(), ids=TOWERS)
def test_the_ends_of_a_tower_save_what_the_plan_says(
    alone: Alone, grids: tuple[tuple[int, ...], ...], plain: Vit, rich: Vit, projector: Projector
) -> None:
    """Two towers with the same layers: their ends are what differs."""
    inner = len(plain.deepstack_layers)
    text = Gpt(layers=1, hidden=16, heads=2, vocab=32, deepstack=inner)
    small = Projector(kind="merger", ffn=8) if inner else Projector(kind="linear")

    def of(tower: Vit, projector: Projector) -> tuple[float, float]:
        vision = ModuleSpec(model="vit", options=tower, feeds=("l",), projector={"l": projector})
        topology = topology_of(
            {"v": vision, "l": ModuleSpec(model="gpt", options=text)},
            sequence=256,
            features={"v": tower.features},
        )
        rows = sum(math.prod(grid) for grid in grids)
        return seen_in(alone, topology, Sample(0, 9, {"v": rows}, segments={"v": grids}))

    (few, few_planned), (many, planned) = of(plain, small), of(rich, projector)
    assert many - few == pytest.approx(planned - few_planned, rel=0.1)
