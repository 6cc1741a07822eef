"""Jobs: a job file that is read, validated and parsed, with its data source. All problems come in one list.

For example ``open_job("job.toml", ["train.steps=20"]).topology``, which raises PlanError for a wrong job.
"""

import functools
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.base.samples import Sample
from mimogrid.core.job.layouts import layout_problems
from mimogrid.core.job.spec import JobSpec, ModuleSpec
from mimogrid.core.models.segments import ONE_EACH, Emission
from mimogrid.core.pricing.balance import Balance
from mimogrid.core.pricing.unknown_names import unknown_names
from mimogrid.core.program.lower import Program, plan_step
from mimogrid.core.schedule.layer_split import parse_job, problems_of_layouts
from mimogrid.core.schedule.order import Order
from mimogrid.core.schedule.orders import Orders
from mimogrid.core.step.step import Step, step_of
from mimogrid.core.topology.topology import Topology
from mimogrid.shell.job import jobfile
from mimogrid.shell.job.builders import NeedsTorch, PlanWarning, find
from mimogrid.shell.job.elastic import under_one_layout
from mimogrid.shell.job.fitted import Fitted
from mimogrid.shell.job.host import HostSource
from mimogrid.shell.job.permission import permit
from mimogrid.shell.job.published import shape_problems
from mimogrid.shell.job.sources.opening import open_source
from mimogrid.shell.job.sources.source import Source
from mimogrid.shell.job.tables import converted, new_converter
from mimogrid.shell.job.tasks import Tasks, open_tasks


@attrs.frozen(eq=False)
class Job:
    """A job that can run. `source` is None if only torch, which is not loaded, or code that was not to run opens it.

    `tasks` are the sources of its validation. `ran` names the functions of the user's own that ran to open it;
    `runs_code` says whether any might. `written` is the job of the file with all its layouts; `ranks` is the number of
    ranks that one was chosen for, None: as the file says.

    Pickling sends the path of the job file, and the other process opens it again. Every rank makes the same plan from
    the same text, and a source of the user's own need not support pickling.
    """

    path: Path
    overrides: tuple[str, ...]
    topology: Topology
    source: Source | None
    written: JobSpec
    ran: tuple[str, ...] = ()
    runs_code: bool = True
    tasks: Tasks = attrs.field(factory=dict[str, Source])
    ranks: int | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        again = functools.partial(open_job, ranks=self.ranks, run_code=self.runs_code)
        return again, (self.path, self.overrides)

    @property
    def is_elastic(self) -> bool:
        """Whether the job has layouts for several numbers of ranks."""
        return bool(self.written.layouts)

    @property
    def spec(self) -> JobSpec:
        """The job as written, with the widths that the builders of own modules declare."""
        return self.topology.spec

    @functools.cached_property
    def orders(self) -> Orders:
        """The orders of training steps."""
        return Orders(self.topology)

    @functools.cached_property
    def forward_orders(self) -> Orders:
        """The orders of steps that run forwards only."""
        return Orders(self.topology, training=False)

    def order_of(self, step: Step) -> Order:
        """Return the order of a training step. Raises PlanError if it needs more memory than the job's cap."""
        return self.orders.of(step.topology)

    def program_of(self, step: Step) -> Program:
        """Return the program of a training step. Raises PlanError as `order_of`."""
        return plan_step(step, self.order_of(step))

    def step(self, index: int) -> Step:
        """Return one step of the job, balanced if the job asks for it.

        Raises PlanError if its samples are not known, or one does not fit.
        """
        return self._balance.step(self._samples(index))

    def step_in_order(self, index: int) -> Step:
        """Return one step with its samples in their order, whatever the job asks for. Raises PlanError as `step`."""
        return step_of(self.topology, self._samples(index))

    def _samples(self, index: int) -> tuple[Sample, ...]:
        size = self.spec.batch.global_size
        return self._described(range(index * size, (index + 1) * size))

    @functools.cached_property
    def _balance(self) -> Balance:
        return Balance(self.topology)

    def _described(self, ids: Iterable[int]) -> tuple[Sample, ...]:
        if self.source is None:
            without = "torch" if self.runs_code else "running its code"
            remedies = ("Leave out --no-code.", "Import torch inside its load, and nowhere at the top level.")
            message = f"its samples are not known without {without}."
            raise PlanError([Problem("data.source", message, remedies[self.runs_code])])
        return tuple(self.source.describe(sample_id) for sample_id in ids)


def open_job(
    path: Path | str, overrides: Iterable[str] = (), *, ranks: int | None = None, run_code: bool = True
) -> Job:
    """Open a job file. Raises PlanError with every problem of its text, its parts and its plan.

    Of several layouts the job gets the one for so many `ranks` (`core.job.layouts`).

    The folder of the job file and the current folder become importable, for the user's own modules and sources.
    Without `run_code` none of these runs, and what only they know is not known.
    """
    full_path, overrides = _permitted(path), tuple(overrides)
    parsed = jobfile.read(path, overrides)
    if parsed.spec is None:
        raise PlanError(parsed.problems)
    written, of_builders, ran = with_builders(parsed.spec, run_code=run_code)
    source, facts, of_source = open_source(written, run_code=run_code)
    known = None if of_source else facts
    of_layouts = [*layout_problems(written)] or problems_of_layouts(written, known)
    spec = written
    if written.layouts and not of_layouts and not of_builders and known:
        spec = under_one_layout(written, ranks, known, source)
    found = parse_job(spec, known)
    of_plan = [*of_builders, *of_source, *of_layouts, *(() if isinstance(found, Topology) else found)]
    problems = [
        *parsed.problems,
        *(parsed.annotated(p) for p in dict.fromkeys(of_plan) if not parsed.explains(p)),
    ]
    if problems:
        raise PlanError(problems)
    assert isinstance(found, Topology)
    if unlike := tuple(shape_problems(found)):
        raise PlanError(unlike)
    tasks, of_tasks = open_tasks(spec, source, found, run_code=run_code)
    if of_tasks:
        raise PlanError(map(parsed.annotated, of_tasks))
    costs = found.spec.schedule.costs
    if costs and (strange := list(unknown_names(costs, found))):
        raise PlanError(attrs.evolve(p, where=f"schedule.costs.{p.where}") for p in strange)
    if source is not None:
        ran = (
            *ran,
            *(name for name in _sources(spec) if ":" in name),
        )
    ran = tuple(name for name in ran if not name.startswith("mimogrid."))
    if source is not None and spec.data.overflow != "error" and not isinstance(source, HostSource):
        source = Fitted(source, found)
    return Job(
        full_path, overrides, found, source, written, tuple(dict.fromkeys(ran)), run_code, tasks, ranks
    )


def _sources(spec: JobSpec) -> Iterator[str]:
    """Yield the names of all sources of a job."""
    yield from (spec.data.source, *(entry.source for entry in spec.data.mix))
    if spec.validation.every:
        yield from (task.source for task in spec.validation.tasks.values())


def _permitted(path: Path | str) -> Path:
    """Return where a job file is; let it name functions under its folder and the current one. Raises PlanError."""
    try:
        full_path = Path(path).resolve()
    except FileNotFoundError:
        remedy = "Change to a folder that is there, or give the whole path of the job file."
        raise PlanError([Problem(str(path), "the current folder is gone.", remedy)]) from None
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links, a null byte
        raise PlanError([Problem(str(path), f"is no path: {error}.", "Check the path.")]) from None
    permit(full_path.parent)
    return full_path


def with_builders(spec: JobSpec, *, run_code: bool) -> tuple[JobSpec, list[Problem], tuple[str, ...]]:
    """Find the builders of own modules, and fill in what they declare of their rows.

    Returns also the functions that ran, under the name of the builder beside them.
    """
    problems: list[Problem] = []
    ran: list[str] = []
    modules: dict[str, ModuleSpec] = {}
    for name, module in spec.modules.items():
        modules[name] = module
        if ":" in module.model:
            try:
                modules[name], described = _as_described(name, module, run_code=run_code)
                ran += [module.model] * described
            except PlanError as error:
                problems += error.problems
    return attrs.evolve(spec, modules=modules), problems, tuple(ran)


def _as_described(name: str, module: ModuleSpec, *, run_code: bool) -> tuple[ModuleSpec, bool]:
    """Return a module with its width and its emission, and whether a `describe` of the user's ran to tell them."""
    where = f"modules.{name}.model"
    assert not attrs.has(type(module.options))
    found = find(module.model, where=where)
    runs = found.describes and run_code
    reason = f"'{module.model}' has no describe(options)"
    if found.describes and not run_code:
        reason = f"'{module.model}' was not run"
    described: Mapping[str, Any] = {}
    try:
        described = found.describe(module.options) if runs else {}  # type: ignore[arg-type]
    except NeedsTorch as error:
        runs, reason = False, str(error)
    except Exception as error:
        message = f"describe of '{module.model}' raised {type(error).__name__}: {error}."
        raise PlanError([Problem(where, message, f"Correct it in {found.spec.origin}.")]) from error
    width, module = described.get("width"), _with_emission(where, module, described.get("rows_out"))
    if width is not None and (type(width) is not int or width < 1):
        message = f"describe of '{module.model}' gives width {width!r}."
        raise PlanError([Problem(where, message, "It must be an integer of 1 or more.")])
    if None not in (width, module.width) and width != module.width:
        message = f"width = {module.width}, but '{module.model}' describes itself as {width} wide."
        raise PlanError([Problem(f"modules.{name}.width", message, "Leave width out.")])
    if width is None and module.width is None and module.feeds:
        warnings.warn(
            f"modules.{name}: {reason}, so the width of what it emits is not known. "
            f"Set modules.{name}.width.",
            PlanWarning,
            stacklevel=4,
        )
    return attrs.evolve(module, width=module.width or width), runs


def _with_emission(where: str, module: ModuleSpec, described: object) -> ModuleSpec:
    """Return a module that emits rows as its `describe` says. Raises PlanError for a table that says nothing."""
    if described is None:
        return module
    found = converted(new_converter(), described, Emission, ("rows_out",))
    if found.value is None:
        raise PlanError(
            Problem(where, f"describe of '{module.model}' gives {p.where}, which {p.message}", p.remedy)
            for p in found.problems
        )
    if module.rows_out not in {ONE_EACH, found.value}:
        message = f"differs from what '{module.model}' describes, {attrs.asdict(found.value)}."
        raise PlanError([Problem(where.replace(".model", ".rows_out"), message, "Leave rows_out out.")])
    return attrs.evolve(module, rows_out=found.value)
