"""Worlds: what all ranks agree on, what they send, and how they end when one of them fails."""

import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import attrs
import pytest

from bodies import Sent, Taken
from layouts import job
from mimogrid.core.base.errors import PlanError, WorldError
from mimogrid.core.job.spec import DataSpec, JobSpec
from mimogrid.core.step.traffic import edge_traffic
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.world.launch import Pool
from scale import drawn, nightly_only, one_of_each


pytestmark = pytest.mark.world

Opened = Callable[[JobSpec], Job]
GRIDS = "enc(1,1,2)@0 lm(1,2,1)@2"


def trained(pool: Pool, opened_job: Job, steps: int) -> list[list[Taken]]:
    """What each rank that is not idle saw."""
    said = pool.run("bodies:train", opened_job.topology.world_size, opened_job, steps)
    return [one for one in said if one is not None]


def fragile(event: str, *, rank: int = 1, call: int = 2, grids: str = GRIDS, **fields: Any) -> JobSpec:
    """A job whose encoder breaks on one rank, in one of its forwards."""
    spec = job(grids, **fields)
    options = {"width": 8, "features": 5, "rank": rank, "call": call, "event": event}
    broken = attrs.evolve(spec.modules["enc"], model="own:fragile", options=options)
    data = attrs.evolve(
        spec.data, options={**spec.data.options, "features": {"enc": 5}, "absent": {"enc": 0.0}}
    )
    return attrs.evolve(spec, modules={**spec.modules, "enc": broken}, data=data)


def lying(wrong: str, sample_id: int) -> JobSpec:
    """A job whose source is wrong about one sample."""
    spec = job(GRIDS, data={"absent": {"enc": 0.0}})
    options = {**spec.data.options, "wrong": wrong, "sample_id": sample_id}
    return attrs.evolve(spec, data=DataSpec(source="own:lying", options=options))


def failure(pool: Pool, opened_job: Job, steps: int = 2) -> str:
    """The report of a world that fails long before anything has waited for its time; the pool works again after it."""
    begun = time.monotonic()
    with pytest.raises(WorldError) as caught:
        pool.run("bodies:train", opened_job.topology.world_size, opened_job, steps)
    assert time.monotonic() - begun < opened_job.spec.train.timeout_s / 2
    return str(caught.value)


# -- failures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, *nightly_only([0])])
def test_a_rank_that_raises_ends_all(pool: Pool, opened: Opened, rank: int) -> None:
    """Its traceback comes once, nobody else's, within seconds; and the pool works again."""
    report = failure(pool, opened(fragile("raise", rank=rank)))
    line = report.splitlines()[0]
    assert line.startswith(f"rank {rank} (host ")
    assert "module enc, stage enc.0) failed at step 0 in 'enc.0 F1' (action " in line
    assert line.endswith("ZeroDivisionError: the encoder broke on purpose")
    assert 1 == report.count("Traceback")
    assert 4 == len(trained(pool, opened(job(GRIDS)), 1))


def test_a_rank_that_raises_late_ends_all(pool: Pool, opened: Opened) -> None:
    """Also in the second step, and also where others have nothing to send it."""
    spec = fragile("raise", rank=5, call=6, grids="enc(1,1,2)@4 lm(1,2,1)@0", microbatches=4, world_size=8)
    report = failure(pool, opened(spec))
    assert report.startswith("rank 5 (host ")
    assert " failed at step 1 in 'enc.0 F" in report


@pytest.mark.parametrize(
    ("event", "said"), [("kill", "was killed by signal 9"), ("exit", "exited with code 3")]
)
def test_a_process_that_dies_is_named(pool: Pool, opened: Opened, event: str, said: str) -> None:
    """A death is reported as one, and not the closed connections that others see."""
    report = failure(pool, opened(fragile(event)))
    assert report.startswith("rank 1 (host ")
    assert f" {said} at step 0 in 'enc.0 F1' (action " in report
    assert 4 == len(trained(pool, opened(job(GRIDS)), 1))


def test_a_rank_with_another_plan_is_refused(pool: Pool, opened: Opened) -> None:
    """Ranks compare their plans before any group is made."""
    jobs = opened(job(GRIDS)), opened(job(GRIDS, seed=4))
    with pytest.raises(WorldError, match="rank 2 planned another job than rank 0: digest") as caught:
        pool.run("bodies:open_another", 4, *jobs, 2)
    assert "Start every rank with the same job file" in str(caught.value)
    assert "AssertionError" not in str(caught.value)


def test_a_world_that_is_too_small_is_refused(pool: Pool, opened: Opened) -> None:
    """A plan error travels as one."""
    with pytest.raises(PlanError, match="needs 4 ranks"):
        pool.run("bodies:train", 3, opened(job(GRIDS)), 1)


def test_descriptions_of_the_first_step_must_agree(pool: Pool, opened: Opened) -> None:
    """A source that describes a sample of the first step by process is caught before any group is made."""
    assert "planned another job" in failure(pool, opened(lying("describe", 3)))


def test_descriptions_of_later_steps_must_agree(pool: Pool, opened: Opened) -> None:
    """A sample of the next step that ranks describe differently is caught before that step."""
    spec = lying("describe", 17)
    report = failure(pool, opened(spec), steps=3)
    assert "describe samples 12..23 differently" in report


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("rows", "sample 5: the source described"),
        ("labels", "sample 5: the source described"),
        ("loss_weights", "the loss weights loaded for module 'lm' add up to"),
    ],
)
def test_what_is_loaded_must_be_as_described(pool: Pool, opened: Opened, wrong: str, said: str) -> None:
    """The error names the sample, or the samples of the share."""
    report = failure(pool, opened(lying(wrong, 5)))
    assert said in report.splitlines()[0]


@pytest.mark.parametrize(
    ("event", "said"),
    [
        ("silent", "module 'enc' returned nothing, no 'rows'"),
        ("short", "one row for each that comes in"),
        ("judge", "module 'enc' feeds others, so the plan gives it no loss; it returned one"),
    ],
)
def test_modules_of_the_user_keep_their_word(pool: Pool, opened: Opened, event: str, said: str) -> None:
    """Others wait for exactly what the plan says that a module emits."""
    assert said in failure(pool, opened(fragile(event)))


def test_the_pool_outlives_what_cannot_be_sent(pool: Pool, opened: Opened) -> None:
    """An argument that no process could take is the caller's error, and leaves no rank at work."""
    with pytest.raises(Exception, match=r"pickle|local object"):
        pool.run("bodies:train", 2, lambda: None, 1)
    assert 4 == len(trained(pool, opened(job(GRIDS)), 1))


# -- steps -------------------------------------------------------------------------------------------------


def test_one_rank_that_overflows_holds_all_back(pool: Pool, opened: Opened) -> None:
    """No rank takes a step whose gradient is not finite on one; the next step goes on."""
    said = trained(pool, opened(fragile("overflow", call=5, microbatches=4)), 4)
    assert 4 == len(said)
    for rank in said:
        assert [True, False, True, True] == [step.taken for step in rank]
        assert [True, False, True, True] == [step.changed for step in rank]
        assert math.isfinite(rank[1].loss)
        assert not math.isfinite(rank[1].norm)


def test_all_ranks_say_the_same(pool: Pool, opened: Opened) -> None:
    """Loss and norm are the same numbers on every rank, to the last bit, in every step."""
    said = trained(pool, opened(job("enc(2,1,2)@0->mid,lm mid(1,1,2)@1 lm(2,2,1)@4")), 3)
    assert 8 == len(said)
    assert said[1:] == said[:-1]


def test_a_run_repeats_bit_by_bit(pool: Pool, opened: Opened) -> None:
    """Two runs of a job have the same losses and norms, to the last bit."""
    spec = job("enc(1,1,2)@0 aud(2,1,1)@0 lm(1,1,3)@2", precision="fp32")
    assert trained(pool, opened(spec), 3) == trained(pool, opened(spec), 3)


def test_every_layout_of_a_model_trains_alike(pool: Pool, opened: Opened) -> None:
    """The same seed gives the same loss under any layout, and after updates still to rounding."""
    layouts = [
        job(f"enc({enc}) lm({lm})", samples=5, changes={"lm": {"options": {"layers": 2}}})
        for enc, lm in (
            ("1,1,1)@0", "1,1,1)@0"),
            ("1,2,1)@0", "1,1,2)@2"),
            ("2,1,2)@0", "2,2,1)@4"),
            *nightly_only([("1,1,5)@0", "1,1,3)@5")]),
        )
    ]
    first, *others = (trained(pool, opened(spec), 2)[0] for spec in layouts)
    for other in others:
        assert first[0].loss == pytest.approx(other[0].loss, rel=1e-12)
        for one, two in zip(first[1:], other[1:], strict=True):
            assert one.loss == pytest.approx(two.loss, rel=1e-7)


@pytest.mark.parametrize(
    "grids",
    [
        "lm(2,2,2)@0",
        *nightly_only(["enc(2,1,2)@0->mid,lm mid(1,2,1)@1 lm(2,2,1)@4", "enc(1,1,3)@0 lm(4,1,1)@4"]),
    ],
)
def test_one_norm_for_all(pool: Pool, opened: Opened, grids: str) -> None:
    """Every rank clips by the norm of the whole gradient: shards once, copies once, tied weights once."""
    spec = job(grids, changes={"lm": {"options": {"tied_embeddings": True}}})
    said = pool.run("bodies:norms", 8, opened(attrs.evolve(spec, world_size=8)))
    found = [one for one in said if one is not None]
    for norm, expected in found:
        assert expected == pytest.approx(norm, rel=1e-9)
    assert 1 == len({norm for norm, _ in found})


# -- what is sent ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grids", "frozen"),
    one_of_each(
        [
            "enc(2,1,2)@0->mid,lm mid(1,2,1)@3 lm(2,2,1)@4",
            "enc(1,1,2)@0*2 lm(1,1,3)@1/2",
            *nightly_only(
                ["enc(1,1,2)@0 lm(1,1,1)@2", "enc(1,1,3)@0 aud(1,1,1)@2 lm(1,1,2)@2->gen gen(2,1,1)@5"]
            ),
        ],
        [False, True],
    ),
)
def test_exactly_the_plan_is_sent(pool: Pool, opened: Opened, grids: str, frozen: bool) -> None:
    """Gloo gets the messages and bytes that the plan counts, per edge; no shapes and no broadcasts."""
    changes = {"enc": {"frozen": frozen}}
    opened_job = opened(job(grids, samples=4, changes=changes, precision="fp32"))
    said = pool.run("bodies:sent", opened_job.topology.world_size, opened_job)
    ranks: list[Sent] = [one for one in said if one is not None]
    messages, volume = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for rank in ranks:
        messages.update(rank.messages)
        volume.update(rank.bytes)
        assert rank.planned == sum(rank.messages.values())
        assert {} == {name: count for name, count in rank.calls.items() if name != "irecv"}
    assert sum(messages.values()) == sum(rank.calls.get("irecv", 0) for rank in ranks)
    for edge in edge_traffic(opened_job.step(0)):
        there, back = (edge.source, edge.target), (edge.target, edge.source)
        assert edge.messages == messages[there] + messages[back]
        assert edge.bytes == volume[there] + volume[back]


# -- what stays --------------------------------------------------------------------------------------------


def test_nothing_stays_of_a_world(pool: Pool, opened: Opened) -> None:
    """Worlds one after the other leave no group and no thread behind."""
    opened_job = opened(job("enc(2,1,1)@0 lm(1,2,1)@1", world_size=4))
    seen = [pool.run("bodies:leftovers", 4, opened_job) for _ in range(drawn(5))]
    assert {0} == {groups for world in seen for groups, _ in world}
    for first, last in zip(seen[2], seen[-1], strict=True):
        assert first[1] >= last[1]
