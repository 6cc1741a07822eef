"""Legality: every reason why a job cannot run, found before anything starts.

Each function looks at one aspect and yields the problems that it finds, with the numbers, the reason and the
legal values. A later aspect is asked only where the earlier ones left something to ask about.
"""

import math
import re
from collections.abc import Iterator, Mapping

from mimogrid.core.errors import Problem, nearest
from mimogrid.core.graph import Graph, find_cycle
from mimogrid.core.layout import AXES, graph_of, has_loss, matches_any, model_of, place
from mimogrid.core.models import Gpt, Own, Regressor, Transformer, Vit, projector
from mimogrid.core.spec import JobSpec, ModuleSpec, SourceFacts


PRECISIONS = ("fp64", "fp32", "bf16", "fp16")
SCHEDULES = ("gpipe", "1f1b")
OPTIMIZERS = ("adamw",)
DECAYS = ("constant", "cosine", "linear")
_MODULE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")


def problems_of(spec: JobSpec, source: SourceFacts) -> tuple[Problem, ...]:
    """Return every problem of a job; none means that it is legal."""
    found = [*_job(spec), *_wiring(spec)]
    sizes = [p for name, module in spec.modules.items() for p in _sizes(name, module)]
    if not sizes:
        for name, module in spec.modules.items():
            found += [*_cut(name, module), *_sharding(name, module), *_lanes(name, module, spec)]
        found += _world(spec)
    found += sizes
    if not sizes and not _wiring_is_broken(spec):
        found += [*_data(spec, source), *_freezing(spec, source), *_own(spec)]
    return tuple(found)


def _wiring_is_broken(spec: JobSpec) -> bool:
    return any(True for _ in _wiring(spec))


# -- the job as a whole ------------------------------------------------------------------------------------


def _job(spec: JobSpec) -> Iterator[Problem]:
    yield from _one_of("precision", spec.precision, PRECISIONS)
    yield from _one_of("schedule.name", spec.schedule.name, SCHEDULES)
    yield from _one_of("optimizer.name", spec.optimizer.name, OPTIMIZERS)
    yield from _one_of("optimizer.decay", spec.optimizer.decay, DECAYS)
    optimizer, train = spec.optimizer, spec.train
    yield from _at_least("optimizer.lr", optimizer.lr, 0)
    yield from _at_least("optimizer.clip_norm", optimizer.clip_norm, 0, "0 turns clipping off.")
    yield from _at_least("optimizer.warmup_steps", optimizer.warmup_steps, 0)
    yield from _at_least("train.steps", train.steps, 0)
    yield from _at_least("train.checkpoint_every", train.checkpoint_every, 0, "0: only at the end.")
    yield from _at_least("train.threads", train.threads, 1)
    if not train.timeout_s > 0:
        yield Problem("train.timeout_s", f"is {train.timeout_s}.", "Use a number of seconds above 0.")
    if not spec.modules:
        yield Problem("modules", "the job has no module.", "Add a table [modules.NAME].")
    yield from _batch(spec)


def _batch(spec: JobSpec) -> Iterator[Problem]:
    size, count = spec.batch.global_size, spec.batch.microbatches
    wrong = [*_at_least("batch.global_size", size, 1), *_at_least("batch.microbatches", count, 1)]
    yield from wrong
    if not wrong and size % count:
        yield Problem(
            "batch.microbatches",
            f"{size} samples of a step do not divide into {count} microbatches.",
            f"Legal counts for {size} samples: {_divisors(size)}.",
        )


# -- the module graph --------------------------------------------------------------------------------------


def _wiring(spec: JobSpec) -> Iterator[Problem]:
    names = tuple(spec.modules)
    for name, module in spec.modules.items():
        if not _MODULE_NAME.fullmatch(name):
            yield Problem(
                f"modules.{name}",
                f"'{name}' cannot name a module.",
                "Use letters, digits, '_' and '-', beginning with a letter.",
            )
        for target in module.feeds:
            if target not in spec.modules:
                yield Problem(
                    f"modules.{name}.feeds",
                    f"module '{name}' feeds '{target}', and no module is called so.",
                    nearest(target, [n for n in names if n != name]),
                )
            elif isinstance(spec.modules[target].options, Vit):
                yield Problem(
                    f"modules.{name}.feeds",
                    f"module '{name}' feeds '{target}', a vit, which reads patch rows from the data only.",
                    f"Use a block in place of '{target}', or take it out of feeds.",
                )
        if len(set(module.feeds)) < len(module.feeds):
            twice = next(t for t in module.feeds if module.feeds.count(t) > 1)
            yield Problem(
                f"modules.{name}.feeds",
                f"module '{name}' feeds '{twice}' {module.feeds.count(twice)} times.",
                "Name each target once.",
            )
        if not module.feeds and not has_loss(module):
            yield Problem(
                f"modules.{name}",
                f"module '{name}' feeds nobody and has no loss: its output would be used by nothing.",
                f"Give it feeds = [...], one of: {', '.join(n for n in names if n != name) or 'none'}.",
            )
    cycle = find_cycle({n: tuple(t for t in m.feeds if t in names) for n, m in spec.modules.items()})
    if cycle:
        yield Problem(
            f"modules.{cycle[0]}.feeds",
            f"the modules feed each other in a cycle: {' -> '.join(cycle)}.",
            "Take one of these edges out.",
        )


# -- one module --------------------------------------------------------------------------------------------


def _sizes(name: str, module: ModuleSpec) -> Iterator[Problem]:
    """Sizes that must be positive before anything can be divided by them."""
    where = f"modules.{name}"
    for axis in (*AXES, "ep", "expert_tp"):
        yield from _at_least(f"{where}.grid.{axis}", getattr(module.grid, axis), 1)
    if module.grid.offset is not None:
        yield from _at_least(f"{where}.grid.offset", module.grid.offset, 0, "Ranks count from 0.")
    if sorted(module.grid.order) != sorted(AXES):
        yield Problem(
            f"{where}.grid.order",
            f"is {list(module.grid.order)}.",
            f"Name each of {', '.join(AXES)} once, fastest first.",
        )
    if module.microbatches is not None:
        yield from _at_least(f"{where}.microbatches", module.microbatches, 1)
    yield from _at_least(f"{where}.chunks", module.chunks, 1)
    if module.width is not None:
        yield from _at_least(f"{where}.width", module.width, 1)
    if not math.isfinite(module.loss_weight):
        yield Problem(f"{where}.loss_weight", f"is {module.loss_weight}.", "Use a finite number.")
    model = module.options
    if not isinstance(model, Mapping):
        counts = ["layers", "hidden", "heads", "kv_heads", "ffn"]
        counts += [key for key in ("vocab", "outputs", "features") if getattr(model, key, None) is not None]
        for key in counts:
            yield from _at_least(f"{where}.options.{key}", getattr(model, key), 1)
        yield from _at_least(f"{where}.options.experts", model.experts, 0, "0: a dense model.")
        if not 0 <= model.dropout < 1:
            yield Problem(f"{where}.options.dropout", f"is {model.dropout}.", "Use 0 <= dropout < 1.")


def _cut(name: str, module: ModuleSpec) -> Iterator[Problem]:
    """How layers are cut into stages, and heads out of the hidden size."""
    model, where = module.options, f"modules.{name}"
    if isinstance(model, Mapping):
        return
    pp, layers = module.grid.pp, model.layers
    if module.split is not None:
        if len(module.split) != pp or sum(module.split) != layers or min(module.split) < 1:
            yield Problem(
                f"{where}.split",
                f"split = {list(module.split)} is not {layers} layers over pp={pp} stages.",
                f"Give {pp} positive numbers whose sum is {layers}.",
            )
    elif layers % pp:
        yield Problem(
            f"{where}.grid.pp",
            f"module '{name}' splits {layers} layers over pp={pp}: {layers} is not a multiple of {pp}.",
            f"Legal pp for {layers} layers: {_divisors(layers)}; or say split = [...] with {pp} numbers.",
        )
    if model.hidden % model.heads:
        yield Problem(
            f"{where}.options.heads",
            f"module '{name}' splits hidden={model.hidden} over {model.heads} heads: "
            f"{model.hidden} is not a multiple of {model.heads}.",
            f"Legal heads: {_divisors(model.hidden)}.",
        )
    elif model.head_width % 2:
        yield Problem(
            f"{where}.options.heads",
            f"module '{name}' has heads of width {model.head_width}; "
            "rotary embeddings need an even width.",
            f"Use a number of heads that gives an even width, such as {_even_heads(model)}.",
        )
    if model.heads % model.kv_heads:
        yield Problem(
            f"{where}.options.kv_heads",
            f"module '{name}' shares {model.kv_heads} key-value heads among {model.heads} heads.",
            f"Legal kv_heads: {_divisors(model.heads)}.",
        )


def _sharding(name: str, module: ModuleSpec) -> Iterator[Problem]:
    """What tensor parallelism shards must divide by tp."""
    model, tp, where = module.options, module.grid.tp, f"modules.{name}.grid.tp"
    if isinstance(model, Mapping):
        return
    shards = {"attention heads": model.heads, "key-value heads": model.kv_heads, "ffn features": model.ffn}
    if isinstance(model, Gpt):
        shards["vocabulary entries"] = model.vocab
    common = math.gcd(*shards.values())
    for what, count in shards.items():
        if count % tp:
            yield Problem(
                where,
                f"module '{name}' splits {count} {what} over tp={tp}: {count} is not a multiple of {tp}.",
                f"Legal tp for this module: {_divisors(common)}.",
            )


def _lanes(name: str, module: ModuleSpec, spec: JobSpec) -> Iterator[Problem]:
    """Every data lane has a sample in every microbatch."""
    size, dp = spec.batch.global_size, module.grid.dp
    count = module.microbatches or spec.batch.microbatches
    if size < 1 or count < 1 or spec.batch.microbatches < 1:
        return
    if size % count:
        if module.microbatches:
            yield Problem(
                f"modules.{name}.microbatches",
                f"{size} samples of a step do not divide into {count} microbatches of module '{name}'.",
                f"Legal counts for {size} samples: {_divisors(size)}.",
            )
        return
    large, small = max(count, spec.batch.microbatches), min(count, spec.batch.microbatches)
    if large % small:
        yield Problem(
            f"modules.{name}.microbatches",
            f"module '{name}' makes {count} microbatches of a step, the job {spec.batch.microbatches}: "
            "their ratio is not an integer.",
            f"Use a divisor or a multiple of {spec.batch.microbatches}.",
        )
    if size // count < dp:
        yield Problem(
            f"modules.{name}.grid.dp",
            f"a microbatch of module '{name}' has {size // count} samples ({size} / {count}) "
            f"for dp={dp} data lanes: {dp - size // count} lanes would have none.",
            f"Use dp <= {size // count}, at most {size // dp} microbatches, or "
            f"batch.global_size >= {dp * count}.",
        )


def _world(spec: JobSpec) -> Iterator[Problem]:
    if spec.world_size is None:
        return
    yield from _at_least("world_size", spec.world_size, 1)
    for name, grid in place(spec).items():
        if grid.offset + grid.size > spec.world_size:
            shape = "*".join(f"{axis.name}={axis.size}" for axis in grid.axes)
            yield Problem(
                f"modules.{name}.grid",
                f"module '{name}' needs ranks {grid.offset}..{grid.offset + grid.size - 1} "
                f"({shape} at offset {grid.offset}), the world has {spec.world_size} "
                f"(0..{spec.world_size - 1}).",
                f"Set world_size = {grid.offset + grid.size} or more, or make the grid smaller.",
            )


# -- data, freezing, own modules ---------------------------------------------------------------------------


def _data(spec: JobSpec, source: SourceFacts) -> Iterator[Problem]:
    graph = graph_of(spec)
    for name in graph.sources:
        yield from _features(name, spec.modules[name], source)
    if not source.targets:
        for name, module in spec.modules.items():
            if isinstance(module.options, Regressor):
                yield Problem(
                    "data.source",
                    f"'{spec.data.source}' has no targets for the regressor '{name}'.",
                    "Use source = 'synthetic' or a source of your own.",
                )
    for name in graph.texts:
        yield from _text(name, spec.modules[name], graph, source)


def _features(name: str, module: ModuleSpec, source: SourceFacts) -> Iterator[Problem]:
    given, model, where = source.features.get(name), module.options, f"modules.{name}.options"
    if isinstance(model, Vit):
        if given is None and model.features is None:
            yield Problem(
                f"{where}.features",
                f"the source does not say how wide the patch rows of module '{name}' are.",
                "Set features to their width.",
            )
        elif None not in (given, model.features) and given != model.features:
            yield Problem(
                f"{where}.features",
                f"module '{name}' reads rows of width {model.features}, the source gives {given}.",
                f"Set features = {given} or leave it out.",
            )
    elif isinstance(model, Transformer) and given not in (None, model.hidden):
        yield Problem(
            f"{where}.hidden",
            f"module '{name}' reads rows of width {model.hidden}, the source gives {given}.",
            f"Set hidden = {given}, or use a vit, which embeds rows of any width.",
        )


def _text(name: str, module: ModuleSpec, graph: Graph, source: SourceFacts) -> Iterator[Problem]:
    model = module.options
    assert isinstance(model, Gpt)
    if source.vocab is not None and model.vocab < source.vocab:
        yield Problem(
            f"modules.{name}.options.vocab",
            f"module '{name}' knows {model.vocab} tokens, the source uses {source.vocab}.",
            f"Set vocab = {source.vocab} or more.",
        )
    if source.sequence is None or source.length is None:
        return
    rows = sum(source.rows.get(origin, 0) for origin in graph.rows_into(name))
    if rows + source.length > source.sequence:
        yield Problem(
            "data.options.sequence",
            f"a sample of module '{name}' can have {rows} rows and {source.length} text tokens, "
            f"more than sequence = {source.sequence} holds.",
            f"Set sequence = {rows + source.length} or more, or give fewer rows.",
        )


def _freezing(spec: JobSpec, source: SourceFacts) -> Iterator[Problem]:
    for name, module in spec.modules.items():
        where = f"modules.{name}"
        if module.trainable is not None and module.frozen is not False:
            yield Problem(
                where,
                f"module '{name}' says both trainable and frozen.",
                "trainable freezes the rest, frozen trains the rest: keep one of them.",
            )
            continue
        model = model_of(name, spec, source)
        key, patterns = "trainable", module.trainable or ()
        if isinstance(module.frozen, tuple):
            key, patterns = "frozen", module.frozen
        if isinstance(model, Own) or (isinstance(model, Vit) and model.features is None):
            continue
        projectors = [
            p.name for target in module.feeds for p in projector(target, model.hidden, model.hidden)
        ]
        names = [*(p.name for p in model.parameters()), *projectors]
        for pattern in patterns:
            if not any(matches_any(n, (pattern,)) for n in names):
                yield Problem(
                    f"{where}.{key}",
                    f"the pattern '{pattern}' matches no parameter of module '{name}'.",
                    nearest(pattern, names),
                )


def _own(spec: JobSpec) -> Iterator[Problem]:
    for name, module in spec.modules.items():
        if not isinstance(module.options, Mapping):
            continue
        where = f"modules.{name}"
        for axis in ("tp", "cp", "ep", "pp"):
            if getattr(module.grid, axis) != 1:
                yield Problem(
                    f"{where}.grid.{axis}",
                    f"module '{name}' is your own: the plan cannot cut it over {axis}="
                    f"{getattr(module.grid, axis)}.",
                    f"Use {axis} = 1; dp may be anything.",
                )
        if module.width is None and any(
            isinstance(spec.modules[target].options, Mapping) for target in module.feeds
        ):
            yield Problem(
                f"{where}.width",
                f"module '{name}' feeds another module of your own, and its output width is not known.",
                "Set width to the width of the rows that it emits.",
            )


# -- small talk --------------------------------------------------------------------------------------------


def _one_of(where: str, value: str, known: tuple[str, ...]) -> Iterator[Problem]:
    if value not in known:
        yield Problem(where, f"'{value}' is not known.", nearest(value, known))


def _at_least(where: str, value: float, least: int, remedy: str = "") -> Iterator[Problem]:
    if not value >= least:
        yield Problem(where, f"is {value}.", remedy or f"Use {least} or more.")


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)


def _even_heads(model: Transformer) -> str:
    even = [h for h in range(1, model.hidden + 1) if model.hidden % (2 * h) == 0]
    return ", ".join(map(str, even)) or "none (hidden is odd)"

