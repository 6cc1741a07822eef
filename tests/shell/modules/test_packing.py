"""Packing: the block that a stage computes has the shape of the plan, and holds every row once."""

import attrs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import job, step_with
from mimogrid.core.base.zigzag import ZigZag
from mimogrid.core.step.step import Step
from mimogrid.core.topology.topology import Module
from mimogrid.shell.modules.packing import Packing, pack_rows, pack_text
from scale import drawn


CPU = torch.device("cpu")
SEQUENCE = 64
"""A multiple of the parts that any of the drawn grids cuts a sequence into."""


def grids(*tp: int) -> st.SearchStrategy[str]:
    """Draw the grid of a module, in words."""
    cp, dp = st.sampled_from([1, 2, 4]), st.sampled_from([1, 2])
    return st.builds("tp{} cp{} dp{}{}".format, st.sampled_from(tp), cp, dp, st.sampled_from(["", " sp"]))


ROWS = st.lists(st.integers(0, 7), min_size=1, max_size=8)


def packings(step: Step, module: Module, dp_rank: int, microbatch: int) -> list[Packing]:
    """Pack a share on each of its cp ranks, padded to the multiple that layers need."""
    share, packed = step.share(module.name, dp_rank, microbatch), []
    for cut in (ZigZag(rank, module.cp) for rank in range(module.cp)):
        multiple = (module.grid.extent("tp") if module.sequence_parallel else 1) * len(cut.chunks)
        if module.name == "l":
            packed.append(pack_text(share, multiple=multiple, device=CPU, cut=cut))
        else:
            packed.append(pack_rows(share, multiple=multiple, dtype=torch.float32, device=CPU, cut=cut))
    return packed


@settings(max_examples=drawn(60), deadline=None)
@given(grids(1, 2, 3), grids(1, 2, 4), ROWS)
def test_blocks_have_the_shapes_of_the_plan(source: str, target: str, rows: list[int]) -> None:
    """(positions, samples) of each rank is what the plan says that stages hand on; the ranks hold every row once."""
    topology = job(f"v vit {source} > l; l gpt {target}", batch=16)
    topology = attrs.evolve(topology, source=attrs.evolve(topology.source, sequence=SEQUENCE))
    step = step_with(topology, {"v": rows})
    for name, module in topology.modules.items():
        for k in range(module.microbatches):
            for dp_rank in range(module.dp_size):
                share, hidden = (
                    step.share(name, dp_rank, k),
                    step.hidden_shape(module.stages[0].stage, dp_rank, k),
                )
                every = packings(step, module, dp_rank, k)
                assert {hidden[:2]} == {(packing.positions, packing.samples) for packing in every}
                assert sum(share.lengths) == sum(len(packing.outgoing.unique()) for packing in every)
                for packing in every:
                    assert bool((packing.outgoing < hidden[0] * hidden[1]).all())
