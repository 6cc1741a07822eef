"""Cut backwards: the parts of a last backward, and sums of gradients between them, give the gradients of the whole.

The notation of the jobs is that of `layouts`, ``name(tp,pp,dp)@offset``.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import attrs
import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from cut import Compared
from layouts import job, layouts
from mimogrid.core.job.spec import JobSpec
from mimogrid.core.program.verify import verify
from mimogrid.shell.job import jobfile
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.world.launch import Pool
from scale import drawn, nightly, nightly_only


pytestmark = pytest.mark.world

Comparing = Callable[[JobSpec], list[Compared]]

ROUNDING = 1e-14
"""How far, relative to the largest value, a gradient in fp64 may be that is summed in another order."""
NOTHING: Mapping[str, Any] = MappingProxyType({})


def spec_of(
    line: str,
    *,
    model: Mapping[str, Any] = NOTHING,
    grid: Mapping[str, Any] = NOTHING,
    module: Mapping[str, Any] = NOTHING,
    sharded: bool = False,
) -> JobSpec:
    """Return the job of a line whose stages have several layers, and a bucket for each few parameters."""
    names = [word.split("(")[0] for word in line.split()]
    changes = {name: {**module, "options": {"layers": 4, **model}} for name in names}
    spec = job(line, microbatches=2, data={"sequence": 16}, changes=changes)
    modules = {n: attrs.evolve(m, grid=attrs.evolve(m.grid, **grid)) for n, m in spec.modules.items()}
    optimizer = attrs.evolve(spec.optimizer, bucket_mb=0.002, cut_mb=0.002, sharded=sharded)
    return attrs.evolve(spec, modules=modules, optimizer=optimizer)


@pytest.fixture(scope="module")
def comparing(pool: Pool, opened: Callable[[JobSpec], Job]) -> Comparing:
    """Compare a job's cut step with the same step without cuts, rank by rank."""

    def compare(spec: JobSpec) -> list[Compared]:
        of_spec = opened(spec)
        assert () == verify(of_spec.program_of(of_spec.step(0)))
        found: list[Compared] = pool.run("cut:compared_in_world", of_spec.topology.world_size, of_spec)
        return found

    return compare


LAYOUTS: dict[str, JobSpec] = {
    "an encoder and a language model": spec_of("enc(1,1,2)@0 lm(1,1,2)@2"),
    "on shared ranks": spec_of("enc(1,1,2)@0 lm(1,1,2)@0"),
    "sharded": spec_of("lm(1,2,2)@0", sharded=True),
    "sequence parallel": spec_of("lm(2,1,2)@0", grid={"sequence_parallel": True}),
    "context parallel": spec_of("lm(1,1,2)@0", grid={"cp": 2}),
    "experts": spec_of("lm(1,1,2)@0", model={"experts": 2, "aux_loss": 0.1}, grid={"ep": 2}),
    "recomputed attention": spec_of("lm(1,1,2)@0", module={"recompute": "selective"}),
    "with dropout": spec_of("lm(1,1,2)@0", model={"dropout": 0.3}),
}
OFTEN = ["an encoder and a language model", "sharded"]


@pytest.mark.parametrize("layout", [*OFTEN, *nightly_only(sorted({*LAYOUTS} - {*OFTEN}))])
def test_parts_are_the_whole(comparing: Comparing, layout: str) -> None:
    """Not a bit of a gradient changes, and each part runs by itself."""
    for compared in comparing(LAYOUTS[layout]):
        assert {} == compared.apart
        assert compared.parts
        assert compared.runs > compared.parts


@nightly
@settings(max_examples=drawn(4), derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(spec=layouts(), sharded=st.booleans())
def test_parts_of_any_layout_are_the_whole(comparing: Comparing, spec: JobSpec, sharded: bool) -> None:
    """Whatever graph, grids, experts, recomputation, chunks and freezing a job has."""
    optimizer = attrs.evolve(spec.optimizer, bucket_mb=1e-4, cut_mb=1e-4, sharded=sharded)
    spec = attrs.evolve(spec, optimizer=optimizer)
    note(jobfile.dump(spec))
    for compared in comparing(spec):
        assert all(name.endswith("embedding.weight") for name in compared.apart), compared.apart
        assert max(compared.apart.values(), default=0.0) <= ROUNDING


@nightly
def test_a_weight_above_and_below_a_cut(comparing: Comparing) -> None:
    """A stage with both ends of a tied embedding adds up, in another order, what autograd adds up first."""
    for compared in comparing(spec_of("lm(1,1,2)@0", model={"tied_embeddings": True})):
        assert {"lm.0.embedding.weight"} >= compared.apart.keys()
        assert max(compared.apart.values(), default=0.0) <= ROUNDING
