"""The module graph: which modules feed which, and how many rows each module emits for a sample.

The graph is acyclic. Numbers of rows follow from a sample's description: a source module reads the rows of the sample,
a `block` emits one row for each row that it receives, and a language model emits one row for each position in use.

>>> graph = ModuleGraph.of({"vision": ("vit", ("language",)), "language": ("gpt", ())})
>>> graph.rows_out(Sample(id=0, length=5, rows={"vision": 4}))
{'vision': 4, 'language': 9}
"""

import functools
from collections.abc import Mapping

import attrs

from mimogrid.core.base.samples import Sample


@attrs.frozen
class Node:
    """A module in the graph, with the modules that feed it and those that it feeds, in file order."""

    name: str
    model: str
    feeders: tuple[str, ...]
    feeds: tuple[str, ...]

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
    def of(cls, modules: Mapping[str, tuple[str, tuple[str, ...]]]) -> "ModuleGraph":
        """Build the graph of ``{name: (model, feeds)}``. Raises ValueError for a cycle."""
        nodes = {
            name: Node(name, model, tuple(f for f, (_, to) in modules.items() if name in to), feeds)
            for name, (model, feeds) in modules.items()
        }
        cycle = find_cycle({name: node.feeds for name, node in nodes.items()})
        if cycle:
            raise ValueError(" -> ".join(cycle))
        order: list[str] = []
        while len(order) < len(nodes):
            order += [
                name
                for name, node in nodes.items()
                if name not in order and all(feeder in order for feeder in node.feeders)
            ]
        return cls(nodes, tuple(order))

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
        """Return how many rows every module emits for a sample."""
        emitted: dict[str, int] = {}
        for name in self.order:
            text = sample.length if self.nodes[name].reads_text else 0
            emitted[name] = self.rows_in(name, emitted, sample) + text
        return emitted

    def rows_into(self, name: str) -> tuple[str, ...]:
        """Return the source modules whose rows reach `name`, one entry per path."""
        return tuple(
            source
            for feeder in self.nodes[name].feeders
            for source in ((feeder,) if self.nodes[feeder].is_source else self.rows_into(feeder))
        )


def find_cycle(feeds: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Return the names around one cycle, the first repeated at the end, or nothing.

    >>> find_cycle({"a": ("b",), "b": ("a",)})
    ('a', 'b', 'a')
    """
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> tuple[str, ...]:
        if name in path:
            return (*path[path.index(name) :], name)
        if name in done:
            return ()
        for target in feeds.get(name, ()):
            cycle = walk(target, (*path, name))
            if cycle:
                return cycle
        done.add(name)
        return ()

    return next((cycle for name in feeds if (cycle := walk(name, ()))), ())


Graph = ModuleGraph
"""The former name, which custom sources may import."""
