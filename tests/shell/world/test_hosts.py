"""Hosts: versions and clocks are compared when a world meets; one table names all hosts that differ."""

import datetime
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import patch

import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from mimogrid.core.base.errors import EchoError, WorldError
from mimogrid.shell.world import world as worlds
from mimogrid.shell.world.hosts import ClockBounds, HostRecord, clock_problem, hosts_text, version_problem
from mimogrid.shell.world.world import World


VERSIONS = {"mimogrid": "0.1.0", "torch": "2.13.0", "python": "3.11"}


def record(host: str, **versions: str) -> HostRecord:
    """A host with some versions of its own."""
    return HostRecord(host, VERSIONS | versions)


def worlds_of(size: int) -> list[World]:
    """Places in one world, over a store in memory."""
    store, timeout = dist.HashStore(), datetime.timedelta(seconds=20)
    return [World(rank, size, store, timeout, range(size)) for rank in range(size)]


def on_every(places: list[World], act: Callable[[World], object]) -> list[object]:
    """Act on every rank at once; return what each returns or raises."""

    def outcome(place: World) -> object:
        try:
            return act(place)
        except WorldError as error:
            return error

    with ThreadPoolExecutor(len(places)) as threads:
        return list(threads.map(outcome, places))


def test_hosts_with_the_same_versions_meet() -> None:
    """Whatever they are called."""
    assert [None, None] == on_every(
        worlds_of(2), lambda place: place.agree_on("digest", record("ab"[place.rank]))
    )


def test_the_first_rank_with_other_versions_reports_all_hosts() -> None:
    """The others end with an echo, before the plans are compared, which may well have the same digest."""
    records = [
        record("a"),
        record("b", torch="2.12.0"),
        record("b", torch="2.12.0"),
        record("c", mimogrid="0.0.9"),
    ]
    first, second, *others = on_every(
        worlds_of(4), lambda place: place.agree_on("digest", records[place.rank])
    )
    assert all(isinstance(error, EchoError) for error in (first, *others))
    assert isinstance(second, WorldError)
    assert not isinstance(second, EchoError)
    assert [
        "rank 1 on host 'b' has torch 2.12.0; rank 0 on host 'a' has torch 2.13.0.",
        "    host  ranks  mimogrid  torch   python",
        "    a     0      0.1.0     2.13.0  3.11",
        "    b     1-2    0.1.0     2.12.0  3.11",
        "    c     3      0.0.9     2.13.0  3.11",
        "    Install the same on every host: pip install mimogrid==0.1.0 torch==2.13.0.",
    ] == str(second).splitlines()


def test_another_python_is_no_package() -> None:
    """No package is named for it."""
    problem = version_problem([record("a"), record("b", python="3.12")])
    assert problem is not None
    assert "Install the same on every host: Python 3.11." == problem.remedy
    assert version_problem([record("a"), record("b")]) is None


@given(st.floats(-100, 100), st.floats(0, 5), st.floats(0, 5), st.floats(0, 5), st.floats(0, 5))
def test_a_difference_of_clocks_is_never_guessed(
    ahead_s: float, early: float, late: float, first_early: float, first_late: float
) -> None:
    """Whenever ranks come and go, the bound is no more than the truth; without delays it is the truth."""
    mine, first = ClockBounds(ahead_s - early, ahead_s + late), ClockBounds(-first_early, first_late)
    found_s = mine.least_ahead_of(first)
    assert 0.0 == found_s or (
        0.0 < found_s <= ahead_s + 1e-9 if ahead_s > 0 else ahead_s - 1e-9 <= found_s < 0.0
    )
    assert ahead_s == ClockBounds(ahead_s, ahead_s).least_ahead_of(ClockBounds(0.0, 0.0))


def test_clocks_that_differ_are_named_by_host() -> None:
    """Once for each host; what is within a second, or cannot be proved, is not told."""
    hosts = ["a", "b", "b", "c", "d"]
    bounds = [(0.0, 0.1), (59.9, 60.0), (61.0, 61.0), (-0.5, 0.5), (-9.0, 0.2)]
    problem = clock_problem(hosts, {rank: ClockBounds(*of) for rank, of in enumerate(bounds)})
    assert problem is not None
    assert "that of 'b' (rank 2) is at least 60.9 s ahead of it. Times" in problem.message
    assert "'c'" not in problem.message
    assert "chronyc" in problem.remedy
    assert clock_problem(["a", "a"], {0: ClockBounds(0, 0), 1: ClockBounds(9, 9)}) is None
    assert "a (ranks 0), b (ranks 1-2), c (ranks 3), d (ranks 4)" == hosts_text(hosts)


def test_a_world_notices_a_clock_that_is_wrong() -> None:
    """By the barrier at which its ranks wait for each other anyway."""
    places, real_s, ahead_by = worlds_of(2), time.time, dict[str, float]()

    class Clock:
        """Stands for the module `time`; rank 1's thread lives an hour ahead."""

        @staticmethod
        def time() -> float:
            """Return the time of this thread's clock."""
            return real_s() + ahead_by.get(threading.current_thread().name, 0.0)

    def act(place: World) -> object:
        ahead_by[threading.current_thread().name] = 3600.0 * place.rank
        place.agree_on("digest", record("ab"[place.rank]))
        place.compare_clocks("joined")
        place.wait_for_all("connected")
        return place.clock_problem() if place.rank == 0 else None

    with patch.object(worlds, "time", Clock):
        problem, _ = on_every(places, act)
    assert "'b' (rank 1) is at least 3" in str(problem)
    assert "ahead of it" in str(problem)
