"""Exactness, shown to a sceptic: the gradients of modules with unlike dp sizes, by two rules, beside one process.

    make demo-parity

A vision encoder on three dp ranks feeds a language model on two. The same weights and samples give three gradients:

    one process    the reference: the loss of the step is a sum over its tokens, divided by their number
    mimogrid       five ranks that run their programs; gradients are sums over dp ranks
    means          each dp rank of the language model takes the mean over its own tokens in a microbatch, and the
                   gradients of each module are averaged over its own dp ranks

Means are what data parallelism does with one dp size, where they are right. Megatron-core's MIMO model does so unless
`calculate_per_token_loss` is set for every module (its data parallel wrapper divides by the size of its own group; see
issues 4066 and 5555 of Megatron-Bridge). The means are computed here, by the rule and on one process: Megatron itself
does not run here. With samples of one length they are off by the ratio of the dp sizes, without an error; with samples
of many lengths they also weigh tokens wrongly.
"""

import collections
import sys
import time
from pathlib import Path
from typing import Any

import attrs
import torch

from mimogrid.core.base.samples import dp_samples
from mimogrid.core.step.step import Step, step_of
from mimogrid.shell.device.place import RankPlace
from mimogrid.shell.job.jobs import Job, open_job
from mimogrid.shell.run.parity import Gradients, full_gradients, module_of, on_one_process
from mimogrid.shell.runtime.session import Session, open_session
from mimogrid.shell.runtime.train_step import train_step
from mimogrid.shell.world.launch import Pool


JOB = Path(__file__).resolve().parents[1] / "examples" / "first" / "job.toml"
LAYOUT = (
    "precision=fp64",
    "modules.vision.grid={dp = 3}",
    "modules.language.grid={dp = 2}",
    "batch.global_size=24",
    "batch.microbatches=2",
)
DATA = {
    "samples of one length": "data.options={ text = [6, 6], rows = { vision = [4, 4] } }",
    "samples of many lengths": "data.options={ text = [1, 12], rows = { vision = [1, 8] } }",
}


@attrs.frozen
class Beside:
    """A module's gradient beside the reference.

    Attributes:
        ratio: how many times as long it is along the reference; 1 is right.
        apart: the largest difference, relative to the largest value of the reference.
    """

    ratio: float
    apart: float


def in_world(place: RankPlace, job: Job) -> dict[str, dict[str, Beside]] | None:
    """Compare both rules with one process; the first rank returns what it found, by rule and module."""
    with open_session(place, job) as session:
        assert session.runtime is not None
        step = job.step(0)
        train_step(session.runtime, 0, step, step, update=False)
        ours = full_gradients(session.runtime)
        if place.rank:
            return None
        _, reference = on_one_process(job, step, session.groups.alone(), session.device)
        means = by_means(session, job, step)
        return {rule: beside(found, reference) for rule, found in (("mimogrid", ours), ("means", means))}


def by_means(session: Session, job: Job, step: Step) -> Gradients:
    """Return the gradients that averages over the dp ranks of each module give."""
    language, total = job.topology.modules["language"], len(step.samples)
    summed: dict[str, torch.Tensor] = {}
    for microbatch in range(language.microbatches):
        for dp_rank in range(language.dp_size):
            own = dp_samples(
                dp_rank=dp_rank,
                dp_size=language.dp_size,
                microbatch=microbatch,
                microbatches=language.microbatches,
                total=total,
            )
            part = step_of(job.topology, step.samples[own.start : own.stop])
            _, gradients = on_one_process(job, part, session.groups.alone(), session.device)
            for name, gradient in gradients.items():
                summed[name] = summed.get(name, torch.zeros(())) + gradient / language.microbatches
    return {name: total / job.topology.modules[module_of(name)].dp_size for name, total in summed.items()}


def beside(found: Gradients, reference: Gradients) -> dict[str, Beside]:
    """Compare gradients with the reference, module by module."""
    modules: dict[str, list[str]] = collections.defaultdict(list)
    for name in reference:
        modules[module_of(name)].append(name)
    compared = {}
    for module, names in modules.items():
        theirs, mine = (torch.cat([g[name].flatten() for name in names]) for g in (reference, found))
        ratio = float(mine @ theirs / (theirs @ theirs))
        compared[module] = Beside(ratio, float((mine - theirs).abs().max() / theirs.abs().max()))
    return compared


def main() -> int:
    """Print the comparison; the exit code is 1 if our gradients are not those of one process."""
    begin, worst = time.monotonic(), 0.0
    size = open_job(JOB, LAYOUT).topology.world_size
    print(f"vision on dp = 3, language on dp = 2: {size} processes, beside one process, in fp64\n")
    with Pool(size) as pool:
        for data, override in DATA.items():
            job = open_job(JOB, (*LAYOUT, override))
            said: list[Any] = pool.run("demo_parity:in_world", size, job)
            rules = next(found for found in said if found)
            print(f"{data:26} {'gradient / right one':>22} {'largest difference':>22}")
            for rule, modules in rules.items():
                for module, found in modules.items():
                    print(f"  {rule:10} {module:13} {found.ratio:22.12f} {found.apart:22.2e}")
            worst = max(worst, *(found.apart for found in rules["mimogrid"].values()))
            print()
    print(
        "With one length, means are off by 2/3 in the encoder alone: the ratio of the dp sizes, without an error."
    )
    print(f"{time.monotonic() - begin:.0f} s")
    return int(worst > 1e-9)  # noqa: PLR2004 -- as `mimogrid parity` in fp64


if __name__ == "__main__":
    sys.exit(main())
