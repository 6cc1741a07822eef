"""Buckets: their shards have every value of every parameter once, and equal cuts on all ranks."""

import itertools
import math

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cases import CASES
from jobs import job
from mimogrid.core.job.optimizers import states_of
from mimogrid.core.job.spec import OptimizerSpec
from mimogrid.core.topology.parse import assemble
from mimogrid.core.topology.topology import Topology
from mimogrid.core.update.buckets import (
    ALIGNMENT,
    Section,
    boxes,
    bucket_of,
    buckets_of,
    local_size,
    optimizer_bytes,
    share_of,
    shared_by,
)


sizes = st.lists(st.integers(1, 300), max_size=8).map(lambda found: {f"p{i}": n for i, n in enumerate(found)})


@given(sizes, st.integers(1, 5))
def test_parts_of_shards_are_every_value_once(sizes: dict[str, int], shards: int) -> None:
    """In order of shards, the parts of a parameter follow each other from its first value to its last."""
    bucket = bucket_of(Section.COMMON, sizes, shards=shards)
    ends = dict.fromkeys(sizes, 0)
    for shard in range(shards):
        for part in bucket.parts(shard):
            assert ends[part.name] == part.start
            ends[part.name] = part.stop
    assert sizes == ends


@given(sizes, st.integers(1, 5))
def test_shards_have_equal_parts_and_cut_where_vectors_end(sizes: dict[str, int], shards: int) -> None:
    """Every cut is a multiple of the alignment from where the parameter begins."""
    bucket = bucket_of(Section.COMMON, sizes, shards=shards)
    assert {bucket.size / shards} == {len(bucket.shard(shard)) for shard in range(shards)}
    for shard in range(shards):
        assert all(part.start % ALIGNMENT == 0 for part in bucket.parts(shard))


@st.composite
def _cuts(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    shape = tuple(draw(st.lists(st.integers(1, 4), max_size=4)))
    start = draw(st.integers(0, math.prod(shape) - 1))
    return shape, start, draw(st.integers(start + 1, math.prod(shape)))


@given(_cuts())
def test_blocks_are_the_values_that_they_cut_in_order(cut: tuple[tuple[int, ...], int, int]) -> None:
    """Block after block, row-major, the indices count from the first value to the last."""
    shape, start, stop = cut
    found = []
    for offsets, lengths in boxes(shape, start, stop):
        for index in itertools.product(*(range(o, o + n) for o, n in zip(offsets, lengths, strict=True))):
            flat = 0
            for i, extent in zip(index, shape, strict=True):
                flat = flat * extent + i
            found.append(flat)
    assert list(range(start, stop)) == found


@given(_cuts())
def test_blocks_are_few(cut: tuple[tuple[int, ...], int, int]) -> None:
    """There are at most two for each dim but the last, and one more."""
    shape, start, stop = cut
    assert len(list(boxes(shape, start, stop))) <= max(2 * len(shape) - 1, 1)


def _with(topology: Topology, **changes: object) -> Topology:
    spec = topology.spec
    rule = attrs.evolve(spec.optimizer, **{k: v for k, v in changes.items() if k != "precision"})
    precision = str(changes.get("precision", spec.precision))
    return assemble(attrs.evolve(spec, optimizer=rule, precision=precision), topology.source)


@pytest.mark.parametrize("text", CASES.values(), ids=CASES)
def test_a_sharded_update_keeps_as_much_together_as_a_replicated_one_on_each_rank(text: str) -> None:
    """The bytes of a sharded update, summed over the shards of a bucket, are those of a replicated update."""
    topology = job(text, batch=48)
    whole, shared = _with(topology), _with(topology, sharded=True)
    for module in topology.modules.values():
        if module.experts or len(module.stages) > module.grid.extent("pp"):
            continue
        only = {rank for rank in module.grid.ranks if len(topology.role(rank).stages) == 1}
        for ranks in module.grid.ranks_along(("cp", "dp")):
            if only >= set(ranks):
                parts = [optimizer_bytes(shared, rank) for rank in ranks]
                assert {sum(parts)} == {optimizer_bytes(whole, rank) for rank in ranks}


def test_bytes_are_those_of_states_and_main_weights() -> None:
    """Two moments of fp32 for each value, and in bf16 one main weight more with its padding."""
    topology = job("l gpt dp2", batch=8)
    module, (info,) = topology.modules["l"], topology.role(0).stages
    held = {p.name: local_size(module, p) for p in info.parameters}
    buckets = buckets_of(topology, info, 0)
    values = sum(held.values())
    assert 2 * 4 * values == optimizer_bytes(_with(topology, precision="fp32"), 0)
    main = sum(bucket.size for bucket in buckets)
    assert values < main
    assert 4 * (2 * values + main) == optimizer_bytes(_with(topology, precision="bf16"), 0)
    plain = _with(topology, name="sgd")
    assert () == states_of(OptimizerSpec(name="sgd"))
    assert 0 == optimizer_bytes(plain, 0)


# -- buckets -----------------------------------------------------------------------------------------------

SMALL = 0.001
"""Megabytes of a bucket: 250 values in fp32."""


@pytest.mark.parametrize(
    "text", [*CASES.values(), "l gpt tp2 dp2 sp x2 tied pp2"], ids=[*CASES, "all sections"]
)
def test_buckets_hold_every_parameter_that_trains_once(text: str) -> None:
    """A bucket has one section. All ranks of an all-reduce have the same number of buckets, of the same sizes."""
    topology = job(text, batch=48, bucket_mb=SMALL)
    for rank in topology.ranks:
        for info in topology.role(rank).stages:
            module = topology.modules[info.stage.module]
            buckets = buckets_of(topology, info, rank)
            held = module.held(info, module.position(rank).get("ep", 0))
            names = [span.name for bucket in buckets for span in bucket.spans]
            assert sorted(p.name for p in held if p.name in info.trainable) == sorted(names)
            for bucket in buckets:
                for other in shared_by(module, rank, bucket.section):
                    theirs = buckets_of(topology, info, other)
                    assert [(b.section, b.size) for b in buckets] == [(b.section, b.size) for b in theirs]


def test_a_bucket_is_full_once_it_has_its_megabytes() -> None:
    """Without its first parameter it is not full. Only the last of a section is smaller; later layers are first."""
    topology = job("l gpt dp2", bucket_mb=SMALL)
    (info,) = topology.role(0).stages
    room = SMALL * 1e6 / 4
    *full, last = (b for b in buckets_of(topology, info, 0) if b.section is Section.COMMON)
    assert len(full) > 1
    for bucket in full:
        held = sum(span.size for span in bucket.spans)
        assert held >= room > held - bucket.spans[0].size
    assert sum(span.size for span in last.spans) - last.spans[0].size < room
    order = [parameter.name for parameter in info.parameters]
    ends = [order.index(bucket.spans[0].name) for bucket in (*full, last)]
    assert sorted(ends, reverse=True) == ends


@pytest.mark.parametrize("text", ["l gpt pp2 dp2", "l gpt tp2 sp pp2", "l gpt dp2 x2 ep2"])
def test_shares_of_buckets_are_a_whole(text: str) -> None:
    """So the all-reduces of a stage take as long in one bucket as in several."""
    topology = job(text, bucket_mb=SMALL)
    for stage, info in topology.stages.items():
        rank = next(rank for rank in topology.ranks if info in topology.role(rank).stages)
        count = len(buckets_of(topology, info, rank))
        assert 1 == pytest.approx(sum(share_of(topology, stage, bucket) for bucket in range(count)))
