"""What trains: by module, how many values, and the kinds of parameters that they are, in words for people."""

import re
from collections.abc import Iterator

from mimogrid.core.job.models import Own
from mimogrid.core.topology.topology import Module, Topology


def trained_lines(topology: Topology) -> Iterator[str]:
    """Yield a line for each built-in module of which not everything trains."""
    for module in topology.modules.values():
        if isinstance(module.model, Own):
            continue
        parameters = {p.name: p.values for p in module.parameters}
        names = trained_names(module)
        count, total = sum(parameters[name] for name in names), sum(parameters.values())
        if not names:
            yield f"{module.name}: nothing of {total:,} values trains."
        elif count < total:
            kinds = dict.fromkeys(re.sub(r"\d+", "*", name) for name in parameters if name in names)
            yield f"{module.name}: {count:,} of {total:,} values train ({count / total:.2%}): {', '.join(kinds)}."


def trained_names(module: Module) -> frozenset[str]:
    """Return the parameters of a module that train."""
    return frozenset[str]().union(*(info.trainable for info in module.stages))
