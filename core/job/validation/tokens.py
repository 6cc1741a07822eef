"""A limit of tokens per microbatch: what else a job may not say, and whether its longest sample fits."""

from collections.abc import Iterator

from mimogrid.core.base.errors import Problem
from mimogrid.core.job.models import Gpt
from mimogrid.core.job.spec import JobSpec, SourceFacts
from mimogrid.core.job.tokens import lanes_of, lanes_per_dp_rank, tokens_per_cell, unread_sources
from mimogrid.core.job.validation.checks import at_least


WHERE = "batch.tokens_per_microbatch"


def limit_problems(spec: JobSpec) -> Iterator[Problem]:
    """Check that nothing else says how many microbatches a step has."""
    yield from at_least(
        WHERE, spec.batch.tokens_per_microbatch, 0, "0: there is no limit, microbatches are counted."
    )
    if spec.batch.tokens_per_microbatch <= 0:
        return
    remedy = f"Leave it out, or {WHERE}."
    if spec.batch.microbatches != 1:
        message = (
            f"is {spec.batch.microbatches}, and {WHERE} cuts each step into as many as its samples need."
        )
        yield Problem("batch.microbatches", message, remedy)
    for name, module in spec.modules.items():
        if module.microbatches is not None:
            message = f"is {module.microbatches}, and {WHERE} says how many all modules have."
            yield Problem(f"modules.{name}.microbatches", message, remedy)


def token_problems(spec: JobSpec, source: SourceFacts) -> Iterator[Problem]:
    """Check that tokens bound what every module reads, and that the longest sample fits into a cell."""
    limit = spec.batch.tokens_per_microbatch
    if limit <= 0:
        return
    if not any(isinstance(module.options, Gpt) for module in spec.modules.values()):
        message = "counts positions of a built-in language model, and the job has none."
        yield Problem(WHERE, message, "Use batch.microbatches.")
        return
    for name in unread_sources(spec):
        message = f"does not bound the rows of module '{name}', from which nothing leads to a language model."
        yield Problem(WHERE, message, "Use batch.microbatches.")
    sequence, lanes = source.sequence or 1, lanes_per_dp_rank(spec)
    if tokens_per_cell(spec) < sequence:
        each = f" for each of the {lanes} lanes that a dp rank has (of {lanes_of(spec)})" if lanes > 1 else ""
        yield Problem(
            WHERE,
            f"is {limit}, and a sample may have {sequence} tokens{each}.",
            f"Use {lanes * sequence} or more, or cut the samples: data.options.sequence, data.overflow.",
        )
