"""Under context parallelism a module is what it is on one rank: a sample's positions are cut, its sums are not.

The notation of the jobs is that of `layouts`, ``name(tp,pp,dp)@offset``, with what is cut behind a bar.
"""

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import pytest

from layouts import job as job_of
from mimogrid.core.job.spec import JobSpec
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.run.parity import TOLERANCE
from mimogrid.shell.world.launch import Pool
from parity import Parity, assert_same
from scale import nightly_only


pytestmark = pytest.mark.world

SEQUENCE = 32


def cut(line: str, *, rows: Mapping[str, tuple[int, int]] | None = None, **options: Any) -> JobSpec:
    """Return the job of a line; behind its bar, ``name.cp=2`` and ``name.sp`` are said of the grids."""
    grids, _, cuts = line.partition("|")
    rows = rows or {name.split("(")[0]: (1, 9) for name in grids.split() if name.startswith(("enc", "img"))}
    data = {"sequence": SEQUENCE, "rows": {name: list(counts) for name, counts in rows.items()}}
    spec = job_of(grids, data=data, **options)
    data_options = {**spec.data.options, "sequence": SEQUENCE}
    modules = dict(spec.modules)
    for word in cuts.split():
        name, _, what = word.partition(".")
        change = {"sequence_parallel": True} if what == "sp" else {"cp": int(what.removeprefix("cp="))}
        modules[name] = attrs.evolve(modules[name], grid=attrs.evolve(modules[name].grid, **change))
    data_spec = attrs.evolve(spec.data, options=data_options)
    return attrs.evolve(spec, modules=modules, data=data_spec)


CASES = [
    # Both sides of an edge.
    "enc(1,1,1)@0 lm(1,1,2)@4 | enc.cp=4 lm.cp=2",
    # Sequence parallelism cuts a rank's part once more.
    "enc(2,1,1)@0 lm(2,1,1)@4 | enc.cp=2 enc.sp lm.cp=2 lm.sp",
    # Fan-in, chains, and losses on other modules.
    "img(1,1,1)@0->mid aud(1,1,1)@0->mid mid(1,2,1)@0 lm(1,1,1)@4 | aud.cp=2 mid.cp=2 lm.cp=4",
    *nightly_only(
        [
            "enc(1,1,1)@0 lm(1,1,1)@1 | lm.cp=2",
            "enc(1,1,1)@0 lm(1,1,1)@2 | enc.cp=2",
            "enc(1,2,1)@0 lm(1,2,1)@4 | enc.cp=2 lm.cp=2",
            "gen(1,2,1)@0 | gen.cp=4",
            "enc(1,1,1)@0 lm(1,1,1)@2 | enc.cp=2 lm.cp=2",
            "enc(1,1,1)@0 lm(1,1,1)@4 | enc.cp=4 lm.cp=4",
            "enc(1,1,3)@0 lm(1,1,1)@6 | enc.cp=2 lm.cp=2",
            "enc(2,1,1)@0 lm(2,1,1)@4 | enc.cp=2 lm.cp=2",
            "enc(4,1,1)@0 lm(2,1,2)@0 | enc.cp=2 lm.cp=2",
            "enc(2,2,1)@0 lm(1,2,2)@0 | enc.cp=2 lm.cp=2",
            "enc(2,2,1)@0 lm(2,2,1)@0 | enc.cp=2 enc.sp lm.cp=2 lm.sp",
            "enc(2,1,1)@0 lm(4,1,1)@0 | enc.cp=4 enc.sp lm.cp=2 lm.sp",
            "img(1,1,1)@0 aud(1,1,2)@2 lm(1,1,1)@4 | img.cp=2 lm.cp=4",
            "enc(1,1,1)@0->mid,lm mid(1,1,1)@2 lm(1,1,1)@4 | enc.cp=2 mid.cp=2 lm.cp=2",
            "enc(1,1,1)@0 lm(1,2,1)@2->gen gen(2,1,1)@4 | enc.cp=2 gen.cp=2 gen.sp",
        ]
    ),
]


@pytest.mark.parametrize("line", CASES)
def test_a_cut_layout_is_the_model(parity: Parity, line: str) -> None:
    """Ragged samples, some without a modality, over ranks that each have a part of the positions."""
    assert_same(parity, cut(line))


def test_modules_with_microbatches_of_their_own(parity: Parity) -> None:
    """An encoder makes four microbatches of each of the language model's, and both are cut."""
    assert_same(parity, cut("enc(1,1,1)@0*2 lm(1,1,1)@2/2 | enc.cp=2 lm.cp=2", samples=6))


@pytest.mark.parametrize("order", [("pp", "cp", "dp", "tp"), *nightly_only([("cp", "tp", "dp", "pp")])])
def test_axes_in_any_order(parity: Parity, order: tuple[str, ...]) -> None:
    """Which ranks share a sample changes nothing."""
    assert_same(parity, cut("enc(2,1,2)@0 lm(2,2,1)@0 | enc.cp=2 lm.cp=2 lm.sp", order=order))


@pytest.mark.parametrize("recompute", ["full", *nightly_only(["selective"])])
def test_recomputation(parity: Parity, recompute: str) -> None:
    """What is computed twice gathers its keys twice."""
    changes = {name: {"recompute": recompute} for name in ("enc", "lm")}
    assert_same(parity, cut("enc(2,1,1)@0 lm(1,2,1)@4 | enc.cp=2 enc.sp lm.cp=2", changes=changes))


@pytest.mark.parametrize(
    "grids", ["lm(1,2,1)@2 | enc.cp=2 lm.cp=2", *nightly_only(["lm(2,1,1)@2 | lm.cp=2 lm.sp"])]
)
def test_tied_embeddings(parity: Parity, grids: str) -> None:
    """Both ends of a module sum what their ranks have of a weight's gradient."""
    changes = {"lm": {"options": {"tied_embeddings": True}}}
    assert_same(parity, cut(f"enc(1,1,1)@0 {grids}", changes=changes))


def test_shared_key_value_heads(parity: Parity) -> None:
    """Fewer heads are gathered than ask."""
    changes = {name: {"options": {"kv_heads": 1}} for name in ("enc", "lm")}
    assert_same(parity, cut("enc(1,1,1)@0 lm(1,1,1)@2 | enc.cp=2 lm.cp=4", changes=changes))


@pytest.mark.parametrize("trainable", [("projector.*",), *nightly_only([("layers.0.*",)])])
def test_partly_frozen(parity: Parity, trainable: tuple[str, ...]) -> None:
    """Where an encoder trains in part, its ranks still add up to it."""
    changes = {"enc": {"trainable": trainable}}
    assert_same(parity, cut("enc(1,1,1)@0 lm(1,1,1)@2 | enc.cp=2 lm.cp=2", changes=changes))


@pytest.mark.parametrize("sp", [" enc.sp lm.sp", *nightly_only([""])])
def test_samples_of_one_row(parity: Parity, sp: str) -> None:
    """Most ranks have nothing but padding, and a rank may have no token that counts."""
    spec = cut(
        "enc(2,1,1)@0 lm(2,1,1)@0 | enc.cp=4 lm.cp=4" + sp, rows={"enc": (1, 1)}, samples=2, microbatches=2
    )
    assert_same(parity, spec)


@pytest.mark.parametrize("absent", [0.7, *nightly_only([1.0])])
def test_microbatches_without_rows(parity: Parity, absent: float) -> None:
    """Most samples lack the modality, or all do."""
    spec = cut("enc(1,2,1)@0 lm(1,1,1)@4 | enc.cp=2 lm.cp=2", samples=2)
    options = {**spec.data.options, "absent": {"enc": absent}}
    assert_same(parity, attrs.evolve(spec, data=attrs.evolve(spec.data, options=options)))


@pytest.mark.parametrize(
    "line",
    [
        "img(1,1,1)@0->mid aud(1,1,1)@2->mid mid(1,2,1)@4 lm(1,1,1)@0->gen gen(1,1,1)@2 "
        "| img.cp=2 mid.cp=2 lm.cp=2 gen.cp=2",
        *nightly_only(
            [
                "enc(1,1,1)@0 lm(1,1,1)@4 | enc.cp=4 lm.cp=4",
                "enc(2,2,1)@0 lm(2,1,1)@0 | enc.cp=2 enc.sp lm.cp=4 lm.sp",
            ]
        ),
    ],
)
def test_a_cut_layout_is_the_plain_model(pool: Pool, opened: Callable[[JobSpec], Job], line: str) -> None:
    """The same comparison with a model in mere torch, which knows nothing of positions that are cut."""
    job = opened(cut(line))
    said = pool.run("against_plain:parity_in_world", job.topology.world_size, job)
    (found,) = [one for one in said if one is not None]
    assert max(found.loss, found.gradients) <= TOLERANCE["fp64"], found


@pytest.mark.parametrize(
    "cuts",
    [
        "enc(2,1,1)@0 lm(2,2,1)@0 | lm.cp=2 lm.sp",
        *nightly_only(["enc(1,1,1)@0 lm(1,1,1)@4 | enc.cp=4 lm.cp=4"]),
    ],
)
def test_what_is_evaluated_is_whole(pool: Pool, opened: Callable[[JobSpec], Job], cuts: str) -> None:
    """Every rank hears the same answers, and they are those of a layout that cuts nothing."""

    def chosen(line: str) -> list[list[int]]:
        job = opened(cut(line))
        return pool.run("against_plain:chosen_in_world", job.topology.world_size, job)

    (expected, _), found = chosen("enc(1,1,1)@0 lm(1,1,1)@1"), chosen(cuts)
    assert len(set(expected)) > 1
    assert [expected] * len(found) == found
