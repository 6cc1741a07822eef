"""Streams: nothing is used before it is there, and no memory is used again before its last use is over."""

from collections.abc import Callable, Mapping
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layouts import job
from mimogrid.core.base.errors import PlanError
from mimogrid.core.job.spec import JobSpec, OptimizerSpec
from mimogrid.core.simulate.timeline import Event, peak_in_flight
from mimogrid.core.topology.groups import Purpose, openings_of
from mimogrid.shell.device import device as devices
from mimogrid.shell.device.place import RankPlace
from mimogrid.shell.device.streams import Streams, _Clock
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.world.launch import Pool
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
    # A wait for what is sent, one for what is received; and the host hears that its copy is complete.
    assert 3 == len(needed)
    assert [] == [place for place, is_needed in needed.items() if not is_needed]


@pytest.mark.parametrize(
    ("grids", "options", "count"),
    [
        ("lm(1,2,2)@0", {"changes": {"lm": {"options": {"tied_embeddings": True}}}}, 1),
        ("lm(1,1,2)@0", {"optimizer": OptimizerSpec(sharded=True), "precision": "bf16"}, 2),
    ],
)
def test_sums_and_gathers_are_over_before_they_are_used(
    pool: Pool, opened: Opened, grids: str, options: Mapping[str, Any], count: int
) -> None:
    """Nothing uses gradients between a sum and its wait, nor weights between a gather and its wait.

    Without the wait, or if a sum is posted too early, something would.
    """
    opened_job = opened(job(grids, **options))
    size = opened_job.topology.world_size

    def wrong(*, without: str | None = None, too_early: bool = False) -> list[set[str]]:
        said = pool.run("bodies:ordered", size, opened_job, False, without, too_early)
        waits.update(place for places, _ in said for place in places if place.startswith("gradients."))
        return [set(found) for _, found in said]

    waits: set[str] = set()
    assert [set()] * size == wrong()
    assert count == len(waits)
    for wait in sorted(waits):
        assert all("may not have written" in " ".join(found) for found in wrong(without=wait))
    assert all("may still use" in " ".join(found) for found in wrong(too_early=True))


@pytest.fixture
def streams() -> OrderedStreams:
    """Streams on which messages are NCCL's."""
    return OrderedStreams()


class Sent:
    """A message that is over at once."""

    def wait(self) -> None:
        """Return at once."""


def test_what_a_message_brings_is_there_when_it_was_waited_for(streams: OrderedStreams) -> None:
    """To read it earlier is told, and so is to write over what a message may still read."""
    with streams.watching():
        tensor, room = torch.ones(2), torch.empty(2)
        leaves = streams.posted(Sent(), tensor, arrives=False)
        comes = streams.posted(Sent(), room, arrives=True)
        room.sum()
        tensor.add_(1)
        assert [
            "compute reads what message 2 may not have written yet",
            "compute writes over what message 1 may still use",
        ] == list(streams.wrong)
        streams.wrong.clear()
        leaves.wait()
        comes.wait()
        room.sum()
        tensor.add_(1)
        assert not streams.wrong


def test_memory_is_free_when_what_used_it_was_waited_for(streams: OrderedStreams) -> None:
    """A tensor that is dropped while a message may still read it would be taken again."""
    for waits in (False, True):
        streams.wrong.clear()
        with streams.watching():
            tensor = torch.ones(2)
            message = streams.posted(Sent(), tensor, arrives=False)
            if waits:
                message.wait()
            del tensor
        assert waits == (not streams.wrong)


class DeviceEvent:
    """An event of a device that comes to it at `at_ns`, by a clock of its own."""

    def __init__(self, at_ns: int) -> None:
        self.at_ns = at_ns

    def synchronize(self) -> None:
        """Return at once."""

    def elapsed_time(self, other: "DeviceEvent") -> float:
        """Return the milliseconds to another one."""
        return (other.at_ns - self.at_ns) / 1e6


@given(
    st.lists(st.tuples(st.integers(0, 10**7), st.integers(0, 10**6)), min_size=1, max_size=20),
    st.integers(0, 10**12),
)
def test_marks_are_on_the_clock_of_the_host(asked_for: list[tuple[int, int]], zero: int) -> None:
    """A device is late for what it is asked; where it is late least, it is taken not to be late at all."""
    clock, late, marks = _Clock(), [], []
    asked = free = 0
    for gap, busy in asked_for:
        asked += gap
        free = max(free, asked) + busy
        late.append(free - asked)
        marks.append(clock.of(DeviceEvent(free + zero), asked))  # type: ignore[arg-type]
    for i, mark in enumerate(marks):
        assert mark.asked_ns + late[i] - min(late) == mark.ns


@pytest.mark.world
def test_marks_are_read_when_the_next_step_is_agreed_on(pool: Pool, opened: Opened) -> None:
    """Begin and end of actions are marked on the stream that computes; the device has done the step before by then."""
    opened_job = opened(job(GRIDS))
    size = opened_job.topology.world_size
    for rank, said in enumerate(pool.run("bodies:marked", size, opened_job)):
        first, second = (" ".join(said).split("done")[i].split("agreeing") for i in range(2))
        # Two runs, before and from the agreement, have a mark at their beginning and one behind each action.
        count = 2 + len(opened_job.program_of(opened_job.step(0)).of(rank))
        assert count == sum(half.count("marked on the current stream") for half in first)
        assert [0, 0, 0, 1] == [half.count("read") for half in (*first, *second)]


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
        fourth = RankPlace(3, 4, "meeting", local_rank=3)
        assert "cpu" == devices.choose(fourth).torch.type
        shared = devices.choose(fourth, "host")
        assert (torch.device("cuda", 1), "gloo", True) == (
            shared.torch,
            shared.backend,
            shared.stages_through_host,
        )
        own = devices.choose(RankPlace(1, 2, "meeting", local_rank=1), "nccl")
        assert ("nccl", False, True) == (own.backend, own.has_tags, own.connects_lazily)
        with pytest.raises(PlanError, match="this host has 2"):
            devices.choose(fourth, "nccl")
    with pytest.raises(PlanError, match="this host has 0"):
        devices.choose(RankPlace(0, 1, "meeting"), "nccl")


@pytest.mark.world
@pytest.mark.parametrize(
    ("grids", "options"),
    [
        ("enc(1,1,1)@0 lm(1,2,1)@1", {}),
        ("enc(1,1,1)@0 lm(1,2,1)@1", {"schedule": "zb-h1"}),
        ("enc(1,1,1)@0/2 lm(1,1,1)@1", {"changes": {"enc": {"frozen": True}}}),
        ("enc(1,1,1)@0*2 lm(1,1,1)@1", {"samples": 4, "changes": {"enc": {"frozen": True}}}),
    ],
)
def test_nothing_is_held_for_longer_than_planned(
    pool: Pool, opened: Opened, grids: str, options: Mapping[str, Any]
) -> None:
    """A stage holds tensors of no more microbatches than are in flight in the plan, and of none after the step."""
    opened_job = opened(job(grids, microbatches=6, data={"absent": {"enc": 0.0}}, **options))
    program = opened_job.program_of(opened_job.step(0))
    said = pool.run("bodies:holding", opened_job.topology.world_size, opened_job)
    for rank, (training, judging, left) in enumerate(said):
        planned = peak_in_flight(Event(rank, action, 0.0, 0.0) for action in program.of(rank))
        assert [] == [stage for stage in training if planned[stage] < training[stage]]
        assert {*judging.values()} <= {0, 1}
        assert 0 == left
