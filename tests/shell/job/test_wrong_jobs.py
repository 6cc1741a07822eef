"""Wrong jobs: whatever legal job is spoiled in one way, that way is named, with its place and the way out."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from layouts import layouts
from mimogrid.core.base.errors import PlanError
from mimogrid.core.job.spec import JobSpec
from mimogrid.shell.job import jobfile
from mimogrid.shell.job.jobs import open_job
from scale import drawn
from wrong import WAYS, wrong_jobs


SLOW = [HealthCheck.too_slow, HealthCheck.filter_too_much]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the jobs are written, one after the other."""
    return tmp_path_factory.mktemp("wrong") / "job.toml"


@settings(max_examples=drawn(15), derandomize=True, suppress_health_check=SLOW)
@given(spec=layouts())
def test_unspoiled_they_are_legal(path: Path, spec: JobSpec) -> None:
    """What is refused below is refused for the one thing that was changed."""
    path.write_text(jobfile.dump(spec))
    assert spec == open_job(path).spec


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=drawn(3), derandomize=True, suppress_health_check=SLOW)
@given(data=st.data())
def test_a_wrong_job_is_refused_where_it_is_wrong(path: Path, way: str, data: st.DataObject) -> None:
    """Opening it says which key is wrong and what to do, and leaves nothing behind."""
    wrong = data.draw(wrong_jobs(way))
    note(wrong.text)
    path.write_text(wrong.text)
    with pytest.raises(PlanError) as refused:
        open_job(path)
    problems = refused.value.problems
    assert {problem.where for problem in problems} & set(wrong.places), refused.value
    for problem in problems:
        assert all((problem.where.strip(), problem.message.strip(), problem.remedy.strip())), problem
    assert [path] == list(path.parent.iterdir())
