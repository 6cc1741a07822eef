"""Nodes: ranks that share a layer are on one node, and no place is left empty without need."""

from hypothesis import given
from hypothesis import strategies as st

from layouts import job, layouts
from mimogrid.core.job.spec import JobSpec, SourceFacts
from mimogrid.core.topology.nodes import cuts_of, ranks_of_nodes
from mimogrid.core.topology.parse import assemble


FACTS = SourceFacts(sequence=32, features={"enc": 5})


@given(layouts(), st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_no_tp_group_is_on_two_nodes(spec: JobSpec, places: list[int]) -> None:
    """Every rank has a node; a node takes no more than it has places, and one more would not do."""
    topology = assemble(spec, FACTS)
    taken = ranks_of_nodes(topology, places)
    cuts = cuts_of(topology)
    assert {0, topology.world_size} <= cuts
    if taken is None:
        return
    assert topology.world_size == sum(taken)
    node_of = [node for node, count in enumerate(taken) for _ in range(count)]
    for module in topology.modules.values():
        for rank in module.grid.ranks:
            group = module.grid.group_of(rank, "tp")
            assert 1 == len({node_of[member] for member in group})
    begin = 0
    for count, most in zip(taken, places, strict=True):
        assert count <= most
        assert not [cut for cut in cuts if begin + count < cut <= begin + most]
        begin += count


def test_too_few_places_are_said() -> None:
    """Also where there are as many as ranks, but none for a whole group."""
    topology = assemble(job("enc(2,1,1)@0 lm(2,1,1)@2"), FACTS)
    assert [(2, 2), None, None, (2, 2)] == [
        ranks_of_nodes(topology, places) for places in ((2, 2), (3, 1), (1, 1, 1, 1), (3, 3))
    ]
