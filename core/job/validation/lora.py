"""LoRA: its numbers, and whether every target is a linear layer of the module."""

import re
from collections.abc import Iterator, Mapping

from mimogrid.core.base.errors import Problem, nearest
from mimogrid.core.job.lora import ALL, NO_LORA, Lora, aims_at, linears, names_of
from mimogrid.core.job.models import BuiltIn
from mimogrid.core.job.spec import ModuleSpec
from mimogrid.core.job.validation.checks import above_zero, at_least, at_most, one_of


def lora_problems(name: str, module: ModuleSpec, precision: str) -> Iterator[Problem]:
    """Check the LoRA of a module whose sizes are legal, in a job of a precision."""
    where = f"modules.{name}.lora"
    if module.lora is None:
        return
    if isinstance(module.options, Mapping):
        fact = f"module '{name}' is your own: the plan does not know its linear layers."
        yield Problem(where, fact, "Put LoRA into your network, and name its parameters in trainable.")
        return
    wrong = list(_numbers(where, module.lora, module.options))
    yield from wrong
    yield from _base(f"{where}.base", module.lora.base, precision)
    if not any(problem.where.endswith(".rank") for problem in wrong):
        yield from _targets(f"{where}.targets", name, module.options, module.lora)


def _base(where: str, base: str, precision: str) -> Iterator[Problem]:
    """Check that every value of the base is one of the job's precision, too."""
    if base:
        yield from one_of(where, base, tuple(_WITHIN))
        if precision not in _WITHIN.get(base, (precision,)):
            fact = (
                f"is '{base}', and the job computes in {precision}, which does not have all values of {base}."
            )
            remedy = f"Leave it out, or set precision to one of {', '.join(_WITHIN[base])}."
            yield Problem(where, fact, remedy)


_WITHIN = {"bf16": ("fp64", "fp32", "bf16"), "fp16": ("fp64", "fp32", "fp16")}
"""By the precision of a base those that have all of its values."""


def _numbers(where: str, lora: Lora, model: BuiltIn) -> Iterator[Problem]:
    yield from at_least(f"{where}.rank", lora.rank, 1)
    yield from at_most(f"{where}.rank", lora.rank, model.hidden)
    if lora.rank > 0:
        yield from above_zero(f"{where}.alpha", lora.alpha)
    if not 0 <= lora.dropout < 1:
        yield Problem(f"{where}.dropout", f"is {lora.dropout}.", "Use a number from 0 to below 1.")


def _targets(where: str, name: str, model: BuiltIn, lora: Lora) -> Iterator[Problem]:
    found = [names_of(each) for each in linears(model, fused_qkv=lora.fused_qkv)]
    words = list(dict.fromkeys(each.rpartition(".")[2] for names in found for each in names))
    if not lora.targets:
        yield Problem(where, "is empty.", f'Name linear layers: {", ".join(words)}; or ["{ALL}"].')
    for target in lora.targets:
        if not any(aims_at(target, names) for names in found):
            fact = f"'{target}' is no linear layer of module '{name}'; {NO_LORA}."
            plain = re.fullmatch(r"\w+", target)
            remedy = nearest(target, words) if plain else f"Its linear layers: {', '.join(words)}."
            yield Problem(where, fact, remedy)
