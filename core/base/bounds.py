"""Bounds: seconds that no order of some tasks beats.

Before a task can begin, a chain of other tasks has to run; the longest one is the task's *head*. After it, a chain of
tasks still has to run; the longest one is its *tail*. A worker runs one task at a time. So for any set of a worker's
tasks these follow each other:

    the shortest head     all work of the set         the shortest tail
    |-- F F F ... --|   [F][F][F][B][B][B]   |-- ... B B --|

Their sum is a lower bound of the time in which everything is done. The caller chooses the sets, and takes the largest
bound. (For one machine this is the bound of Carlier 1982.)

>>> needs = {"a": [], "b": [("a", 0.5)], "c": [("b", 0.0)]}
>>> heads = longest_before_s("abc", needs, {"a": 1.0, "b": 2.0, "c": 3.0})
>>> heads
{'a': 0.0, 'b': 1.5, 'c': 3.5}
>>> bound_s([heads["b"], heads["c"]], work=5.0, tails=[3.0, 0.0])
6.5
"""

from collections.abc import Hashable, Iterable, Mapping
from typing import Protocol, TypeVar


Task = TypeVar("Task", bound=Hashable)
_Key_contra = TypeVar("_Key_contra", contravariant=True)
_Value_co = TypeVar("_Value_co", covariant=True)


class Table(Protocol[_Key_contra, _Value_co]):
    """A list or a mapping: something that gives a value for each task."""

    def __getitem__(self, task: _Key_contra, /) -> _Value_co:
        """Return the value of a task."""
        ...


def bound_s(heads: Iterable[float], work: float, tails: Iterable[float]) -> float:
    """Return the lower bound that a set of a worker's tasks gives: shortest head, all work, shortest tail."""
    return min(heads, default=0.0) + work + min(tails, default=0.0)


def longest_before_s(
    order: Iterable[Task],
    needs: Table[Task, Iterable[tuple[Task, float]]],
    seconds: Table[Task, float],
    least: Mapping[Task, float] | None = None,
) -> dict[Task, float]:
    """Return the seconds of the longest chain that has to run before each task.

    `order` has every task behind those that it needs. `needs` has these, and the seconds that their results are on
    the way. `least` has seconds that pass before some tasks in any case. For tails, turn the graph around.
    """
    found: dict[Task, float] = {}
    for task in order:
        longest = least.get(task, 0.0) if least else 0.0
        for other, on_the_way in needs[task]:
            longest = max(longest, found[other] + seconds[other] + on_the_way)
        found[task] = longest
    return found
