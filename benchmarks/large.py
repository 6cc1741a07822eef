"""The job of the benchmarks that grow the world: two encoders in front of a language model.

Each module is on a grid of its own, with dp ranks in ratios that do not divide.
"""

from mimogrid.core.job.models import Gpt, Vit
from mimogrid.core.job.spec import BatchSpec, DataSpec, GridSpec, JobSpec, ModuleSpec, SourceFacts


FACTS = SourceFacts(sequence=64, features={"vision": 16, "audio": 16})
"""What the source of the job's samples would say."""


def job(ranks: int, microbatches: int) -> JobSpec:
    """Return the job on about so many ranks: the nearest multiple of 100 that is no more, at the least 100."""
    scale = max(ranks // 100, 1)
    transformer = {"layers": 4, "hidden": 64, "heads": 4}
    modules = {
        "vision": ModuleSpec(
            model="vit", options=Vit(**transformer), feeds=("language",), grid=GridSpec(tp=2, dp=10 * scale)
        ),
        "audio": ModuleSpec(
            model="vit", options=Vit(**transformer), feeds=("language",), grid=GridSpec(pp=2, dp=8 * scale)
        ),
        "language": ModuleSpec(
            model="gpt", options=Gpt(**transformer, vocab=64), grid=GridSpec(tp=4, dp=4 * scale, pp=4)
        ),
    }
    return JobSpec(
        modules=modules,
        data=DataSpec(source="none"),
        batch=BatchSpec(global_size=20 * scale * microbatches, microbatches=microbatches),
    )
