"""What the documents promise beyond their examples: messages that exist, keys that are explained, three screens."""

import re
from pathlib import Path

import attrs

from mimogrid.core.faults.throughput import Throughput


ROOT = Path(__file__).parents[3]
SCREENS, LINES = 3, 50


def test_messages_of_the_troubleshooting_page_are_those_of_the_code() -> None:
    """Each fragment stands in a string of the core or of the shell; those without one are not messages of ours."""
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    sources = [path for top in ("core", "shell") for path in sorted((ROOT / top).rglob("*.py"))]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    shown = {"mimogrid: command not found", "waiting 70 %"}
    assert [] == [message for message in messages if message not in code and message not in shown]
    assert 20 <= len(messages)


def test_every_number_of_a_run_is_explained() -> None:
    """By its key in metrics.jsonl."""
    page = (ROOT / "docs/runs.md").read_text(encoding="utf-8")
    keys = [*attrs.fields_dict(Throughput), "loss", "peak_bytes", "stragglers"]
    assert [] == [key for key in keys if f"`{key}`" not in page]


def test_the_readme_fits_three_screens() -> None:
    """Whatever is longer is a page of its own."""
    assert SCREENS * LINES >= len((ROOT / "README.md").read_text(encoding="utf-8").splitlines())
