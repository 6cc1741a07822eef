"""Former names of modules: users' files and checkpoints that hold them keep working."""

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mimogrid.moved import FUNCTIONS, INTO, PACKAGES, RENAMED, current_name
from mimogrid.shell.cli.main import main
from mimogrid.shell.job.builders import find
from mimogrid.shell.job.jobfile import dump, parsed


FORMER = [
    *(f"mimogrid.{into.partition('.')[0]}.{name}" for into, names in INTO.items() for name in names.split()),
    *(f"mimogrid.{name}" for name in RENAMED),
    "mimogrid.core.legality.checks",
    "mimogrid.shell.sources.synthetic",
    "mimogrid.shell.probe.clock",
]
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


@pytest.mark.parametrize("name", FORMER)
def test_a_former_name_is_the_module_itself(name: str) -> None:
    """It is one module under two names, and the warning says which is today's."""
    current = current_name(name)
    with pytest.warns(DeprecationWarning, match="now") as warned:
        module = importlib.import_module(name)
    assert f"{name} is {current} now." == str(warned[-1].message)
    assert module is importlib.import_module(current)
    assert current == module.__spec__.name == module.__name__  # type: ignore[union-attr]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_has_the_names_of_the_module_in_whose_place_it_is(package: str) -> None:
    """Everything that a former module defined is found where it is now; what nobody defined is not."""
    here = importlib.import_module(f"mimogrid.{package}")
    for place in PACKAGES[package]:
        module = importlib.import_module(f"mimogrid.{place}")
        for name, value in vars(module).items():
            if getattr(value, "__module__", None) == module.__name__ and not name.startswith("_"):
                if f"{package}.{name}" in FUNCTIONS:
                    assert getattr(here, name) is module
                    continue
                with pytest.warns(
                    DeprecationWarning, match=f"{package}.{name} is mimogrid.{place}.{name} now"
                ):
                    assert getattr(here, name) is value
    assert not hasattr(here, "nobody_defined_this")


def test_a_module_in_the_place_of_a_function_can_be_called(capsys: pytest.CaptureFixture[str]) -> None:
    """``from mimogrid.shell.cli import main`` gave a function once."""
    from mimogrid.shell import cli  # noqa: PLC0415

    with pytest.warns(DeprecationWarning, match=r"the function mimogrid\.shell\.cli\.main\.main"):
        assert 0 == cli.main([])  # type: ignore[operator]
    assert "mimogrid" in capsys.readouterr().out


def test_a_users_file_of_before_runs_as_it_is(tmp_path: Path) -> None:
    """It imports what it always imported, without torch, and is warned on its own lines."""
    lines = [
        "from mimogrid.core.samples import Sample",
        "from mimogrid.core.topology import Topology, parse",
        "import mimogrid.core.legality.checks as checks",
        "from mimogrid.core import grid",
        "import mimogrid.core.base.samples, mimogrid.core.base.grid, mimogrid.core.topology.topology, sys",
        "assert Sample is mimogrid.core.base.samples.Sample",
        "assert Topology is mimogrid.core.topology.topology.Topology",
        "assert grid is mimogrid.core.base.grid",
        "assert callable(parse) and 'torch' not in sys.modules",
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
