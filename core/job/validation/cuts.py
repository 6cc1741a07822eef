"""How a module is split: layers over stages, heads and features over tp, experts over ep."""

import math
from collections.abc import Iterator, Mapping

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.job.models import ACTIVATIONS, NORMS, BuiltIn, Gpt, Transformer, Vit
from mimogrid.core.job.placement import stages_of
from mimogrid.core.job.spec import GridSpec, ModuleSpec
from mimogrid.core.job.validation.checks import divisors, one_of
from mimogrid.core.models.frequencies import parse_scaling


def cut_problems(name: str, module: ModuleSpec) -> Iterator[Problem]:
    """Check how layers are split into stages, and the hidden size into heads."""
    model, where = module.options, f"modules.{name}"
    if isinstance(model, Mapping):
        return
    yield from _stages(name, module, model.layers)
    if model.hidden % model.heads and model.head_width == model.hidden // model.heads:
        yield Problem(
            f"{where}.options.heads",
            f"module '{name}' splits hidden={model.hidden} over {model.heads} heads: "
            f"{model.hidden} is not a multiple of {model.heads}.",
            f"Legal heads: {divisors(model.hidden)}; or give heads a width of their own: head_width.",
        )
    elif model.head_width % 2 and getattr(model, "positions", "rotary") != "learned":
        yield Problem(
            f"{where}.options.heads",
            f"module '{name}' has heads of width {model.head_width}; rotary embeddings need an even width.",
            f"Use a number of heads that gives an even width, such as {_even_heads(model)}.",
        )
    yield from _parts_of_layers(f"{where}.options", model)
    if model.heads % model.kv_heads:
        yield Problem(
            f"{where}.options.kv_heads",
            f"module '{name}' shares {model.kv_heads} key-value heads among {model.heads} heads.",
            f"Legal kv_heads: {divisors(model.heads)}.",
        )


def _parts_of_layers(where: str, model: Transformer) -> Iterator[Problem]:
    """Check the names of a layer's parts, and that they go together."""
    yield from one_of(f"{where}.norm", model.norm, NORMS)
    yield from one_of(f"{where}.activation", model.activation, ACTIVATIONS)
    if model.rotary_scaling:
        try:
            parse_scaling(f"{where}.rotary_scaling", model.rotary_scaling)
        except PlanError as error:
            yield from error.problems
    if model.window and not isinstance(model, Gpt | Vit):
        message = "is for causal models; here every row sees every other."
        yield Problem(f"{where}.window", message, "Leave it out.")


def _stages(name: str, module: ModuleSpec, layers: int) -> Iterator[Problem]:
    """Check how many layers each stage has; a rank has one stage for each of its chunks."""
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
            f"Legal {what} for {layers} layers: {divisors(layers)}; "
            f"or say split = [...] with {stages} numbers.",
        )


def sharding_problems(name: str, module: ModuleSpec) -> Iterator[Problem]:
    """Check that tp divides what tensor parallelism shards."""
    model, tp, where = module.options, module.grid.tp, f"modules.{name}.grid.tp"
    if isinstance(model, Mapping):
        return
    shards = {"attention heads": model.heads, "key-value heads": model.kv_heads}
    if not all(map(model.has_experts, range(model.layers))):
        shards["ffn features"] = model.ffn
    if isinstance(model, Gpt):
        shards["vocabulary entries"] = model.vocab_rows
    padded = isinstance(model, Gpt) and model.vocab_padding > 0  # Padding follows tp, and not tp the padding.
    common = math.gcd(*(n for what, n in shards.items() if not (padded and what == "vocabulary entries")))
    for what, count in shards.items():
        if count % tp:
            yield Problem(
                where,
                f"module '{name}' splits {count} {what} over tp={tp}: {count} is not a multiple of {tp}.",
                f"Legal tp for this module: {divisors(common)}."
                + (
                    f" Or pad: options.vocab_padding = {-count % tp}." if what == "vocabulary entries" else ""
                ),
            )


def expert_problems(name: str, module: ModuleSpec) -> Iterator[Problem]:
    """Check how experts are placed on the ranks of a stage, and how many a token goes to."""
    grid, model, where = module.grid, module.options, f"modules.{name}"
    ranks, wanted = grid.tp * grid.cp * grid.dp, grid.ep * grid.expert_tp
    if ranks % wanted:
        yield Problem(
            f"{where}.grid.ep",
            f"module '{name}' lays experts over ep={grid.ep} * expert_tp={grid.expert_tp} = {wanted} ranks, "
            f"which does not divide the {ranks} (tp={grid.tp} * cp={grid.cp} * dp={grid.dp}) of a stage.",
            f"Legal products for {ranks} ranks: {divisors(ranks)}.",
        )
    if isinstance(model, Mapping):
        return
    if model.experts:
        yield from _expert_sizes(name, grid, model)
    elif wanted > 1:
        yield Problem(
            f"{where}.options.experts",
            f"module '{name}' lays experts over {wanted} ranks and has none.",
            "Set experts to their number, or leave out ep and expert_tp.",
        )


def _expert_sizes(name: str, grid: GridSpec, model: BuiltIn) -> Iterator[Problem]:
    """Check that experts and their features divide evenly, and that a token finds `top_k` experts."""
    where = f"modules.{name}"
    if model.experts % grid.ep:
        yield Problem(
            f"{where}.grid.ep",
            f"module '{name}' splits {model.experts} experts over ep={grid.ep} ranks: "
            f"{model.experts} is not a multiple of {grid.ep}.",
            f"Legal ep for {model.experts} experts: {divisors(model.experts)}.",
        )
    if model.expert_ffn % grid.expert_tp:
        yield Problem(
            f"{where}.grid.expert_tp",
            f"module '{name}' splits {model.expert_ffn} features of an expert over expert_tp={grid.expert_tp}.",
            f"Legal expert_tp: {divisors(model.expert_ffn)}.",
        )
    if model.top_k > model.experts:
        yield Problem(
            f"{where}.options.top_k",
            f"module '{name}' sends each token to {model.top_k} of {model.experts} experts.",
            f"Use top_k <= {model.experts}.",
        )


def _even_heads(model: Transformer) -> str:
    return divisors(model.hidden // 2) if model.hidden % 2 == 0 else "none (hidden is odd)"
