"""The module graph: which modules feed which, and how many rows each module emits for a sample.

The graph is acyclic. Numbers of rows follow from a sample's description: a source module reads the rows of the sample
and emits what its `Emission` makes of each segment, a `block` emits one row for each row that it receives, and a
language model emits one row for each position in use.

>>> modules = {"vision": ("vit", ("language",)), "language": ("gpt", ())}
>>> graph = ModuleGraph.of(modules, {"vision": Emission(merge=2)})
>>> graph.rows_out(Sample(id=0, length=5, rows={"vision": 8}, segments={"vision": ((1, 2, 4),)}))
{'vision': 2, 'language': 7}
"""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence

import attrs

from mimogrid.core.base.samples import Sample, SegmentGrid
from mimogrid.core.models.segments import ONE_EACH, Emission


_NO_EMISSIONS: Mapping[str, Emission] = {}


@attrs.frozen
class Node:
    """A module in the graph, with the modules that feed it and those that it feeds, in file order.

    What it emits for the rows that it reads is its `emission`; to a module that others feed all rows of a sample are
    one segment.
    """

    name: str
    model: str
    feeders: tuple[str, ...]
    feeds: tuple[str, ...]
    emission: Emission = ONE_EACH

    @property
    def is_source(self) -> bool:
        """Whether its rows come from the data: no module feeds it."""
        return not self.feeders and not self.reads_text

    @property
    def reads_text(self) -> bool:
        """Whether it is a built-in language model, which reads tokens."""
        return self.model == "gpt"


@attrs.frozen
class ModuleGraph:
    """The modules of a job in file order, and their names in an order in which feeders come first."""

    nodes: Mapping[str, Node]
    order: tuple[str, ...]

    @classmethod
    def of(
        cls,
        modules: Mapping[str, tuple[str, tuple[str, ...]]],
        emissions: Mapping[str, Emission] = _NO_EMISSIONS,
    ) -> "ModuleGraph":
        """Build the graph of ``{name: (model, feeds)}``. Raises ValueError for a cycle.

        `emissions` are of modules that emit other rows than they read.
        """
        feeders: dict[str, list[str]] = {name: [] for name in modules}
        for name, (_, targets) in modules.items():
            for target in dict.fromkeys(targets):
                if target in feeders:
                    feeders[target].append(name)
        nodes = {
            name: Node(name, model, tuple(feeders[name]), feeds, emissions.get(name, ONE_EACH))
            for name, (model, feeds) in modules.items()
        }
        cycle = find_cycle({name: node.feeds for name, node in nodes.items()})
        if cycle:
            raise ValueError(" -> ".join(cycle))
        return cls(nodes, tuple(_in_order(feeders)))

    @functools.cached_property
    def sources(self) -> tuple[str, ...]:
        """The modules whose rows come from the data."""
        return tuple(name for name, node in self.nodes.items() if node.is_source)

    @functools.cached_property
    def texts(self) -> tuple[str, ...]:
        """The built-in language models."""
        return tuple(name for name, node in self.nodes.items() if node.reads_text)

    def rows_in(self, name: str, rows_out: Mapping[str, int], sample: Sample) -> int:
        """Return how many rows a module reads for a sample; `rows_out` are those that its feeders emit."""
        node = self.nodes[name]
        if node.is_source:
            return sample.rows.get(name, 0)
        return sum(rows_out[feeder] for feeder in node.feeders)

    def rows_out(self, sample: Sample) -> dict[str, int]:
        """Return how many rows every module emits for a sample. Raises ValueError for a grid that cannot be merged."""
        emitted: dict[str, int] = {}
        for name, node in ((name, self.nodes[name]) for name in self.order):
            rows = self.rows_in(name, emitted, sample)
            grids = sample.grids(name) if node.is_source else ((rows,),) * bool(rows)
            text = sample.length if node.reads_text else 0
            emitted[name] = sum(map(node.emission.rows, grids)) + text
        return emitted

    def grids_out(self, name: str, sample: Sample, rows_out: Mapping[str, int]) -> tuple[SegmentGrid, ...]:
        """Return the grid of each segment of the rows that a module emits for a sample; `rows_out` are of all modules.

        What a module emits for the rows of others is one segment.
        """
        node = self.nodes[name]
        if node.is_source:
            return tuple(map(node.emission.grid, sample.grids(name)))
        return ((rows_out[name],),) * bool(rows_out[name])

    def emitting_each(self) -> "ModuleGraph":
        """Return the graph in which every module emits a row for each that it reads."""
        nodes = {name: attrs.evolve(node, emission=ONE_EACH) for name, node in self.nodes.items()}
        return ModuleGraph(nodes, self.order)

    @functools.cached_property
    def paths(self) -> int:
        """How many paths lead from a source module to any one module, at most."""
        counts: dict[str, int] = {}
        for name in self.order:
            counts[name] = max(sum(counts[feeder] for feeder in self.nodes[name].feeders), 1)
        return max(counts.values(), default=0)

    def rows_into(self, name: str) -> tuple[str, ...]:
        """Return the source modules whose rows reach `name`, one entry per path."""
        reached: dict[str, tuple[str, ...]] = {}
        for module in self.order[: self.order.index(name) + 1]:
            node = self.nodes[module]
            reached[module] = tuple(
                source
                for feeder in node.feeders
                for source in ((feeder,) if self.nodes[feeder].is_source else reached[feeder])
            )
        return reached[name]


def _in_order(feeders: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Yield names so that feeders come first: those that nothing feeds, then those that only these feed, and so on."""
    missing = {name: len(of) for name, of in feeders.items()}
    fed: dict[str, list[str]] = {name: [] for name in feeders}
    for name, of in feeders.items():
        for feeder in of:
            fed[feeder].append(name)
    place = {name: i for i, name in enumerate(feeders)}
    ready = [name for name, count in missing.items() if not count]
    while ready:
        yield from ready
        following: list[str] = []
        for target in itertools.chain.from_iterable(fed[name] for name in ready):
            missing[target] -= 1
            if not missing[target]:
                following.append(target)
        ready = sorted(following, key=place.__getitem__)


def find_cycle(feeds: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Return the names around one cycle, the first repeated at the end, or nothing.

    >>> find_cycle({"a": ("b",), "b": ("a",)})
    ('a', 'b', 'a')
    """
    done: set[str] = set()
    for start in feeds:
        path = {
            start: iter(feeds[start])
        }  # from `start` to where the walk is, with the targets still to visit
        while path:
            name, targets = next(reversed(path.items()))
            target = next(targets, None)
            if target is None:
                done.add(name)
                del path[name]
            elif target in path:
                names = [*path]
                return (*names[names.index(target) :], target)
            elif target not in done:
                path[target] = iter(feeds.get(target, ()))
    return ()


Graph = ModuleGraph
"""The former name, which custom sources may import."""
