"""Every layout has the loss and the gradients of the same model on one process.

The notation of the jobs is that of `layouts`: ``name(tp,pp,dp)@offset``, of the ranks 0 to 7.
"""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, note, settings

from layouts import PIPELINE_INSIDE, job, layouts
from mimogrid.core.job.spec import JobSpec, OptimizerSpec
from mimogrid.shell.job import jobfile
from parity import Parity, assert_same
from scale import drawn, nightly_only, one_of_each


pytestmark = pytest.mark.world


# -- grids -------------------------------------------------------------------------------------------------

GRIDS = """
    enc(1,1,1)@0 lm(1,1,1)@1
    enc(2,2,1)@0 lm(2,2,1)@4

    enc(1,2,4)@0 lm(2,4,1)@0

    img(1,1,1)@0 aud(1,1,1)@1 lm(2,2,1)@2->gen gen(1,1,2)@6
    enc(1,1,3)@0->gen,lm gen(2,1,1)@3 lm(1,2,1)@5
    enc(1,1,2)@0->lm1,lm2 lm1(1,2,1)@2->lm2 lm2(2,1,1)@4

    enc(1,1,3)@0 lm(1,1,5)@3

    enc(1,1,1)@0 img(1,1,2)@0 aud(2,1,1)@0 mid(1,2,1)@0 lm(2,1,1)@0->gen gen(1,1,2)@0
"""
MORE_GRIDS = """
    enc(1,1,2)@0 lm(1,1,2)@1
    enc(1,1,4)@0 lm(2,2,1)@4
    enc(4,1,1)@0 lm(2,1,2)@4
    enc(1,1,1)@7 lm(1,1,1)@3
    enc(1,1,1)@0->mid,lm mid(1,1,1)@1->lm lm(1,1,1)@2->gen gen(1,1,1)@3
    enc(1,2,2)@0 lm(1,1,3)@4
    lm(1,4,2)@0
    img(1,1,1)@0->mid aud(1,1,2)@1->mid mid(1,2,1)@3 lm(1,1,2)@5

    enc(2,1,2)@0 lm(1,1,4)@4
    enc(2,2,2)@0 lm(2,2,2)@0
    img(1,2,1)@0 aud(2,1,1)@2 lm(1,4,1)@4
    enc(1,1,2)@0->gen gen(1,3,1)@2

    enc(1,1,1)@0 lm(1,3,1)@1
    enc(2,1,1)@0 lm(2,3,1)@2
    enc(2,2,1)@0 lm(1,1,4)@4
    enc(1,1,2)@0 lm(2,3,1)@2
    enc(1,1,1)@0 lm(1,7,1)@1

    enc(1,1,1)@0 aud(1,1,1)@0 lm(1,1,1)@1
    enc(2,2,1)@0 aud(2,2,1)@0 lm(2,2,1)@4
    img(1,1,1)@0 aud(1,1,1)@1 lm(2,2,1)@2->gen gen(2,1,1)@6

    enc(2,1,1)@0 lm(2,1,1)@2
    enc(2,1,1)@0 lm(2,2,1)@2
    enc(4,1,1)@0 lm(4,1,1)@4
    enc(2,1,2)@0 lm(4,1,1)@4
    enc(2,1,2)@0 lm(2,1,2)@4
    enc(2,1,1)@0 lm(2,1,1)@4
    enc(1,1,4)@0 lm(4,1,1)@4
    enc(4,1,1)@0 lm(1,1,4)@4
    enc(2,1,2)@0 lm(2,2,1)@4
    enc(1,1,4)@0 lm(1,1,4)@4

    enc(4,2,1)@0 lm(1,2,4)@0
    enc(2,1,4)@0 lm(4,1,2)@0
    enc(4,1,2)@0 lm(2,1,4)@0
    enc(4,1,2)@0 lm(4,1,2)@0
    enc(2,1,2)@4 lm(1,1,4)@4
    enc(1,1,8)@0 lm(1,1,4)@0
    enc(1,2,1)@0 lm(1,2,1)@0
    enc(1,1,3)@0 lm(1,1,2)@0
    enc(2,2,1)@0 lm(2,2,1)@2
    enc(1,1,1)@0 lm(1,1,1)@4

    img(1,2,1)@0 aud(1,1,1)@2 lm(1,2,1)@3
    img(1,3,1)@0 aud(1,1,2)@3 lm(1,1,1)@5
    enc(1,1,1)@0->mid,lm mid(1,1,1)@1 lm(1,1,1)@2
    enc(2,1,1)@0->mid,lm mid(1,1,2)@2 lm(1,2,2)@4
    enc(1,1,1)@0->gen,lm gen(1,1,1)@1 lm(1,1,1)@2
    enc(1,1,2)@0 lm(1,1,1)@2
    enc(1,1,1)@0 lm(1,1,2)@1
    enc(1,1,4)@0 lm(1,1,1)@4
    enc(1,1,4)@0 lm(1,1,2)@4

    enc(1,1,3)@0 lm(1,1,2)@3
    enc(1,1,1)@0 lm(1,1,5)@1
    enc(1,1,5)@0 lm(1,1,3)@5
    enc(2,1,2)@0 lm(1,1,3)@4

    lm(1,1,1)@0
    lm(1,2,1)@0
    lm(2,2,2)@0
    gen(2,2,1)@0
    mid(1,1,2)@0 lm(1,2,1)@2
    lm1(1,1,1)@0->lm2 lm2(1,1,2)@1
"""


def cases(text: str) -> list[str]:
    """The lines of a text that say something, with single spaces."""
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("grids", [*cases(GRIDS), *nightly_only(cases(MORE_GRIDS))])
def test_a_layout_is_the_model(parity: Parity, grids: str) -> None:
    """The default order of the axes, pp slowest; ragged samples, some without a modality, uneven shares."""
    assert_same(parity, job(grids))


@pytest.mark.parametrize(
    ("grids", "order"),
    one_of_each(
        [
            "enc(2,2,2)@0 lm(2,2,2)@0",
            "enc(2,1,1)@0->mid,lm mid(1,1,2)@2 lm(1,2,2)@4",
            *nightly_only(["enc(1,2,4)@0 lm(2,4,1)@0"]),
        ],
        [PIPELINE_INSIDE, ("pp", "tp", "dp", "cp"), *nightly_only([("dp", "pp", "tp", "cp")])],
    ),
)
def test_axes_in_any_order(parity: Parity, grids: str, order: tuple[str, ...]) -> None:
    """Which axis varies fastest changes who does what, and nothing else."""
    assert_same(parity, job(grids, order=order))


@pytest.mark.parametrize(
    ("grids", "schedule"),
    one_of_each(
        [
            "enc(1,1,1)@0->mid,lm mid(1,1,1)@1 lm(1,3,1)@2",
            *nightly_only(["img(1,2,1)@0 aud(1,1,1)@2 lm(1,2,1)@3", "enc(2,2,1)@0 aud(2,2,1)@0 lm(2,2,1)@4"]),
        ],
        ["1f1b", *nightly_only(["gpipe"])],
    ),
)
def test_many_microbatches(parity: Parity, grids: str, schedule: str) -> None:
    """Sixteen microbatches, more than any stage has in flight."""
    assert_same(parity, job(grids, microbatches=16, schedule=schedule))


@pytest.mark.parametrize("samples", [1, *nightly_only([2, 7])])
def test_few_samples(parity: Parity, samples: int) -> None:
    """One, two and seven samples in a microbatch."""
    assert_same(parity, job("enc(2,1,1)@0 lm(1,2,1)@2", samples=samples, microbatches=3))


def test_one_sample_for_each_dp_rank(parity: Parity) -> None:
    """Five dp ranks with one sample each feed three dp ranks."""
    assert_same(parity, job("enc(1,1,5)@0 lm(1,1,3)@5", samples=5))


@pytest.mark.parametrize(
    "grids",
    [
        "enc(1,1,1)@0*2->mid,lm mid(1,1,1)@1/2 lm(1,2,1)@2",
        "enc(1,1,1)@0 lm(1,1,2)@1/2->gen gen(1,1,1)@3*2",
        *nightly_only(
            [
                "enc(1,1,2)@0/2 lm(1,1,2)@0*2",
                "enc(1,1,1)@0*2 lm(1,1,1)@1",
                "enc(1,1,2)@0*4 lm(1,2,1)@2",
                "enc(1,1,3)@0/2 lm(1,1,2)@3",
                "enc(2,1,1)@0/4 lm(1,2,1)@2",
                "img(1,2,1)@0*2 aud(1,1,2)@2/2 lm(1,1,3)@4",
                "lm(1,2,1)@0*2",
            ]
        ),
    ],
)
def test_modules_with_microbatches_of_their_own(parity: Parity, grids: str) -> None:
    """A module may work through the step in twice, four times or half as many microbatches as others."""
    assert_same(parity, job(grids, samples=12))


def test_ranks_that_idle(parity: Parity) -> None:
    """The first rank, the last one and one between the modules have nothing to do."""
    assert_same(parity, job("enc(1,1,2)@1 lm(1,2,1)@4", world_size=8))


@pytest.mark.parametrize("split", [(1, 3), *nightly_only([(3, 1)])])
def test_stages_of_unequal_depth(parity: Parity, split: tuple[int, ...]) -> None:
    """Layers are cut as the job says."""
    changes = {name: {"split": split, "options": {"layers": 4}} for name in ("enc", "lm")}
    assert_same(parity, job("enc(1,2,1)@0 lm(2,2,1)@2", changes=changes))


# -- steps -------------------------------------------------------------------------------------------------


def test_further_steps(parity: Parity) -> None:
    """Later steps, of other samples and so of other shapes, agree as the first one does."""
    assert_same(parity, job("enc(1,1,3)@0 lm(2,2,1)@3"), steps=2)


def test_shared_updates(parity: Parity) -> None:
    """Gradients that are scattered over dp ranks are those of one process, also of tied weights at two stages."""
    changes = {"lm": {"options": {"tied_embeddings": True}}}
    spec = job(
        "enc(1,1,2)@0 lm(1,2,2)@0", changes=changes, optimizer=OptimizerSpec(sharded=True, bucket_mb=0.01)
    )
    assert_same(parity, spec, steps=2)


# -- chunks ------------------------------------------------------------------------------------------------

INTERLEAVED = {
    "a chain": ("lm(1,2,1)@0", {"lm": 4}, {}),
    "behind an encoder": ("enc(1,1,2)@0 lm(2,2,1)@2", {"lm": 4}, {}),
    "of an encoder too": ("enc(1,2,1)@0 lm(1,2,1)@2", {"enc": 4, "lm": 4}, {}),
    "before a generator": ("enc(1,1,1)@0 lm(1,2,1)@1->gen gen(1,2,1)@3", {"lm": 6}, {}),
    "tied over the ends": ("enc(1,1,1)@0 lm(2,2,1)@1", {"lm": 4}, {"tied_embeddings": True}),
    "beside an encoder on the same ranks": ("enc(1,1,2)@0 lm(1,2,1)@0", {"lm": 4}, {}),
}


@pytest.mark.parametrize(
    "case", [*list(INTERLEAVED)[4:5], *nightly_only([*list(INTERLEAVED)[:4], *list(INTERLEAVED)[5:]])]
)
def test_interleaved_chunks(parity: Parity, case: str) -> None:
    """Several chunks of a module on a rank, in the interleaved order, train the same model."""
    line, layers, options = INTERLEAVED[case]
    changes: dict[str, dict[str, Any]] = {
        name: {"chunks": count // 2, "options": {"layers": count}} for name, count in layers.items()
    }
    changes["lm"]["options"] |= options
    assert_same(parity, job(line, schedule="interleaved", changes=changes))


# -- at random ---------------------------------------------------------------------------------------------


@settings(max_examples=drawn(5), derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(spec=layouts())
def test_any_layout_is_the_model(parity: Parity, spec: JobSpec) -> None:
    """Whatever graph, grids, offsets, shares, microbatches, splits and freezing a job has."""
    note(jobfile.dump(spec))
    assert_same(parity, spec)
