"""The page on what to touch: its examples are changes of this tree, as it is."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[3]
DIFFS = re.findall(r"^```diff\n(.*?)^```$", (ROOT / "docs/changing.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed; it applies the diffs")
@pytest.mark.parametrize("number", range(len(DIFFS)))
def test_an_example_applies(number):
    """Every hunk finds its place."""
    check = ("git", "apply", "--check", "--unidiff-zero", "-")
    done = subprocess.run(check, input=DIFFS[number], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "" == done.stderr


def test_there_is_an_example_of_each():
    """A schedule, a source, a command, an adapter; a family has its own test."""
    assert 4 == len(DIFFS)
