"""Split backwards: two halves are the whole, and all products for gradients of weights are in the second one.

The notation of the jobs is that of `layouts`, ``name(tp,pp,dp)@offset``. The first halves of a stage are followed
by the second ones at once, one microbatch later, or when all of them are done.
"""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import attrs
import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from halves import LAST, Work, halved
from layouts import job, layouts
from mimogrid.core.job.spec import JobSpec, ScheduleSpec
from mimogrid.core.program.verify import verify
from mimogrid.shell.job import jobfile
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.run.parity import ParityReport
from mimogrid.shell.world.launch import Pool
from scale import drawn, nightly_only, one_of_each


pytestmark = pytest.mark.world

Opened = Callable[[JobSpec], Job]
Comparing = Callable[..., dict[str, float]]
Working = Callable[[str], list[tuple[frozenset[str], Work, Work]]]

ROUNDING = 1e-14
"""How far, relative to the largest value, a gradient in fp64 may be that is summed in another order."""


def spec_of(
    line: str,
    *,
    grid: Mapping[str, Any] = MappingProxyType({}),
    model: Mapping[str, Any] = MappingProxyType({}),
    module: Mapping[str, Any] = MappingProxyType({}),
    changes: Mapping[str, Mapping[str, Any]] | None = None,
    **options: Any,
) -> JobSpec:
    """Return the job of a line; `grid`, `model` and `module` are fields of all its grids, models and modules.

    `changes` are those of some modules, instead.
    """
    if changes is None:
        names = [word.split("(")[0] for word in line.split()]
        changes = {name: {**module, "options": model} for name in names}
    data = {"sequence": 16, **options.pop("data", {})}
    spec = job(line, data=data, changes=changes, **options)
    modules = {n: attrs.evolve(m, grid=attrs.evolve(m.grid, **grid)) for n, m in spec.modules.items()}
    return attrs.evolve(spec, modules=modules)


@pytest.fixture(scope="module")
def apart(pool: Pool, opened: Opened) -> Comparing:
    """Compare halves with the whole; return the gradients that are not the same bits, and how far, by name."""

    def compare(spec: JobSpec, *, delay: int) -> dict[str, float]:
        of_spec = opened(spec)
        assert () == verify(halved(of_spec.program_of(of_spec.step(0)), delay))
        said = pool.run("halves:apart_in_world", of_spec.topology.world_size, of_spec, delay)
        return {name: max(one.get(name, 0.0) for one in said) for name in set().union(*said)}

    return compare


@pytest.fixture(scope="module")
def working(pool: Pool, opened: Opened) -> Working:
    """Watch whole backwards and halves of a layout at work.

    Return for each rank by which trained weights it multiplies, and what it did with whole ones and with halves.
    """

    @functools.cache
    def work(layout: str) -> list[tuple[frozenset[str], Work, Work]]:
        of_spec = opened(LAYOUTS[layout])
        said = pool.run("halves:work_in_world", of_spec.topology.world_size, of_spec)
        return [(_multiplied(of_spec, rank), *both) for rank, both in enumerate(said) if both is not None]

    return work


def _multiplied(of_spec: Job, rank: int) -> frozenset[str]:
    return frozenset(
        f"{info.stage}.{p.name}"
        for info in of_spec.topology.role(rank).stages
        for p in info.parameters
        if len(p.shape) == 2 and p.name in info.trainable and p.name != "embedding.weight"
    )


# -- the same gradients ------------------------------------------------------------------------------------

LAYOUTS: dict[str, JobSpec] = {
    "a chain": spec_of("lm(1,4,1)@0"),
    "tensor parallel": spec_of("enc(2,2,1)@0 lm(2,2,1)@4"),
    "sequence parallel": spec_of("enc(2,1,1)@0 lm(4,1,1)@2", grid={"sequence_parallel": True}),
    "context parallel": spec_of("enc(1,1,1)@0 lm(1,1,2)@4", grid={"cp": 2}),
    "both": spec_of("enc(2,1,1)@0 lm(2,1,1)@4", grid={"cp": 2, "sequence_parallel": True}),
    "dp ranks without rows": spec_of("enc(1,1,3)@0 aud(1,1,1)@3 lm(1,1,2)@4", data={"absent": {"enc": 0.7}}),
    "microbatches of their own": spec_of("enc(1,1,2)@0*2 lm(1,2,1)@2", samples=4),
    "on shared ranks": spec_of("enc(1,2,1)@0 lm(2,1,1)@0->gen gen(1,2,1)@0"),
    "in single precision": spec_of("enc(1,1,1)@0 lm(2,2,1)@1", precision="fp32"),
    "recomputed": spec_of("enc(1,2,1)@0 lm(2,2,1)@2", module={"recompute": "full"}),
    "recomputed, sequence parallel": spec_of(
        "enc(2,1,1)@0 lm(2,2,1)@2", module={"recompute": "full"}, grid={"sequence_parallel": True}
    ),
    "recomputed attention": spec_of("enc(1,1,1)@0 lm(2,2,1)@1", module={"recompute": "selective"}),
    "with dropout": spec_of("enc(1,1,2)@0 lm(2,2,1)@2", model={"dropout": 0.3}),
    "with dropout, recomputed": spec_of(
        "enc(1,1,1)@0 lm(2,2,1)@1", model={"dropout": 0.3}, module={"recompute": "full"}
    ),
    "tied ends": spec_of("lm(2,2,2)@0", model={"tied_embeddings": True}),
    "chunks": spec_of("lm(1,2,1)@0", schedule="interleaved", module={"chunks": 2}, model={"layers": 4}),
    "experts": spec_of("lm(1,1,4)@0", model={"experts": 4, "aux_loss": 0.1}, grid={"ep": 4}),
    "experts in shards": spec_of(
        "enc(2,1,1)@0 lm(2,1,2)@4",
        model={"experts": 2, "aux_loss": 0.1},
        grid={"expert_tp": 2},
        module={"recompute": "full"},
    ),
    "experts, sequence parallel": spec_of(
        "lm(2,1,2)@0", model={"experts": 4, "top_k": 1}, grid={"ep": 4, "sequence_parallel": True}
    ),
    "frozen ones between": spec_of(
        "enc(1,1,2)@0->mid,lm mid(1,1,1)@2 lm(1,2,1)@3->gen gen(1,1,2)@5",
        changes={
            "enc": {"trainable": ("projector.*",)},
            "mid": {"frozen": True},
            "lm": {"frozen": ("layers.0.*",)},
        },
    ),
    "weights alone": spec_of("enc(1,1,2)@0 lm(2,2,1)@2", module={"trainable": ("*weight",)}),
    "biases alone": spec_of("enc(1,1,2)@0 lm(2,2,1)@2", module={"trainable": ("*bias",)}),
    "the first weight alone": spec_of(
        "enc(1,2,1)@0 lm(1,1,1)@2", changes={"enc": {"trainable": ("input.weight",)}}
    ),
}


OFTEN = [
    "microbatches of their own",
    "recomputed, sequence parallel",
    "tied ends",
    "experts",
    "the first weight alone",
]


@pytest.mark.parametrize("delay", [LAST])
@pytest.mark.parametrize("layout", [*OFTEN, *nightly_only(sorted({*LAYOUTS} - {*OFTEN}))])
def test_halves_are_the_whole(apart: Comparing, layout: str, delay: int) -> None:
    """Not a bit of a gradient changes, whatever lies between the halves of a microbatch."""
    assert {} == apart(LAYOUTS[layout], delay=delay)


@pytest.mark.parametrize("delay", [LAST, *nightly_only([0])])
def test_a_weight_in_both_halves(apart: Comparing, delay: int) -> None:
    """A stage with both ends of a tied embedding adds up, in another order, what autograd adds up first."""
    found = apart(spec_of("lm(2,1,2)@0", model={"tied_embeddings": True}), delay=delay)
    assert {"lm.0.embedding.weight"} == found.keys()
    assert max(found.values()) <= ROUNDING


@settings(max_examples=drawn(2), derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(spec=layouts(), delay=st.sampled_from((0, 1, 2, LAST)))
def test_halves_of_any_layout_are_the_whole(apart: Comparing, spec: JobSpec, delay: int) -> None:
    """Whatever graph, grids, experts, recomputation, chunks and freezing a job has."""
    spec = attrs.evolve(spec, schedule=ScheduleSpec(name="1f1b"))  # One that has whole backwards.
    note(jobfile.dump(spec))
    found = apart(spec, delay=delay)
    assert all(name.endswith("embedding.weight") for name in found), found
    assert max(found.values(), default=0.0) <= ROUNDING


# -- who does what -----------------------------------------------------------------------------------------

WATCHED = [
    "recomputed, sequence parallel",
    *nightly_only(["experts", "a chain", "tensor parallel", "both", "tied ends", "experts in shards"]),
]


@pytest.mark.parametrize("layout", WATCHED)
def test_products_come_last(working: Working, layout: str) -> None:
    """After all first halves no weight has a gradient by which something is multiplied, and all others have."""
    for multiplied, _, halves in working(layout):
        assert frozenset() == halves.touched & multiplied
        assert halves.touched
        assert halves.flops["W"] > 0


@pytest.mark.parametrize("layout", WATCHED)
def test_halves_are_no_more_work(working: Working, layout: str) -> None:
    """Both halves have as many operations as the whole, and forwards know nothing of them."""
    for _, whole, halves in working(layout):
        assert whole.flops["F"] == halves.flops["F"]
        assert whole.flops["B"] == halves.flops["I"] + halves.flops["W"]


@pytest.mark.parametrize("layout", WATCHED)
def test_nothing_else_is_kept(working: Working, layout: str) -> None:
    """Between the halves there are the factors of the products and nothing of autograd; then not even those."""
    for multiplied, _, halves in working(layout):
        assert 0 == halves.saved
        assert halves.products[0] >= len(multiplied)
        assert 0 == halves.products[1]


# -- schedules ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grids", "schedule"),
    one_of_each(
        [
            "lm(1,4,1)@0",
            "enc(1,2,1)@0 aud(1,1,1)@2 lm(1,2,2)@3",
            *nightly_only(["enc(1,1,2)@0 lm(2,2,1)@2->gen gen(1,2,1)@6", "enc(1,2,1)@0 lm(1,2,1)@0"]),
        ],
        ["zb-h1", "zb-h2"],
    ),
)
def test_schedules_that_split(parity: Callable[..., ParityReport], grids: str, schedule: str) -> None:
    """A layout whose schedule splits backwards is the model, in every step."""
    found = parity(job(grids, microbatches=6, schedule=schedule), steps=2)
    assert found.passed, found
