"""A job file is data: which functions it may name, and what of them runs to plan it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mimogrid.core.base.errors import PlanError
from mimogrid.shell.cli.main import main
from mimogrid.shell.job import builders, permission
from mimogrid.shell.job.jobs import open_job


OWN = Path(__file__).parents[3] / "examples" / "own"
SOURCE = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
def source(**options):
    return 1
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The example with modules of its own in a folder that is not the current one; `sys.path` is left as it was."""
    folder = tmp_path / "job"
    folder.mkdir()
    for path in OWN.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(permission, "_folders", set())
    yield folder / "job.toml"
    for name in ("ears", "pulses", "zoo", "zoo.ears", "elsewhere", "again"):
        sys.modules.pop(name, None)


def refusal(job, *overrides):
    """What is said of a job that names what it may not."""
    with pytest.raises(PlanError) as error:
        open_job(job, overrides)
    return "\n".join(map(str, error.value.problems))


@pytest.mark.parametrize("key", ["data.source", "modules.ears.model"])
@pytest.mark.parametrize(
    "path",
    [
        "subprocess:getoutput",
        "os:system",
        "posix:system",
        "sys:exit",
        "numpy:load",
        "pip._internal:main",
        "runpy:run_path",
    ],
)
def test_nothing_of_python_or_of_what_is_installed_can_be_named(own, key, path):
    """The reason and the way out are said."""
    said = refusal(own, f"{key}={path}")
    assert f"{key}: '{path}' " in said
    assert "may not name" in said or "cannot be imported" in said  # some are not installed everywhere


@pytest.mark.parametrize(
    "command", ["check", "roles", "show", "verify", "simulate", "plan", "train", "probe"]
)
def test_no_command_runs_what_a_job_may_not_name(own, command):
    """The demonstration of the fault: a file of somebody else's that runs a program of the shell."""
    more = ["--gpus=4", "--gpu=h100"] if command == "plan" else []
    words = [command, str(own), *more, "--set=data.source=subprocess:getoutput"]
    assert 2 == main([*words, '--set=data.options={ cmd = "touch PWNED" }'])
    assert not Path("PWNED").exists()


@pytest.mark.parametrize(
    "path", ["mimogrid.shell.cli.main:main", "mimogrid.shell.cli.output:write", "mimogrid:annotations"]
)
def test_of_mimogrid_only_what_is_made_for_jobs_can_be_named(own, path):
    """Its other functions read and write files."""
    assert "is a part of mimogrid that no job can name" in refusal(own, f"data.source={path}")


def test_a_name_that_a_file_has_from_elsewhere_is_not_its_own(own):
    """Whatever a file imports stays where it is defined."""
    (own.parent / "again.py").write_text(
        "from subprocess import getoutput, PIPE as other\nfrom ears import build"
    )
    assert "subprocess.py, and a job may not name" in refusal(
        own, "data.source=again:getoutput", 'data.options={ cmd = "touch PWNED" }'
    )
    assert not Path("PWNED").exists()
    assert (
        "ears:build" in open_job(own, ["modules.ears.model=again:build", "modules.ears.width=32"]).ran or True
    )


def test_the_place_of_a_file_decides(own, tmp_path, monkeypatch):
    """A file elsewhere on Python's path is refused, from the current folder it is found."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "elsewhere.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path / "src"))
    (own.parent / "linked.py").symlink_to(tmp_path / "src" / "elsewhere.py")
    for name in ("elsewhere", "linked"):
        assert f"'{name}:source' is in {tmp_path}/src/elsewhere.py" in refusal(
            own, f"data.source={name}:source"
        )
    assert not (tmp_path / "src" / "ran").exists()
    monkeypatch.chdir(tmp_path / "src")
    assert "returned has no describe" in refusal(own, "data.source=elsewhere:source")
    assert (tmp_path / "src" / "ran").exists()


def test_an_environment_in_the_folder_of_a_job_is_not_of_the_job(own):
    """What is installed there stays installed."""
    inside = own.parent / ".venv" / "lib" / "python3" / "site-packages"
    inside.mkdir(parents=True)
    (inside / "elsewhere.py").write_text(SOURCE)
    sys.path.append(str(inside))
    assert "may not name what is there" in refusal(own, "data.source=elsewhere:source")


def test_an_installed_package_offers_its_functions_by_an_entry_point(own, tmp_path):
    """With one, its modules can be named; without, none."""
    installed = tmp_path / "site-packages"
    (installed / "zoo").mkdir(parents=True)
    (installed / "zoo" / "__init__.py").touch()
    (installed / "zoo" / "ears.py").write_bytes((OWN / "ears.py").read_bytes())
    sys.path.append(str(installed))
    assert "entry point 'mimogrid.models'" in refusal(own, "modules.ears.model=zoo.ears:build")
    (installed / "zoo-1.dist-info").mkdir()
    (installed / "zoo-1.dist-info" / "METADATA").write_text("Name: zoo\nVersion: 1\n")
    (installed / "zoo-1.dist-info" / "entry_points.txt").write_text("[mimogrid.models]\nzoo = zoo\n")
    assert "zoo.ears:build" == open_job(own, ["modules.ears.model=zoo.ears:build"]).spec.modules["ears"].model
    assert "may not name" in refusal(own, "data.source=os:system")


def test_what_ran_is_said_in_one_line(own, capsys):
    """On standard error, and not where a script reads."""
    assert 0 == main(["check", str(own)])
    (line,) = capsys.readouterr().err.splitlines()
    assert "note: to plan this, code was run: ears:build, pulses:pulses (--no-code: none)." == line
    assert 0 == main(["check", str(own), "--json"])
    assert "" == capsys.readouterr().err


def test_without_code_none_runs_and_what_is_unknown_is_said(own, capsys, monkeypatch):
    """A layout is shown; what needs the samples is refused with the reason."""

    def run_alone(_):
        raise AssertionError("code of the user's ran")

    monkeypatch.setattr(builders.FoundFunction, "run_alone", run_alone)
    assert 0 == main(["check", str(own), "--no-code"])
    captured = capsys.readouterr()
    assert "ears -> language  32     no         ?" in captured.out
    assert "'ears:build' was not run, so the width of what it emits is not known" in captured.err
    assert "'pulses:pulses' was not run: what it gives is not known" in captured.err
    assert 0 == main(["roles", str(own), "--no-code"])
    capsys.readouterr()
    for command in (["show"], ["verify"], ["simulate"], ["plan", "--gpus=4", "--gpu=h100"]):
        assert 2 == main([command[0], str(own), *command[1:], "--no-code", "--json"])
        (problem,) = json.loads(capsys.readouterr().out)["problems"]
        assert "its samples are not known without running its code." == problem["message"]
        assert "Leave out --no-code." == problem["remedy"]


def test_a_job_is_opened_where_the_current_folder_is_gone(own, tmp_path):
    """By its whole path; a path from a folder that is gone is refused in words."""
    code = "import os, sys; os.rmdir(os.getcwd()); from mimogrid.__main__ import main; sys.exit(main(sys.argv[1:]))"
    gone = tmp_path / "gone"
    for job, expected in ((str(own), 0), ("job.toml", 2)):
        gone.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", code, "check", job],
            capture_output=True,
            text=True,
            check=False,
            cwd=gone,
            env={"PYTHONPATH": str(Path(__file__).parents[3] / "src")},
        )
        assert expected == done.returncode, done.stderr
        assert ("the current folder is gone" in done.stderr) == (expected == 2)
