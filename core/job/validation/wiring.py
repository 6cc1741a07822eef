"""The module graph: names, edges, and which modules have a loss."""

import math
import re
from collections.abc import Iterator

from mimogrid.core.base.errors import Problem, nearest
from mimogrid.core.job.graph import find_cycle
from mimogrid.core.job.models import Vit
from mimogrid.core.job.placement import graph_of, has_loss
from mimogrid.core.job.spec import JobSpec, ModuleSpec


TENSORS = frozenset(
    "rows tokens labels loss_weights targets lengths loss logits prediction".split()  # noqa: SIM905
)
"""Names of tensors in the inputs and outputs of a module; rows of other modules have the names of these modules."""
PATHS_MOST = 1_000
"""Rows travel along every path: more of them are taken for a mistake."""
_MODULE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")


def wiring_problems(spec: JobSpec) -> Iterator[Problem]:
    """Check that names are legal, that edges lead to modules, and that there is no cycle."""
    names = tuple(spec.modules)
    for name, module in spec.modules.items():
        if not _MODULE_NAME.fullmatch(name):
            yield Problem(
                f"modules.{name}",
                f"'{name}' cannot name a module.",
                "Use letters, digits, '_' and '-', beginning with a letter or '_'.",
            )
        elif name in TENSORS:
            yield Problem(
                f"modules.{name}",
                f"'{name}' is the name of a tensor that modules exchange beside each other's rows.",
                f"Call it otherwise. Taken: {', '.join(sorted(TENSORS))}.",
            )
        for target in dict.fromkeys(module.feeds):
            yield from _target(name, target, spec)
        if len(set(module.feeds)) < len(module.feeds):
            twice = next(t for t in module.feeds if module.feeds.count(t) > 1)
            yield Problem(
                f"modules.{name}.feeds",
                f"module '{name}' feeds '{twice}' {module.feeds.count(twice)} times.",
                "Name each target once.",
            )
        if not module.feeds and not has_loss(module):
            yield Problem(
                f"modules.{name}",
                f"module '{name}' feeds nobody and has no loss: its output would be used by nothing.",
                f"Give it feeds = [...], one of: {', '.join(n for n in names if n != name) or 'none'}.",
            )
    cycle = find_cycle({name: module.feeds for name, module in spec.modules.items()})
    if cycle:
        yield Problem(
            f"modules.{cycle[0]}.feeds",
            f"the modules feed each other in a cycle: {' -> '.join(cycle)}.",
            "Take one of these edges out.",
        )
    elif graph_of(spec).paths > PATHS_MOST:
        fact = f"the edges join to {graph_of(spec).paths:,} paths from one module to another."
        yield Problem("modules", fact, f"Use at most {PATHS_MOST:,}: let fewer modules feed the same ones.")


def _target(name: str, target: str, spec: JobSpec) -> Iterator[Problem]:
    where = f"modules.{name}.feeds"
    if target not in spec.modules:
        others = [other for other in spec.modules if other != name]
        yield Problem(
            where,
            f"module '{name}' feeds '{target}', and no module is called so.",
            nearest(target, others) if others else "Take it out: there is no other module.",
        )
    elif isinstance(spec.modules[target].options, Vit):
        yield Problem(
            where,
            f"module '{name}' feeds '{target}', a vit, which reads patch rows from the data only.",
            f"Use a block in place of '{target}', or take it out of feeds.",
        )


def loss_problems(name: str, module: ModuleSpec) -> Iterator[Problem]:
    """Check that a loss weight is a number, and that the module has a loss."""
    where = f"modules.{name}.loss_weight"
    if not math.isfinite(module.loss_weight):
        yield Problem(where, f"is {module.loss_weight}.", "Use a finite number.")
    elif module.loss_weight != 1 and not has_loss(module):
        yield Problem(
            where, f"module '{name}' has no loss that {module.loss_weight} could weigh.", "Leave it out."
        )
