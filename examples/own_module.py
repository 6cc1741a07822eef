"""Any nn.Module as an encoder, in a plain torch loop with its own process group, optimizer and learning-rate schedule.

    torchrun --nproc-per-node 4 examples/own_module.py

The job is that of examples/own: a listener on two dp ranks feeds a language model on two pipeline stages. Here this
program creates the listener and the optimizer.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mimogrid.adapters.torch_module import Embedded
from mimogrid.shell.job.jobs import open_job


class Rows(nn.Module):
    """Wraps a network that maps rows to rows as a job calls it: inputs by name in, outputs by name out."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return one row for each row of the input."""
        return {"rows": self.network(inputs["rows"])}


def main(steps: int = 60) -> list[float]:
    """Train, and return the loss of every step."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    folder = Path(__file__).parent / "own"
    job = open_job(
        folder / "job.toml", ['modules.ears.model="mimogrid.shell.job.host:module"', "modules.ears.width=32"]
    )
    torch.manual_seed(0)
    listener = Rows(nn.Sequential(nn.Linear(4, 64), nn.SiLU(), nn.LayerNorm(64), nn.Linear(64, 32)))
    losses = []

    with Embedded(job, modules={"ears": listener}, optimizer="host") as embedded:
        optimizer = torch.optim.RAdam(embedded.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for step in range(steps):
            outcome = embedded.step()  # leaves complete gradients in .grad
            if outcome.taken:
                optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(outcome.loss)
            if dist.get_rank() == 0 and step % 20 == 19:
                print(f"step {step + 1}: loss {outcome.loss:.4f}")
    return losses


if __name__ == "__main__":
    if "RANK" not in os.environ:
        raise SystemExit("Start four ranks: torchrun --nproc-per-node 4 examples/own_module.py")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)  # the ranks share the cores of this machine
    main()
    dist.destroy_process_group()
