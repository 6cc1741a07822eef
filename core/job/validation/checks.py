"""Checks of single values: bounds, names, divisors."""

import math
from collections.abc import Iterator

from mimogrid.core.base.errors import Problem, nearest


def one_of(where: str, value: str, known: tuple[str, ...]) -> Iterator[Problem]:
    """Check that a value is one of the known words."""
    if value not in known:
        yield Problem(where, f"'{value}' is not known.", nearest(value, known))


def at_least(where: str, value: float, least: int, remedy: str = "") -> Iterator[Problem]:
    """Check that a value is at least `least`; NaN is not."""
    if not value >= least:
        yield Problem(where, f"is {value}; it must be {least} or more.", remedy or f"Use {least} or more.")


def at_most(where: str, value: int, most: int) -> Iterator[Problem]:
    """Check that a value is at most `most`."""
    if value > most:
        yield Problem(where, f"is {value:,}.", f"Use at most {most:,}.")


def finite(where: str, value: float, remedy: str = "") -> Iterator[Problem]:
    """Check that a value is a finite number of 0 or more."""
    if not 0 <= value < math.inf:
        yield Problem(where, f"is {value}.", remedy or "Use a finite number of 0 or more.")


def above_zero(where: str, value: float) -> Iterator[Problem]:
    """Check that a value is a finite number above 0."""
    if not 0 < value < math.inf:
        yield Problem(where, f"is {value}.", "Use a finite number above 0.")


def divisors(number: int) -> str:
    """Write the divisors of a number; of a large number only the small ones.

    >>> divisors(12)
    '1, 2, 3, 4, 6, 12'
    """
    few = [d for d in range(1, min(number, 4096) + 1) if number % d == 0]
    more = [] if number <= 4096 else ["..."]  # noqa: PLR2004
    return ", ".join([*map(str, few), *more])
