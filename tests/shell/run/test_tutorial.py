"""The tutorial: each of its commands runs, in order, and its Python is that of the example or runs as it stands."""

import contextlib
import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from mimogrid.shell.cli import start
from mimogrid.shell.cli.main import main
from mimogrid.shell.world.launch import Pool


ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
STEPS, BRIEF = (
    ("train.steps=320", "train.steps=6"),
    ("--set", "train.steps=4", "--set", "train.evaluate=false"),
)
"""What makes runs short: another number of steps where one is said, and else these words."""
OURS = ("eyes", "convnet", "album")


def blocks(language: str) -> list[str]:
    """The blocks of the page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """The commands of the page that are mimogrid's."""
    return [line for block in blocks("sh") for line in block.splitlines() if line.startswith("mimogrid ")]


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the example, with its pictures, as the current one; what its job makes importable is undone."""
    folder = tmp_path / "pictures"
    shutil.copytree(ROOT / "examples/pictures", folder, ignore=shutil.ignore_patterns("png", "__pycache__"))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in OURS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    runpy.run_path("make.py")["main"](folder / "png")
    return folder


def words_of(command: str, folder: Path) -> list[str]:
    """The words of a command, which writes where ranks of the pool find it, and is over soon."""
    words = shlex.split(command.replace("runs/tutorial", str(folder / "runs/tutorial")).replace(*STEPS))[1:]
    return [*words, *BRIEF] if words[0] == "train" and STEPS[1] not in words else words


@pytest.mark.world
def test_every_command_of_the_tutorial_runs(
    pool: Pool, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the ranks of the pool, for a few steps; in the end the weights load in plain torch."""
    monkeypatch.setattr(start, "Pool", lambda *_, **__: contextlib.nullcontext(pool))
    for command in commands():
        words = words_of(command, pictures)
        with patch("mimogrid.shell.run.report.READ_COUNT", 1):
            assert 0 == main(words), (command, capsys.readouterr().err)
        if words[0] == "parity":
            assert "passed: " in capsys.readouterr().out
    report = json.loads((pictures / "runs/tutorial/report.json").read_text())
    assert 6 == report["steps"] == len(report["losses"])
    assert 2 == report["world_size"]
    *shown, last = blocks("python")
    monkeypatch.syspath_prepend(str(pictures))
    exec(last, {})
    code = "".join(Path(f"{name}.py").read_text() for name in OURS)
    assert [] == [block for block in shown if block not in code]


def test_the_job_of_the_page_is_that_of_the_example() -> None:
    """As far as it is shown."""
    job = (ROOT / "examples/pictures/job.toml").read_text(encoding="utf-8")
    assert [] == [block for block in blocks("text") if block.startswith("[") and block not in job]
