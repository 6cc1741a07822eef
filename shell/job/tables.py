"""Tables: turns what a TOML parser returns into attrs values, and finds *all* problems at once.

A field of an attrs class is a key of its table. A field without a default is required. Types are strict: true is not an
integer, "4" is not a number, a string is not a list of its letters. An integer serves as a float, and a list becomes a
tuple.

>>> @attrs.frozen
... class Grid:
...     tp: int = 1
>>> converted(new_converter(), {"ttp": 2}, Grid).problems[0].path
('ttp',)
"""

import collections.abc
import difflib
import json
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import attrs
from cattrs import Converter
from cattrs.errors import BaseValidationError, ForbiddenExtraKeysError
from cattrs.gen import make_dict_structure_fn

from mimogrid.core.base.errors import nearest


T = TypeVar("T")


class WrongValueError(ValueError):
    """A value that cannot stand where it does: the fact and the remedy, without the place."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy


@attrs.frozen
class TableProblem:
    """One problem at one place of a table.

    Attributes:
        path: The keys that lead to the place.
        message: The fact.
        remedy: What to do.
        missing: Whether a required key is missing.
        unknown: Whether the key is not a field of its class.
        table: For an unknown key, the class.
        meant: For an unknown key, the field with the nearest name, if there is one.
    """

    path: tuple[str, ...]
    message: str
    remedy: str
    missing: bool = False
    unknown: bool = False
    table: type | None = None
    meant: str | None = None

    @property
    def where(self) -> str:
        """The place as it is written in a job file."""
        return dotted(self.path)


@attrs.frozen
class Converted(Generic[T]):
    """A value, or the problems of its table; never both."""

    value: T | None
    problems: tuple[TableProblem, ...]


def converted(converter: Converter, table: object, kind: type[T], path: tuple[str, ...] = ()) -> Converted[T]:
    """Convert a table to a value of an attrs class; `path` is the place of the table."""
    try:
        return Converted(converter.structure(table, kind), ())
    except (BaseValidationError, WrongValueError) as error:
        return Converted(None, tuple(_problems(error, path)))


def new_converter() -> Converter:
    """Return a cattrs converter with the strict types of the job file."""
    converter = Converter(omit_if_default=True)
    for kind in _SCALARS:
        converter.register_structure_hook(kind, _scalar)
    converter.register_structure_hook_factory(attrs.has, lambda kind: table_hook(converter, kind))
    converter.register_structure_hook_factory(is_mapping, lambda kind: _mapping(converter, kind))
    converter.register_structure_hook_factory(is_tuple, lambda kind: _tuple(converter, kind))
    converter.register_structure_hook_factory(_is_choice, lambda kind: _choice(converter, kind))
    return converter


def table_hook(converter: Converter, kind: type, **overrides: Any) -> Callable[[Any, Any], Any]:
    """Return the hook that converts a table to `kind`; overrides are those of cattrs."""
    read: Callable[[Any, Any], Any] = make_dict_structure_fn(
        kind, converter, _cattrs_forbid_extra_keys=True, **overrides
    )

    def hook(value: Any, _: Any) -> Any:
        return read(_table(value), kind)

    return hook


def dotted(path: Sequence[str]) -> str:
    """Write a path as in a job file.

    >>> dotted(("modules", "my module", "feeds", "[0]"))
    'modules."my module".feeds[0]'
    """
    text = ""
    for key in path:
        if key.startswith("["):
            text += key
        else:
            bare = key and all(c.isascii() and (c.isalnum() or c in "_-") for c in key)
            text += ("." if text else "") + (key if bare else json.dumps(key))
    return text


def shown(value: object) -> str:
    """Write a value as in a job file, cut if it is long.

    >>> shown([True, "a"])
    '[true, "a"]'
    """
    match value:
        case bool():
            text = str(value).lower()
        case str():
            text = json.dumps(value, ensure_ascii=False)
        case list() | tuple():
            text = f"[{', '.join(map(shown, value))}]"
        case dict():
            text = (
                "{}" if not value else f"{{ {', '.join(f'{key} = {shown(v)}' for key, v in value.items())} }}"
            )
        case _:
            text = str(value)
    return text if len(text) <= _LONG else text[: _LONG - 4] + " ..."


# -- kinds of values ---------------------------------------------------------------------------------------

_LONG = 60
_SCALARS: Mapping[type, str] = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
}
_KINDS: Mapping[type, str] = {
    bool: "a boolean",
    int: "an integer",
    float: "a number with a point",
    str: "a string",
    list: "a list",
    dict: "a table",
}
_EXAMPLES: Mapping[type, str] = {int: "4", float: "0.5", bool: "true", str: '"text"'}


def _mismatch(value: object, expected: str, remedy: str) -> WrongValueError:
    kind = _KINDS.get(type(value), "a date")
    return WrongValueError(f"is {shown(value)}, {kind}; expected {expected}.", remedy)


def _scalar(value: Any, kind: type) -> Any:
    if type(value) is kind:
        return value
    if kind is float and type(value) is int:
        return float(value)
    raise _mismatch(value, _SCALARS[kind], _scalar_remedy(value, kind))


def _scalar_remedy(value: object, kind: type) -> str:
    if kind is str:
        return f"Write it in quotes: {shown(str(value))}." if _is_plain(value) else "Use a string."
    if kind is int and isinstance(value, float) and value.is_integer():
        return f"Write {int(value)}."
    if isinstance(value, str):
        try:
            number = value if kind is bool else str(kind(value))
        except ValueError:
            number = ""
        if number and (kind is not bool or value in {"true", "false"}):
            return f"Write {value} without quotes."
    return f"Use {_SCALARS[kind]}, such as {_EXAMPLES[kind]}."


def _is_plain(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _table(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _mismatch(value, "a table", "Use a table, such as { key = 1 }.")
    return value


def is_mapping(kind: Any) -> bool:
    """Whether a type is a mapping, which a table is read into."""
    return typing.get_origin(kind) is collections.abc.Mapping


def _mapping(converter: Converter, kind: Any) -> Callable[[Any, Any], Any]:
    _, item = typing.get_args(kind)
    if item is Any:
        return lambda value, _: dict(_table(value))
    return lambda value, _: converter.structure(_table(value), dict[str, item])  # type: ignore[valid-type]


def is_tuple(kind: Any) -> bool:
    """Whether a type is a tuple, which a list is read into."""
    return typing.get_origin(kind) is tuple


def _tuple(converter: Converter, kind: Any) -> Callable[[Any, Any], Any]:
    items = typing.get_args(kind)

    def hook(value: Any, _: Any) -> Any:
        if not isinstance(value, list):
            remedy = "Use a list." if isinstance(value, dict) else f"Write [{shown(value)}]."
            raise _mismatch(value, f"a list of {_plural(items)}", remedy)
        if items[-1] is not Ellipsis and len(value) != len(items):
            raise WrongValueError(
                f"is {shown(value)}, a list of {len(value)}; expected {len(items)} {_plural(items)}.",
                f"Give {len(items)} of them.",
            )
        return tuple(converter.structure(value, list[items[0]]))  # type: ignore[valid-type]

    return hook


def _plural(items: tuple[Any, ...]) -> str:
    return {int: "integers", float: "numbers", str: "strings"}.get(items[0], "values")


def _is_choice(kind: Any) -> bool:
    """Whether a type is a union of several types besides None."""
    if typing.get_origin(kind) not in {types.UnionType, typing.Union}:
        return False
    return sum(member is not types.NoneType for member in typing.get_args(kind)) > 1


def _choice(converter: Converter, kind: Any) -> Callable[[Any, Any], Any]:
    """Return the hook that converts a value to that member of a union that it looks like."""
    members = [m for m in typing.get_args(kind) if m is not types.NoneType]

    def looks_like(member: Any, value: object) -> bool:
        if is_mapping(member) or attrs.has(member):
            return isinstance(value, dict)
        if is_tuple(member):
            return isinstance(value, list)
        return type(value) is member or (member is float and type(value) is int)

    def hook(value: Any, _: Any) -> Any:
        for member in members:
            if looks_like(member, value):
                return converter.structure(value, member)
        expected = " or ".join(_named(member) for member in members)
        wrap = any(is_tuple(member) for member in members) and isinstance(value, str)
        remedy = f"Write [{shown(value)}]." if wrap else f"Use {expected}."
        raise _mismatch(value, expected, remedy)

    return hook


def _named(member: Any) -> str:
    if is_mapping(member) or attrs.has(member):
        return "a table"
    return f"a list of {_plural(typing.get_args(member))}" if is_tuple(member) else _SCALARS[member]


# -- what cattrs found -------------------------------------------------------------------------------------


def _problems(error: BaseException, path: tuple[str, ...]) -> Iterator[TableProblem]:
    match error:
        case ForbiddenExtraKeysError():
            for key in sorted(error.extra_fields):
                yield _unknown((*path, key), error.cl)
        case BaseValidationError():
            for inner in error.exceptions:
                yield from _problems(inner, (*path, *_step(inner)))
        case WrongValueError():
            yield TableProblem(path, error.message, error.remedy)
        case KeyError():
            yield TableProblem(path, "is missing.", "It is required, and has no default.", missing=True)
        case _:
            yield TableProblem(path, f"cannot be read: {error}.", "Check the value.")


def _step(error: BaseException) -> tuple[str, ...]:
    """Return the key from a group of errors to one of them. cattrs leaves it in a note."""
    for note in getattr(error, "__notes__", ()):
        if hasattr(note, "name"):
            return (note.name,)
        if hasattr(note, "index"):
            return (note.index if isinstance(note.index, str) else f"[{note.index}]",)
    return ()


ELSEWHERE = {
    "data_parallel_size": "dp",
    "dtype": "precision",
    "global_batch_size": "global_size",
    "hidden_size": "hidden",
    "learning_rate": "lr",
    "max_steps": "steps",
    "num_attention_heads": "heads",
    "num_heads": "heads",
    "num_hidden_layers": "layers",
    "num_layers": "layers",
    "num_microbatches": "microbatches",
    "output_dir": "run_dir",
    "pipeline_parallel_size": "pp",
    "save_every": "checkpoint_every",
    "save_interval": "checkpoint_every",
    "save_steps": "checkpoint_every",
    "tensor_parallel_size": "tp",
    "train_iters": "steps",
    "vocab_size": "vocab",
}
"""What other libraries call a key, and what it is called here."""


def _unknown(path: tuple[str, ...], table: type) -> TableProblem:
    known = [field.name for field in attrs.fields(table)]
    here = ELSEWHERE.get(path[-1])
    meant = [here] if here in known else difflib.get_close_matches(path[-1], known, n=1)
    return TableProblem(
        path,
        f"'{path[-1]}' is not a known key here.",
        f"Did you mean '{meant[0]}'?" if meant else nearest(path[-1], known),
        unknown=True,
        table=table,
        meant=meant[0] if meant else None,
    )
