"""Planning: the search of `core.plan`, as the commands and elastic jobs run it."""

import contextlib
import gc
from collections.abc import Iterator

from mimogrid.core.plan.layouts import Question
from mimogrid.core.plan.planner import Plan, plan
from mimogrid.core.plan.progress import Watch, always


def searched(question: Question, watch: Watch = always) -> Plan:
    """Search for the fastest layout. Raises PlanError for pins that no layout has together."""
    with without_garbage_collection():
        return plan(question, watch=watch)


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Keep the garbage collector from looking through millions of values of a plan, which has hardly any cycles.

    It takes a quarter of a search, half of a large simulation, and finds nothing worth mentioning.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
