"""Former names of modules: users' files and checkpoints that hold them keep working."""

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mimogrid.former_names import FORMER
from mimogrid.shell.cli.main import main
from mimogrid.shell.job.builders import find
from mimogrid.shell.job.jobfile import dump, parsed


JOB = """
[modules.ears]
model = "mimogrid.shell.host:module"
width = 8
feeds = ["language"]
[modules.language]
model = "gpt"
options = { layers = 1, hidden = 8, heads = 2, vocab = 8 }
[data]
source = "mimogrid.shell.host:samples"
options = { sequence = 8, vocab = 8 }
[batch]
global_size = 2
"""


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """Former names are imported anew, and forgotten afterwards."""
    yield
    for name in FORMER:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(("name", "current"), FORMER.items())
def test_a_former_name_is_the_module_itself(name: str, current: str) -> None:
    """It is one module under two names, and the warning says the present one."""
    with pytest.warns(DeprecationWarning, match=f"{name} is {current} now"):
        module = importlib.import_module(name)
    assert module is importlib.import_module(current)
    assert current == module.__name__


def test_a_users_file_of_before_runs_as_it_is(tmp_path: Path) -> None:
    """It imports what it always imported, without torch, and is warned on its own lines."""
    lines = [
        "from mimogrid.core.samples import Sample",
        "from mimogrid.core.topology import Topology",
        "from mimogrid.core.models import Gpt, llama",
        "from mimogrid.core import grid",
        "import mimogrid.core.base.samples, mimogrid.core.base.grid, sys",
        "assert Sample is mimogrid.core.base.samples.Sample",
        "assert grid is mimogrid.core.base.grid",
        "assert Topology is mimogrid.core.topology.topology.Topology and Gpt is mimogrid.core.job.models.Gpt",
        "assert llama is mimogrid.core.models.llama",
        "assert 'torch' not in sys.modules",
    ]
    (tmp_path / "before.py").write_text("\n".join(lines))
    run = [sys.executable, "-W", "always::DeprecationWarning", "before.py"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (0, "") == (done.returncode, done.stdout), done.stderr
    for line in (1, 2, 3, 4):
        assert f"before.py:{line}: DeprecationWarning" in done.stderr


def test_a_job_of_before_is_the_job_of_today(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A job file names what the embedding program brings; so does the job in a checkpoint, which a run compares."""
    (tmp_path / "job.toml").write_text(JOB)
    assert 0 == main(["check", str(tmp_path / "job.toml")]), capsys.readouterr().err
    assert parsed(JOB) == parsed(JOB.replace("shell.host", "shell.job.host")) == parsed(dump(parsed(JOB)))
    assert "mimogrid.shell.job.host:samples" == find("mimogrid.shell.host:samples", where="here").path
