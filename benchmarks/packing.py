"""What padding costs: a step on ragged samples, beside the same step with every sample padded to one length.

    python benchmarks/packing.py [--pairs N] [--mix NAME ...]

Both sides are one job on one rank. The padded side describes every sample anew: as long as the longest, with weight 0
behind its own text (or what the more rows leave of it), and with as many rows as the longest has, as one segment. So
it computes the block of positions times samples that padding makes. The two take turns; ratios are the median over
pairs of one run.

Computed positions over real ones are counted without running, on grids that round rows up or cut them.
"""

import argparse
import math
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch

from mimogrid.core.base.samples import Sample
from mimogrid.core.step.step import Step, step_of
from mimogrid.core.topology.topology import Topology
from mimogrid.shell.device.place import RankPlace
from mimogrid.shell.job.jobs import Job, open_job
from mimogrid.shell.runtime.session import open_session
from mimogrid.shell.runtime.train_step import train_step
from mimogrid.shell.world.launch import Pool


JOB = Path(__file__).with_suffix(".toml")
GRIDS: Mapping[str, tuple[str, ...]] = {
    "one rank": (),
    "cp = 4": tuple(f"modules.{name}.grid.cp=4" for name in ("vision", "audio", "language")),
    "tp = 4, sp": tuple(
        f"modules.{name}.grid.{cut}"
        for name in ("vision", "audio", "language")
        for cut in ("tp=4", "sequence_parallel=true")
    ),
    "dp = 4": tuple(f"modules.{name}.grid.dp=4" for name in ("vision", "audio", "language")),
}


# -- length mixes ------------------------------------------------------------------------------------------


def log_normal(draws: random.Random, low: int, high: int) -> int:
    """Draw a length whose logarithm is normal: a sixth of them are outside of a factor of 2.5, none beyond the ends."""
    middle = math.sqrt(low * high)
    return round(min(max(middle * math.exp(0.9 * draws.gauss(0, 1)), low), high))


def _text(draws: random.Random) -> tuple[int, list[int], list[int]]:
    return log_normal(draws, 20, 4000), [], []


def _images(draws: random.Random) -> tuple[int, list[int], list[int]]:
    return (
        log_normal(draws, 20, 400),
        [draws.choice((64, 100, 144, 256)) for _ in range(draws.randrange(13))],
        [],
    )


def _audio(draws: random.Random) -> tuple[int, list[int], list[int]]:
    return log_normal(draws, 20, 400), [], [log_normal(draws, 50, 1500) for _ in range(draws.randrange(3))]


def _equal(_: random.Random) -> tuple[int, list[int], list[int]]:
    return 384, [64, 64], []


MIXES: Mapping[str, Callable[[random.Random], tuple[int, list[int], list[int]]]] = {
    "text": _text,
    "images": _images,
    "audio": _audio,
    "equal": _equal,
}
"""By name, what draws the length of a text, and the segments of images and of clips.

Log-normal texts of 20 to 4000 tokens; 0 to 12 images beside texts of 20 to 400; 0 to 2 clips of 50 to 1500 frames; all
equal.
"""


def ragged(mix: str, count: int, seed: int = 0) -> tuple[Sample, ...]:
    """Draw samples of a mix."""
    draws = random.Random(f"{mix} {seed}")
    found = []
    for i in range(count):
        length, images, clips = MIXES[mix](draws)
        rows = {"vision": sum(images), "audio": sum(clips)}
        segments = {"vision": tuple((n,) for n in images), "audio": tuple((n,) for n in clips)}
        found.append(Sample(id=i, length=length, rows=rows, segments=segments))
    return tuple(found)


def padded(samples: Sequence[Sample]) -> tuple[Sample, ...]:
    """Describe samples as padded to the longest of them."""
    most = {name: max(sample.rows[name] for sample in samples) for name in samples[0].rows}
    rows = [{name: most[name] if sample.rows[name] else 0 for name in most} for sample in samples]
    sequence = max(
        max(sample.length + sum(sample.rows.values()), sum(of.values()) + 1)
        for sample, of in zip(samples, rows, strict=True)
    )
    return tuple(
        Sample(
            id=sample.id,
            length=sequence - sum(of.values()),
            rows=of,
            units={"language": float(min(sample.length, sequence - sum(of.values())))},
        )
        for sample, of in zip(samples, rows, strict=True)
    )


@attrs.frozen(eq=False)
class Given:
    """Random tensors for samples; the text beyond what the units count weighs nothing."""

    samples: Sequence[Sample]

    def load(self, sample_id: int, module: str) -> Mapping[str, torch.Tensor]:
        """Return what a sample has for a module."""
        sample = self.samples[sample_id]
        draws = torch.Generator().manual_seed(sample_id)
        if module != "language":
            return {"rows": torch.randn(sample.rows[module], 16, generator=draws)}
        placeholders, counted = sum(sample.rows.values()), sample.units.get("language", sample.length)
        tokens = torch.randint(256, (placeholders + sample.length,), generator=draws)
        weights = torch.zeros(len(tokens))
        weights[placeholders : placeholders + int(counted)] = 1
        return {
            "tokens": tokens.index_fill(0, torch.arange(placeholders), -1),
            "labels": tokens,
            "loss_weights": weights,
        }


# -- measured ----------------------------------------------------------------------------------------------


def in_world(
    place: RankPlace, job: Job, mixes: Sequence[str], pairs: int
) -> dict[str, list[tuple[float, float]]]:
    """Return for each mix the CPU seconds of a step, packed and padded, pair by pair."""
    found: dict[str, list[tuple[float, float]]] = {}
    with open_session(place, job) as session:
        for mix in mixes:
            samples = ragged(mix, job.spec.batch.global_size)
            sides = samples, padded(samples)
            for pair in range(pairs + 1):
                seconds = tuple(_step_s(session.runtime, job, side) for side in sides)
                if pair:  # the first warms up
                    found.setdefault(mix, []).append((seconds[0], seconds[1]))
    return found


def _step_s(runtime: Any, job: Job, samples: Sequence[Sample]) -> float:
    step = step_of(job.topology, tuple(samples))
    begin = time.process_time()
    train_step(runtime, 0, step, step, update=False, source=Given(samples))
    return time.process_time() - begin


def positions(topology: Topology, samples: Sequence[Sample]) -> tuple[int, int]:
    """Return the positions that all modules compute in a step, and those that samples have."""
    step: Step = step_of(topology, tuple(samples))
    computed = real = 0
    for name, module in topology.modules.items():
        for dp_rank in range(module.dp_size):
            for k in step.active(name, dp_rank):
                share = step.share(name, dp_rank, k)
                computed += math.prod(share.shape)
                real += sum(share.positions)
    return computed, real


def main() -> None:
    """Print positions and times of all mixes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--mix", nargs="*", default=list(MIXES), choices=list(MIXES))
    given = parser.parse_args()
    machine = f"{platform.platform()}, {os.cpu_count()} cores"
    print(f"{machine}, Python {platform.python_version()}, torch {torch.__version__}")
    print(f"load {' '.join(f'{load:.1f}' for load in os.getloadavg())} (1, 5, 15 minutes) when it began")
    print("\ncomputed positions / real positions")
    print(f"{'mix':10}{'padded':>12}" + "".join(f"{grid:>12}" for grid in GRIDS))
    for mix in given.mix:
        samples = ragged(mix, 16)
        ratios = [computed / real for computed, real in _by_grid(samples)]
        whole = sum(s.length + 2 * sum(s.rows.values()) for s in padded(samples))
        print(
            f"{mix:10}{whole / _by_grid(samples)[0][1]:12.3f}" + "".join(f"{ratio:12.4f}" for ratio in ratios)
        )
    with Pool(1) as pool:
        (measured,) = pool.run(f"{Path(__file__).stem}:in_world", 1, open_job(JOB), given.mix, given.pairs)
    print("\nCPU seconds of a step of 16 samples in 2 microbatches, and padded / packed")
    print(f"{'mix':10}{'packed':>12}{'padded':>12}{'ratio':>12}{'least':>12}{'most':>12}")
    for mix, seconds in measured.items():
        packed_s, padded_s = (statistics.median(of) for of in zip(*seconds, strict=True))
        ratios = [slow / fast for fast, slow in seconds]
        numbers = (packed_s, padded_s, statistics.median(ratios), min(ratios), max(ratios))
        print(f"{mix:10}" + "".join(f"{number:12.3f}" for number in numbers))


def _by_grid(samples: Sequence[Sample]) -> list[tuple[int, int]]:
    return [positions(open_job(JOB, overrides).topology, samples) for overrides in GRIDS.values()]


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
