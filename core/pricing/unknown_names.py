"""Unknown names: stages and edges that costs name and the job does not have."""

from collections.abc import Iterator

from mimogrid.core.base.errors import Problem, nearest
from mimogrid.core.job.costs import Costs
from mimogrid.core.topology.topology import Topology


def unknown_names(costs: Costs, topology: Topology) -> Iterator[Problem]:
    """Yield a problem for every stage or edge that costs name and the job does not have."""
    stages = [str(stage) for stage in topology.stages]
    links = list(dict.fromkeys(str(name) for link in topology.links for name in (link.edge or link, link)))
    for table, named, known in (("stages", costs.stages, stages), ("edges", costs.edges, links)):
        for name in named:
            if name not in known:
                kind = "stage" if table == "stages" else "edge"
                yield Problem(f'{table}."{name}"', f"the job has no {kind} '{name}'.", nearest(name, known))
