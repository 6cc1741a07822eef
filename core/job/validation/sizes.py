"""Sizes of one module, which are divisors elsewhere and must be positive and not absurd."""

from collections.abc import Iterator, Mapping

from mimogrid.core.base.errors import Problem
from mimogrid.core.job.models import BuiltIn
from mimogrid.core.job.placement import AXES, size_of, stages_of
from mimogrid.core.job.spec import GridSpec, JobSpec, ModuleSpec
from mimogrid.core.job.validation.checks import above_zero, at_least, at_most, finite


RANKS_MOST, LAYERS_MOST, EXPERTS_MOST, WIDTH_MOST = 100_000, 10_000, 10_000, 10_000_000
TABLES_MOST, PARTS_MOST = 100_000, 1_000_000
"""Larger numbers are taken for typing errors; it would take too long to enumerate them."""


def total_problems(spec: JobSpec) -> Iterator[Problem]:
    """Check how many layers, experts and stages all modules have together."""
    layers = parts = 0
    for module in spec.modules.values():
        if not isinstance(module.options, Mapping):
            layers += module.options.layers * max(module.options.experts, 1)
            parts += module.options.layers * stages_of(module)
    if layers > TABLES_MOST:
        fact = f"have {layers:,} layers, or experts in layers."
        yield Problem("modules", fact, f"Use at most {TABLES_MOST:,} in all.")
    if parts > PARTS_MOST:
        fact = f"have {parts:,} layers times stages."
        yield Problem("modules", fact, f"Use at most {PARTS_MOST:,} in all: fewer pipeline stages.")


def size_problems(name: str, module: ModuleSpec) -> Iterator[Problem]:
    """Check the sizes of a module."""
    where = f"modules.{name}"
    yield from _grid_sizes(f"{where}.grid", module.grid)
    for key in ("microbatches", "chunks", "width"):
        if getattr(module, key) is not None:
            yield from at_least(f"{where}.{key}", getattr(module, key), 1)
            yield from at_most(f"{where}.{key}", getattr(module, key), WIDTH_MOST)
    if not isinstance(module.options, Mapping):
        yield from _model_sizes(f"{where}.options", module.options)


def _grid_sizes(where: str, grid: GridSpec) -> Iterator[Problem]:
    wrong = [
        problem
        for axis in (*AXES, "ep", "expert_tp")
        for problem in at_least(f"{where}.{axis}", getattr(grid, axis), 1)
    ]
    yield from wrong
    if not wrong and size_of(grid) > RANKS_MOST:
        shape = "*".join(f"{axis}={getattr(grid, axis)}" for axis in AXES)
        yield Problem(where, f"{shape} is {size_of(grid):,} ranks.", f"Use at most {RANKS_MOST:,}.")
    if grid.offset is not None:
        yield from at_least(f"{where}.offset", grid.offset, 0, "Ranks count from 0.")
        yield from at_most(f"{where}.offset", grid.offset, RANKS_MOST)
    if sorted(grid.order) != sorted(AXES):
        yield Problem(
            f"{where}.order",
            f"is {list(grid.order)}.",
            f"Name each of {', '.join(AXES)} once, fastest first.",
        )


_SIZES = ("layers", "hidden", "heads", "kv_heads", "head_width", "ffn")


def _model_sizes(where: str, model: BuiltIn) -> Iterator[Problem]:
    # A default that follows from another size is wrong only if that one is, which is reported there.
    defaults = {"kv_heads": model.heads, "ffn": 4 * model.hidden, "outputs": model.hidden}
    defaults |= {"head_width": model.hidden // (model.heads or 1), "expert_ffn": model.ffn}
    for key in (*_SIZES, "expert_ffn", "top_k", "vocab", "outputs", "features", "merge", "pool"):
        value = getattr(model, key, None)
        if value is not None and value != defaults.get(key):
            yield from at_least(f"{where}.{key}", value, 1)
            yield from at_most(f"{where}.{key}", value, WIDTH_MOST)
    yield from at_most(f"{where}.layers", model.layers, LAYERS_MOST)
    yield from at_least(f"{where}.experts", model.experts, 0, "0: a dense model.")
    yield from at_most(f"{where}.experts", model.experts, EXPERTS_MOST)
    yield from at_least(f"{where}.vocab_padding", getattr(model, "vocab_padding", 0), 0)
    for key in ("position_count", "deepstack"):
        yield from at_least(f"{where}.{key}", getattr(model, key, 0), 0, "0: there are none.")
        yield from at_most(f"{where}.{key}", getattr(model, key, 0), WIDTH_MOST)
    for key in ("full_layers", "dense_layers", "deepstack_layers"):
        if len(getattr(model, key, ())) > max(model.layers, 0):
            count = len(getattr(model, key))
            yield Problem(f"{where}.{key}", f"lists {count:,} of {model.layers} layers.", "Name each once.")
    yield from at_least(f"{where}.window", model.window, 0, "0: a token sees all before it.")
    yield from finite(f"{where}.aux_loss", model.aux_loss)
    for key in ("init_std", "norm_eps", "rotary_base"):
        yield from above_zero(f"{where}.{key}", getattr(model, key))
    if not 0 <= model.dropout < 1:
        yield Problem(f"{where}.dropout", f"is {model.dropout}.", "Use 0 <= dropout < 1.")
