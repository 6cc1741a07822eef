"""Elastic jobs: opened for a number of ranks, with the layout for it; a planned one is searched for once."""

import pickle
from pathlib import Path
from unittest.mock import patch

import pytest

from mimogrid.core.base.errors import PlanError
from mimogrid.core.job.changes import refused
from mimogrid.shell.job import elastic, planning
from mimogrid.shell.job.jobs import open_job


JOB = """
[modules.vision]
model = "vit"
feeds = ["language"]
grid = { dp = 2 }
options = { layers = 2, hidden = 64, heads = 4 }

[modules.language]
model = "gpt"
grid = { pp = 2 }
options = { layers = 4, hidden = 64, heads = 4, vocab = 64 }

[data]
source = "synthetic"

[batch]
global_size = 16
microbatches = 4

[[layouts]]
ranks = 2
modules.vision.grid = { dp = 1 }
modules.language.grid = { offset = 1 }
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A job with layouts for four ranks and for two."""
    file = tmp_path / "job.toml"
    file.write_text(JOB)
    return file


def test_a_job_is_opened_for_the_ranks_that_there_are(path: Path) -> None:
    """Another process that gets it opens it for as many; its record names no other layout."""
    assert [4, 4, 2] == [open_job(path, ranks=ranks).topology.world_size for ranks in (None, 5, 3)]
    again = pickle.loads(pickle.dumps(open_job(path, ranks=3)))
    assert 2 == again.topology.world_size
    assert again.is_elastic
    assert () == again.spec.layouts


def test_a_world_that_is_too_small_is_told_the_sizes(path: Path) -> None:
    """All that there are."""
    with pytest.raises(PlanError, match=r"there are 1 ranks, and the smallest .* is for 2 \(all: 2, 4\)"):
        open_job(path, ranks=1)


def test_a_mistake_in_a_layout_is_found_whatever_the_world(path: Path) -> None:
    """A run must not find it when its world shrinks."""
    path.write_text(JOB.replace("grid = { offset = 1 }", "grid = { offset = 1, tp = 3 }"))
    for ranks in (None, 2, 4):
        with pytest.raises(PlanError, match=r"^layouts\[0\]\.modules\.language\.grid"):
            open_job(path, ranks=ranks)


def test_a_planned_layout_is_searched_for_once_in_a_run(path: Path, tmp_path: Path) -> None:
    """For each number of ranks; it is kept as a job file, and that of another job does not count."""
    path.write_text(JOB[: JOB.index("[[layouts]]")])
    folder = tmp_path / "run"
    folder.mkdir()
    given = ['layouts="plan"', 'gpu.name="h100"', f"train.run_dir={folder}"]
    first = open_job(path, given, ranks=3)
    assert 3 >= len(first.topology.ranks)
    assert not list(refused(open_job(path, given).spec, first.spec, accepted=()))
    elastic.keep(first.spec, 3, folder)
    with patch.object(planning, "plan", side_effect=AssertionError("searched again")):
        assert first.spec == open_job(path, given, ranks=3).spec
        assert first.topology.modules == open_job(elastic.kept_in(folder, 3)).topology.modules
        with pytest.raises(AssertionError, match="searched again"):
            open_job(path, [*given, "seed=7"], ranks=3)
