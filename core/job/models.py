"""Models: what the plan knows about a network without building it.

Each built-in model has options. From these follows a table of its parameters: layout-independent name, full shape, the
layer that holds it, and how it is sharded. Initial weights, trainable patterns, checkpoints, gradient reductions and
memory all use this table. The shell builds networks that match it, and checks that they do.

>>> gpt = Gpt(layers=2, hidden=8, heads=2, vocab=16)
>>> [p.name for p in gpt.parameters() if p.layer == 1][:3]
['layers.1.attention_norm.weight', 'layers.1.attention_norm.bias', 'layers.1.attention.qkv.weight']
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import attrs

from mimogrid.core.base.samples import SegmentGrid


FIRST, LAST = "first", "last"
PROJECTOR, HEAD = "projector.", "output."
"""Prefixes of the names of a projector's parameters, which only one edge uses, and of those that only a loss uses."""


NORMS = ("layernorm", "rmsnorm")
PARTS = (
    *("norm", "norm_eps", "activation", "gated", "qkv_bias", "out_bias", "mlp_bias", "qk_norm"),
    *("rotary_base", "rotary_scaling", "window"),
)
"""Options that say what the parts of a layer compute; all else is sizes."""
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu")


@attrs.frozen
class Parameter:
    """One parameter of a module, at full size.

    Attributes:
        name: the layout-independent name inside the module, such as ``layers.3.attention.qkv.weight``.
        shape: the full shape.
        layer: the layer that holds it, or `FIRST` or `LAST` for the ends of the module.
        std: the standard deviation of its normal initial values; 0 for a constant.
        constant: the initial value if `std` is 0.
        tp_dim: the dim that is sharded over tp, or over expert_tp for a parameter of an expert; None: every rank holds
            all of it.
        tp_blocks: the number of equal blocks along that dim, each of which is sharded separately (2 if the gate and
            the up projection of a gated layer are one weight).
        partial: under sequence parallelism its gradient on one tp rank is a partial sum.
        routes: it is a router's. Tp ranks split the tokens among them for routing, so its gradient is always partial.
        over_heads: it is shared by all heads of a layer. Tp ranks split these, so its gradient is always partial.
        copy: the other end of the module that holds a copy of it (tied embeddings).
        expert: the number of the expert that it belongs to; None: it belongs to no expert.
    """

    name: str
    shape: tuple[int, ...]
    layer: int | str
    std: float = 0.0
    constant: float = 0.0
    tp_dim: int | None = None
    tp_blocks: int = 1
    partial: bool = False
    routes: bool = False
    over_heads: bool = False
    copy: str | None = None
    expert: int | None = None


@attrs.frozen(kw_only=True)
class Transformer:
    """The options of all built-in models: a stack of pre-norm transformer layers.

    Attributes:
        layers: how many there are.
        hidden: width of the hidden states.
        heads: query heads.
        kv_heads: key-value heads, each shared by as many query heads.
        head_width: width of a head; by default all heads together are as wide as the hidden states.
        ffn: width inside the MLP.
        norm: "layernorm" (weight and bias) or "rmsnorm" (weight).
        norm_eps: what norms add to a variance or a mean square.
        activation: one of `ACTIVATIONS`.
        gated: the MLP multiplies what it passes on by an activated gate. `mlp.up` is then the gate, and behind it what
            the gate lets through.
        qkv_bias: queries, keys and values have a bias.
        out_bias: the output of the attention has a bias.
        mlp_bias: both linear layers of the MLP have a bias.
        qk_norm: queries and keys pass an RMS norm, head by head.
        rotary_base: the base of the rotary frequencies.
        rotary_scaling: how the frequencies are stretched (`core.models.frequencies.parse_scaling`); empty: not at all.
        window: a token of a causal model sees itself and the `window` - 1 before it; 0: all before it.
        full_layers: layers without the window.
        dropout: the probability of dropping a value in training.
        experts: experts of an MLP; 0: it is dense.
        top_k: experts that a token goes to.
        aux_loss: weight of the loss that balances experts.
        init_std: standard deviation of initial weights.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int = attrs.field(default=attrs.Factory(lambda self: self.heads, takes_self=True))
    head_width: int = attrs.field(
        default=attrs.Factory(lambda self: self.hidden // (self.heads or 1), takes_self=True)
    )
    ffn: int = attrs.field(default=attrs.Factory(lambda self: 4 * self.hidden, takes_self=True))
    norm: str = "layernorm"
    norm_eps: float = 1e-5
    activation: str = "gelu"
    gated: bool = False
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    qk_norm: bool = False
    rotary_base: float = 10_000.0
    rotary_scaling: Mapping[str, Any] = attrs.field(factory=dict[str, Any], hash=False)
    window: int = 0
    full_layers: tuple[int, ...] = ()
    dropout: float = 0.0
    experts: int = 0
    top_k: int = 2
    aux_loss: float = 0.0
    init_std: float = 0.02

    causal = False
    has_loss = False
    reads_text = False

    @property
    def qkv_width(self) -> int:
        """The width of the queries, keys and values of all heads."""
        return (self.heads + 2 * self.kv_heads) * self.head_width

    @property
    def up_width(self) -> int:
        """The width of what the first linear layer of an MLP gives."""
        return (2 if self.gated else 1) * self.ffn

    def parameters(self) -> Iterator[Parameter]:
        """Yield every parameter of the module, without the projectors of its edges."""
        yield from self.first_parameters()
        for layer in range(self.layers):
            yield from self.layer_parameters(layer)
        yield from self.norm_parameters("final_norm", LAST)
        yield from self.last_parameters()

    def first_parameters(self) -> Iterator[Parameter]:
        """Yield the parameters before the layers."""
        yield from ()

    def last_parameters(self) -> Iterator[Parameter]:
        """Yield the parameters after the final norm."""
        yield from ()

    def layer_parameters(self, layer: int) -> Iterator[Parameter]:
        """Yield the parameters of one transformer layer."""
        prefix, hidden = f"layers.{layer}", self.hidden
        shallow, deep = self.init_std, self.init_std / (2 * self.layers) ** 0.5
        yield from self.norm_parameters(f"{prefix}.attention_norm", layer)
        yield from _column(
            f"{prefix}.attention.qkv", (self.qkv_width, hidden), layer, shallow, bias=self.qkv_bias
        )
        if self.qk_norm:
            for name in ("q_norm", "k_norm"):
                yield Parameter(
                    f"{prefix}.attention.{name}.weight",
                    (self.head_width,),
                    layer,
                    constant=1.0,
                    over_heads=True,
                )
        inner = self.heads * self.head_width
        yield from _row(f"{prefix}.attention.out", (hidden, inner), layer, deep, bias=self.out_bias)
        yield from self.norm_parameters(f"{prefix}.mlp_norm", layer)
        if not self.experts:
            for parameter in _column(
                f"{prefix}.mlp.up", (self.up_width, hidden), layer, shallow, bias=self.mlp_bias
            ):
                yield attrs.evolve(parameter, tp_blocks=2 if self.gated else 1)
            yield from _row(f"{prefix}.mlp.down", (hidden, self.ffn), layer, deep, bias=self.mlp_bias)
            return
        router = (self.experts, hidden)
        yield Parameter(f"{prefix}.mlp.router.weight", router, layer, std=shallow, routes=True)
        for expert in range(self.experts):
            name = f"{prefix}.mlp.experts.{expert}"
            for parameter in (
                *_column(f"{name}.up", (self.ffn, hidden), layer, shallow),
                *_row(f"{name}.down", (hidden, self.ffn), layer, deep),
            ):
                yield attrs.evolve(parameter, expert=expert, partial=False)

    def window_of(self, layer: int) -> int:
        """Return the window of a layer; 0: none."""
        return 0 if layer in self.full_layers else self.window

    def spans(self, grid: SegmentGrid) -> tuple[int, ...]:
        """Return the lengths of the attention segments that a segment of a grid makes in the layers."""
        return (math.prod(grid),)

    def emitted(self, grid: SegmentGrid) -> int:
        """Return how many rows the module emits for a segment of a grid."""
        return math.prod(grid)

    def changed(self, options: tuple[str, ...]) -> tuple[str, ...]:
        """Return those of some options that are not as they are by default."""
        plain = Transformer(layers=1, hidden=2, heads=1)
        return tuple(name for name in options if getattr(self, name) != getattr(plain, name))

    def norm_parameters(self, name: str, layer: int | str) -> Iterator[Parameter]:
        """Yield the parameters of a norm of the hidden states."""
        yield Parameter(f"{name}.weight", (self.hidden,), layer, constant=1.0, partial=True)
        if self.norm == "layernorm":
            yield Parameter(f"{name}.bias", (self.hidden,), layer, partial=True)


@attrs.frozen(kw_only=True)
class Vit(Transformer):
    """`vit`: reads patch rows of width `features`, emits rows of width `hidden`."""

    features: int | None = None

    def first_parameters(self) -> Iterator[Parameter]:
        """Yield the embedding of the patch rows."""
        assert self.features is not None
        yield Parameter("input.weight", (self.hidden, self.features), FIRST, std=self.init_std)
        yield Parameter("input.bias", (self.hidden,), FIRST)


@attrs.frozen(kw_only=True)
class Block(Transformer):
    """`block`: reads rows of width `hidden`, emits one row of that width for each."""


@attrs.frozen(kw_only=True)
class Gpt(Transformer):
    """`gpt`: reads tokens, with rows at the placeholders; its loss is the cross entropy on text.

    `vocab_padding` rows follow those of the vocabulary, so that tp divides them. No token reads them, their logits are
    minus infinity, and their gradients are zero.
    """

    vocab: int
    vocab_padding: int = 0
    tied_embeddings: bool = False

    causal = True
    has_loss = True
    reads_text = True

    @property
    def vocab_rows(self) -> int:
        """Rows of the token embedding."""
        return self.vocab + self.vocab_padding

    def first_parameters(self) -> Iterator[Parameter]:
        """Yield the token embedding."""
        shape = (self.vocab_rows, self.hidden)
        copy = LAST if self.tied_embeddings else None
        yield Parameter("embedding.weight", shape, FIRST, std=self.init_std, tp_dim=0, copy=copy)

    def last_parameters(self) -> Iterator[Parameter]:
        """Yield the output projection, unless the embedding is tied to it."""
        if not self.tied_embeddings:
            shape = (self.vocab_rows, self.hidden)
            yield Parameter("output.weight", shape, LAST, std=self.init_std, tp_dim=0)


@attrs.frozen(kw_only=True)
class Regressor(Transformer):
    """`regressor`: reads rows; its loss is the squared error against targets of width `outputs`."""

    outputs: int = attrs.field(default=attrs.Factory(lambda self: self.hidden, takes_self=True))

    has_loss = True

    def last_parameters(self) -> Iterator[Parameter]:
        """Yield the output projection."""
        yield Parameter("output.weight", (self.outputs, self.hidden), LAST, std=self.init_std)
        yield Parameter("output.bias", (self.outputs,), LAST)


BuiltIn = Vit | Block | Gpt | Regressor
BUILT_IN: dict[str, type[BuiltIn]] = {"vit": Vit, "block": Block, "gpt": Gpt, "regressor": Regressor}


def projector(target: str, width_source: int, width_target: int, *, std: float = 0.02) -> Iterator[Parameter]:
    """Yield the parameters of the projector of an edge, which the last stage of the source module holds."""
    name = f"{PROJECTOR}{target}"
    yield Parameter(f"{name}.weight", (width_target, width_source), LAST, std=std)
    yield Parameter(f"{name}.bias", (width_target,), LAST)


def _column(
    name: str, shape: tuple[int, int], layer: int, std: float, *, bias: bool = True
) -> Iterator[Parameter]:
    """Yield a layer whose output features are sharded over tp: weight and bias along dim 0."""
    yield Parameter(f"{name}.weight", shape, layer, std=std, tp_dim=0)
    if bias:
        yield Parameter(f"{name}.bias", shape[:1], layer, tp_dim=0)


def _row(
    name: str, shape: tuple[int, int], layer: int, std: float, *, bias: bool = True
) -> Iterator[Parameter]:
    """Yield a layer whose input features are sharded over tp; the bias is added once, after the sum over tp."""
    yield Parameter(f"{name}.weight", shape, layer, std=std, tp_dim=1)
    if bias:
        yield Parameter(f"{name}.bias", shape[:1], layer, partial=True)


@attrs.frozen(kw_only=True)
class Own:
    """A custom module; `path` names its builder as ``package.module:function``.

    The plan knows only the width of its output, so it is one stage with tp = cp = ep = 1.
    """

    path: str
    width: int | None
    has_loss: bool

    layers = 1
    init_std = 0.02
    causal = False
    reads_text = False

    @property
    def hidden(self) -> int | None:
        """The width of the rows that it emits."""
        return self.width

    def parameters(self) -> Iterator[Parameter]:
        """Yield nothing: its parameters are known only when it is built."""
        yield from ()
