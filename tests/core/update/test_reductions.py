"""Gradients, rates, the digest and traffic: what is counted, and that it is counted once."""

import collections
import math

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import CASES
from hashseeds import printed
from jobs import job, program_for, program_of, step_with
from mimogrid.core.job.spec import OptimizerSpec
from mimogrid.core.program.digest import digest_of
from mimogrid.core.program.lower import link_of
from mimogrid.core.program.verify import listing_of
from mimogrid.core.schedule.actions import Send
from mimogrid.core.step.traffic import EdgeTraffic, edge_traffic
from mimogrid.core.topology.topology import Topology
from mimogrid.core.update.learning_rate import learning_rate
from mimogrid.core.update.reductions import counts_in_norm, is_written_by, loss_scale
from scale import drawn


Shard = tuple[str, str, int]


def counted(topology: Topology) -> tuple[dict[Shard, int], dict[tuple[str, str], int]]:
    """Return how many ranks count each shard in the norm, and how many write each parameter."""
    shards: dict[Shard, int] = collections.Counter()
    written: dict[tuple[str, str], int] = collections.Counter()
    for rank in topology.ranks:
        for info in topology.role(rank).stages:
            module = topology.modules[info.stage.module]
            position = module.grid.position(rank) | (module.experts.position(rank) if module.experts else {})
            for parameter in info.parameters:
                along = "tp" if parameter.expert is None else "expert_tp"
                shard = position[along] if parameter.tp_dim is not None else 0
                if parameter.expert is not None:
                    held = topology.spec.modules[module.name].grid.ep
                    each = module.model.experts // held  # type: ignore[union-attr]
                    if position["ep"] != parameter.expert // each:
                        continue
                shards[module.name, parameter.name, shard] += counts_in_norm(position, info, parameter)
                written[module.name, parameter.name] += is_written_by(position, info, parameter)
    return shards, written


@pytest.mark.parametrize("case", CASES)
def test_one_rank_counts_each_shard_and_one_writes_each_parameter(case: str) -> None:
    """Whatever is replicated, every value enters the norm once and is written once."""
    shards, written = counted(job(CASES[case], batch=48))
    assert {1} == set(shards.values())
    assert {1} == set(written.values())


def test_experts_are_counted_once() -> None:
    """Experts over ep and expert_tp with copies: each shard of each expert once."""
    for text in ("l gpt tp2 dp4 ep2 expert_tp2 x4", "l gpt tp2 dp2 pp2 ep4 x8", "l gpt dp4 ep2 x2"):
        shards, written = counted(job(text, batch=16))
        assert {1} == set(shards.values()), text
        assert {1} == set(written.values()), text


def test_loss_is_divided_by_the_global_count() -> None:
    """A loss of weight 1 over 12 tokens is scaled by 1/12; a loss over no tokens by 0, not NaN."""
    topology = job(CASES["1 1"])
    assert 1 / 12 == loss_scale(topology, "language", 12)
    assert 0.0 == loss_scale(topology, "language", 0)


# -- rates -------------------------------------------------------------------------------------------------


RATES = {
    "constant": [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0],
    "wsd": [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 0.6625],
    "linear": [0.25, 0.5, 0.75, 1.0, 1.0, 0.775, 0.55, 0.325],
    "cosine": [
        0.25,
        0.5,
        0.75,
        1.0,
        1.0,
        1 - 0.9 * (1 - math.sqrt(0.5)) / 2,
        0.55,
        0.55 - 0.45 * math.sqrt(0.5),
    ],
}


@pytest.mark.parametrize("decay", RATES)
def test_rates(decay: str) -> None:
    """Four steps of warm-up, then four of the decay down to a tenth."""
    optimizer = OptimizerSpec(lr=1.0, warmup_steps=4, decay=decay, final_lr_fraction=0.1)
    found = [learning_rate(optimizer, step=i, steps=8) for i in range(8)]
    assert pytest.approx(RATES[decay]) == found


@given(st.integers(0, 20), st.integers(1, 20), st.sampled_from(["constant", "linear", "cosine", "wsd"]))
def test_a_rate_is_between_nothing_and_the_peak(warmup: int, steps: int, decay: str) -> None:
    """No step has a rate of zero or above the job's, however short the run and long the warm-up."""
    optimizer = OptimizerSpec(lr=2.0, warmup_steps=warmup, decay=decay)
    for step in range(steps):
        assert 0 < learning_rate(optimizer, step=step, steps=steps) <= 2.0


# -- digest ------------------------------------------------------------------------------------------------


def test_equal_jobs_have_equal_digests() -> None:
    """Equal jobs have equal digests, and a job with anything changed has another one."""

    def digest(text: str, rows: tuple[int, ...] = (2,), **options: int | str) -> str:
        topology = job(text, **options)  # type: ignore[arg-type]
        return digest_of(program_for(step_with(topology, {"vision": rows})))

    base = digest(CASES["dp2 1"])
    assert base == digest(CASES["dp2 1"])
    others = [
        digest(CASES["dp2 1"], schedule="gpipe"),
        digest(CASES["dp2 1"], microbatches=2),
        digest(CASES["dp2 1"], (2, 1)),
        digest(CASES["1 dp2"]),
        digest(CASES["frozen encoder"]),
    ]
    assert 6 == len({base, *others})


def test_a_digest_does_not_depend_on_the_process() -> None:
    """Other processes, with other hash seeds, find the same digest."""
    code = (
        "from jobs import job, program_for, step_with\n"
        "from mimogrid.core.program.digest import digest_of\n"
        "topology = job('vision vit dp2 > language; language gpt tp2 pp2 tied')\n"
        "print(digest_of(program_for(step_with(topology))))"
    )
    assert 1 == len(printed(code, __file__))


# -- traffic -----------------------------------------------------------------------------------------------


def test_traffic_of_two_ranks() -> None:
    """Two rows of width 8 in fp32, each of four samples, forth and back: 8 messages and 512 bytes."""
    topology = job("vision vit > language; language gpt", batch=4, microbatches=4)
    (found,) = edge_traffic(step_with(topology, {"vision": (2,)}))
    expected = EdgeTraffic("vision", "language", 8, 512, 0, 512)
    assert expected == found


def test_traffic_under_tp() -> None:
    """Eight rows of width 16 go to two tp ranks, four each, and back; each then gathers the other half.

    Leaders would receive the whole on both ranks of the language model, and on the one of the encoder.
    """
    topology = job("vision vit > language; language gpt tp2", batch=1, microbatches=1)
    (found,) = edge_traffic(step_with(topology, {"vision": (8,)}))
    whole = 8 * 16 * 4
    assert EdgeTraffic("vision", "language", 4, 2 * whole, whole, 3 * whole) == found


def test_traffic_of_a_frozen_encoder() -> None:
    """Nothing comes back to an encoder in which nothing trains; where one projector does, its edge alone answers."""
    topology = job("vision vit frozen width4 > language; language regressor width4", batch=1, microbatches=1)
    (found,) = edge_traffic(step_with(topology, {"vision": (2,)}))
    assert (1, 2 * 4 * 4) == (found.messages, found.bytes)


@settings(max_examples=drawn(30))
@given(st.sampled_from(sorted(CASES)), st.lists(st.sampled_from((0, 1, 5)), min_size=1, max_size=48))
def test_traffic_is_what_the_program_sends(case: str, rows: list[int]) -> None:
    """The messages of every edge are those that the ranks' programs send to other ranks."""
    program = program_of(CASES[case], dict.fromkeys(("vision", "image", "audio"), rows), batch=48)
    sent: dict[str, int] = collections.Counter()
    for rank, actions in listing_of(program).items():
        for action in actions:
            if isinstance(action, Send):
                edge = link_of(program.topology, action).edge
                sent[str(edge)] += sum(peer != rank for peer in program.peers_of(rank, action))
    found = {f"{t.source} -> {t.target}": t.messages for t in edge_traffic(program.routes.step)}
    assert {edge: sent[edge] for edge in found} == found


def test_traffic_counts_both_directions_edge_by_edge() -> None:
    """Of two edges of an encoder that trains one projector only, one carries gradients."""
    topology = job("vision vit > a, b; a regressor; b regressor", batch=1, microbatches=1)
    spec = topology.spec.modules["vision"]
    frozen = attrs.evolve(spec, trainable=("projector.a.*",))
    topology = remade(topology, vision=frozen)
    found = {t.target: t.messages for t in edge_traffic(step_with(topology, {"vision": (2,)}))}
    assert {"a": 2, "b": 1} == found


def remade(topology: Topology, **modules: object) -> Topology:
    """Return a topology with other modules."""
    from mimogrid.core.topology.parse import assemble  # noqa: PLC0415

    spec = attrs.evolve(topology.spec, modules={**topology.spec.modules, **modules})
    return assemble(spec, topology.source)
