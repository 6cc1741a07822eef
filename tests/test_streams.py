"""Streams: nothing is used before it is there, and no memory is used again before its last use is over."""

from collections.abc import Callable, Mapping
from typing import Any
from unittest.mock import patch

import pytest
import torch

from layouts import job
from mimogrid.core.errors import PlanError
from mimogrid.core.groups import Purpose, openings_of
from mimogrid.core.spec import JobSpec, OptimizerSpec
from mimogrid.shell import device as devices
from mimogrid.shell.jobs import Job
from mimogrid.shell.launch import Pool
from mimogrid.shell.place import Place
from mimogrid.shell.streams import Stream, Streams
from ordered import OrderedStreams


pytestmark = pytest.mark.world

Opened = Callable[[JobSpec], Job]
GRIDS = "enc(1,1,1)@0 lm(1,1,1)@1"


def checked(
    pool: Pool, opened: Opened, *, through_host: bool, without: str | None = None
) -> tuple[set[str], set[str]]:
    """The places that order something in a world, and what is wrong there."""
    opened_job = opened(job(GRIDS))
    said = pool.run("bodies:ordered", opened_job.topology.world_size, opened_job, through_host, without)
    return {place for places, _ in said for place in places}, {text for _, wrong in said for text in wrong}


def test_everything_is_ordered_and_nothing_too_much(pool: Pool, opened: Opened) -> None:
    """A step uses nothing too early, on NCCL or through host memory; and without any one of its waits, it would."""
    needed: dict[str, bool] = {}
    for through_host in (False, True):
        places, wrong = checked(pool, opened, through_host=through_host)
        assert set() == wrong
        for place in places:
            _, wrong = checked(pool, opened, through_host=through_host, without=place)
            needed[place] = needed.get(place, False) or bool(wrong)
    # In sending and in receiving each: a stream that follows, memory that is kept, a wait; and a host that hears.
    assert 7 == len(needed)
    assert [] == [place for place, is_needed in needed.items() if not is_needed]


@pytest.mark.parametrize(
    ("grids", "options"),
    [
        ("lm(1,2,2)@0", {"changes": {"lm": {"options": {"tied_embeddings": True}}}}),
        ("lm(1,1,2)@0", {"optimizer": OptimizerSpec(sharded=True), "precision": "bf16"}),
    ],
)
def test_sums_are_over_before_they_are_used(
    pool: Pool, opened: Opened, grids: str, options: Mapping[str, Any]
) -> None:
    """Nothing uses gradients between a sum and its wait; without the wait, or posted too early, something would."""
    opened_job = opened(job(grids, **options))
    size = opened_job.topology.world_size

    def wrong(*, without: str | None = None, too_early: bool = False) -> list[set[str]]:
        said = pool.run("bodies:ordered", size, opened_job, False, without, too_early)
        (place,) = {place for places, _ in said for place in places if place.startswith("gradients.")}
        sums.add(place)
        return [set(found) for _, found in said]

    sums: set[str] = set()
    assert [set()] * size == wrong()
    (wait,) = sums
    assert all("may not have written" in " ".join(found) for found in wrong(without=wait))
    assert all("may still use" in " ".join(found) for found in wrong(too_early=True))


@pytest.fixture
def streams() -> OrderedStreams:
    """Streams on which messages are NCCL's."""
    return OrderedStreams()


def test_reading_what_another_stream_writes_needs_an_event(streams: OrderedStreams) -> None:
    """Without one it is told, with one it is right."""
    with streams.watching():
        tensor = torch.ones(2)
        with streams.on(Stream.SEND):
            tensor.sum()
        assert ["send reads what compute may not have written yet"] == list(streams.wrong)
        streams.wrong.clear()
        tensor.add_(1)
        assert ["compute writes over what send may still use"] == list(streams.wrong)


def test_memory_is_taken_again_by_who_took_it(streams: OrderedStreams) -> None:
    """A tensor that another stream reads is kept for that stream, or dropped too early."""
    for kept in (False, True):
        streams.wrong.clear()
        with streams.watching():
            tensor = torch.ones(2)
            streams.follow(Stream.SEND, after=Stream.COMPUTE)
            with streams.on(Stream.SEND):
                tensor.sum()
            if kept:
                streams.keep(tensor, until=Stream.SEND)
            del tensor
        assert (not kept) == ("compute takes again what send may still use" in streams.wrong)


def test_groups_are_connected_when_they_are_made(pool: Pool, opened: Opened) -> None:
    """Each rank uses each of its groups and channels once, as planned; and who waits in vain is told for what."""
    spec = job("enc(2,1,1)@0 lm(1,2,1)@2")
    opened_job = opened(spec)
    said = pool.run("bodies:connected", opened_job.topology.world_size, opened_job)
    openings = openings_of(opened_job.topology, has_tags=False)
    for rank, (calls, _, _) in enumerate(said):
        planned = [
            (
                "all_reduce" if o.purpose is Purpose.COLLECTIVE else ("irecv", "isend")[ranks[0] == rank],
                len(ranks),
            )
            for o in openings
            for ranks in o.slot
            if rank in ranks and len(ranks) > 1
        ]
        assert planned == calls
    assert {"all_reduce", "isend", "irecv"} == {name for calls, _, _ in said for name, _ in calls}
    (usual,) = {taken.loss for of_rank in pool.run("bodies:train", 4, opened_job, 1) for taken in of_rank}
    assert {usual} == {loss for _, loss, _ in said}
    assert said[0][2] == "a message: not done in 0.1 s; some of its ranks have not come, or are gone."


def test_a_gpu_for_each_rank_or_one_for_all() -> None:
    """Ranks share GPUs through host memory; NCCL refuses to, and says so before it is asked."""
    with (
        patch.object(torch.cuda, "is_available", lambda: True),
        patch.object(torch.cuda, "device_count", lambda: 2),
        patch.object(torch.cuda, "set_device", lambda _: None),
        patch.object(devices, "CudaStreams", lambda _: Streams()),
    ):
        fourth = Place(3, 4, "meeting", local_rank=3)
        assert "cpu" == devices.choose(fourth).torch.type
        shared = devices.choose(fourth, "host")
        assert (torch.device("cuda", 1), "gloo", True) == (
            shared.torch,
            shared.backend,
            shared.stages_through_host,
        )
        own = devices.choose(Place(1, 2, "meeting", local_rank=1), "nccl")
        assert ("nccl", False, True) == (own.backend, own.has_tags, own.connects_lazily)
        with pytest.raises(PlanError, match="this host has 2"):
            devices.choose(fourth, "nccl")
    with pytest.raises(PlanError, match="this host has 0"):
        devices.choose(Place(0, 1, "meeting"), "nccl")
