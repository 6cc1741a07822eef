"""Waiting: what takes long is told on standard error, and what is short says nothing."""

import sys
import time

import pytest

from mimogrid.shell.world.heartbeat import Heartbeat
from mimogrid.shell.world.phases import BETWEEN, BUILDING
from mimogrid.shell.world.waiting import Waiting, phase_in_words, waiting


def test_without_a_terminal_there_is_a_line_every_ten_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    """The first one after ten seconds of the same work; with how much is done, where that is known."""
    shown = Waiting("reading weights")
    for second in range(100, 121):
        shown.look(float(second))
    assert [
        "reading weights: 10 s so far",
        "reading weights: 20 s so far",
    ] == capsys.readouterr().err.splitlines()
    shown.tell(1, 4)
    shown.look(140.0)
    assert "reading weights: 25%, 120 s left, 40 s so far\n" == capsys.readouterr().err
    shown.say("writing weights")
    for second in range(141, 150):
        shown.look(float(second))
    shown.say(None)
    shown.look(500.0)
    assert "" == capsys.readouterr().err


def test_on_a_terminal_one_line_changes_and_vanishes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After two seconds; beside others' lines it writes lines of its own."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    shown, beside = Waiting("simulating"), Waiting("meeting", in_place=False)
    for second in (100.0, 101.0, 102.0, 103.0):
        shown.look(second)
        beside.look(second)
    shown.clear()
    said = capsys.readouterr().err
    assert ["", "simulating: 2 s so far", "simulating: 3 s so far", "", ""] == [
        part.strip() for part in said.split("\r")
    ]
    assert "\n" not in said


def test_whoever_is_silent_has_no_thread(capsys: pytest.CaptureFixture[str]) -> None:
    """Also where it is told something."""
    with waiting("work", silent=True) as shown:
        shown.tell(1, 2)
        assert shown.look(0.0) is None
    with waiting("work") as shown:
        shown.tell(1, 2)
    assert "" == capsys.readouterr().err


def test_a_rank_says_what_it_does_outside_of_steps() -> None:
    """Steps have progress of their own."""
    heartbeat = Heartbeat(0)
    assert "meeting the other ranks" == phase_in_words(heartbeat.record())
    heartbeat.enter(BUILDING)
    assert "weights" in (phase_in_words(heartbeat.record()) or "")
    heartbeat.enter(BETWEEN)
    assert phase_in_words(heartbeat.record()) is None
    assert time.time() >= heartbeat.record().since_s
