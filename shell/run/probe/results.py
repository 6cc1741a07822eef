"""Results: what was measured of a job, as values, as a costs file and as JSON."""

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import tomlkit

from mimogrid.core.job.costs import Costs
from mimogrid.shell.job import costfile
from mimogrid.shell.job.jobs import Job


@attrs.frozen(kw_only=True)
class Memory:
    """Bytes of a rank: the growth of resident memory since before its stages were built, and what the plan expects."""

    peak: int
    planned: int


@attrs.frozen(kw_only=True)
class Probed:
    """What was measured of a job.

    Attributes:
        samples: the number of samples in a microbatch, by module.
        costs: the costs, ready for a simulation.
        split: the seconds of the two halves of a backward over those of a whole one, by stage that can be split.
        spread: how far the repetitions of an action are apart, relative to their median, by stage.
        memory: memory, by rank.
    """

    samples: Mapping[str, float]
    costs: Costs
    split: Mapping[str, float]
    spread: Mapping[str, float]
    memory: Mapping[int, Memory]

    def of_stages(self) -> dict[str, dict[str, Any]]:
        """Return the seconds of every stage, with the samples of a microbatch that they are for."""
        table = costfile.table_of(self.costs)["stages"]
        return {
            name: {"samples": self.samples[name.partition(".")[0]], **table.get(name, {})} for name in table
        }


def in_text(found: Probed, job: Job, others: Sequence[Probed] = ()) -> str:
    """Return a costs file; its comments have what was measured of microbatches of other sizes."""
    lines = [
        f"Measured by `mimogrid probe` for {job.path.name}. {found.costs.origin}.",
        "Seconds of stages are medians of the faster half of steps in which ranks took turns to compute. Those of",
        "joint actions are what they would take with a core for each rank. Posting messages counts for its stage.",
        "Grad-norm sync, optimizer and planning are `update`. A backward that can be split has its two halves here,",
        "which add up to the time of a backward under the job's own schedule.",
    ]
    lines += [f"{name}: repetitions differ by {spread:.0%}" for name, spread in found.spread.items()]
    lines += [
        f"{name}: split in two, a backward takes {ratio:.3f} x as long as whole"
        for name, ratio in found.split.items()
    ]
    lines += [
        f"rank {rank}: memory grew by {of.peak / 1e6:.1f} MB; planned, without libraries and what an allocator "
        f"adds, {of.planned / 1e6:.1f} MB"
        for rank, of in found.memory.items()
    ]
    for other in others:
        for name, seconds in other.of_stages().items():
            values = ", ".join(f"{key} {value:.4g}" for key, value in seconds.items())
            lines.append(f"other microbatches: {name}: {values}")
    comments = "".join(f"# {line}\n" for line in lines)
    return f"{comments}\n{tomlkit.dumps(costfile.table_of(found.costs))}"


def in_json(found: Probed, others: Sequence[Probed] = ()) -> dict[str, Any]:
    """Return everything that was measured, for a script."""
    sizes = sorted((found, *others), key=lambda one: max(one.samples.values()))
    table = costfile.table_of(found.costs)
    return {
        "origin": found.costs.origin,
        "stages": {name: [one.of_stages()[name] for one in sizes] for name in found.of_stages()},
        "edges": table.get("edges", {}),
        "machine": table.get("machine", {}),
        "split": dict(found.split),
        "spread": dict(found.spread),
        "memory": {str(rank): attrs.asdict(of) for rank, of in found.memory.items()},
        "costs": tomlkit.dumps(table),
    }
