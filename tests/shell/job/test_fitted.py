"""A source gives the samples that a job takes: it loads what it describes, the first positions of what there was."""

from collections.abc import Callable

import attrs
import pytest
import torch

from layouts import job as job_of
from mimogrid.core.base.errors import PlanError
from mimogrid.core.job.spec import JobSpec
from mimogrid.shell.job.jobs import Job


SEQUENCE, COUNT = 9, 12
Opened = Callable[[JobSpec], Job]


def spec_of(overflow: str, sequence: int = SEQUENCE) -> JobSpec:
    """Return a job of samples of up to 12 positions."""
    data = {"sequence": sequence, "rows": {"enc": [0, 6]}, "text": [2, 6], "absent": {"enc": 0.0}}
    spec = job_of("enc(1,1,1)@0 lm(1,1,1)@0->gen gen(1,1,1)@0", microbatches=1, samples=COUNT, data=data)
    return attrs.evolve(spec, data=attrs.evolve(spec.data, overflow=overflow))


@pytest.mark.parametrize("overflow", ["truncate", "drop"])
def test_what_is_loaded_is_what_is_described(opened: Opened, overflow: str) -> None:
    """Of a sample that is cut, the first positions; of one that fits, all; of one that is dropped, nothing."""
    job, whole = opened(spec_of(overflow)), opened(spec_of(overflow, sequence=12)).source
    graph = job.topology.graph
    changed = 0
    for i in range(COUNT):
        taken, before = job.source.describe(i), whole.describe(i)
        changed += taken != before
        for name, count in graph.rows_out(taken).items():
            if count and name != "enc":
                loaded, all_of_it = job.source.load(i, name), whole.load(i, name)
                assert all(torch.equal(all_of_it[key][:count], of) for key, of in loaded.items())
                assert {count} == {len(of) for of in loaded.values()}
        assert graph.rows_out(taken)["lm"] == min(graph.rows_out(before)["lm"], SEQUENCE) or taken.length == 0
    assert 0 < changed < COUNT
    assert job.step(0).tokens <= COUNT * SEQUENCE


def test_too_long_samples_are_an_error_unless_the_job_says_more(opened: Opened) -> None:
    """The error says so."""
    with pytest.raises(PlanError, match=r"(?s)more than sequence = 9 holds.*data\.overflow"):
        opened(spec_of("error"))
    with pytest.raises(PlanError, match=r"data\.overflow: 'cut' is not known"):
        opened(spec_of("cut"))
