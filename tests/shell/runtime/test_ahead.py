"""Loading beside computing: what is read is planned, loads come in order and in bounds, and what fails is told."""

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimogrid.core.base.errors import WorldError
from mimogrid.core.schedule.actions import Kind
from mimogrid.core.schedule.loads import SampleLoad, loads_of
from mimogrid.core.topology.roles import RankRole
from mimogrid.shell.job.jobs import Job, open_job
from mimogrid.shell.runtime.ahead import LoadsAhead
from mimogrid.shell.runtime.data import Loader, LoadError
from mimogrid.shell.world.launch import Pool
from pictures_that_fail import job_in
from scale import drawn, nightly_only


ROOT = Path(__file__).resolve().parents[3]
READ = "pictures_that_fail:read"
TRAIN = "mimogrid.shell.run.train:in_world"


class Recorded:
    """The source of a job that notes what is loaded."""

    def __init__(self, source: Any) -> None:
        self._source = source
        self.loaded: list[tuple[int, str]] = []

    def load(self, sample_id: int, module: str) -> Mapping[str, torch.Tensor]:
        """Load a sample."""
        self.loaded.append((sample_id, module))
        return self._source.load(sample_id, module)  # type: ignore[no-any-return]


def read_by(job: Job, role: RankRole, index: int) -> list[list[tuple[int, str]]]:
    """What the stages of a rank read in a step, forward by forward."""
    step, source, found = job.step(index), Recorded(job.source), list[list[tuple[int, str]]]()
    loader = Loader(source, device=torch.device("cpu"), dtype=torch.float32)
    infos = {info.stage: info for info in role.stages}
    for action in job.order_of(job.step(0)).actions:
        if action.kind is Kind.FORWARD and action.stage in infos:
            info, module = infos[action.stage], job.topology.modules[action.stage.module]
            share = step.share(module.name, module.grid.position(role.rank)["dp"], action.microbatch)
            source.loaded.clear()
            if info.first:
                loader.inputs(module, share)
            if info.last:
                loader.targets(module, share)
            if source.loaded:
                found.append(list(source.loaded))
    return found


@pytest.mark.parametrize(
    ("path", "overrides"),
    [
        ("examples/first/job.toml", ()),
        ("examples/first/job.toml", ("modules.language.microbatches=8",)),
        ("examples/own/job.toml", ()),
        ("examples/digits/job.toml", ("modules.vision.grid.dp=4", "modules.language.grid.pp=1")),
        (
            "examples/digits/job.toml",
            ("modules.language.chunks=2", "modules.language.options.layers=4", "schedule.name=interleaved"),
        ),
    ],
)
def test_what_stages_read_is_planned(path: str, overrides: tuple[str, ...]) -> None:
    """Every sample that a forward reads, in order, each as often as it is read, and no other."""
    job = open_job(ROOT / path, overrides)
    for rank in job.topology.ranks:
        role = job.topology.role(rank)
        planned = list(loads_of(job.step(1), job.order_of(job.step(1)), role))
        read = read_by(job, role, 1)
        assert [list(dict.fromkeys(one)) for one in read] == [
            [(load.sample_id, load.module) for load in of] for of in planned
        ]
        assert [len(one) for one in read] == [sum(load.reads for load in of) for of in planned]


class Counting:
    """A source that says what is loaded, and loads when it may."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.may = threading.Event()

    def load(self, sample_id: int, module: str) -> Mapping[str, torch.Tensor]:
        """Load a sample: its number."""
        self.begun.append(sample_id)
        assert self.may.wait(60)
        return {module: torch.tensor([sample_id])}


@given(
    sizes=st.lists(st.integers(1, 3), min_size=1, max_size=6),
    ahead=st.integers(1, 4),
    workers=st.integers(1, 3),
    reads=st.integers(1, 2),
)
@settings(max_examples=drawn(12))
def test_loads_are_in_order_and_in_bounds(sizes: list[int], ahead: int, workers: int, reads: int) -> None:
    """No forward is loaded before it is within `ahead`, nothing is loaded twice, and each read gets its sample."""
    source = Counting()
    source.may.set()
    ids = iter(range(sum(sizes)))
    forwards = [tuple(SampleLoad(next(ids), "m", reads) for _ in range(size)) for size in sizes]
    loads = LoadsAhead([source] * workers, ahead=ahead, timeout_s=60)
    loads.expect(forwards[:2])
    loads.expect(forwards[2:])
    for number, forward in enumerate(forwards):
        for load in forward * reads:
            assert load.sample_id == loads.load(load.sample_id, "m")["m"].item()
            allowed = {load.sample_id for of in forwards[: number + ahead + 1] for load in of}
            assert set(source.begun) <= allowed
    loads.close()
    assert sorted(source.begun) == list(range(sum(sizes)))
    if workers == 1:
        assert sorted(source.begun) == source.begun


def test_what_was_not_planned_is_loaded_all_the_same() -> None:
    """Such as a sample that a host asks for."""
    source = Counting()
    source.may.set()
    loads = LoadsAhead([source], ahead=1, timeout_s=60)
    assert 5 == loads.load(5, "m")["m"].item()
    loads.close()


def test_a_load_without_end_ends_in_words() -> None:
    """With the sample, the module and the time."""
    loads = LoadsAhead([Counting()], ahead=1, timeout_s=0.01)
    with pytest.raises(LoadError, match=r"sample 3: loading it for module 'm' takes longer than 0.01 s"):
        loads.load(3, "m")
    loads._threads[0].join(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of jobs."""
    return tmp_path_factory.mktemp("failing")


@pytest.mark.world
def test_any_tensor_crosses_between_processes(pool: Pool, folder: Path) -> None:
    """Scalars, empty ones, half precision, transposed ones, flags; loaded in another process than the rank's."""
    job = job_in(folder, "data.workers=1", function="odd")
    ((found, warned),) = pool.run(READ, 1, job, [1])
    (tensors,) = found
    assert tensors.pop("pid").item() != os.getpid()
    expected = {
        "none": torch.zeros(0, 3),
        "half": torch.ones(2, 3).bfloat16(),
        "turned": torch.arange(6).reshape(2, 3).T,
        "flags": torch.tensor([True, False]),
    }
    assert expected.keys() == tensors.keys()
    assert all(expected[n].dtype == of.dtype and expected[n].equal(of) for n, of in tensors.items())
    assert not warned


@pytest.mark.world
def test_a_process_that_is_killed_is_started_again_or_named(pool: Pool, folder: Path) -> None:
    """One kill costs a warning; a sample that kills every process is the error, and the next sample loads."""
    job = job_in(
        folder, "data.workers=1", "data.options.kills=[4]", "data.options.dies=[5]", "data.options.raises=[7]"
    )
    ((found, warned),) = pool.run(READ, 1, job, [4, 5, 7, 8])
    assert (1, 5) == found[0]["rows"].shape
    assert "sample 5: the process that loaded it for module 'eyes' was killed by signal 9, 3 times" in str(
        found[1]
    )
    assert "sample 7: loading it for module 'eyes' raised ValueError: no such picture" in str(found[2])
    assert "Traceback" in str(found[2])
    assert (2, 5) == found[3]["rows"].shape
    assert [4, 5, 5] == [int(line.split()[1].rstrip(":")) for line in warned]


@pytest.mark.world
def test_losses_are_bitwise_those_without_workers(pool: Pool, folder: Path, tmp_path: Path) -> None:
    """With threads, with processes, and with processes that are killed in between."""
    ways = {
        "none": (),
        "thread": ("data.workers=2", 'data.worker_kind="thread"', "data.ahead=1"),
        "process": ("data.workers=2", "data.ahead=3", "data.options.kills=[10, 13]"),
    }
    reports = {}
    for way, overrides in ways.items():
        job = job_in(folder, *overrides)
        found = pool.run(TRAIN, 2, job, None, str(tmp_path / way))
        reports[way] = next(report for report in found if report)
    assert reports["none"]["losses"] == reports["thread"]["losses"] == reports["process"]["losses"]
    warned = (tmp_path / "process" / "logs" / "rank-0.jsonl").read_text()
    assert 2 == warned.count("is started again")
    assert {"0", "1"} == set(reports["none"]["waiting_for_data_by_rank"])
    assert 0 < reports["none"]["waiting_for_data"] < reports["none"]["waiting"] < 1


@pytest.mark.world
@pytest.mark.parametrize(
    "overrides", [(), ("data.workers=1", 'data.worker_kind="thread"'), *nightly_only([("data.workers=2",)])]
)
def test_a_source_that_raises_ends_the_run_with_the_sample(
    pool: Pool, folder: Path, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    """And the module and the traceback, in the one report, with and without workers."""
    job = job_in(folder, "data.options.raises=[10]", *overrides)
    with pytest.raises(
        WorldError, match=r"sample 10: loading it for module 'eyes' raised ValueError: no such picture"
    ) as caught:
        pool.run(TRAIN, 2, job, None, str(tmp_path))
    assert "rank 0" in str(caught.value)
