"""Nodes: an elastic torchrun world of several agents on this machine, which come and go.

Agents meet over a store that this process keeps, so any of them may go. Each has two ranks, or another number. What the
agents and their ranks say is added to one file.
"""

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import attrs
from torch.distributed import TCPStore
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import launching
from injection import injected
from mimogrid.shell.cli.main import main


RANKS_LEAST, RANKS_MOST, RANKS_OF_A_NODE = 2, 4, 2
NODES_MOST = RANKS_MOST // RANKS_OF_A_NODE
MEETING = {
    "is_host": "false",
    "keep_alive_interval": "2",
    "keep_alive_max_attempt": "5",
    "last_call_timeout": "3",
}
"""How agents meet: none keeps the store, and all notice within some seconds that another one is gone."""
VARIABLES = {"GLOO_SOCKET_IFNAME": "lo", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Without the second one an agent goes on to point its ranks to the store of an agent that is gone."""


@attrs.define
class Cluster:
    """The nodes of a world: what their ranks run, the agents that live, and how often torchrun was started."""

    store: TCPStore
    arguments: Sequence[str]
    said: Path
    fault: str
    ranks_of_a_node: int
    agents: list[BaseProcess] = attrs.field(factory=list)
    starts: int = 1

    def add(self) -> BaseProcess:
        """Add a node."""
        agent = launching.process(
            _agent,
            self.store.port,
            f"{self.said.parent.name}-{self.starts}",
            self.ranks_of_a_node,
            (self.arguments, self.said, self.fault),
        )
        agent.start()
        self.agents.append(agent)
        return agent

    def remove(self, agent: BaseProcess, number: signal.Signals = signal.SIGKILL) -> None:
        """Remove a node: its agent is killed, or asked to end."""
        if agent.is_alive():
            os.kill(agent.pid or 0, number)
        agent.join(60)
        self.agents.remove(agent)

    def clear(self) -> None:
        """Remove all nodes; those that are added afterwards meet under another name, as of another torchrun."""
        for agent in [*self.agents]:
            self.remove(agent)
        self.starts += 1

    def join(self, limit_s: float) -> list[int | None]:
        """Wait for all agents; return their exit codes."""
        for agent in self.agents:
            agent.join(limit_s)
        return [agent.exitcode for agent in self.agents]


@contextmanager
def cluster(
    arguments: Sequence[str], said: Path, *, fault: str = "", ranks_of_a_node: int = RANKS_OF_A_NODE
) -> Iterator[Cluster]:
    """Open a world without nodes, whose ranks run `mimogrid` and suffer a fault; at the end all nodes are killed."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    opened = Cluster(store, arguments, said, fault, ranks_of_a_node)
    try:
        yield opened
    finally:
        opened.clear()


def _agent(port: int, name: str, ranks: int, of_rank: tuple[Sequence[str], Path, str]) -> None:
    """Run a node, as torchrun does."""
    os.environ.update(VARIABLES)
    config = LaunchConfig(
        min_nodes=max(1, RANKS_LEAST // ranks),
        max_nodes=RANKS_MOST // ranks,
        nproc_per_node=ranks,
        run_id=name,
        rdzv_backend="c10d",
        rdzv_endpoint=f"127.0.0.1:{port}",
        rdzv_configs=dict(MEETING),
        local_addr="127.0.0.1",
        max_restarts=1000,
        monitor_interval=0.1,
        start_method=launching.METHOD,
    )
    launching.speak_into(of_rank[1])
    elastic_launch(config, _rank)(*of_rank)


def _rank(arguments: Sequence[str], said: Path, fault: str) -> None:
    """Run `mimogrid` on a rank, with the fault at every start."""
    launching.speak_into(said)
    with injected(fault):
        if code := main(list(arguments)):
            raise SystemExit(code)
