"""The lock of a run folder: one world trains there. A second process, a second host and a copy are told apart."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import attrs
import pytest

from mimogrid.core.base.errors import PlanError, WorldError
from mimogrid.shell.run import run_lock


OWNING = """
import sys, time
from pathlib import Path
from mimogrid.shell.run import run_lock
run_lock.BEAT_S = 0.05
with run_lock.owned(Path(sys.argv[1])):
    print("owned", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that owns the lock of a folder."""
    command = [sys.executable, "-c", OWNING, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert "owned\n" == process.stdout.readline()
        yield process
        process.kill()


def own(folder: Path) -> str:
    """Own a lock for a moment; return why not ("": it worked)."""
    try:
        with run_lock.owned(folder):
            return ""
    except PlanError as error:
        return str(error)


def test_a_live_owner_is_named(other: "subprocess.Popen[str]", tmp_path: Path) -> None:
    """Host, process, user, when it was last seen, and the way out; nobody asks long."""
    begun = time.monotonic()
    said = own(tmp_path)
    assert time.monotonic() - begun < 1.0
    assert f"process {other.pid} on host '{os.uname().nodename}' (user " in said
    assert "last seen 0 s ago" in said
    assert f"kill {other.pid}" in said


def test_the_lock_of_a_killed_owner_is_free_at_once(other: "subprocess.Popen[str]", tmp_path: Path) -> None:
    """Its name still stands in the file; the kernel knows better."""
    other.kill()
    other.wait()
    assert run_lock.read(tmp_path)
    assert "" == own(tmp_path)
    assert run_lock.read(tmp_path) is None


def test_a_rank_that_lives_keeps_others_out(other: "subprocess.Popen[str]", tmp_path: Path) -> None:
    """Also when its launcher is gone: it is waited for, and then named."""
    with run_lock.shared(tmp_path), patch.object(run_lock, "ENDING_S", 0.2):
        other.kill()
        other.wait()
        assert f"process {other.pid} on host '" in (said := own(tmp_path))
        assert "is gone, but its ranks still end" in said
    assert "" == own(tmp_path)


def test_a_rank_comes_too_late(tmp_path: Path) -> None:
    """A world that starts has the lock alone for a moment; a rank of an earlier one does not begin then."""
    with run_lock._opened(tmp_path) as descriptor:
        assert run_lock._flock(descriptor, run_lock.fcntl.LOCK_EX)
        with pytest.raises(WorldError, match="taken by another world"), run_lock.shared(tmp_path):
            pass


def on_another_host(owner: run_lock.Owner) -> run_lock.Owner:
    """An owner whose process this machine cannot see."""
    return attrs.evolve(owner, host="elsewhere", machine="another boot")


def left_by(folder: Path, owner: run_lock.Owner) -> None:
    """Write an owner into a lock that nobody holds here, as a file system does that does not share locks."""
    (folder / run_lock.LOCK).write_text(json.dumps(attrs.asdict(owner)))


@pytest.fixture
def elsewhere(tmp_path: Path) -> run_lock.Owner:
    """An owner of the folder on another host."""
    with run_lock.owned(tmp_path):
        owner = run_lock.read(tmp_path)
    assert owner
    left_by(tmp_path, on_another_host(owner))
    return on_another_host(owner)


def test_another_host_that_beats_is_refused(tmp_path: Path, elsewhere: run_lock.Owner) -> None:
    """Whatever the clocks say: the count rises while it is watched."""
    ended = threading.Event()

    def beat() -> None:
        count = 0
        while not ended.wait(0.05):
            count += 1
            left_by(tmp_path, attrs.evolve(elsewhere, beats=count))

    beating = threading.Thread(target=beat)
    beating.start()
    with patch.object(run_lock, "STALE_S", 5.0):
        said = own(tmp_path)
    ended.set()
    beating.join()
    assert f"process {elsewhere.pid} on host 'elsewhere'" in said


def test_another_host_that_is_silent_is_succeeded(
    tmp_path: Path, elsewhere: run_lock.Owner, capsys: pytest.CaptureFixture[str]
) -> None:
    """A node that died left its name; the run goes on without it, and says why that takes a while."""
    with patch.object(run_lock, "STALE_S", 0.3):
        assert "" == own(tmp_path)
    assert "was left by process" in capsys.readouterr().err
    assert run_lock.read(tmp_path) is None


def test_a_copy_of_a_folder_in_use_is_free(other: "subprocess.Popen[str]", tmp_path: Path) -> None:
    """The name in a copied lock is that of the other file."""
    copy = tmp_path / "copy"
    copy.mkdir()
    owner = run_lock.read(tmp_path)
    assert owner
    left_by(copy, on_another_host(owner))
    assert other.poll() is None
    assert "" == own(copy)


def test_without_locks_the_process_is_asked_for(other: "subprocess.Popen[str]", tmp_path: Path) -> None:
    """On a file system without locks: its id and when it began."""
    with patch.object(run_lock, "_flock", lambda *_: None):
        assert f"process {other.pid} on host" in own(tmp_path)
        other.kill()
        other.wait()
        assert "" == own(tmp_path)


def test_an_owner_whose_folder_is_taken_ends(other: "subprocess.Popen[str]", tmp_path: Path) -> None:
    """It was cut off from the file system for so long that another host has gone on with the run."""
    owner = run_lock.read(tmp_path)
    assert owner
    left_by(tmp_path, on_another_host(owner))
    assert 1 == other.wait(timeout=10)
