"""Elastic jobs: the layout under which a job with several layouts is opened.

The layouts stand in the job file, or one is searched for where ``layouts = "plan"``, as by `mimogrid plan`. The search
gives every rank the same layout. It takes a while, so a run keeps what was found: ``layouts/ranks-N.toml`` in its
folder is a job file, and a world of N ranks that finds one there does not search.
"""

from collections.abc import Sequence
from pathlib import Path

import attrs

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.base.samples import Sample
from mimogrid.core.job.changes import refused
from mimogrid.core.job.layouts import PLANNED, chosen, laid_out, layout_of, too_small
from mimogrid.core.job.spec import JobSpec, SourceFacts
from mimogrid.shell.job import jobfile
from mimogrid.shell.job.sources.source import Source


LAYOUTS = "layouts"
"""The folder in a run's folder that keeps planned layouts."""


def under_one_layout(spec: JobSpec, ranks: int | None, facts: SourceFacts, source: Source | None) -> JobSpec:
    """Return a job under the layout for so many ranks; None: for those of its file.

    `source` is None where only torch opens it. Raises PlanError where there is no such layout.
    """
    size = spec.world_size if ranks is None else ranks
    if spec.layouts == PLANNED and size is not None:
        return _planned(attrs.evolve(spec, layouts=(), world_size=None), size, facts, source)
    found = chosen(spec, ranks)
    if found is None:
        assert size is not None
        raise PlanError([too_small(spec, size)])
    return found.spec


def kept_in(folder: Path, ranks: int) -> Path:
    """Return the file in which a run keeps the planned layout for so many ranks."""
    return folder / LAYOUTS / f"ranks-{ranks}.toml"


def keep(spec: JobSpec, ranks: int, folder: Path) -> None:
    """Keep the layout of a job in a run's folder, for the next world of so many ranks."""
    path = kept_in(folder, ranks)
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(f"# The planned layout for {ranks} ranks.\n{jobfile.dump(spec)}", encoding="utf-8")
    partial.replace(path)


def _planned(spec: JobSpec, ranks: int, facts: SourceFacts, source: Source | None) -> JobSpec:
    kept = _kept(spec, ranks)
    if kept is None:
        if source is None:
            message = "are planned from the samples of a step, and these are not known without torch."
            raise PlanError([Problem("layouts", message, "Write layouts: [[layouts]].")])
        kept = _searched(spec, ranks, facts, [*map(source.describe, range(spec.batch.global_size))])
    return laid_out(spec, layout_of(kept, ranks))


def _kept(spec: JobSpec, ranks: int) -> JobSpec | None:
    """Return the job with the layout that its run has kept; None where there is none, or it is that of another job."""
    path = kept_in(Path(spec.train.run_dir or "."), ranks)
    if spec.train.run_dir is None or not path.is_file():
        return None
    found = jobfile.recorded(path.read_text(encoding="utf-8"), path)
    return None if any(refused(found, spec, accepted=())) else found


def _searched(spec: JobSpec, ranks: int, facts: SourceFacts, samples: Sequence[Sample]) -> JobSpec:
    """Return the job with the fastest layout. Raises PlanError where none fits."""
    from mimogrid.core.plan.layouts import Question  # noqa: PLC0415 -- only what is used
    from mimogrid.shell.job.planning import searched  # noqa: PLC0415

    found = searched(Question(spec=spec, facts=facts, samples=tuple(samples), gpus=ranks))
    if found.best is None:
        message = f"no layout for {ranks} ranks fits. The closest one: {found.nearest_fit}."
        raise PlanError([Problem("layouts", message, "Start more ranks, or use a GPU with more memory.")])
    return found.best.spec
