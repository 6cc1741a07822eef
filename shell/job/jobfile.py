"""Job files: reads a `JobSpec` from TOML, and writes it.

`load` reads a file strictly and reports all problems together: unknown keys with the nearest known one, values of the
wrong type, missing keys. Overrides (``a.b.c=value``) are set before the file is read, so their mistakes are reported in
the same form.

`read` also returns a spec if the mistakes leave enough to understand the file (a misspelt key stands for the nearest
known one). Then problems of the plan can be reported in the same run.
"""

import contextlib
import copy
import itertools
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from cattrs import Converter
from cattrs.gen import override

from mimogrid.core.base.errors import PlanError, Problem, nearest
from mimogrid.core.job.costs import Costs
from mimogrid.core.job.models import BUILT_IN
from mimogrid.core.job.spec import DataSpec, GridSpec, JobSpec, MixSpec, ModuleSpec, TaskSpec
from mimogrid.core.job.validation.job import too_many_modules
from mimogrid.former_names import current_path
from mimogrid.shell.job import costfile
from mimogrid.shell.job.hf import lay_options
from mimogrid.shell.job.published import lay_weights
from mimogrid.shell.job.tables import (
    TableProblem,
    WrongValueError,
    converted,
    dotted,
    new_converter,
    shown,
    table_hook,
)
from mimogrid.shell.job.textfiles import TooMuch, read_text, toml_of


REQUIRED = {
    "modules": "Add a table [modules.NAME] for every module.",
    "data": 'Add a table [data] with source = "synthetic", "digits" or "package.module:function".',
    "batch": "Add a table [batch] with global_size = N.",
}
OWN_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
"""How the user's own modules and sources are named: ``package.module:function``."""
WRITE_ONE = "mimogrid init --template vision-language --out job.toml"
"""The command by which a user without a job file begins."""
LONG = 200
"""Characters of an override that a message repeats."""


@attrs.frozen
class ParsedJob:
    """A job file as far as it can be read.

    Attributes:
        spec: What the user probably meant; None if that is not clear. It is reliable only without `problems`.
        problems: All problems of the text.
        doubtful: Tables that a mistake left incomplete. Problems of the plan there may be consequences of the mistake.
        overrides: For each place that an override set, the text of the override.
    """

    spec: JobSpec | None
    problems: tuple[Problem, ...]
    doubtful: tuple[str, ...] = ()
    overrides: Mapping[str, str] = attrs.field(factory=dict[str, str])

    def explains(self, problem: Problem) -> bool:
        """Whether a problem of the plan may be a consequence of a problem of the text."""
        return any(_is_within(problem.where, table) for table in self.doubtful)

    def annotated(self, problem: Problem) -> Problem:
        """Return the problem, with the override that it comes from, if any."""
        for place, text in self.overrides.items():
            if _is_within(problem.where, place):
                return attrs.evolve(problem, message=f"{problem.message} (Given by --set {text}.)")
        return problem


def _is_within(where: str, place: str) -> bool:
    return where == place or where.startswith((f"{place}.", f"{place}["))


def load(path: Path | str, overrides: Iterable[str] = ()) -> JobSpec:
    """Read a job file. Raises PlanError with every problem of its text."""
    parsed_job = read(path, overrides)
    if parsed_job.problems or parsed_job.spec is None:
        raise PlanError(parsed_job.problems)
    return parsed_job.spec


def read(path: Path | str, overrides: Iterable[str] = ()) -> ParsedJob:
    """Read a job file as far as possible."""
    try:
        text = _text(Path(path))
        table = _parsed(text, str(path))
    except PlanError as error:
        return ParsedJob(None, error.problems)
    problems: list[Problem] = []
    places: dict[str, str] = {}
    modules = table.get("modules")
    named = tuple(modules) if isinstance(modules, dict) else ()
    for entry in overrides:
        try:
            places[_lay_over(table, entry)] = entry
        except PlanError as error:
            problems += error.problems
    problems += _taken_for_modules(table, named, places)
    if not table:
        empty = Problem(
            str(path), "the job file is empty.", "A job needs [modules.NAME], [data] and [batch]."
        )
        return ParsedJob(None, (*problems, empty))
    modules = table.get("modules")
    if isinstance(modules, dict) and (many := tuple(too_many_modules(len(modules)))):
        return ParsedJob(None, (*problems, *many))  # at once: each could have problems of its own
    costs, of_costs = _take_costs(table, Path(path).parent)
    of_configs = lay_options(table, Path(path).parent)
    _lay_data(table.get("data"), table.get("validation"), Path(path).parent)
    of_weights = lay_weights(table, Path(path).parent)
    of_files = [*of_costs, *itertools.chain(*of_configs.values(), *of_weights.values())]
    problems += dict.fromkeys(of_files)
    unread = [name for name in {**of_configs, **of_weights} if name]
    for name in unread:
        _stand_in(table["modules"][name])
    job = attrs.evolve(_read_table(table), overrides=places)
    doubtful = (dotted(("modules", name)) for name in unread)
    job = attrs.evolve(job, doubtful=(*job.doubtful, *doubtful))
    if costs and job.spec:
        job = attrs.evolve(job, spec=_with_costs(job.spec, costs))
    problems += [job.annotated(problem) for problem in job.problems]
    return attrs.evolve(job, problems=tuple(problems))


def _taken_for_modules(
    table: dict[str, Any], named: Sequence[str], places: Mapping[str, str]
) -> Iterator[Problem]:
    """Yield the modules that only overrides name, and without a model; take them out again."""
    modules: Any = table.get("modules")
    if not named or not isinstance(modules, dict):
        return
    for name in [*modules]:
        where = dotted(("modules", name))
        if name not in named and isinstance(modules[name], dict) and "model" not in modules[name]:
            entry = next(entry for place, entry in places.items() if _is_within(place, where))
            yield Problem(
                where, f"there is no module '{name}'. (Given by --set {entry}.)", nearest(name, named)
            )
            del modules[name]


def _lay_data(data: object, validation: object, folder: Path) -> None:
    """Make the folders that sources of conversations name absolute, and say which index each is by its digest."""
    tasks = validation.get("tasks") if isinstance(validation, dict) else None
    entries = [*tasks.values()] if isinstance(tasks, dict) else []
    if isinstance(data, dict):
        entries += [data, *(data["mix"] if isinstance(data.get("mix"), list) else ())]
    for entry in entries:
        options = entry.get("options") if isinstance(entry, dict) else None
        if isinstance(options, dict) and entry.get("source") == "conversations":
            from mimogrid.shell.data.index import Index  # noqa: PLC0415 -- imports pyarrow

            for key in ("index", "checkpoint"):
                if isinstance(options.get(key), str) and "\0" not in options[key]:
                    options[key] = str((folder / options[key]).resolve())
            with contextlib.suppress(PlanError):  # The source reports it.
                options.setdefault("digest", Index(Path(str(options.get("index")))).facts.digest)


def _stand_in(module: dict[str, Any]) -> None:
    """Give a module what a file should have said of it, so that nothing else is reported as missing."""
    if "model" not in module:
        module |= {"model": "block", "options": {}}
    if isinstance(options := module.setdefault("options", {}), dict) and module["model"] in BUILT_IN:
        vocab = {"vocab": 1} if module["model"] == "gpt" else {}
        module["options"] = {"layers": 1, "hidden": 2, "heads": 1} | vocab | options


def _with_costs(spec: JobSpec, costs: Costs | None) -> JobSpec:
    return attrs.evolve(spec, schedule=attrs.evolve(spec.schedule, costs=costs))


def parsed(text: str) -> JobSpec:
    """Read what `dump` wrote. Raises PlanError."""
    return read_table(_parsed(text, "job"))


def read_table(table: dict[str, Any]) -> JobSpec:
    """Read the table of a job that names no further files. Raises PlanError."""
    costs, problems = _take_costs(table, Path())
    job = _read_table(table)
    if problems or job.problems or job.spec is None:
        raise PlanError([*problems, *job.problems])
    return _with_costs(job.spec, costs)


def recorded(text: object, where: Path) -> JobSpec:
    """Read the job that a run or a checkpoint recorded. Raises PlanError with the name of the file."""
    try:
        return parsed(str(text))
    except PlanError as error:
        message = f"holds a job that cannot be read: {error.problems[0].message}"
        raise _file_error(where, message, "Use the mimogrid that wrote it.") from None


def dump(spec: JobSpec) -> str:
    """Write a spec as a job file, without defaults; `load` reads it back to an equal spec."""
    import tomlkit  # noqa: PLC0415  (slow to import, and few commands write)

    document = tomlkit.document()
    tables = CONVERTER.unstructure(spec)
    if spec.schedule.costs:
        tables["schedule"]["costs"] = costfile.table_of(spec.schedule.costs)
    for key, value in sorted(tables.items(), key=lambda pair: isinstance(pair[1], list)):
        if not isinstance(value, dict):
            document.add(key, value)
    for key, value in tables.items():
        if key == "modules":
            modules = tomlkit.table(is_super_table=bool(value))
            for name, module in value.items():
                modules.add(name, _flat_table(module))
            document.add(key, modules)
        elif isinstance(value, dict):
            document.add(key, _flat_table(value))
    return tomlkit.dumps(document)


def _flat_table(value: Mapping[str, Any]) -> Any:
    """Return a TOML table with its inner tables on one line each."""
    import tomlkit  # noqa: PLC0415

    table = tomlkit.table()
    for key, item in sorted(value.items(), key=lambda pair: isinstance(pair[1], dict)):
        if isinstance(item, dict):
            inline = tomlkit.inline_table()
            inline.update(item)
            table.add(key, inline)
        else:
            table.add(key, item)
    return table


# -- text --------------------------------------------------------------------------------------------------


def _text(path: Path) -> str:
    try:
        return read_text(path, "Check the path and its permissions.")
    except PlanError:
        near = _neighbours(path)
        if near is None:
            raise
        remedy = nearest(path.name, near) if near else f"Check the path, or write one: {WRITE_ONE}"
        raise _file_error(path, "there is no such file.", remedy) from None


def _neighbours(path: Path) -> list[str] | None:
    """The job files in the folder of one that is not there; None if it is there or cannot be looked for."""
    try:
        if os.path.lexists(path):
            return None
        return (
            sorted(p.name for p in path.parent.glob("*.toml") if _is_job(p)) if path.parent.is_dir() else []
        )
    except (OSError, ValueError):
        return None


def _is_job(path: Path) -> bool:
    """Whether a file has the table that only a job has."""
    with contextlib.suppress(PlanError):
        return "\n[modules." in f"\n{read_text(path, '')}"
    return False


def _file_error(path: Path | str, message: str, remedy: str) -> PlanError:
    return PlanError([Problem(str(path), message, remedy)])


def _parsed(text: str, name: str) -> dict[str, Any]:
    try:
        return toml_of(text)
    except TooMuch as error:
        raise _file_error(name, f"{error}.", "No job needs that.") from None
    except tomllib.TOMLDecodeError as error:
        message, remedy = _explained(str(error), text)
        raise _file_error(name, message, remedy) from None


def _explained(message: str, text: str) -> tuple[str, str]:
    """Return fact and remedy for a message of the TOML parser."""
    fact, line, column = _located(message, text)
    at = f"(line {line}, column {column})"
    twice = re.match(r"Cannot (?:declare|redefine namespace) \((.*?)\)", fact)
    if twice:
        path = re.findall(r"'((?:[^'\\]|\\.)*)'", twice[1])
        first = _first_declared(path, text)
        since = f", first on line {first}" if first and first != line else ""
        what = f"module '{path[1]}'" if path[0] == "modules" and len(path) == 2 else "this table"  # noqa: PLR2004
        message = f"the table [{dotted(path)}] is declared twice{since} {at}."
        return message, f"Give {what} one table: rename one of the two, or join them."
    if fact.startswith(("Cannot overwrite a value", "Duplicate inline table key")):
        key = text.splitlines()[line - 1].strip() if text else ""
        return f"a key or table is given twice {at}: {key}", "Keep one of the two."
    return f"is not TOML: {fact[:1].lower()}{fact[1:]} {at}.", "Correct the line."


def _located(message: str, text: str) -> tuple[str, int, int]:
    """Split the parser's message into fact, line and column."""
    place = re.search(r" \(at line (\d+), column (\d+)\)$", message)
    if place:
        return message[: place.start()], int(place[1]), int(place[2])
    lines = text.rstrip().splitlines() or [""]
    return message.removesuffix(" (at end of document)"), len(lines), len(lines[-1]) + 1


def _first_declared(path: list[str], text: str) -> int:
    header = re.compile(r"\s*\[\s*" + r"\s*\.\s*".join(f"[\"']?{re.escape(k)}[\"']?" for k in path))
    lines = text.splitlines()
    return next((i for i, line in enumerate(lines, start=1) if header.match(line)), 0)


# -- overrides ---------------------------------------------------------------------------------------------


def _lay_over(table: dict[str, Any], entry: str) -> str:
    """Set an override ``a.b.c=value`` in the table; return its place. Raises PlanError."""
    key, equals, text = entry.partition("=")
    remedy = "Write --set a.b.c=value, such as --set train.steps=20."
    where = f"--set {entry if len(entry) <= LONG else entry[:LONG] + ' ...'}"
    try:
        path, value = _key_path(key), _override_value(text.strip())
    except TooMuch as error:
        raise PlanError([Problem(where, f"{error}.", remedy)]) from None
    if not equals or not path:
        raise PlanError([Problem(where, "is not of the form a.b.c=value.", remedy)])
    for depth, step in enumerate(path[:-1], start=1):
        table = table.setdefault(step, {})
        if not isinstance(table, dict):
            message = f"{dotted(path[:depth])} is {shown(table)}, not a table, so it has no keys."
            remedy = f"Override {dotted(path[:depth])} itself, or name another key."
            raise PlanError([Problem(where, message, remedy)])
    table[path[-1]] = value
    return dotted(path)


def _key_path(key: str) -> tuple[str, ...]:
    """Read a dotted key as TOML does; () if it is not one."""
    try:
        table: Any = toml_of(f"{key} = 0")
    except tomllib.TOMLDecodeError:
        return ()
    path: list[str] = []
    while isinstance(table, dict):
        if len(table) != 1:
            return ()
        [(step, table)] = table.items()
        path.append(step)
    return tuple(path)


def _override_value(text: str) -> object:
    """Read a value as TOML does. What is not TOML is a string, and so is a date, which no job has."""
    try:
        table = toml_of(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    value = table["value"]
    is_toml = len(table) == 1 and isinstance(value, bool | int | float | str | list | dict)
    return value if is_toml else text


# -- costs -------------------------------------------------------------------------------------------------


def _take_costs(table: dict[str, Any], folder: Path) -> tuple[Costs | None, list[Problem]]:
    """Take `schedule.costs` out of a job's tables: the tables of a costs file, or its path from the job's folder."""
    schedule = table.get("schedule")
    costs = schedule.pop("costs", None) if isinstance(schedule, dict) else None
    where = "schedule.costs"
    try:
        if isinstance(costs, str):
            where = str(folder / costs)
            costs = costfile.load(folder / costs, "Check schedule.costs.")
        elif costs is not None and not isinstance(costs, dict):
            remedy = 'Give the path of a costs file, or its tables: { stages."language.0" = {...} }.'
            return None, [Problem(where, f"is {shown(costs)}.", remedy)]
    except PlanError as error:
        return None, list(error.problems)
    return (None, []) if costs is None else costfile.costs_of(costs, f"{where}.")


# -- tables ------------------------------------------------------------------------------------------------


@attrs.frozen
class _Options:
    """The options of a module as written, with the name of its model."""

    model: object
    table: object


def _job_converter() -> Converter:
    converter = new_converter()

    def module_hook(value: Any, kind: Any) -> Any:
        if isinstance(value, Mapping):
            value = {**value, "options": _Options(value.get("model"), value.get("options", {}))}
        return module(value, kind)

    def options_hook(options: _Options, _: Any) -> Any:
        model = BUILT_IN.get(options.model) if isinstance(options.model, str) else None
        return converter.structure(options.table, model or Mapping[str, Any])

    options_type = attrs.fields(ModuleSpec).options.type
    converter.register_structure_hook_factory(lambda kind: bool(kind == options_type), lambda _: options_hook)
    module = table_hook(converter, ModuleSpec, model=override(struct_hook=_model))
    converter.register_structure_hook(ModuleSpec, module_hook)
    source = override(struct_hook=lambda value, _: current_path(converter.structure(value, str)))
    for kind in (DataSpec, MixSpec, TaskSpec):
        converter.register_structure_hook(kind, table_hook(converter, kind, source=source))
    return converter


def _model(value: Any, _: Any) -> str:
    if not isinstance(value, str):
        remedy = f"Use one of {', '.join(BUILT_IN)}, or a string of the form package.module:function."
        raise WrongValueError(f"is {shown(value)}; expected the name of a model.", remedy)
    if value in BUILT_IN:
        return value
    if ":" not in value:
        others = "Your own: package.module:function. A published one: `mimogrid init FOLDER`."
        remedy = f"{nearest(value, tuple(BUILT_IN))} {others}"
        raise WrongValueError(f"'{value}' is not a built-in model.", remedy)
    if not OWN_PATH.fullmatch(value):
        message = f"'{value}' is not of the form package.module:function."
        raise WrongValueError(message, "Name a module of Python and a function in it.")
    return current_path(value)


CONVERTER = _job_converter()


def _read_table(table: dict[str, Any]) -> ParsedJob:
    first = converted(CONVERTER, table, JobSpec)
    if first.value is not None:
        return ParsedJob(first.value, ())
    meant = {(*problem.path[:-1], problem.meant) for problem in first.problems if problem.meant}
    problems = tuple(
        _problem(problem, table) for problem in first.problems if problem.unknown or problem.path not in meant
    )
    if any(problem.missing and problem.path not in meant for problem in first.problems):
        return ParsedJob(None, problems)
    repaired, doubtful = copy.deepcopy(table), set[str]()
    for problem in first.problems:
        if problem.missing or _renamed(repaired, problem):
            continue
        if not _dropped(repaired, problem):
            return ParsedJob(None, problems)
        doubtful.add(dotted(problem.path[: 2 if problem.path[0] == "modules" else 1]))
    return ParsedJob(converted(CONVERTER, repaired, JobSpec).value, problems, tuple(sorted(doubtful)))


def _problem(problem: TableProblem, table: Mapping[str, Any]) -> Problem:
    if len(problem.path) == 1 and problem.path[0] in REQUIRED and problem.path[0] not in table:
        return Problem(problem.where, "is missing.", REQUIRED[problem.path[0]])
    remedy = problem.remedy
    modules = table.get("modules")
    if len(problem.path) == 1 and isinstance(modules, dict) and problem.path[0] in modules:
        remedy = f"'{problem.path[0]}' is a module: write {dotted(('modules', *problem.path))}."
    elif problem.unknown and not problem.meant:
        home = next(iter(_homes(problem)), None)
        remedy = f"'{problem.path[-1]}' belongs in {home}." if home else remedy
    return Problem(problem.where, problem.message, remedy)


def _homes(problem: TableProblem) -> Iterator[str]:
    """Yield the tables that have a key which this one lacks."""
    key, place = problem.path[-1], problem.path[:2]
    if place[0] == "modules" and len(problem.path) > 2:  # noqa: PLR2004
        homes: dict[str, type] = {dotted(place): ModuleSpec, dotted((*place, "grid")): GridSpec}
        if problem.table is ModuleSpec:
            homes |= {dotted((*place, "options")): model for model in BUILT_IN.values()}
    else:
        homes = {"the top of the file": JobSpec}
    homes |= {f"[{f.name}]": f.type for f in attrs.fields(JobSpec) if f.type and attrs.has(f.type)}
    return (home for home, kind in homes.items() if key in attrs.fields_dict(kind))


def _renamed(table: dict[str, Any], problem: TableProblem) -> bool:
    """Rename a misspelt key to the field that was meant, if that is free; return whether it was."""
    inner = _table_of(table, problem)
    if inner is None or not problem.meant or problem.meant in inner:
        return False
    inner[problem.meant] = inner.pop(problem.path[-1])
    return True


def _dropped(table: dict[str, Any], problem: TableProblem) -> bool:
    """Remove a faulty key, unless too much depends on it; return whether it was removed."""
    inner, key = _table_of(table, problem), problem.path[-1]
    if inner is None or key in {"feeds", "model"} or isinstance(inner[key], dict):
        return False
    del inner[key]
    return True


def _table_of(table: Any, problem: TableProblem) -> dict[str, Any] | None:
    """Return the table with a faulty key; None if it is not a key, such as an entry of a list."""
    for step in problem.path[:-1]:
        table = table.get(step) if isinstance(table, dict) else None
    return table if isinstance(table, dict) and problem.path[-1] in table else None
