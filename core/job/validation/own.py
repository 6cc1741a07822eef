"""Custom modules, about which the plan knows only their width."""

from collections.abc import Iterator, Mapping

from mimogrid.core.base.errors import Problem
from mimogrid.core.job.spec import JobSpec
from mimogrid.core.job.validation.checks import at_least
from mimogrid.core.models.segments import ONE_EACH, Emission


def own_problems(spec: JobSpec) -> Iterator[Problem]:
    """Check that custom modules are not split and declare a width if one is needed; built-in modules do not."""
    for name, module in spec.modules.items():
        where = f"modules.{name}"
        if not isinstance(module.options, Mapping):
            if module.width is not None:
                fact = f"module '{name}' is a built-in {module.model}, which emits rows of its hidden size."
                yield Problem(f"{where}.width", fact, "Leave width out.")
            if module.rows_out != ONE_EACH:
                fact = f"module '{name}' is a built-in {module.model}, whose options say what it emits."
                yield Problem(f"{where}.rows_out", fact, "Leave rows_out out.")
            continue
        yield from _emission(f"{where}.rows_out", module.rows_out)
        for axis in ("tp", "cp", "ep", "expert_tp", "pp"):
            if getattr(module.grid, axis) != 1:
                yield Problem(
                    f"{where}.grid.{axis}",
                    f"module '{name}' is your own: the plan cannot cut it over {axis}="
                    f"{getattr(module.grid, axis)}.",
                    f"Use {axis} = 1; dp may be anything.",
                )
        if module.width is None and any(
            target in spec.modules and isinstance(spec.modules[target].options, Mapping)
            for target in module.feeds
        ):
            yield Problem(
                f"{where}.width",
                f"module '{name}' feeds another module of your own, and its output width is not known.",
                "Set width to the width of the rows that it emits.",
            )


def _emission(where: str, emission: Emission) -> Iterator[Problem]:
    """Check that the counts of an emission are positive; rows may be dropped."""
    for key, least in (("stride", 1), ("merge", 1), ("pool", 1), ("count", 0)):
        yield from at_least(f"{where}.{key}", getattr(emission, key), least)
