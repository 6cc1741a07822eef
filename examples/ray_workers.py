"""Ray actors that train a job together, as a program holds them that has workers of its own (verl does).

    python examples/ray_workers.py [JOB [STEPS]]

The program decides what its workers do and when: here they take some steps, and give it the weights. The job is one of
the things that live in a worker, beside what else the program keeps there.
"""

import socket
import sys
from pathlib import Path
from typing import Any

import ray
import torch.distributed as dist

from mimogrid.adapters.torch_module import Embedded
from mimogrid.shell.job.jobs import open_job


JOB = Path(__file__).parent / "first/job.toml"


@ray.remote
class Worker:
    """A worker of the program: it is in the program's process group, and holds its part of the job."""

    def address(self) -> str:
        """Return where the workers can meet: on the host of this one."""
        with socket.socket() as listener:
            listener.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{listener.getsockname()[1]}"

    def join(self, address: str, rank: int, size: int, job: str) -> None:
        """Join the workers, and open the job in their group."""
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=size)
        self.embedded = Embedded(open_job(job, ranks=size))

    def step(self) -> float | None:
        """Train one step; return the loss, or None on a rank that idles."""
        outcome = self.embedded.step()
        return None if outcome is None else outcome.loss

    def state(self) -> dict[str, Any]:
        """Return the state of the job, on the first of its ranks: weights by name, for inference or another layout."""
        return self.embedded.state_dict()

    def leave(self) -> None:
        """Close the job, and leave the process group."""
        self.embedded.close()
        dist.destroy_process_group()


def main(job: Path = JOB, steps: int = 3) -> list[float]:
    """Train with as many workers as the job needs; return the losses."""
    size = open_job(job).topology.world_size
    workers = [Worker.remote() for _ in range(size)]
    address = ray.get(workers[0].address.remote())
    ray.get([worker.join.remote(address, rank, size, str(job)) for rank, worker in enumerate(workers)])
    losses = [ray.get([worker.step.remote() for worker in workers])[0] for _ in range(steps)]
    state = ray.get([worker.state.remote() for worker in workers])[0]
    ray.get([worker.leave.remote() for worker in workers])
    print(f"{steps} steps on {size} workers: losses {losses}")
    print(f"{sum(name.startswith('language.') for name in state)} tensors of the language model")
    return losses


if __name__ == "__main__":
    ray.init(address="local", include_dashboard=False)
    main(*map(Path, sys.argv[1:2]), *map(int, sys.argv[2:3]))
