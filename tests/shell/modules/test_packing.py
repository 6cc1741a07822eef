"""Packing: the row that a stage computes has the shape of the plan, and holds every row once."""

import attrs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import job, step_with
from mimogrid.core.base.samples import prefix_sums
from mimogrid.core.base.zigzag import ZigZag
from mimogrid.core.step.step import Share, Step
from mimogrid.core.topology.topology import Module
from mimogrid.shell.modules.block import block_of_rows, block_of_text
from mimogrid.shell.modules.packing import Entries, Packing, pack
from scale import drawn


CPU = torch.device("cpu")
SEQUENCE = 64
"""A multiple of the parts that any of the drawn grids cuts a block into."""


def grids(*tp: int) -> st.SearchStrategy[str]:
    """Draw the grid of a module, in words."""
    cp, dp = st.sampled_from([1, 2, 4]), st.sampled_from([1, 2])
    return st.builds("tp{} cp{} dp{}{}".format, st.sampled_from(tp), cp, dp, st.sampled_from(["", " sp"]))


ROWS = st.lists(st.integers(0, 7), min_size=1, max_size=8)


def shares(step: Step):
    """Yield every share of a step with its module and the hidden shape of a rank."""
    for name, module in step.topology.modules.items():
        for k in range(module.microbatches):
            for dp_rank in range(module.dp_size):
                hidden = step.hidden_shape(module.stages[0].stage, dp_rank, k)
                yield module, step.share(name, dp_rank, k), hidden


def assert_whole(share: Share, every: list[Entries], length: int) -> None:
    """The ranks hold every position once, in entries of their own."""
    assert sum(share.positions) == sum(len(entries.outgoing.unique()) for entries in every)
    for entries in every:
        assert sorted(entries.incoming.tolist()) == sorted(entries.outgoing.tolist())
        assert bool((entries.outgoing < length).all())


@settings(max_examples=drawn(60), deadline=None)
@given(grids(1, 2, 3), grids(1, 2, 4), ROWS)
def test_rows_have_the_shapes_of_the_plan(source: str, target: str, rows: list[int]) -> None:
    """The length of each rank's row is what the plan says that stages hand on; every position keeps its number."""
    step = step_with(job(f"v vit {source} > l; l gpt {target}", batch=16), {"v": rows})
    for module, share, hidden in shares(step):
        length = hidden[0]
        assert length % module.multiple == 0 == hidden[1] - 1
        cuts = [ZigZag(rank, module.cp) for rank in range(module.cp)]
        every = [pack(share, length=length, device=CPU, cut=cut) for cut in cuts]
        assert_whole(share, every, length)
        starts = prefix_sums(share.positions)
        for packing in every:
            assert_numbered(packing, share, starts)


def assert_numbered(packing: Packing, share: Share, starts: tuple[int, ...]) -> None:
    """Each position knows its sample, and where in it it is; its share's other positions are in its segment."""
    total = starts[-1]
    mine = packing.portion.outgoing if packing.portion else torch.arange(total)
    samples = torch.arange(len(share.positions)).repeat_interleave(torch.tensor(share.positions))
    assert torch.equal(
        samples[mine][packing.outgoing.argsort()], packing.row.sample_of[packing.row.entries.argsort()]
    )
    within = torch.arange(total) - torch.tensor(starts)[samples]
    assert torch.equal(within[mine], packing.row.positions[0, packing.outgoing])
    if packing.row.order is not None:
        assert total == len(packing.row.order.unique())


@settings(max_examples=drawn(30), deadline=None)
@given(grids(1, 2, 3), grids(1, 2, 4), ROWS)
def test_blocks_have_the_shapes_of_the_plan(source: str, target: str, rows: list[int]) -> None:
    """Networks of host programs compute (positions, samples), and the ranks hold every position once."""
    topology = job(f"v vit {source} > l; l gpt {target}", batch=16)
    topology = attrs.evolve(topology, source=attrs.evolve(topology.source, sequence=SEQUENCE))
    step = step_with(topology.with_padded(topology.modules), {"v": rows})
    for module, share, hidden in shares(step):
        every = [_block(module, share, ZigZag(rank, module.cp)) for rank in range(module.cp)]
        assert {hidden[:2]} == {(block.positions, block.samples) for block in every}
        assert_whole(share, every, hidden[0] * hidden[1])


def _block(module: Module, share: Share, cut: ZigZag):
    if module.name == "l":
        return block_of_text(share, device=CPU, cut=cut)
    multiple = (module.grid.extent("tp") if module.sequence_parallel else 1) * len(cut.chunks)
    return block_of_rows(share, multiple=multiple, dtype=torch.float32, device=CPU, cut=cut)
