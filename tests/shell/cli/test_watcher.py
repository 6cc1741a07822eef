"""The watcher of a search: a line that changes on a terminal, elsewhere one every ten seconds, or none."""

import time

import pytest

from mimogrid.core.plan.progress import Progress
from mimogrid.shell.cli.watcher import Watcher


PROGRESS = Progress(looked_at=1200, simulated=30, best_s=0.5, bound_s=0.25)


@pytest.mark.parametrize(("silent", "lines"), [(False, 2), (True, 0)])
def test_without_a_terminal_there_is_a_line_every_ten_seconds(
    silent: bool, lines: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With what the search has found so far."""
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with Watcher(None, silent=silent) as watcher:
        for second in range(25):
            now = 100.0 + second
            assert watcher(PROGRESS)
    said = capsys.readouterr().err.splitlines()
    assert lines == len(said)
    assert all("1,200 examined, 30 simulated; best 0.5 s, bound 0.25 s" in line for line in said)
