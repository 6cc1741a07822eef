"""LoRA: small trained products beside the frozen linear layers of a module (Hu et al. 2021, arXiv 2106.09685).

A linear layer y = W x becomes y = W x + (alpha / rank) B A x, where A has `rank` rows and B as many columns. W is
frozen. A has random values at the start and B zeros, so the network begins as it was. At the end B A may be added to W.

Weights that are one tensor here (queries, keys and values; the gate and what it opens) are several linear layers in
published checkpoints. Each of these has a pair of its own, unless the checkpoint has them as one, too (`fused_qkv`).

>>> from mimogrid.core.job.models import Gpt
>>> gpt = Gpt(layers=1, hidden=8, heads=2, kv_heads=1, vocab=16)
>>> for adapter in adapters(gpt, Lora(rank=2, targets=("q", "v_proj"))):
...     print(adapter.name, *((p.name, p.shape) for p in adapter.parameters(2)))
layers.0.attention.q ('layers.0.attention.qkv.lora.q.a', (2, 8)) ('layers.0.attention.qkv.lora.q.b', (8, 2))
layers.0.attention.v ('layers.0.attention.qkv.lora.v.a', (2, 8)) ('layers.0.attention.qkv.lora.v.b', (4, 2))

Tensor parallelism cuts a pair as it cuts the layer beside it: B by its rows where W is cut by its outputs, A by its
columns where W is cut by its inputs. The other one of the pair is whole on every rank.
"""

import fnmatch
import functools
import re
from collections.abc import Iterable, Iterator, Mapping

import attrs

from mimogrid.core.job.models import BuiltIn, Parameter


MARK = ".lora."
"""What the names of all its parameters, and of no others, have."""
ALL = "all-linear"
"""The target that is every linear layer of the layers, as PEFT writes it."""
USUAL: Mapping[str, str] = {
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "qkv": "qkv",
    "out": "o_proj",
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj",
}
"""By our name of a linear layer what most published checkpoints call it."""
NO_LORA = "experts and routers get no LoRA: transformers holds those of a layer in tensors that are no linear layers"
"""Why targets name no experts and no routers."""


@attrs.frozen(kw_only=True)
class Lora:
    """`[modules.NAME.lora]`.

    Attributes:
        rank: rows of each A.
        targets: linear layers that get a pair: names, the ends of names, or patterns of either; or `ALL`.
        alpha: the products are weighted by alpha / rank.
        dropout: the probability of dropping a value that an A reads in training.
        fused_qkv: queries, keys and values of a layer share one pair.
        base: the precision in which the module holds the matrices that do not train; empty: that of the job.
    """

    rank: int
    targets: tuple[str, ...]
    alpha: float = attrs.field(default=attrs.Factory(lambda self: float(self.rank), takes_self=True))
    dropout: float = 0.0
    fused_qkv: bool = False
    base: str = ""

    @property
    def scale(self) -> float:
        """The weight of the products."""
        return self.alpha / self.rank


@attrs.frozen
class Adapter:
    """A linear layer that can have a pair beside it.

    Attributes:
        layer: the number of the transformer layer.
        weight: the name of the weight that it is, or is a part of, such as ``layers.3.attention.qkv``.
        part: its own name, such as ``q``.
        width_in: the width of its inputs.
        width_out: the width of its outputs.
        column: tp cuts its outputs; else its inputs.
    """

    layer: int
    weight: str
    part: str
    width_in: int
    width_out: int
    column: bool

    @property
    def name(self) -> str:
        """The name of the linear layer, such as ``layers.3.attention.q``."""
        return f"{self.weight.rpartition('.')[0]}.{self.part}"

    @property
    def prefix(self) -> str:
        """What the names of its two parameters begin with."""
        return f"{self.weight}{MARK}{self.part}"

    def parameters(self, rank: int) -> tuple[Parameter, Parameter]:
        """Return A and B. The variance of A is that of the uniform values which PEFT draws."""
        cut, whole = (0, None) if self.column else (None, 1)
        std = (3 * self.width_in) ** -0.5
        shape_a, shape_b = (rank, self.width_in), (self.width_out, rank)
        return (
            Parameter(f"{self.prefix}.a", shape_a, self.layer, std=std, tp_dim=whole, partial=whole is None),
            Parameter(f"{self.prefix}.b", shape_b, self.layer, tp_dim=cut, partial=cut is None),
        )


def linears(model: BuiltIn, *, fused_qkv: bool = False) -> Iterator[Adapter]:
    """Yield the linear layers of a model that can have a pair: all in its layers, but for experts and routers."""
    hidden, inner, groups = model.hidden, model.heads * model.head_width, model.kv_heads * model.head_width
    for layer in range(model.layers):
        qkv, out, up, down = (
            f"layers.{layer}.{part}" for part in ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
        )
        parts = {"qkv": model.qkv_width} if fused_qkv else {"q": inner, "k": groups, "v": groups}
        yield from (Adapter(layer, qkv, part, hidden, width, column=True) for part, width in parts.items())
        yield Adapter(layer, out, "out", inner, hidden, column=False)
        if not model.has_experts(layer):
            for part in ("gate", "up") if model.gated else ("up",):
                yield Adapter(layer, up, part, hidden, model.ffn, column=True)
            yield Adapter(layer, down, "down", model.ffn, hidden, column=False)


@functools.lru_cache(maxsize=64)
def adapters(model: BuiltIn, lora: Lora) -> tuple[Adapter, ...]:
    """Return the linear layers of a model that get a pair."""
    found = linears(model, fused_qkv=lora.fused_qkv)
    return tuple(each for each in found if any(aims_at(target, names_of(each)) for target in lora.targets))


_BASE = re.compile(
    r"layers\.\d+\.(attention\.(qkv|out)|mlp\.(experts\.\d+\.)?(up|down))\.weight|(embedding|output)\.weight"
)


def held_in(parameter: Parameter, lora: Lora | None, precision: str, *, trains: bool) -> str:
    """Return the precision in which a network holds a parameter, in a job of a precision.

    With `Lora.base` it is another one for the matrices of layers, of experts, of embeddings and of heads, if they do
    not train. Routers keep that of the job: rounded, they would choose other experts.

    >>> lora = Lora(rank=2, targets=("q",), base="bf16")
    >>> held_in(Parameter("layers.0.mlp.up.weight", (4, 2), layer=0), lora, "fp32", trains=False)
    'bf16'
    >>> held_in(Parameter("layers.0.mlp.router.weight", (4, 2), layer=0), lora, "fp32", trains=False)
    'fp32'
    """
    rounded = lora is not None and lora.base and not trains and _BASE.fullmatch(parameter.name)
    return lora.base if lora is not None and rounded else precision


def names_of(adapter: Adapter) -> tuple[str, str]:
    """Return our name of a linear layer, and the same with the usual word at its end."""
    return adapter.name, f"{adapter.name.rpartition('.')[0]}.{USUAL[adapter.part]}"


def aims_at(target: str, names: Iterable[str]) -> bool:
    """Whether a target is one of the names of a linear layer or the end of one, as words between points.

    >>> aims_at("q_proj", ["layers.0.attention.q_proj"]), aims_at("proj", ["layers.0.attention.q_proj"])
    (True, False)
    >>> aims_at("layers.[0-3].*.v", ["layers.2.attention.v"])
    True
    """
    return target == ALL or any(
        fnmatch.fnmatchcase(name, target) or fnmatch.fnmatchcase(name, f"*.{target}") for name in names
    )


def lora_parameters(model: BuiltIn, lora: Lora) -> Iterator[Parameter]:
    """Yield the parameters that are beside those of a model."""
    for adapter in adapters(model, lora):
        yield from adapter.parameters(lora.rank)
