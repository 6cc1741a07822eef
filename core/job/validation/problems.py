"""Problems: every reason why a job cannot run, found before anything starts.

The other files check one aspect each. Their functions yield problems, with the numbers, the reason and the legal
values. An aspect is checked only if earlier aspects leave it meaningful.
"""

from collections.abc import Iterator

from mimogrid.core.base.errors import Problem
from mimogrid.core.job.layer_engines import ENGINES, FORMATS, engine_problems
from mimogrid.core.job.spec import JobSpec, ModuleSpec, SourceFacts
from mimogrid.core.job.validation.checks import one_of
from mimogrid.core.job.validation.cuts import cut_problems, expert_problems, sharding_problems
from mimogrid.core.job.validation.data import data_problems
from mimogrid.core.job.validation.job import job_problems
from mimogrid.core.job.validation.lora import lora_problems
from mimogrid.core.job.validation.optimizer import group_problems
from mimogrid.core.job.validation.own import own_problems
from mimogrid.core.job.validation.parameters import freezing_problems
from mimogrid.core.job.validation.ranks import balance_problems, dp_problems, world_problems
from mimogrid.core.job.validation.sizes import size_problems, total_problems
from mimogrid.core.job.validation.tokens import limit_problems, token_problems
from mimogrid.core.job.validation.towers import tower_problems
from mimogrid.core.job.validation.wiring import loss_problems, wiring_problems


RECOMPUTES = ("none", "selective", "full")


def problems_of(spec: JobSpec, source: SourceFacts | None) -> tuple[Problem, ...]:
    """Return every problem of a job; a legal job has none.

    `source` is None if the source itself is wrong. Then it is not checked whether the data fits the modules.
    """
    found, wiring = list(job_problems(spec)), list(wiring_problems(spec))
    found += [*limit_problems(spec), *wiring]
    whole = True
    for name, module in spec.modules.items():
        sizes = list(size_problems(name, module))
        found += [*sizes, *_word_problems(name, module), *engine_problems(name, spec)]
        whole = whole and not sizes
        if not sizes:
            found += [*cut_problems(name, module), *sharding_problems(name, module)]
            found += [*expert_problems(name, module), *dp_problems(name, module, spec)]
            found += [
                *loss_problems(name, module),
                *tower_problems(name, spec),
                *lora_problems(name, module, spec.precision),
            ]
    totals = list(total_problems(spec)) if whole else []
    found += totals
    whole = whole and not totals
    if whole:
        found += [*balance_problems(spec), *world_problems(spec)]
        found += [*freezing_problems(spec, source or SourceFacts())]
        found += [*own_problems(spec), *group_problems(spec, source or SourceFacts())]
    if whole and not wiring and source is not None:
        found += [*data_problems(spec, source), *token_problems(spec, source)]
    return tuple(found)


def _word_problems(name: str, module: ModuleSpec) -> Iterator[Problem]:
    where = f"modules.{name}"
    yield from one_of(f"{where}.recompute", module.recompute, RECOMPUTES)
    yield from one_of(f"{where}.engine", module.engine, ENGINES)
    yield from one_of(f"{where}.fp8", module.fp8, FORMATS)
