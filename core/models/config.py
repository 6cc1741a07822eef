"""Configs: a ``config.json`` that is being read, with everything that is wrong with it.

A value that the file leaves out is what transformers takes for it, so every family states these defaults. Reading goes
on after a problem, with a default; the caller that began to read raises all problems at once.

>>> config = Config({"hidden_size": "many"}, defaults={"hidden_size": 8, "hidden_act": "silu"})
>>> config.integer("hidden_size"), config.activation("hidden_act")
(8, 'silu')
>>> print(config.problems[0])
config.json: hidden_size: is "many"; expected an integer of 1 or more.
    Check the file.
"""

import json
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import attrs

from mimogrid.core.base.errors import PlanError, Problem, nearest
from mimogrid.core.models.network import Model, PublishedModule


ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
"""Names of activations in transformers, and ours."""


SIZE_MOST, COUNT_MOST = 2**31 - 1, 1024
"""The largest sizes, and counts of what recipes list one by one: a file must not say how long it takes to read it."""


@attrs.frozen(kw_only=True, eq=False)
class Family:
    """An architecture.

    Attributes:
        model_type: its name in a config file.
        architectures: classes of transformers whose files it reads.
        defaults: what transformers takes for what a file leaves out.
        read: returns its module, or the modules of a whole.
        role: `language`, `vision` or `audio` where it is one module: its name in a job, and what it can be in a whole.
    """

    model_type: str
    architectures: tuple[str, ...]
    defaults: Mapping[str, Any]
    read: "Callable[[Config], PublishedModule | Model]"
    role: str = ""


@attrs.frozen
class Config:
    """A table of a config file. Its methods return values of the right kind, and note what is wrong.

    Attributes:
        values: what the file says.
        defaults: what transformers takes for what it leaves out.
        names: the tensors on disk; none where they are not known.
        families: by model type, those that a table within may be of.
        path: keys to this table from the top of the file.
        at: what the names of its tensors on disk begin with, as transformers writes them now.
        problems: what is wrong with the file, so far.
    """

    values: Mapping[str, Any]
    defaults: Mapping[str, Any]
    names: Collection[str] = ()
    families: Mapping[str, Family] = attrs.field(factory=dict[str, Family])
    path: tuple[str, ...] = ()
    at: str = ""
    problems: list[Problem] = attrs.field(factory=list[Problem])

    def get(self, key: str) -> Any:
        """Return a value as it is written, or its default."""
        return self.values.get(key, self.defaults.get(key))

    def written(self, *keys: str) -> str:
        """Return which of several names of one key the file uses; the last where it uses none."""
        return next((key for key in keys if key in self.values), keys[-1])

    def integer(self, key: str, *, least: int = 1, most: int = SIZE_MOST) -> int:
        """Return an integer."""
        is_one: bool = type(self.get(key)) is int and least <= self.get(key) <= most
        limits = f"{least} or more" if most == SIZE_MOST else f"{least} to {most}"
        value = self._checked(key, is_one, f"an integer of {limits}")
        return value if type(value) is int else max(least, 1)

    def count(self, key: str, *, least: int = 1) -> int:
        """Return a number of things of which each has parts of a recipe: heads, experts."""
        return self.integer(key, least=least, most=COUNT_MOST)

    def layers(self, key: str) -> int:
        """Return a number of layers, each of which has tensors on disk."""
        return self.integer(key, most=min(COUNT_MOST, len(self.names) or COUNT_MOST))

    def number(self, key: str, *, above: int | None = None) -> float:
        """Return a number."""
        value = self.get(key)
        is_one = type(value) in {int, float} and math.isfinite(value) and (above is None or value > above)
        value = self._checked(key, is_one, "a number" if above is None else f"a number above {above}")
        return float(value) if type(value) in {int, float} else 1.0

    def flag(self, key: str) -> bool:
        """Return a boolean."""
        return bool(self._checked(key, type(self.get(key)) is bool, "true or false"))

    def integers(self, key: str) -> list[int]:
        """Return a list of integers."""
        return self._list(key, int, "integers")

    def names_in(self, key: str) -> list[str]:
        """Return a list of names."""
        return self._list(key, str, "names")

    def _list(self, key: str, kind: type, of: str) -> list[Any]:
        value: Any = [] if self.get(key) is None else self.get(key)
        is_one = type(value) in {list, tuple} and all(type(item) is kind for item in value)
        return list(value) if is_one else list(self._checked(key, is_one, f"a list of {of}") or ())

    def activation(self, key: str) -> str:
        """Return our name of an activation."""
        name = str(self.get(key))
        if name not in ACTIVATIONS:
            message = f"is '{name}', an activation that there is none of here."
            self.problem(key, message, nearest(name, tuple(ACTIVATIONS)))
        return ACTIVATIONS.get(name, "gelu")

    def expect_zero(self, *keys: str) -> None:
        """Note which probabilities of dropping something in training are not zero."""
        for key in keys:
            if self.get(key):
                message = f"is {json.dumps(self.get(key))}; what a module drops is an option of the job."
                self.problem(key, message, "Write 0.0 there, and set the module's option dropout.")

    def problem(self, key: str, message: str, remedy: str) -> None:
        """Note what is wrong with a key, or with the table where it is empty, once."""
        found = Problem(f"config.json: {'.'.join(filter(None, (*self.path, key)))}", message, remedy)
        if found not in self.problems:
            self.problems.append(found)

    def expect_divisor(self, key: str, divisor: int, of: str, value: int) -> None:
        """Note that a key is no divisor of another value, unless one of them stands in for a wrong one."""
        if value % divisor and not self.problems:
            self.problem(key, f"is {divisor}, no divisor of {of} {value}.", "Check the file.")

    def _checked(self, key: str, is_right: bool, expected: str) -> Any:
        if is_right:
            return self.get(key)
        self.problem(key, f"is {json.dumps(self.get(key))}; expected {expected}.", "Check the file.")
        return self.defaults.get(key)

    def within(self, key: str, *, defaults: Mapping[str, Any], at: str = "") -> "Config":
        """Return a table within."""
        values: Any = self.get(key) or {}
        if not isinstance(values, Mapping):
            self.problem(key, f"is {json.dumps(values)}; expected a table.", "Check the file.")
            values = {}
        return attrs.evolve(self, values=values, defaults=defaults, path=(*self.path, key), at=at)

    def part(
        self,
        key: str,
        *,
        role: str,
        otherwise: str,
        at: str,
        instead: Mapping[str, Any] | None = None,
        unknown: "Callable[[Config], PublishedModule | None]" = lambda _: None,
    ) -> PublishedModule:
        """Return the module that a table within describes.

        Args:
            key: of the table.
            role: what it must be, such as `language`.
            otherwise: the model type that transformers takes where the table says none.
            at: what the names of its tensors on disk begin with.
            instead: values that stand in place of the table's.
            unknown: what reads a table whose type no family here has, if the table says enough.

        Raises PlanError, with what was wrong before, where no family here has that type and that role.
        """
        table = self.within(key, defaults={"model_type": otherwise}, at=at)
        kind, known = table.get("model_type"), [name for name, f in self.families.items() if f.role == role]
        if kind not in known:
            if (found := unknown(table)) is not None:
                return found
            message = f"is '{kind}', no architecture that is known for {role}."
            table.problem("model_type", message, nearest(str(kind), known))
            raise PlanError(self.problems)
        family = self.families[kind]
        values = {**table.values, **(instead or {})}
        module = family.read(attrs.evolve(table, values=values, defaults=family.defaults))
        assert isinstance(module, PublishedModule)
        return module

    def prefix(self, tensor: str, otherwise: str = "") -> str:
        """Return what the names on disk begin with, by one tensor that is there once.

        transformers has changed it over time (`visual.`, `model.visual.`); what follows has stayed.
        """
        found = [name.removesuffix(tensor) for name in self.names if f".{name}".endswith(f".{tensor}")]
        return found[0] if len(found) == 1 else self.at + otherwise
