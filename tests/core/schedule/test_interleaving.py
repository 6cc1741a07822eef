"""Interleaved orders: the virtual stages of a rank take turns as in the literature."""

import textwrap

import pytest

from jobs import job
from mimogrid.core.schedule.orders import order_of
from mimogrid.core.topology.topology import Topology


def by_rank(topology: Topology, module: str) -> str:
    """What the ranks of a pipeline do, an action as kind, microbatch and chunk: F2.1."""
    queues: dict[int, list[str]] = {}
    for action in order_of(topology).actions:
        if action.stage.module == module:
            word = f"{action.kind.value}{action.microbatch}.{action.stage.chunk}"
            queues.setdefault(action.stage.pp, []).append(word)
    return "\n".join(f"{pp} | {' '.join(queues[pp])}" for pp in sorted(queues))


def test_two_ranks_of_two_chunks() -> None:
    """The picture of Narayanan et al.: rank r of P warms up with 2(P - r - 1) + (v - 1)P forwards."""
    expected = """
        0 | F0.0 F1.0 F0.1 F1.1 F2.0 B0.1 F3.0 B1.1 F2.1 B0.0 F3.1 B1.0 B2.1 B3.1 B2.0 B3.0
        1 | F0.0 F1.0 F0.1 B0.1 F1.1 B1.1 F2.0 B0.0 F3.0 B1.0 F2.1 B2.1 F3.1 B3.1 B2.0 B3.0
    """
    topology = job("l gpt pp2 chunks2", microbatches=4, schedule="interleaved")
    assert textwrap.dedent(expected).strip() == by_rank(topology, "l")


@pytest.mark.parametrize(("pipeline", "chunks"), [(2, 2), (2, 4), (4, 2), (4, 3), (8, 2)])
def test_in_flight_on_the_first_rank_is_as_published(pipeline: int, chunks: int) -> None:
    """The first rank holds P(v + 1) - 1 chunk forwards at most: P(1 + (P - 1)/(Pv)) microbatches' worth."""
    topology = job(f"l gpt pp{pipeline} chunks{chunks}", microbatches=3 * pipeline, batch=3 * pipeline)
    flying = most = 0
    for action in order_of(topology).actions:
        if action.stage.pp == 0:
            flying += 1 if action.kind.value == "F" else -1
            most = max(most, flying)
    assert pipeline * chunks + pipeline - 1 == most
