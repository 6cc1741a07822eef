"""Errors. Each says what is wrong, where, with which numbers, and how to correct it.

A `PlanError` is the user's: the job cannot run, and this is found before anything starts. A `WorldError` is the
cluster's: a rank failed, or ranks have different plans. A failed ``assert`` is a bug of mimogrid.
"""

import difflib
from collections.abc import Iterable, Sequence

import attrs


@attrs.frozen
class Problem:
    """One thing that is wrong with a job: the place, the fact with its numbers, and the remedy."""

    where: str
    message: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}\n    {self.remedy}"


class PlanError(Exception):
    """A job that cannot be planned, with all its problems."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems: tuple[Problem, ...] = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type["PlanError"], tuple[tuple[Problem, ...]]]:
        return type(self), (self.problems,)  # Pickled with its problems, for other processes.


class WorldError(Exception):
    """A failure in the running world; it names the rank and the action that failed."""


class EchoError(WorldError):
    """This rank stopped because another rank failed; that rank reports why."""


def nearest(word: str, known: Sequence[str]) -> str:
    """Return the remedy for an unknown name: the nearest known name, or all of them.

    >>> nearest("langage", ["vision", "language"])
    "Did you mean 'language'?"
    >>> nearest("zzz", ["tp", "cp"])
    'Known: cp, tp.'
    >>> nearest("1F1B", ["1f1b", "gpipe"])
    "Did you mean '1f1b'?"
    """
    same = [name for name in known if name.lower() == word.lower()]
    close = same or difflib.get_close_matches(word, known, n=1)
    return f"Did you mean '{close[0]}'?" if close else f"Known: {', '.join(sorted(known))}."
