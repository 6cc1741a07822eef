"""How much the tests draw and run: a sample by default, all of it and more in the nox session ``nightly``.

``MIMOGRID_TEST_SCALE=8 pytest tests/core`` draws eight times as many examples and runs every case of the fixed lists.
``make quick`` draws fewer than by default.
"""

import itertools
import os
from collections.abc import Sequence
from typing import Any

import pytest


SCALE = float(os.environ.get("MIMOGRID_TEST_SCALE", "1"))
"""1 by default; 8 in the session ``nightly``, and less than 1 in ``quick``."""


nightly = pytest.mark.skipif(SCALE <= 1, reason="takes long: nox -s nightly")
"""Of a test that runs at a larger scale only."""


def drawn(count: int) -> int:
    """Return the number of examples to draw where `count` are drawn by default."""
    return max(1, round(count * SCALE))


def nightly_only(cases: Sequence[Any]) -> list[Any]:
    """Return `cases` at a larger scale, none by default."""
    return list(cases) if SCALE > 1 else []


def one_of_each(first: Sequence[Any], second: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Return pairs in which every value occurs; at a larger scale, all pairs."""
    if SCALE > 1:
        return list(itertools.product(first, second))
    count = max(len(first), len(second))
    return [(first[i % len(first)], second[i % len(second)]) for i in range(count)]
