"""Temporary folders: none outlives its world for longer than until the next one begins."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mimogrid.shell.world.temporary import PREFIX, temporary_folder


@pytest.fixture(autouse=True)
def tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_the_folder_of_a_killed_launcher_goes_with_the_next_world(tmp: Path) -> None:
    """That of one that lives stays, and so does what is not ours."""
    (tmp / f"{PREFIX}of_somebody").mkdir()
    (tmp / f"{PREFIX}fileFILE").write_text("")
    (tmp / f"{PREFIX}linkLINK").symlink_to(tmp / f"{PREFIX}of_somebody")
    killed = (
        "import os, sys, tempfile; from mimogrid.shell.world.temporary import temporary_folder as t;"
        "tempfile.tempdir = sys.argv[1]; c = t(); (c.__enter__() / 'meeting').touch(); os.kill(os.getpid(), 9)"
    )
    others = set(tmp.iterdir())
    with temporary_folder() as first:
        subprocess.run([sys.executable, "-c", killed, str(tmp)], check=False)
        (left,) = set(tmp.iterdir()) - others - {first}
        assert (left / "meeting").exists()
        with temporary_folder() as second:
            assert {*others, first, second} == set(tmp.iterdir())
    assert others == set(tmp.iterdir())


def test_a_folder_that_another_launcher_removes_before_it_is_locked_is_made_again(
    tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes that for one of a dead launcher."""
    made = tempfile.mkdtemp

    def lost(prefix: str) -> str:
        monkeypatch.setattr(tempfile, "mkdtemp", made)
        folder = Path(made(prefix=prefix))
        folder.rmdir()
        return str(folder)

    monkeypatch.setattr(tempfile, "mkdtemp", lost)
    with temporary_folder() as folder:
        assert folder.is_dir()
    assert not list(tmp.iterdir())
