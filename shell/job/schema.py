"""The schema: the job file as a JSON Schema, by which an editor completes keys, explains them and marks mistakes.

It follows from the classes that the file is read into (`tables`): a field is a key, its type says what may stand there.
What a key means stands once, in the tables of ``docs/job-file.md``: a table there describes the class that has all of
its keys. Words that only validation knows, such as the names of schedules, are listed in `WORDS`.

A schema says less than `mimogrid check`: nothing of ranks, divisors or names of modules.
"""

import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

import mimogrid
from mimogrid.core.job import layer_engines
from mimogrid.core.job.models import ACTIVATIONS, BUILT_IN, NORMS, Transformer
from mimogrid.core.job.precision import VALUE_BYTES
from mimogrid.core.job.schedules import SCHEDULES
from mimogrid.core.job.spec import (
    BALANCES,
    TRACKERS,
    WORKER_KINDS,
    BatchSpec,
    DataSpec,
    JobSpec,
    ModuleLayoutSpec,
    ModuleSpec,
    OptimizerSpec,
    ScheduleLayoutSpec,
    ScheduleSpec,
    TrackSpec,
)
from mimogrid.core.job.validation.optimizer import DECAYS
from mimogrid.core.job.validation.problems import RECOMPUTES
from mimogrid.shell.job.sources.opening import BUILT_IN as SOURCES
from mimogrid.shell.job.tables import is_mapping, is_tuple


Schema = dict[str, Any]

PAGE = "job-file.md"
DIALECT = "http://json-schema.org/draft-07/schema#"
"""The newest one that both taplo and tombi read."""
WORDS: Mapping[tuple[type, str], tuple[str, ...]] = {
    (BatchSpec, "balance"): BALANCES,
    (JobSpec, "precision"): tuple(VALUE_BYTES),
    (ModuleSpec, "recompute"): RECOMPUTES,
    (ModuleLayoutSpec, "recompute"): RECOMPUTES,
    (ModuleSpec, "engine"): layer_engines.ENGINES,
    (ModuleSpec, "fp8"): layer_engines.FORMATS,
    (DataSpec, "worker_kind"): WORKER_KINDS,
    (TrackSpec, "to"): TRACKERS,
    (ScheduleSpec, "name"): SCHEDULES,
    (ScheduleLayoutSpec, "name"): SCHEDULES,
    (OptimizerSpec, "decay"): DECAYS,
    (Transformer, "norm"): NORMS,
    (Transformer, "activation"): ACTIVATIONS,
}
_SCALARS: Mapping[Any, Schema] = {
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    str: {"type": "string"},
    Any: {},
}


def job_schema() -> Schema:
    """Return the JSON Schema of a job file."""
    meanings = _meanings((Path(mimogrid.__file__).parent / PAGE).read_text(encoding="utf-8"))
    whole = _table(JobSpec, meanings)
    of_module = whole["properties"]["modules"]["additionalProperties"]
    # Options are read by their model (`jobfile`); where a checkpoint has them they need not be written.
    of_module["properties"]["options"] = {"type": "object", **_said(ModuleSpec, "options", meanings)}
    of_module["properties"]["model"]["examples"] = list(BUILT_IN)
    of_module["required"].remove("options")
    of_module["allOf"] = [_of_model(name, model, meanings) for name, model in BUILT_IN.items()]
    whole["properties"]["data"]["properties"]["source"]["examples"] = list(SOURCES)
    whole["properties"]["schedule"]["properties"]["costs"]["type"] = ["string", "object"]
    return {"$schema": DIALECT, "title": "A job of mimogrid", **whole}


def header(schema: Path | str) -> str:
    """Return the first line of a job file that tells editors where its schema is."""
    return f"#:schema {schema}\n"


def _of_model(name: str, model: type, meanings: "Meanings") -> Schema:
    options = _table(model, meanings)
    del options["required"]  # the rest may come from `config`, or from a checkpoint
    options["properties"]["config"] = {
        "type": "string",
        "description": "A config.json of Hugging Face, from the folder of the job file: sizes are read from it.",
    }
    return {"if": {"properties": {"model": {"const": name}}}, "then": {"properties": {"options": options}}}


def _table(kind: type, meanings: "Meanings") -> Schema:
    """Return the schema of a table that is read into an attrs class."""
    fields = attrs.fields(attrs.resolve_types(kind))
    return {
        "type": "object",
        "properties": {field.name: _key(kind, field, meanings) for field in fields},
        "required": [field.name for field in fields if field.default is attrs.NOTHING],
        "additionalProperties": False,
    }


def _key(kind: type, field: "attrs.Attribute[Any]", meanings: "Meanings") -> Schema:
    found = _value(field.type, meanings) | _said(kind, field.name, meanings)
    if type(field.default) in {int, float, bool, str}:
        found["default"] = field.default
    words = [allowed for (of, name), allowed in WORDS.items() if name == field.name and issubclass(kind, of)]
    if words:
        (found["items"] if found.get("type") == "array" else found)["enum"] = list(words[0])
    return found


def _value(kind: Any, meanings: "Meanings") -> Schema:
    """Return the schema of a value, by the rules of `tables`."""
    if kind in _SCALARS:
        return dict(_SCALARS[kind])
    if attrs.has(kind):
        return _table(kind, meanings)
    inner = typing.get_args(kind)
    if is_mapping(kind):
        return {"type": "object", "additionalProperties": _value(inner[1], meanings)}
    if is_tuple(kind):
        items = {"type": "array", "items": _value(inner[0], meanings)}
        return items if inner[-1] is Ellipsis else items | {"minItems": len(inner), "maxItems": len(inner)}
    if typing.get_origin(kind) in {types.UnionType, typing.Union}:
        members = [_value(member, meanings) for member in inner if member is not types.NoneType]
        return members[0] if len(members) == 1 else {"anyOf": members}
    raise AssertionError(kind)


# -- what keys mean ----------------------------------------------------------------------------------------


Meanings = list[Mapping[str, str]]
"""By table of the page, the meaning of each key."""


def _said(kind: type, key: str, meanings: Meanings) -> Schema:
    """Return the description of a key of a class, if the page has one."""
    fields = attrs.fields_dict(kind)
    if issubclass(kind, Transformer):
        fields = {
            name: field for model in BUILT_IN.values() for name, field in attrs.fields_dict(model).items()
        }
    found = [table[key] for table in meanings if key in table and table.keys() <= fields.keys()]
    return {"description": found[0]} if found else {}


def _meanings(page: str) -> Meanings:
    """Read the tables of the page whose first column is `key` and whose last is `meaning`."""
    found: Meanings = []
    for table in re.findall(r"^\| key \|.*\n\|[-| ]+\n((?:\|.*\n)+)", page, re.MULTILINE):
        found.append(dict(_rows(table)))
    return found


def _rows(table: str) -> Iterator[tuple[str, str]]:
    for row in table.splitlines():
        key, *_, meaning = (cell.strip() for cell in row.strip("|").split("|"))
        # An editor has no page to link to.
        text = re.sub(r" \(\[how\]\([^)]*\)\)", "", meaning)
        yield key.strip("`"), re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)
