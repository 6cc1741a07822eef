"""How much the tests draw: a sample by default, all of it and more in the nox session ``nightly``.

``MIMOGRID_TEST_SCALE=8 pytest tests/core`` draws eight times as many examples and runs every case of the fixed lists.
"""

import os
from collections.abc import Sequence
from typing import Any


SCALE = int(os.environ.get("MIMOGRID_TEST_SCALE", "1"))
"""1 by default; larger in the session ``nightly``."""


def drawn(count: int) -> int:
    """Return the number of examples to draw where `count` are drawn by default."""
    return count * SCALE


def nightly_only(cases: Sequence[Any]) -> list[Any]:
    """Return `cases` at a larger scale, none by default."""
    return list(cases) if SCALE > 1 else []
