"""Steps whose microbatches have a limit of tokens: the model is the same, however many microbatches a step has."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest

from layouts import job
from mimogrid.core.job.spec import JobSpec
from mimogrid.shell.job.jobs import Job
from parity import Parity, assert_same
from scale import nightly_only
from updates import Seen
from updates import assert_same as assert_same_bits


pytestmark = pytest.mark.world

STEPS = 3


def limited(spec: JobSpec, tokens: int, **changes: Any) -> JobSpec:
    """The same job with a limit of tokens in place of a number of microbatches; `changes` are of its batch."""
    batch = attrs.evolve(spec.batch, microbatches=1, tokens_per_microbatch=tokens, **changes)
    return attrs.evolve(spec, batch=batch)


def counts(job: Job, steps: int = STEPS) -> list[int]:
    """How many microbatches the first steps have."""
    return [job.step(index).topology.most_microbatches for index in range(steps)]


@pytest.mark.parametrize(
    ("grids", "tokens", "fields"),
    [
        ("enc(1,1,2)@0 lm(1,2,2)@2", 11, {}),
        ("img(1,1,1)@0 aud(1,1,1)@1 lm(2,1,2)@2", 13, {"schedule": "zb-h1"}),
        ("enc(1,1,2)@0 lm(1,1,3)@2", 27, {"balance": "cost"}),
        *nightly_only(
            [
                ("enc(1,1,4)@0 lm(2,1,2)@0", 18, {"balance": "cost"}),
                ("enc(2,1,2)@0->mid mid(1,1,1)@4 lm(1,2,1)@5", 18, {"schedule": "gpipe"}),
                ("enc(1,2,1)@0 lm(1,2,1)@2->gen gen(1,1,2)@4", 18, {"schedule": "auto"}),
            ]
        ),
    ],
)
def test_steps_of_any_number_of_microbatches_are_the_model(
    parity: Parity, opened: Callable[[JobSpec], Job], grids: str, tokens: int, fields: dict[str, Any]
) -> None:
    """Loss and gradients are those of all samples at once on one process, in fp64, while the numbers vary."""
    schedule, balance = fields.get("schedule", "1f1b"), fields.get("balance", "none")
    spec = limited(job(grids, schedule=schedule), tokens, balance=balance)
    assert len(set(counts(opened(spec)))) > 1
    assert_same(parity, spec, steps=STEPS)


def test_interleaved_stages_get_a_multiple(parity: Parity, opened: Callable[[JobSpec], Job]) -> None:
    """Two pipeline ranks with two chunks each: every number of microbatches is even."""
    changes = {"lm": {"chunks": 2, "options": {"layers": 4}}}
    spec = limited(job("enc(1,1,1)@0 lm(1,2,1)@1", changes=changes), 11)
    assert {0} == {count % 2 for count in counts(opened(spec))}
    assert_same(parity, spec)


def test_a_run_of_varying_numbers_goes_on_where_it_was_stopped(
    train: Callable[..., list[Seen]], opened: Callable[[JobSpec], Job], tmp_path: Path
) -> None:
    """Three steps in one go, and with a stop between, are the same bits."""
    fp32 = attrs.evolve(job("enc(1,1,2)@0 lm(1,1,3)@2"), precision="fp32")
    spec = limited(fp32, 27, balance="cost")
    assert len(set(counts(opened(spec)))) > 1
    whole = train(spec, range(3))
    train(spec, range(2), None, tmp_path)
    assert_same_bits(whole, train(spec, range(2, 3), None, None, tmp_path))
