"""What Megatron-LM's tests of MIMO ask for (`megatron_behaviours.toml`): each has a test here, or a reason."""

import ast
import collections
import functools
import tomllib
from pathlib import Path
from typing import Any

import pytest


TABLE = tomllib.loads(Path(__file__).with_name("megatron_behaviours.toml").read_text(encoding="utf-8"))
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/megatron.md").read_text(encoding="utf-8")
KINDS = ("holds", "otherwise", "beyond", "refused", "absent")


@pytest.mark.parametrize("group", TABLE["group"], ids=lambda group: group["name"])
def test_a_behaviour_has_a_test_or_a_reason(group: dict[str, Any]) -> None:
    """The tests that a row names are there, and the rows of a group stand for all of its functions."""
    for _, kind, what, *tests in group["behaviours"]:
        assert kind in KINDS
        assert bool(tests) == (kind != "absent"), what
        for key, name in (test.split() for test in tests):
            assert name in _functions(TABLE["files"][key]), name
    assert group["functions"] == sum(count for count, *_ in group["behaviours"])


@functools.cache
def _functions(file: str) -> set[str]:
    found = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in found.body if isinstance(node, ast.FunctionDef)}


def test_the_page_has_the_counts() -> None:
    """All 263 functions of theirs are counted, and the page says how many of them hold."""
    counts = collections.Counter[str]()
    for count, kind, *_ in (row for group in TABLE["group"] for row in group["behaviours"]):
        counts[kind] += count
    assert 263 == counts.total()
    assert "| " + " | ".join(str(counts[kind]) for kind in KINDS) + " |" in PAGE
