"""Opened jobs: a job is validated once, whatever its schedule."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType

import pytest

from mimogrid.core.job.validation.problems import problems_of
from mimogrid.shell.job.jobs import open_job


JOB = """
schedule.name = "{schedule}"

[modules.vision]
model = "vit"
feeds = ["language"]
frozen = true
options = {{ layers = 2, hidden = 64, heads = 4 }}

[modules.language]
model = "gpt"
frozen = ["layers.0.*", "layers.1.*"]
grid = {{ pp = 3 }}
options = {{ layers = {layers}, hidden = 64, heads = 4, vocab = 64 }}

[data]
source = "digits"

[batch]
global_size = 64
microbatches = 8
"""


def calls_of(code: CodeType, during: Callable[[], object]) -> int:
    """Return how often a function is called, wherever it was imported to."""
    count = 0

    def note(frame: FrameType, event: str, _: object) -> None:
        nonlocal count
        count += event == "call" and frame.f_code is code

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        during()
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.parametrize(("schedule", "layers"), [("1f1b", 6), ("auto", 6), ("auto", 7)])
def test_a_job_is_validated_once(tmp_path: Path, schedule: str, layers: int) -> None:
    """Also where `auto` tries two splits of the layers."""
    path = tmp_path / "job.toml"
    path.write_text(JOB.format(schedule=schedule, layers=layers))
    assert 1 == calls_of(problems_of.__code__, lambda: open_job(path))
