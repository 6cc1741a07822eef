"""Dropout: a mask hangs on the step, the sample and the place in it, so every layout has the same.

Of values every rank of a sample knows which are dropped, whichever part of them it has; nothing is drawn that an order
of calls could change.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from layouts import job as job_of
from mimogrid.core.job.spec import JobSpec
from mimogrid.core.step.step import Step, step_of
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.megatron.draws import child, dropped, kept
from mimogrid.shell.modules.interface import StageModule
from mimogrid.shell.world.launch import Pool
from parity import Parity, assert_same
from ragged import step_with
from scale import nightly_only
from stages import Alone, build, gradients, run, world_of_one


P = 0.3


def spec_of(
    line: str, *, microbatches: int = 2, changes: Mapping[str, Any] | None = None, **axes: Any
) -> JobSpec:
    """Return a job with dropout in every module; `axes` are those of the language model's grid."""
    names = [word.split("(")[0] for word in line.split()]
    options = {name: {"options": {"dropout": P}, **(changes or {})} for name in names}
    spec = job_of(line, microbatches=microbatches, samples=2, data={"sequence": 32}, changes=options)
    grid = attrs.evolve(spec.modules["lm"].grid, **axes)
    return attrs.evolve(spec, modules={**spec.modules, "lm": attrs.evolve(spec.modules["lm"], grid=grid)})


# -- the hash ----------------------------------------------------------------------------------------------


def test_draws_are_those_of_the_published_generator() -> None:
    """The first numbers of SplitMix64 from the state 1234567, by an implementation in integers of Python."""
    state = torch.tensor(1234567)
    vectors = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert vectors == [int(child(state, i)) % 2**64 for i in range(1, 5)]
    assert vectors == [int(n) % 2**64 for n in child(state, torch.arange(1, 5))]


def test_as_many_are_dropped_as_the_probability_says() -> None:
    """Over positions, over columns, and over pairs of neighbours, which are independent."""
    keys = child(torch.tensor(7), torch.arange(400))
    mask = kept(keys[:, None], torch.arange(300), P).double()
    both = mask[:, 1:] * mask[:, :-1], mask[1:] * mask[:-1]
    assert float(mask.mean()) == pytest.approx(1 - P, abs=0.01)
    assert [float(pairs.mean()) for pairs in both] == pytest.approx([(1 - P) ** 2] * 2, abs=0.01)
    assert 0.02 < float(mask.mean(dim=0).std()) < 0.03  # of 400 draws: sqrt(0.21 / 400)
    ones = torch.ones(400, 1, 300, dtype=torch.float64)
    assert torch.equal(dropped(ones, keys, P)[:, 0], mask / (1 - P))


# -- packed is each sample alone ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone() -> Iterator[Alone]:
    """A world of one."""
    with world_of_one() as groups:
        yield groups


def test_a_sample_is_masked_alike_beside_any_others(alone: Alone, opened: Callable[[JobSpec], Job]) -> None:
    """The losses and gradients of a row are the sums of those of its samples in rows of their own."""
    topology = opened(spec_of("enc(1,1,1)@0 lm(1,1,1)@0", microbatches=1)).topology
    stages = build(topology, alone)
    step, batch = step_with(
        topology, [(4, {"enc": [2, 3]}), (5, {"enc": []}), (0, {"enc": [1]}), (3, {"enc": [7]})]
    )
    together = _gradients(topology, stages, step, batch)
    apart = [
        _gradients(topology, stages, step_of(topology, (sample,)), [data])
        for sample, data in zip(step.samples, batch, strict=True)
    ]
    for name, gradient in together.items():
        torch.testing.assert_close(sum(of[name] for of in apart), gradient, rtol=1e-9, atol=1e-12)
    stages["lm"][0].draw_key = 1
    assert not torch.equal(_gradients(topology, stages, step, batch)["loss"], together["loss"])


def _gradients(
    topology: Any, stages: Mapping[str, list[StageModule]], step: Step, batch: Any
) -> dict[str, Tensor]:
    for stage in itertools.chain(*stages.values()):
        stage.zero_grad()
    loss = run(topology, stages, step, batch)["lm"]["loss"]
    loss.backward()
    found = {f"{m}.{name}": g.clone() for m, own in gradients(stages).items() for name, g in own.items()}
    return {"loss": loss.detach(), **found}


# -- every layout ------------------------------------------------------------------------------------------


@pytest.mark.world
@pytest.mark.parametrize(
    ("line", "axes", "changes"),
    [
        ("enc(2,1,2)@0 lm(2,1,1)@0", {"cp": 2, "sequence_parallel": True}, {"recompute": "full"}),
        ("enc(1,1,1)@0 lm(2,2,1)@0", {}, {"recompute": "selective"}),
        *nightly_only(
            [
                ("enc(1,2,1)@0 lm(1,1,2)@0", {"cp": 2}, {}),
                ("enc(1,1,3)@0 lm(4,1,1)@0", {"sequence_parallel": True}, {}),
            ]
        ),
    ],
)
def test_layouts_drop_the_same(
    parity: Parity, line: str, axes: Mapping[str, Any], changes: Mapping[str, Any]
) -> None:
    """Tp ranks that share values mask them alike, those that have heads or positions of their own apart."""
    assert_same(parity, spec_of(line, changes=changes, **axes))


@pytest.mark.world
def test_evaluation_drops_nothing(pool: Pool, opened: Callable[[JobSpec], Job]) -> None:
    """Forward-only programs answer as those of a job without dropout."""

    def chosen(spec: JobSpec) -> list[list[int]]:
        return pool.run("against_plain:chosen_in_world", 1, opened(spec))

    line, without = "enc(1,1,1)@0 lm(1,1,1)@0", {"options": {"dropout": 0.0}}
    assert chosen(spec_of(line)) == chosen(spec_of(line, changes=without))
