"""Errors: what is wrong, where, by which numbers, and the way out.

`PlanError` is the user's (a job that cannot be run, found before anything starts), `WorldError` the
cluster's (a rank that failed, a plan that differs). An ``assert`` in this project is ours alone.
"""

import difflib
from collections.abc import Iterable, Sequence

import attrs


@attrs.frozen
class Problem:
    """One thing wrong with a job: the place, the fact with its numbers, and the remedy."""

    where: str
    message: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}\n    {self.remedy}"


class PlanError(Exception):
    """A job that cannot be planned; holds *all* its problems, not only the first."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems: tuple[Problem, ...] = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type["PlanError"], tuple[tuple[Problem, ...]]]:
        return type(self), (self.problems,)  # It travels between processes with its problems.


class WorldError(Exception):
    """A failure of the running world, with the rank and the action that it struck."""


class EchoError(WorldError):
    """A rank was cut off by the failure of another, which reports it."""


def nearest(word: str, known: Sequence[str]) -> str:
    """Return the way out for an unknown name: the nearest known one, or all of them.

    >>> nearest("langage", ["vision", "language"])
    "Did you mean 'language'?"
    >>> nearest("zzz", ["tp", "cp"])
    'Known: cp, tp.'
    """
    close = difflib.get_close_matches(word, known, n=1)
    return f"Did you mean '{close[0]}'?" if close else f"Known: {', '.join(sorted(known))}."
