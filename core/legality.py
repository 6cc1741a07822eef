"""Legality: every reason why a job cannot run, found before anything starts.

Each function looks at one aspect and yields the problems that it finds, with the numbers, the reason and the
legal values. A later aspect is asked only where the earlier ones left something to ask about.
"""

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import cast

import attrs

from mimogrid.core.engines import ENGINES, FORMATS, engine_problems
from mimogrid.core.errors import Problem, nearest
from mimogrid.core.graph import Graph, find_cycle
from mimogrid.core.layout import (
    AXES,
    edge_shape,
    graph_of,
    has_loss,
    matches_any,
    model_of,
    place,
    size_of,
    stages_of,
)
from mimogrid.core.models import BuiltIn, Gpt, Regressor, Transformer, Vit, projector
from mimogrid.core.optimizers import KINDS, REFUSED, kind_of, matches
from mimogrid.core.samples import Sample
from mimogrid.core.spec import (
    GridSpec,
    GroupSpec,
    JobSpec,
    LossScaleSpec,
    ModuleSpec,
    OptimizerSpec,
    SourceFacts,
    TrainSpec,
)


PRECISIONS = ("fp64", "fp32", "bf16", "fp16")
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "auto")
DECAYS = ("constant", "cosine", "linear", "wsd")
RECOMPUTES = ("none", "selective", "full")
RANKS_MOST, LAYERS_MOST, EXPERTS_MOST = 1_000_000, 10_000, 10_000
SAMPLES_MOST, WIDTH_MOST = 10_000_000, 10_000_000
"""Beyond these a number is a slip of the hand, and enumerating it would take all day."""
TENSORS = frozenset(
    "rows tokens labels loss_weights targets lengths loss logits prediction".split()  # noqa: SIM905
)
"""What the inputs and outputs of a module hold besides the rows of other modules, which go by their names."""
_MODULE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")


def problems_of(spec: JobSpec, source: SourceFacts | None) -> tuple[Problem, ...]:
    """Return every problem of a job; none means that it is legal.

    `source` is None where the source itself is wrong: then nothing is said of how data and modules fit.
    """
    found, wiring = list(_job(spec)), list(_wiring(spec))
    found += wiring
    whole = True
    for name, module in spec.modules.items():
        sizes = list(_sizes(name, module))
        found += [*sizes, *_one_of(f"modules.{name}.recompute", module.recompute, RECOMPUTES)]
        found += _one_of(f"modules.{name}.engine", module.engine, ENGINES)
        found += _one_of(f"modules.{name}.fp8", module.fp8, FORMATS)
        found += engine_problems(name, spec)
        whole = whole and not sizes
        if not sizes:
            found += [*_cut(name, module), *_sharding(name, module), *_experts(name, module)]
            found += [*_lanes(name, module, spec), *_loss(name, module)]
    if whole:
        found += [*_world(spec), *_freezing(spec, source or SourceFacts()), *_own(spec)]
        found += _groups(spec, source or SourceFacts())
    if whole and not wiring and source is not None:
        found += [*_data(spec, source), *_sequence(spec, source)]
    return tuple(found)


def parity_problems(spec: JobSpec) -> tuple[Problem, ...]:
    """Return why a job cannot be compared with the same model on one process, legal as it may be."""
    return tuple(
        Problem(
            f"modules.{name}.options.dropout",
            f"is {module.options.dropout}: every layout draws masks of its own, so there is no one process to "
            f"compare module '{name}' with.",
            f"Compare without it: --set modules.{name}.options.dropout=0.",
        )
        for name, module in spec.modules.items()
        if not isinstance(module.options, Mapping) and module.options.dropout
    )


# -- the job as a whole ------------------------------------------------------------------------------------


def _job(spec: JobSpec) -> Iterator[Problem]:
    yield from _one_of("precision", spec.precision, PRECISIONS)
    yield from _at_least("seed", spec.seed, 0)
    yield from _one_of("schedule.name", spec.schedule.name, SCHEDULES)
    if spec.schedule.memory_gb is not None:
        yield from _above_zero("schedule.memory_gb", spec.schedule.memory_gb)
    yield from _optimizer(spec.optimizer)
    yield from _train(spec.train)
    if not spec.modules:
        yield Problem("modules", "the job has no module.", "Add a table [modules.NAME].")
    yield from _batch(spec)


def _optimizer(optimizer: OptimizerSpec) -> Iterator[Problem]:
    yield from _kind(optimizer)
    yield from _one_of("optimizer.decay", optimizer.decay, DECAYS)
    yield from _above_zero("optimizer.lr", optimizer.lr)
    if optimizer.eps is not None:
        yield from _above_zero("optimizer.eps", optimizer.eps)
    yield from _above_zero("optimizer.bucket_mb", optimizer.bucket_mb)
    yield from _finite("optimizer.clip_norm", optimizer.clip_norm, "0 turns clipping off.")
    yield from _finite("optimizer.weight_decay", optimizer.weight_decay)
    yield from _at_least("optimizer.warmup_steps", optimizer.warmup_steps, 0)
    for key in ("final_lr_fraction", "decay_fraction"):
        if not 0 <= getattr(optimizer, key) <= 1:
            yield Problem(f"optimizer.{key}", f"is {getattr(optimizer, key)}.", "Use a number from 0 to 1.")
    if not all(0 <= beta < 1 for beta in optimizer.betas or ()):
        yield Problem(
            "optimizer.betas",
            f"is {list(optimizer.betas or ())}: each is how much of a running mean is kept.",
            "Use numbers from 0 to below 1, such as [0.9, 0.95].",
        )
    yield from _loss_scale(optimizer.loss_scale)
    where, skip = "optimizer.skip_above", optimizer.skip_above
    yield from _at_least(f"{where}.window", skip.window, 1)
    for key in ("norm", "loss"):
        if getattr(skip, key) and not 1 < getattr(skip, key) < math.inf:
            yield Problem(f"{where}.{key}", f"is {getattr(skip, key)}.", "Use a number above 1; 0: no limit.")


def _kind(optimizer: OptimizerSpec) -> Iterator[Problem]:
    """The optimizer's class, and whether it takes what the job gives it."""
    where, name = "optimizer.name", optimizer.name.lower()
    if name in REFUSED:
        yield Problem(where, f"'{optimizer.name}' {REFUSED[name]}.", f"Use one of {', '.join(KINDS)}.")
    elif name not in KINDS:
        yield Problem(where, f"'{optimizer.name}' is not known.", nearest(name, tuple(KINDS)))
    if name not in KINDS:
        return
    kind = kind_of(optimizer)
    untaken = {
        "betas": kind.betas is None and optimizer.betas is not None,
        "eps": kind.eps is None and optimizer.eps is not None,
        "weight_decay": not kind.decays
        and any((optimizer.weight_decay, *(group.weight_decay for group in optimizer.groups))),
    }
    for key in (key for key, wrong in untaken.items() if wrong):
        yield Problem(f"optimizer.{key}", f"{kind.name} takes no {key}.", "Leave it out.")
    for key, value in optimizer.options.items():
        if key not in kind.options:
            known = nearest(key, tuple(kind.options)) if kind.options else "It has none: leave it out."
            yield Problem(f"optimizer.options.{key}", f"{kind.name} has no option '{key}'.", known)
        elif not _is_like(value, kind.options[key]):
            yield Problem(
                f"optimizer.options.{key}",
                f"is {value!r}; {kind.name} takes a value such as {kind.options[key]!r}.",
                "Use a value of that kind.",
            )


def _is_like(value: object, default: object) -> bool:
    if isinstance(default, tuple):
        pair = tuple(cast("Iterable[object]", value)) if isinstance(value, list | tuple) else ()
        return len(pair) == len(cast("tuple[object, ...]", default)) and all(_is_like(v, 0.0) for v in pair)
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    return isinstance(value, int | float) and 0 <= value < math.inf


def _loss_scale(rule: LossScaleSpec) -> Iterator[Problem]:
    where = "optimizer.loss_scale"
    for key in ("initial", "minimum"):
        value = getattr(rule, key)
        if not (0 < value < math.inf and math.frexp(value)[0] == 0.5):  # noqa: PLR2004
            remedy = "Use a power of two, such as 65536: then scaling rounds nothing."
            yield Problem(f"{where}.{key}", f"is {value}, not a power of two.", remedy)
    for key, legal in (("growth", (2.0, 4.0)), ("backoff", (0.5, 0.25))):
        if getattr(rule, key) not in legal:
            remedy = f"Use {legal[0]} or {legal[1]}: then scaling rounds nothing."
            yield Problem(f"{where}.{key}", f"is {getattr(rule, key)}.", remedy)
    yield from _at_least(f"{where}.interval", rule.interval, 1)


def _groups(spec: JobSpec, source: SourceFacts) -> Iterator[Problem]:
    """Every group must mean something; what own models hold is not known before they are built."""
    known = [(module, name) for module in spec.modules for name in _names_of(module, spec, source)]
    own = {name for name, module in spec.modules.items() if isinstance(module.options, Mapping)}
    for i, group in enumerate(spec.optimizer.groups):
        where = f"optimizer.groups[{i}]"
        if group.lr is not None:
            yield from _finite(f"{where}.lr", group.lr, "0 leaves the parameters as they are.")
        if group.weight_decay is not None:
            yield from _finite(f"{where}.weight_decay", group.weight_decay)
        if not group.modules and not group.match:
            yield Problem(where, "matches every parameter.", "Name modules = [...] or match = [...].")
        strangers = [module for module in group.modules if module not in spec.modules]
        for module in strangers:
            remedy = nearest(module, tuple(spec.modules))
            yield Problem(f"{where}.modules", f"no module is called '{module}'.", remedy)
        if strangers or own & set(group.modules or spec.modules):
            continue
        for pattern in group.match:
            alone = GroupSpec(modules=group.modules, match=(pattern,))
            if not any(matches(alone, module, name) for module, name in known):
                names = [f"{m}.{n}" for m, n in known if m in (group.modules or spec.modules)]
                fact = f"the pattern '{pattern}' matches no parameter."
                yield Problem(f"{where}.match", fact, _nearest_parameter(pattern, names))


def _train(train: TrainSpec) -> Iterator[Problem]:
    yield from _at_least("train.steps", train.steps, 0)
    yield from _at_least("train.checkpoint_every", train.checkpoint_every, 0, "0: only at the end.")
    yield from _at_least("train.keep_checkpoints", train.keep_checkpoints, 1)
    yield from _at_least("train.keep_every", train.keep_every, 0, "0: none for ever.")
    yield from _at_least("train.threads", train.threads, 1)
    yield from _above_zero("train.timeout_s", train.timeout_s)
    for step in train.profile.steps:
        if step not in range(train.steps):
            remedy = f"Name steps from 0 on, below train.steps = {train.steps}."
            yield Problem("train.profile.steps", f"has {step}, which is no step of the run.", remedy)
    for rank in train.profile.ranks:
        yield from _at_least("train.profile.ranks", rank, 0)
    for entry in train.skip_steps:
        first, last = (entry, entry) if isinstance(entry, int) else entry
        if not 0 <= first <= last:
            remedy = "Steps count from 0; a range is [first, last], both included."
            yield Problem("train.skip_steps", f"has [{first}, {last}].", remedy)
    if train.run_dir == "":
        yield Problem("train.run_dir", "is empty.", "Name a folder, or leave it out: runs/<job>-<n>.")


def _batch(spec: JobSpec) -> Iterator[Problem]:
    size, count = spec.batch.global_size, spec.batch.microbatches
    wrong = [
        *_at_least("batch.global_size", size, 1),
        *_at_most("batch.global_size", size, SAMPLES_MOST),
        *_at_least("batch.microbatches", count, 1),
    ]
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
                "Use letters, digits, '_' and '-', beginning with a letter or '_'.",
            )
        elif name in TENSORS:
            yield Problem(
                f"modules.{name}",
                f"'{name}' is the name of a tensor that modules exchange beside each other's rows.",
                f"Call it otherwise. Taken: {', '.join(sorted(TENSORS))}.",
            )
        for target in dict.fromkeys(module.feeds):
            yield from _target(name, target, spec)
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


def _target(name: str, target: str, spec: JobSpec) -> Iterator[Problem]:
    where = f"modules.{name}.feeds"
    if target not in spec.modules:
        others = [other for other in spec.modules if other != name]
        yield Problem(
            where,
            f"module '{name}' feeds '{target}', and no module is called so.",
            nearest(target, others) if others else "Take it out: there is no other module.",
        )
    elif isinstance(spec.modules[target].options, Vit):
        yield Problem(
            where,
            f"module '{name}' feeds '{target}', a vit, which reads patch rows from the data only.",
            f"Use a block in place of '{target}', or take it out of feeds.",
        )


# -- one module --------------------------------------------------------------------------------------------


def _sizes(name: str, module: ModuleSpec) -> Iterator[Problem]:
    """Sizes that must be positive before anything can be divided by them."""
    where = f"modules.{name}"
    yield from _grid_sizes(f"{where}.grid", module.grid)
    for key in ("microbatches", "chunks", "width"):
        if getattr(module, key) is not None:
            yield from _at_least(f"{where}.{key}", getattr(module, key), 1)
    if not isinstance(module.options, Mapping):
        yield from _model_sizes(f"{where}.options", module.options)


def _grid_sizes(where: str, grid: GridSpec) -> Iterator[Problem]:
    wrong = [
        problem
        for axis in (*AXES, "ep", "expert_tp")
        for problem in _at_least(f"{where}.{axis}", getattr(grid, axis), 1)
    ]
    yield from wrong
    if not wrong and size_of(grid) > RANKS_MOST:
        shape = "*".join(f"{axis}={getattr(grid, axis)}" for axis in AXES)
        yield Problem(where, f"{shape} is {size_of(grid):,} ranks.", f"Use at most {RANKS_MOST:,}.")
    if grid.offset is not None:
        yield from _at_least(f"{where}.offset", grid.offset, 0, "Ranks count from 0.")
        yield from _at_most(f"{where}.offset", grid.offset, RANKS_MOST)
    if sorted(grid.order) != sorted(AXES):
        yield Problem(
            f"{where}.order",
            f"is {list(grid.order)}.",
            f"Name each of {', '.join(AXES)} once, fastest first.",
        )


def _model_sizes(where: str, model: BuiltIn) -> Iterator[Problem]:
    # A default that follows from another size is as wrong as that one, and need not be said again.
    defaults = {"kv_heads": model.heads, "ffn": 4 * model.hidden, "outputs": model.hidden}
    for key in ("layers", "hidden", "heads", "kv_heads", "ffn", "top_k", "vocab", "outputs", "features"):
        value = getattr(model, key, None)
        if value is not None and value != defaults.get(key):
            yield from _at_least(f"{where}.{key}", value, 1)
            yield from _at_most(f"{where}.{key}", value, WIDTH_MOST)
    yield from _at_most(f"{where}.layers", model.layers, LAYERS_MOST)
    yield from _at_least(f"{where}.experts", model.experts, 0, "0: a dense model.")
    yield from _at_most(f"{where}.experts", model.experts, EXPERTS_MOST)
    yield from _finite(f"{where}.aux_loss", model.aux_loss)
    yield from _above_zero(f"{where}.init_std", model.init_std)
    if not 0 <= model.dropout < 1:
        yield Problem(f"{where}.dropout", f"is {model.dropout}.", "Use 0 <= dropout < 1.")


def _cut(name: str, module: ModuleSpec) -> Iterator[Problem]:
    """How layers are cut into stages, and heads out of the hidden size."""
    model, where = module.options, f"modules.{name}"
    if isinstance(model, Mapping):
        return
    yield from _stages(name, module, model.layers)
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
            f"module '{name}' has heads of width {model.head_width}; rotary embeddings need an even width.",
            f"Use a number of heads that gives an even width, such as {_even_heads(model)}.",
        )
    if model.heads % model.kv_heads:
        yield Problem(
            f"{where}.options.kv_heads",
            f"module '{name}' shares {model.kv_heads} key-value heads among {model.heads} heads.",
            f"Legal kv_heads: {_divisors(model.heads)}.",
        )


def _stages(name: str, module: ModuleSpec, layers: int) -> Iterator[Problem]:
    """How many layers each stage has; a rank has a stage for each of its chunks."""
    where, pp, stages = f"modules.{name}", module.grid.pp, stages_of(module)
    over = f"pp={pp}" if module.chunks == 1 else f"pp={pp} * chunks={module.chunks} = {stages}"
    if module.chunks > 1 and pp == 1:
        yield Problem(
            f"{where}.chunks",
            f"module '{name}' has {module.chunks} chunks a rank on pp=1: there is nothing to interleave.",
            "Use chunks = 1, or pp of 2 or more.",
        )
    if module.split is not None:
        if len(module.split) != stages or sum(module.split) != layers or min(module.split) < 1:
            yield Problem(
                f"{where}.split",
                f"split = {list(module.split)} is not {layers} layers over {over} stages.",
                f"Give {stages} positive numbers whose sum is {layers}.",
            )
    elif layers % stages:
        key, what = ("grid.pp", "pp") if module.chunks == 1 else ("chunks", "pp * chunks")
        yield Problem(
            f"{where}.{key}",
            f"module '{name}' splits {layers} layers over {over}: {layers} is not a multiple of {stages}.",
            f"Legal {what} for {layers} layers: {_divisors(layers)}; "
            f"or say split = [...] with {stages} numbers.",
        )


def _sharding(name: str, module: ModuleSpec) -> Iterator[Problem]:
    """What tensor parallelism shards must divide by tp."""
    model, tp, where = module.options, module.grid.tp, f"modules.{name}.grid.tp"
    if isinstance(model, Mapping):
        return
    shards = {"attention heads": model.heads, "key-value heads": model.kv_heads}
    if not model.experts:
        shards["ffn features"] = model.ffn
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


def _experts(name: str, module: ModuleSpec) -> Iterator[Problem]:
    """How experts are laid over the ranks of a stage, and chosen among."""
    grid, model, where = module.grid, module.options, f"modules.{name}"
    ranks, wanted = grid.tp * grid.cp * grid.dp, grid.ep * grid.expert_tp
    if ranks % wanted:
        yield Problem(
            f"{where}.grid.ep",
            f"module '{name}' lays experts over ep={grid.ep} * expert_tp={grid.expert_tp} = {wanted} ranks, "
            f"which does not divide the {ranks} (tp={grid.tp} * cp={grid.cp} * dp={grid.dp}) of a stage.",
            f"Legal products for {ranks} ranks: {_divisors(ranks)}.",
        )
    if isinstance(model, Mapping):
        return
    if not model.experts:
        if wanted > 1:
            yield Problem(
                f"{where}.options.experts",
                f"module '{name}' lays experts over {wanted} ranks and has none.",
                "Set experts to their number, or leave out ep and expert_tp.",
            )
        return
    if model.experts % grid.ep:
        yield Problem(
            f"{where}.grid.ep",
            f"module '{name}' deals {model.experts} experts to ep={grid.ep} ranks: "
            f"{model.experts} is not a multiple of {grid.ep}.",
            f"Legal ep for {model.experts} experts: {_divisors(model.experts)}.",
        )
    if model.ffn % grid.expert_tp:
        yield Problem(
            f"{where}.grid.expert_tp",
            f"module '{name}' splits {model.ffn} ffn features of an expert over expert_tp={grid.expert_tp}.",
            f"Legal expert_tp: {_divisors(model.ffn)}.",
        )
    if model.top_k > model.experts:
        yield Problem(
            f"{where}.options.top_k",
            f"module '{name}' sends each token to {model.top_k} of {model.experts} experts.",
            f"Use top_k <= {model.experts}.",
        )


def _loss(name: str, module: ModuleSpec) -> Iterator[Problem]:
    where = f"modules.{name}.loss_weight"
    if not math.isfinite(module.loss_weight):
        yield Problem(where, f"is {module.loss_weight}.", "Use a finite number.")
    elif module.loss_weight != 1 and not has_loss(module):
        yield Problem(
            where, f"module '{name}' has no loss that {module.loss_weight} could weigh.", "Leave it out."
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
    if module.chunks > 1 and count % module.grid.pp:
        yield Problem(
            f"modules.{name}.chunks",
            f"module '{name}' interleaves {module.chunks} chunks over pp={module.grid.pp}, "
            f"which {count} microbatches are not a multiple of.",
            f"Use a number of microbatches that divides by {module.grid.pp}, or chunks = 1.",
        )
    large, small = max(count, spec.batch.microbatches), min(count, spec.batch.microbatches)
    if large % small:
        yield Problem(
            f"modules.{name}.microbatches",
            f"module '{name}' makes {count} microbatches of a step, the job {spec.batch.microbatches}: "
            "their ratio is not an integer.",
            f"Use a divisor or a multiple of {spec.batch.microbatches}.",
        )
    if size // count < dp:
        fewer = f"at most {size // dp} microbatches, " if size >= dp else ""
        yield Problem(
            f"modules.{name}.grid.dp",
            f"a microbatch of module '{name}' has {size // count} samples ({size} / {count}) "
            f"for dp={dp} data lanes: {dp - size // count} lanes would have none.",
            f"Use dp <= {size // count}, {fewer}or batch.global_size >= {dp * count}.",
        )


def _world(spec: JobSpec) -> Iterator[Problem]:
    if spec.world_size is None:
        return
    if not 1 <= spec.world_size <= RANKS_MOST:
        yield Problem("world_size", f"is {spec.world_size}.", f"Use 1 to {RANKS_MOST:,} ranks.")
        return
    for name, grid in place(spec).items():
        if grid.offset + grid.size > spec.world_size:
            shape = " * ".join(f"{axis.name}={axis.size}" for axis in grid.axes)
            yield Problem(
                f"modules.{name}.grid",
                f"module '{name}' needs ranks {grid.offset}..{grid.offset + grid.size - 1} "
                f"({shape} at offset {grid.offset}), and the world has the ranks "
                f"0..{spec.world_size - 1}.",
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
    longest = Sample(id=0, length=source.length, rows=source.rows)
    rows = graph.rows_out(longest)[name] - source.length
    if rows + source.length > source.sequence:
        yield Problem(
            "data.options.sequence",
            f"a sample of module '{name}' can have {rows} rows and {source.length} text tokens, "
            f"more than sequence = {source.sequence} holds.",
            f"Set sequence = {rows + source.length} or more, or give fewer rows.",
        )


def _sequence(spec: JobSpec, source: SourceFacts) -> Iterator[Problem]:
    """A language sequence is cut over tp (sequence parallel) and over cp."""
    for name, module in spec.modules.items():
        if source.sequence is None or not isinstance(module.options, Gpt):
            continue
        grid = module.grid
        parts = (grid.tp if grid.sequence_parallel else 1) * (2 * grid.cp if grid.cp > 1 else 1)
        if source.sequence % parts:
            over = [f"tp={grid.tp}"] * grid.sequence_parallel + [f"2 * cp={grid.cp}"] * (grid.cp > 1)
            yield Problem(
                "data.options.sequence",
                f"module '{name}' cuts sequence = {source.sequence} over {' and '.join(over)}: "
                f"{source.sequence} is not a multiple of {parts}.",
                f"Set sequence = {-(-source.sequence // parts) * parts}.",
            )


def _freezing(spec: JobSpec, source: SourceFacts) -> Iterator[Problem]:
    for name, module in spec.modules.items():
        if module.trainable is not None and module.frozen is not False:
            yield Problem(
                f"modules.{name}",
                f"module '{name}' says both trainable and frozen.",
                "trainable freezes the rest, frozen trains the rest: keep one of them.",
            )
        else:
            yield from _patterns(name, module, spec, source)


def _patterns(name: str, module: ModuleSpec, spec: JobSpec, source: SourceFacts) -> Iterator[Problem]:
    """Every pattern must match something; what an own model holds is not known."""
    if isinstance(module.options, Mapping):
        return
    key, patterns = "trainable", module.trainable or ()
    if isinstance(module.frozen, tuple):
        key, patterns = "frozen", module.frozen
    names = _names_of(name, spec, source) if patterns else []
    for pattern in patterns:
        if not any(matches_any(n, (pattern,)) for n in names):
            yield Problem(
                f"modules.{name}.{key}",
                f"the pattern '{pattern}' matches no parameter of module '{name}'.",
                _nearest_parameter(pattern, names),
            )


def _names_of(name: str, spec: JobSpec, source: SourceFacts) -> list[str]:
    """Return the parameters of a module, projectors included; of an own model these only."""
    model = model_of(name, spec, source)
    if isinstance(model, Vit) and model.features is None:
        model = attrs.evolve(model, features=1)
    names = [parameter.name for parameter in model.parameters()]
    for target in spec.modules[name].feeds:
        if target in spec.modules:
            width, projected = edge_shape(model, model_of(target, spec, source))
            names += [p.name for p in projector(target, 1, width)] if projected else []
    return names


def _nearest_parameter(pattern: str, names: list[str]) -> str:
    """Point to a like name; a large model has too many to list, so else to the kinds that there are."""
    close = difflib.get_close_matches(pattern, names, n=1)
    kinds = dict.fromkeys(re.sub(r"\d+", "*", name) for name in names)
    return nearest(pattern, names) if close else f"Its parameters: {', '.join(kinds)}."


def _own(spec: JobSpec) -> Iterator[Problem]:
    for name, module in spec.modules.items():
        where = f"modules.{name}"
        if not isinstance(module.options, Mapping):
            if module.width is not None:
                fact = f"module '{name}' is a built-in {module.model}, which emits rows of its hidden size."
                yield Problem(f"{where}.width", fact, "Leave width out.")
            continue
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


# -- small talk --------------------------------------------------------------------------------------------


def _one_of(where: str, value: str, known: tuple[str, ...]) -> Iterator[Problem]:
    if value not in known:
        yield Problem(where, f"'{value}' is not known.", nearest(value, known))


def _at_least(where: str, value: float, least: int, remedy: str = "") -> Iterator[Problem]:
    if not value >= least:
        yield Problem(where, f"is {value}; it must be {least} or more.", remedy or f"Use {least} or more.")


def _at_most(where: str, value: int, most: int) -> Iterator[Problem]:
    if value > most:
        yield Problem(where, f"is {value:,}.", f"Use at most {most:,}.")


def _finite(where: str, value: float, remedy: str = "") -> Iterator[Problem]:
    if not 0 <= value < math.inf:
        yield Problem(where, f"is {value}.", remedy or "Use a finite number of 0 or more.")


def _above_zero(where: str, value: float) -> Iterator[Problem]:
    if not 0 < value < math.inf:
        yield Problem(where, f"is {value}.", "Use a finite number above 0.")


def _divisors(number: int) -> str:
    """Write the divisors of a number, the small ones of a large one.

    >>> _divisors(12)
    '1, 2, 3, 4, 6, 12'
    """
    few = [d for d in range(1, min(number, 4096) + 1) if number % d == 0]
    more = [] if number <= 4096 else ["..."]  # noqa: PLR2004
    return ", ".join([*map(str, few), *more])


def _even_heads(model: Transformer) -> str:
    return _divisors(model.hidden // 2) if model.hidden % 2 == 0 else "none (hidden is odd)"
