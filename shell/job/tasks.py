"""Tasks: the sources of a job's validation, each under the name of what it asks of the model.

    [validation]
    every = 100
    samples = 64
    [validation.tasks.captions]
    source = "conversations"
    options = { index = "captions.index" }

A job without tasks has those that its data source holds out. The modules read both alike, so whatever is wrong with a
source of training data is wrong with one of these.
"""

from collections.abc import Mapping
from typing import Any

import attrs

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.job.models import Own
from mimogrid.core.job.spec import DataSpec, JobSpec
from mimogrid.core.job.validation.problems import problems_of
from mimogrid.core.topology.topology import Topology
from mimogrid.shell.job import builders
from mimogrid.shell.job.fitted import Fitted
from mimogrid.shell.job.sources.opening import open_source
from mimogrid.shell.job.sources.source import Source


Tasks = Mapping[str, Source]


def open_tasks(
    spec: JobSpec, data: Source | None, topology: Topology, *, run_code: bool = True
) -> tuple[Tasks, list[Problem]]:
    """Open the sources of a job's validation, whose own source is `data`; return them and all problems.

    There is none without validation, or if only torch, which is not loaded, or code that was not to run opens it.
    """
    wanted, problems = spec.validation, list[Problem]()
    if not wanted.every:
        return {}, []
    for key, paths in (("metrics", wanted.metrics), ("generate.metrics", wanted.generate.metrics)):
        for number, path in enumerate(paths):
            try:
                builders.find(path, where=f"validation.{key}[{number}]")
            except PlanError as error:
                problems += error.problems
    if not wanted.tasks:
        tasks, found = _held_out(spec, data)
        return _fitted(tasks, topology), [*problems, *found, *_unknown_best(spec, tuple(tasks))]
    opened, spec = dict[str, Source](), _with_models(spec, topology)
    for name, task in wanted.tasks.items():
        alone = attrs.evolve(
            spec, data=DataSpec(source=task.source, options=task.options, overflow=spec.data.overflow)
        )
        source, facts, of_source = open_source(alone, run_code=run_code)
        of_plan = () if of_source else problems_of(alone, facts)
        for problem in (*of_source, *of_plan):
            place = f"validation.tasks.{name}"
            where = problem.where.replace("data", place, 1) if problem.where.startswith("data.") else place
            problems.append(attrs.evolve(problem, where=where))
        if source is not None:
            opened[name] = source
    return _fitted(opened, topology), [*problems, *_unknown_best(spec, tuple(wanted.tasks))]


def _with_models(spec: JobSpec, topology: Topology) -> JobSpec:
    """Return a spec whose built-in modules read what the data source gives, where they do not say so themselves."""
    models = {
        name: module.model for name, module in topology.modules.items() if not isinstance(module.model, Own)
    }
    modules = {
        name: attrs.evolve(module, options=models.get(name, module.options))
        for name, module in spec.modules.items()
    }
    return attrs.evolve(spec, modules=modules)


def _held_out(spec: JobSpec, data: Any) -> tuple[Tasks, list[Problem]]:
    """Return the tasks that the data source holds out."""
    if data is None:
        return {}, []
    if not hasattr(data, "held_out") or not getattr(data, "tasks", ()):
        message = f"is missing, and '{spec.data.source or 'the mixture'}' holds no samples out."
        return {}, [Problem("validation.tasks", message, "Write [validation.tasks.NAME] with a source.")]
    return {task: data.held_out(task=task) for task in data.tasks}, []


def _unknown_best(spec: JobSpec, tasks: tuple[str, ...]) -> list[Problem]:
    """Return what is wrong with the name of the metric by which a validation is the best, as far as names are known."""
    best = spec.validation.best
    losses = [
        "loss",
        *(f"{task}/loss" for task in tasks),
        *(f"{task}/{name}" for task in tasks for name in spec.modules),
        *(f"{task}/exact" for task in tasks if spec.validation.generate.tokens),
    ]
    if not best or not tasks or best in losses or spec.validation.metrics or spec.validation.generate.metrics:
        return []
    return [Problem("validation.best", f"'{best}' is not known.", f"Known: {', '.join(losses)}.")]


def _fitted(tasks: Tasks, topology: Topology) -> Tasks:
    if topology.spec.data.overflow == "error":
        return tasks
    return {name: Fitted(source, topology) for name, source in tasks.items()}
