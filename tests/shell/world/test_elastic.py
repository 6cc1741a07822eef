"""Elastic worlds: a run whose world shrinks or grows goes on under the layout for it, as if nothing had happened."""

import json
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest

import harm
import launching
import nodes
from mimogrid.core.job.spec import BatchLayoutSpec, GridSpec, JobSpec, LayoutSpec, ModuleLayoutSpec
from mimogrid.shell.job.jobs import Job, open_job
from mimogrid.shell.world.launch import Pool
from scale import nightly


pytestmark = pytest.mark.world

STEPS = 30
LAYOUT = LayoutSpec(
    ranks=2,
    modules={"enc": ModuleLayoutSpec(), "lm": ModuleLayoutSpec(grid=GridSpec(tp=1, pp=1, offset=1))},
    batch=BatchLayoutSpec(microbatches=2),
)
SLOW = "delay rank 0 every step for 0.2 s at NORM"
"""So that steps are left when a node comes or goes."""


@pytest.fixture(scope="module")
def elastic(opened: Callable[[JobSpec], Job]) -> Job:
    """A job with layouts for four ranks and for two."""
    spec = harm.job()
    train = attrs.evolve(spec.train, steps=STEPS)
    return opened(attrs.evolve(spec, train=train, precision="fp64", layouts=(LAYOUT,)))


def starts(folder: Path) -> list[tuple[int, int, int]]:
    """For each time that the run began or went on: the ranks of its layout, those of its world, and the first step."""
    path, found = folder / "logs" / "rank-0.jsonl", []
    for line in map(json.loads, path.read_text().splitlines() if path.exists() else ()):
        if line["event"] == "layout":
            layout = line["ranks"], line["of"]
        if line["event"] == "resuming" or line["event"].startswith("no whole checkpoint"):
            found.append((*layout, line.get("step", 0)))
    return found


@nightly
def test_a_world_that_shrinks_and_grows_takes_the_layout_that_fits(
    pool: Pool, elastic: Job, tmp_path: Path
) -> None:
    """Under torchrun from 4 ranks to 2, and back to 4: the losses are those of a world that never changed."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert "" == harm.run(pool, elastic, whole).report
    arguments = ["train", str(elastic.path), "--set", f"train.run_dir={folder}"]
    with nodes.cluster(arguments, tmp_path / "said", fault=SLOW) as cluster:
        cluster.add()
        second = cluster.add()
        launching.await_that((folder / "checkpoints" / "step-00000004").exists, 120.0)
        cluster.remove(second)
        launching.await_that(lambda: starts(folder)[-1][:2] == (2, 2), 120.0)
        *_, at = starts(folder)[-1]
        launching.await_that((folder / "checkpoints" / f"step-{at + 2:08}").exists, 120.0)
        cluster.add()
        assert [0, 0] == cluster.join(300.0), (tmp_path / "said").read_text()
    assert [(4, 4), (2, 2), (4, 4)] == [start[:2] for start in starts(folder)][-3:]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [*range(STEPS)] == [line["step"] for line in lines]
    assert harm.left(whole)[1] == pytest.approx(harm.left(folder)[1], rel=1e-9, abs=0)


@nightly
def test_a_rank_that_idled_is_used_when_another_one_comes(pool: Pool, elastic: Job, tmp_path: Path) -> None:
    """Under torchrun with nodes of one rank: three take the layout for two, and with a fourth that for four."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert "" == harm.run(pool, elastic, whole).report
    arguments = ["train", str(elastic.path), "--set", f"train.run_dir={folder}"]
    with nodes.cluster(arguments, tmp_path / "said", fault=SLOW, ranks_of_a_node=1) as cluster:
        for _ in range(3):
            cluster.add()
        launching.await_that(lambda: (2, 3) in [start[:2] for start in starts(folder)], 120.0)
        *_, at = starts(folder)[-1]
        launching.await_that((folder / "checkpoints" / f"step-{at + 2:08}").exists, 120.0)
        cluster.add()
        assert [0] * 4 == cluster.join(300.0), (tmp_path / "said").read_text()
    seen = [start[:2] for start in starts(folder)]
    assert (4, 4) in seen[seen.index((2, 3)) :]
    assert harm.left(whole)[1] == pytest.approx(harm.left(folder)[1], rel=1e-9, abs=0)


@nightly
def test_a_rank_that_a_layout_leaves_over_idles_until_the_end(
    pool: Pool, elastic: Job, tmp_path: Path
) -> None:
    """It ends when another rank is killed, and when the run is done; the run is that of the layout."""
    three = open_job(elastic.path, ["world_size=3", "train.steps=6"])
    assert (3, 2) == (three.topology.world_size, len(three.topology.ranks))
    pair, folder = tmp_path / "pair", tmp_path / "run"
    assert "" == harm.run(pool, open_job(elastic.path, ["world_size=2", "train.steps=6"]), pair).report
    ended = harm.run(pool, three, folder, "kill rank 1 step 3 at lm.0 B1")
    assert ended.line.startswith("rank 1 (host "), ended.report
    assert "" == harm.run(pool, three, folder, resume=True).report
    assert harm.left(pair) == harm.left(folder)
