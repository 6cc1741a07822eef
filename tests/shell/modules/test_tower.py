"""Towers as stages: what trains in them."""

import torch

from mimogrid.core.base.samples import Sample
from mimogrid.core.job.models import Regressor, Vit
from mimogrid.core.job.spec import ModuleSpec
from stages import batch_of, build, gradients, run, step_with, topology_of, world_of_one


SIZES = {"layers": 2, "hidden": 12, "heads": 3}
SAMPLE = Sample(id=0, length=0, rows={"vision": 12}, segments={"vision": ((1, 2, 4), (1, 2, 2))})


def test_keys_without_a_bias() -> None:
    """The rows of the fused bias that are keys' get no gradient, and all others do."""
    tower = Vit(**SIZES, features=5, k_bias=False)
    topology = topology_of(
        {
            "vision": ModuleSpec(model="vit", options=tower, feeds=("head",)),
            "head": ModuleSpec(model="regressor", options=Regressor(**SIZES)),
        },
        rows={"vision": 12},
    )
    with world_of_one() as groups:
        stages = build(topology, groups)
        step = step_with(topology, SAMPLE)
        run(topology, stages, step, batch_of(step))["head"]["loss"].backward()
        bias = gradients(stages)["vision"]["layers.1.attention.qkv.bias"].view(3, 3, 4)
    queries, keys, values = bias.unbind(dim=1)
    assert not keys.any()
    assert queries.all()
    assert values.all()
    assert torch.isfinite(bias).all()
