"""Rotary positions: what a config file says of them, old and new, as options of a model.

Until version 4 transformers wrote `rope_theta` and `rope_scaling`, since then `rope_parameters` with both.

>>> old = Config({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}, defaults={})
>>> new = Config({"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}}, defaults={})
>>> rotary(old) == rotary(new)
True
>>> rotary(new)
{'rotary_base': 500000.0, 'rotary_scaling': {'type': 'linear', 'factor': 2.0}}
"""

from collections.abc import Mapping
from typing import Any

from mimogrid.core.base.errors import PlanError, nearest
from mimogrid.core.models.config import Config
from mimogrid.core.models.frequencies import parse_scaling


THETA = 10_000.0
SCALINGS: Mapping[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
"""The scalings that there are, and what each needs."""
MORE: Mapping[str, tuple[str, ...]] = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
}
"""What a scaling may have besides."""


def rotary(
    config: Config, *, theta: float = THETA, plain: tuple[str, ...] = ("default",), max_positions: int = 0
) -> dict[str, Any]:
    """Return the options `rotary_base` and `rotary_scaling`.

    Args:
        config: the table that says them.
        theta: what transformers takes for the base where the file says none.
        plain: types that scale nothing.
        max_positions: the positions of the model, which scalings take for those of old where the file says none.
    """
    top = {"rope_theta": theta, "original_max_position_embeddings": max_positions or None} | {
        key: config.values[key] for key in ("rope_theta", "partial_rotary_factor") if key in config.values
    }
    table = _table(config, top)
    kind = table.get("rope_type") or table.get("type") or "default"
    options: dict[str, Any] = {"rotary_base": table.number("rope_theta", above=1)}
    if any(isinstance(value, Mapping) for value in table.values.values()):
        table.problem(
            "", "is different in different layers, which no model here has.", "Use another checkpoint."
        )
    elif kind not in (*plain, *SCALINGS):
        known = nearest(str(kind), (*plain, *SCALINGS))
        table.problem("", f"is of the type '{kind}', a scaling that there is none of here.", known)
    elif table.get("partial_rotary_factor") not in (None, 1):
        table.problem(
            "", "turns a part of each head only, which no model here does.", "Use another checkpoint."
        )
    elif kind in SCALINGS:
        lacking = [name for name in SCALINGS[kind] if table.get(name) is None]
        if lacking:
            table.problem(
                "", f"is of the type '{kind}' and lacks {', '.join(lacking)}.", "Add it to the file."
            )
        wanted = (*SCALINGS[kind], *MORE.get(kind, ()))
        said = {key: table.get(key) for key in wanted if table.get(key) is not None}
        options["rotary_scaling"] = {"type": kind, **said}
        _check_scaling(table, options["rotary_scaling"], complete=not lacking)
    return options


def _check_scaling(table: Config, scaling: Mapping[str, Any], *, complete: bool) -> None:
    """Note which numbers of a scaling are none."""
    try:
        if complete:
            parse_scaling("", scaling)
    except PlanError as error:
        for problem in error.problems:
            table.problem(problem.where.removeprefix("."), f"{problem.message}.", problem.remedy)


def sections(config: Config, width: int, *, otherwise: list[int]) -> list[int]:
    """Return how many of the angles of a head follow time, height and width; together they are half a head."""
    table = _table(config, {"mrope_section": otherwise})
    found = table.integers("mrope_section")
    if sum(found) != width // 2:
        message = f"has sections of {found} angles; a head of width {width} has {width // 2}."
        table.problem("", message, "Make mrope_section add up to half the width of a head.")
    return found


def _table(config: Config, defaults: Mapping[str, Any]) -> Config:
    """Return the table of rotary positions, old or new."""
    key = "rope_scaling" if config.values.get("rope_scaling") else "rope_parameters"
    return config.within(key, defaults=defaults)
