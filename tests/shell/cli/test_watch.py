"""A run is watched from its folder: what each rank does, what the last steps reached; nothing there is touched."""

import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import pytest

from mimogrid.core.schedule.actions import parse
from mimogrid.shell.cli import watch
from mimogrid.shell.cli.main import main
from mimogrid.shell.job import jobfile
from mimogrid.shell.run.folders import showing_heartbeats
from mimogrid.shell.run.watching import RunWatch
from mimogrid.shell.world.heartbeat import Heartbeat


FIRST = Path(__file__).resolve().parents[3] / "examples" / "first" / "job.toml"
STEP = {
    "losses": {"language": 0.5},
    "step_s": 2.0,
    "tokens_per_s": 1234.0,
    "waiting": 0.25,
    "peak_bytes": 5e8,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a run of 30 steps, 20 of which are done; the last line is being written."""
    record = {"job": jobfile.dump(jobfile.load(FIRST, ["train.steps=30"]))}
    (tmp_path / "run.json").write_text(json.dumps(record))
    lines = [json.dumps({"step": step, "loss": 1 / (step + 1), **STEP}) for step in range(20)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 20, "lo')
    return tmp_path


@pytest.fixture
def ranks(folder: Path) -> Iterator[list[Heartbeat]]:
    """Two ranks of this process: one computes, one waits. Their heartbeats are elsewhere, as in a local world."""
    meeting = folder.parent / f"{folder.name}-meeting"
    found = [Heartbeat(rank) for rank in range(2)]
    for rank in found:
        rank.keep_in(meeting)
        rank.begin_program(20, 9)
    found[0].begin_action(3, parse("vision.0 F2"))
    found[1].begin_action(4, parse("language.1 WAIT_RECV_F2 <- language.0"))
    with showing_heartbeats(folder, meeting):
        yield found


def everything(folder: Path) -> dict[str, tuple[bytes, int]]:
    """The files of a folder, and when each was written."""
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir() if p.is_file()}


@pytest.mark.usefixtures("ranks")
def test_what_ranks_do_is_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With step time, loss, waiting, memory, and what is left; the folder is as it was."""
    before = everything(folder)
    assert 0 == main(["watch", str(folder), "--once"])
    shown = capsys.readouterr().out
    assert before == everything(folder)
    for words in ("training, 20/30 steps", "loss 0.0500", "2.00 s a step", "1,234 tokens/s", "20 s left"):
        assert words in shown
    rows = {line.split()[0]: line for line in shown.splitlines() if line[:1].isdigit()}
    assert "vision.0 F2" in rows["0"]
    assert "100%" in rows["0"]
    assert "language.1 WAIT_RECV_F2 <- language.0" in rows["1"]
    assert all(platform.node() in row and "MB" in row for row in rows.values())


@pytest.mark.usefixtures("ranks")
def test_a_script_gets_the_same(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As one value."""
    assert 0 == main(["watch", str(folder), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert ("training", 20, 30) == (told["state"], told["done"], told["steps"])
    assert [(0, "vision.0 F2", os.getpid()), (1, "language.1 WAIT_RECV_F2 <- language.0", os.getpid())] == [
        (rank["rank"], rank["doing"], rank["pid"]) for rank in told["ranks"]
    ]
    assert told["ranks"][0]["memory_bytes"] > 1 << 20


def test_a_rank_computes_for_a_share_of_the_looks(folder: Path, ranks: list[Heartbeat]) -> None:
    """A joint action whose own part is done is waiting."""
    watch = RunWatch(folder)
    for _ in range(3):
        watch.look()
    ranks[0].wait_for_others()
    found = watch.state().ranks
    assert [0.75, 0.0] == [rank.computing for rank in found]
    assert found[0].record.waits


@pytest.mark.parametrize(
    ("is_finished", "state", "way"),
    [(False, "not running", "--resume"), (True, "finished", "mimogrid report")],
)
def test_where_nothing_runs_the_last_state_is_shown(
    folder: Path, capsys: pytest.CaptureFixture[str], is_finished: bool, state: str, way: str
) -> None:
    """Without waiting for anything, with what may be done now, also where a killed world has left its link."""
    (folder / "heartbeats").symlink_to(folder / "gone")
    if is_finished:
        (folder / "report.json").write_text("{}")
    assert 0 == main(["watch", str(folder), "--once"])
    shown = capsys.readouterr().out
    assert f"{state}, 20/30 steps" in shown
    assert way in " ".join(shown.split())


def test_a_folder_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In words."""
    assert 2 == main(["watch", str(tmp_path)])
    assert "holds no run" in capsys.readouterr().err


@pytest.mark.usefixtures("ranks")
def test_many_ranks_are_cut_and_control_characters_escaped(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The terminal stays as it is."""
    monkeypatch.setattr(watch, "RANKS_SHOWN", 1)
    with (folder / "metrics.jsonl").open("w") as file:
        file.write(json.dumps({"step": 0, "loss": 1.0, "losses": {"a\x1b]0;x": 1.0, "b": 2.0}}) + "\n")
    assert 0 == main(["watch", str(folder), "--once"])
    shown = capsys.readouterr().out
    assert "... and 1 more ranks" in shown
    assert "\x1b" not in shown
