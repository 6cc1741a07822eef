"""HTML: an interactive page as one file, which a browser opens without a network.

The page is `page/page.html` with its style, its program and the data in it. The data are values of
`core/draw/dashboard.py`. The program sets texts as texts, so no name in a job file can become markup.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mimogrid.core.base.text import printable
from mimogrid.shell.cli.output import write


PARTS = Path(__file__).parent / "page"


def write_page(path: Path, title: str, data: Mapping[str, Any]) -> None:
    """Write a page. Raises PlanError where the file cannot be written."""
    write(path, [page(title, data)])


def page(title: str, data: Mapping[str, Any]) -> str:
    """Return a page with its data.

    Args:
        title: What the page is about.
        data: Its sections, each of which may be missing: "facts", "world", "timelines", "candidates", "curves".
    """
    text = json.dumps({"title": printable(title), **data}, separators=(",", ":"))
    parts = {
        "STYLE": _read("page.css"),
        "PROGRAM": _read("page.js"),
        # In a script element only `<` could end the element or begin a comment.
        "DATA": text.replace("<", "\\u003c"),
    }
    filled = _read("page.html")
    for name, part in parts.items():
        before, _, after = filled.partition(f"/*{name}*/")
        filled = f"{before}{part}{after}"
    return filled


def _read(name: str) -> str:
    return (PARTS / name).read_text(encoding="utf-8")
