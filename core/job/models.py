"""Models: what the plan knows about a network without building it.

Each built-in model has options. From these follows a table of its parameters: layout-independent name, full shape, the
layer that holds it, and how it is sharded. Initial weights, trainable patterns, checkpoints, gradient reductions and
memory all use this table. The shell builds networks that match it, and checks that they do.

>>> gpt = Gpt(layers=2, hidden=8, heads=2, vocab=16)
>>> [p.name for p in gpt.parameters() if p.layer == 1][:3]
['layers.1.attention_norm.weight', 'layers.1.attention_norm.bias', 'layers.1.attention.qkv.weight']
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs

from mimogrid.core.base.samples import SegmentGrid
from mimogrid.core.models.segments import ONE_EACH, PLANE, Emission
from mimogrid.core.models.tower import TowerRows, tower_rows


FIRST, LAST = "first", "last"
PROJECTOR, HEAD = "projector.", "output."
"""Prefixes of the names of a projector's parameters, which only one edge uses, and of those that only a loss uses."""


NORMS = ("layernorm", "rmsnorm")
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu")
POSITIONS = ("rotary", "learned", "rotary_2d")
INTERPOLATIONS = ("none", "bilinear")
STEMS = ("patch", "whisper")
PARTS = (
    *("norm", "norm_eps", "activation", "gated", "qkv_bias", "k_bias", "out_bias", "mlp_bias", "qk_norm"),
    *("rotary_base", "rotary_scaling", "rotary_sections", "positions", "window", "final_norm", "pool"),
    *("deepstack", "deepstack_layers"),
)
"""Options that say what a stack of layers computes; all else is sizes, and what comes before or behind it."""
CONVOLUTION = 3
"""The width of Whisper's convolutions, in frames."""


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
        zeros: how many of its values are zero and never train, and are no parameters of the model.
        padding: rows behind the others that only make tp divide them. They are zero, as their gradients are.
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
    zeros: int = 0
    padding: int = 0

    @property
    def unpadded_shape(self) -> tuple[int, ...]:
        """The full shape without padding: that of every tensor which leaves the job."""
        return (self.shape[0] - self.padding, *self.shape[1:])

    @property
    def values(self) -> int:
        """How many parameters of the model it is."""
        return math.prod(self.unpadded_shape) - self.zeros


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
        k_bias: keys have a bias if queries and values have one. Without it, its rows of `attention.qkv.bias` are zero
            and never train.
        out_bias: the output of the attention has a bias.
        mlp_bias: both linear layers of the MLP have a bias.
        qk_norm: queries and keys pass an RMS norm, head by head.
        rotary_base: the base of the rotary frequencies.
        rotary_scaling: how the frequencies are stretched (`core.models.frequencies.parse_scaling`); empty: not at all.
        window: a token of a causal model sees itself and the `window` - 1 before it; 0: all before it. For a tower see
            `Vit`.
        full_layers: layers without the window.
        dropout: the probability of dropping a value in training.
        experts: experts of an MLP; 0: it is dense.
        expert_ffn: width inside an expert.
        top_k: experts that a token goes to.
        norm_top_k: the weights of a token's experts add up to 1; else they are those of a softmax over all experts.
        dense_layers: layers without experts.
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
    k_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    qk_norm: bool = False
    rotary_base: float = 10_000.0
    rotary_scaling: Mapping[str, Any] = attrs.field(factory=dict[str, Any], hash=False)
    window: int = 0
    full_layers: tuple[int, ...] = ()
    dropout: float = 0.0
    experts: int = 0
    expert_ffn: int = attrs.field(default=attrs.Factory(lambda self: self.ffn, takes_self=True))
    top_k: int = 2
    norm_top_k: bool = True
    dense_layers: tuple[int, ...] = ()
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
    def up_blocks(self) -> int:
        """How many matrices the first linear layer of an MLP is: a gate, and what it opens."""
        return 2 if self.gated else 1

    @property
    def emission(self) -> Emission:
        """How many rows the module emits for a segment that it reads."""
        return ONE_EACH

    @property
    def row_width(self) -> int:
        """The width of the rows that the module emits, before an edge projects them."""
        return self.hidden

    def mlp_widths(self, layer: int) -> tuple[int, int]:
        """Return the widths of what the first and the second linear layers of a token's MLPs give and read."""
        width = self.top_k * self.expert_ffn if self.has_experts(layer) else self.ffn
        return self.up_blocks * width, width

    def has_experts(self, layer: int) -> bool:
        """Whether the MLP of a layer has experts."""
        return bool(self.experts) and layer not in self.dense_layers

    def parameters(self) -> Iterator[Parameter]:
        """Yield every parameter of the module, without the projectors of its edges."""
        yield from self.first_parameters()
        for layer in range(self.layers):
            yield from self.layer_parameters(layer)
        yield from self.final_parameters()
        yield from self.last_parameters()

    def first_parameters(self) -> Iterator[Parameter]:
        """Yield the parameters before the layers."""
        yield from ()

    def final_parameters(self) -> Iterator[Parameter]:
        """Yield the parameters of the final norm."""
        yield from self.norm_parameters("final_norm", LAST)

    def last_parameters(self) -> Iterator[Parameter]:
        """Yield the parameters after the final norm."""
        yield from ()

    def layer_parameters(self, layer: int) -> Iterator[Parameter]:
        """Yield the parameters of one transformer layer."""
        prefix, hidden = f"layers.{layer}", self.hidden
        shallow, deep = self.init_std, self.init_std / (2 * self.layers) ** 0.5
        yield from self.norm_parameters(f"{prefix}.attention_norm", layer)
        weight, *bias = _column(
            f"{prefix}.attention.qkv", (self.qkv_width, hidden), layer, shallow, bias=self.qkv_bias
        )
        zeros = 0 if self.k_bias else self.kv_heads * self.head_width
        yield from (weight, *(attrs.evolve(parameter, zeros=zeros) for parameter in bias))
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
        if not self.has_experts(layer):
            yield from self.mlp_parameters(f"{prefix}.mlp", layer, self.ffn)
            return
        router = (self.experts, hidden)
        yield Parameter(f"{prefix}.mlp.router.weight", router, layer, std=shallow, routes=True)
        for expert in range(self.experts):
            for parameter in self.mlp_parameters(f"{prefix}.mlp.experts.{expert}", layer, self.expert_ffn):
                yield attrs.evolve(parameter, expert=expert, partial=False)

    def mlp_parameters(self, name: str, layer: int, ffn: int) -> Iterator[Parameter]:
        """Yield the parameters of two linear layers that are `ffn` wide between them."""
        shallow, deep = self.init_std, self.init_std / (2 * self.layers) ** 0.5
        blocks, bias = self.up_blocks, self.mlp_bias
        up = _column(f"{name}.up", (blocks * ffn, self.hidden), layer, shallow, bias=bias)
        yield from (attrs.evolve(parameter, tp_blocks=blocks) for parameter in up)
        yield from _row(f"{name}.down", (self.hidden, ffn), layer, deep, bias=bias)

    def window_of(self, layer: int) -> int:
        """Return the window of a layer; 0: none."""
        return 0 if layer in self.full_layers else self.window

    def spans(self, grid: SegmentGrid) -> tuple[int, ...]:
        """Return the lengths of the attention segments that a segment of a grid makes in the layers."""
        return (math.prod(grid),)

    def expect(self, grid: SegmentGrid) -> None:
        """Raise ValueError, which says why, if the module cannot read a segment of a grid."""
        self.emission.rows(grid)

    def changed(self, options: tuple[str, ...]) -> tuple[str, ...]:
        """Return those of some options that are not as they are by default; what a model does not have is not."""
        defaults = {field.name: field.default for field in attrs.fields(type(self)) if field.name in options}
        plain = {
            name: default.factory() if isinstance(default, attrs.Factory) else default  # type: ignore[arg-type]
            for name, default in defaults.items()
        }
        return tuple(name for name in options if name in plain and getattr(self, name) != plain[name])

    def norm_parameters(self, name: str, layer: int | str, *, partial: bool = True) -> Iterator[Parameter]:
        """Yield the parameters of a norm of the hidden states."""
        yield from norm_parameters(name, self.hidden, layer, self.norm, partial=partial)


@attrs.frozen(kw_only=True)
class Vit(Transformer):
    """`vit`: a tower, which reads rows from the data and emits rows of width `hidden`.

    Rows come in segments (`Sample.segments`), and attention stays within a segment; within a frame where the grid of a
    segment has frames.

    Attributes:
        features: the width of the rows.
        stem: what makes hidden states of rows. "patch": one linear layer. "whisper": two convolutions over frames of
            sound, each with a GELU, the second at every other frame.
        patch_bias: the linear layer of the stem has a bias.
        positions: "rotary" (along a segment), "rotary_2d" (height and width), or "learned" (a table only).
        position_count: rows of a table of positions that is added behind the stem; 0: there is none.
        position_interpolation: "none", or "bilinear": the table is a square, which grids of any size read between
            its rows.
        class_token: a learnt row before those of each frame.
        emit_class_token: it is emitted too.
        pre_norm: a norm before the layers.
        final_norm: a norm behind the layers.
        merge: so many by so many rows of a frame become one, side by side. Rows come block by block.
        pool: so many rows become their mean, before the final norm; what remains at the end is dropped.
        window: attention stays within windows of so many by so many merged rows, save in the full layers; 0: it does
            not.
        deepstack_layers: layers whose output the edges also emit, each through a merger of its own, beside the rows.
    """

    features: int | None = None
    stem: str = "patch"
    patch_bias: bool = True
    positions: str = "rotary"
    position_count: int = 0
    position_interpolation: str = "none"
    class_token: bool = False
    emit_class_token: bool = False
    pre_norm: bool = False
    final_norm: bool = True
    merge: int = 1
    pool: int = 1
    deepstack_layers: tuple[int, ...] = ()

    @property
    def emission(self) -> Emission:
        """How many rows the module emits for a segment that it reads."""
        stride = 2 if self.stem == "whisper" else 1
        return Emission(stride=stride, merge=self.merge, pool=self.pool, extra=int(self.emit_class_token))

    @property
    def row_width(self) -> int:
        """The width of the rows that the module emits, before an edge projects them."""
        return self.hidden * self.merge**2

    def spans(self, grid: SegmentGrid) -> tuple[int, ...]:
        """Return the lengths of the attention segments that a segment of a grid makes: its frames."""
        frames, rows = Emission(stride=self.emission.stride).frames(grid)
        return (rows + self.class_token,) * frames

    def window_pairs(self, grid: SegmentGrid) -> int:
        """Return the pairs of positions of a segment that lie in one window, of those layers."""
        frames, *sides = grid
        whole = (divmod(side // self.merge, self.window) for side in sides)
        return frames * self.merge**4 * math.prod(count * self.window**2 + rest**2 for count, rest in whole)

    def rows_in_layers(self, grids: Sequence[SegmentGrid]) -> TowerRows:
        """Return where the rows of segments are among the positions of the layers."""
        if self.emission.stride > 1:
            grids = tuple((length // self.emission.stride,) for (length,) in grids)
        return tower_rows(
            grids,
            merge=self.merge,
            pool=self.pool,
            window=self.window,
            class_token=self.class_token,
            emit_class_token=self.emit_class_token,
        )

    def windows(self, grid: SegmentGrid) -> tuple[int, ...]:
        """Return the lengths of the attention segments of a segment in the layers with windows."""
        frames, *sides = grid
        blocks = (_parts(side // self.merge, self.window) for side in sides)
        return tuple(rows * columns * self.merge**2 for rows, columns in itertools.product(*blocks)) * frames

    def expect(self, grid: SegmentGrid) -> None:
        """Raise ValueError, which says why, if the module cannot read a segment of a grid."""
        flat = len(grid) != PLANE
        if self.stem == "whisper" and not flat:
            raise ValueError(f"a grid of {grid} is no length of a sound")
        if flat and (self.positions == "rotary_2d" or self.window or self.position_interpolation != "none"):
            raise ValueError(f"a grid of {grid} has no height and width")
        self.emission.rows(grid)
        longest = max(self.spans(grid), default=0)
        if not self.position_count or self.position_interpolation != "none":
            return
        if longest > self.position_count:
            raise ValueError(
                f"a grid of {grid} needs {longest} positions, and there are {self.position_count}"
            )
        if not flat and longest != self.position_count:
            raise ValueError(
                f"a grid of {grid} needs {longest} positions, and the table of {self.position_count} is for images "
                "of one size"
            )

    def first_parameters(self) -> Iterator[Parameter]:
        """Yield the parameters before the layers."""
        assert self.features is not None
        if self.stem == "whisper":
            for name, width in (("conv1", self.features), ("conv2", self.hidden)):
                kernel = (self.hidden, width, CONVOLUTION)
                yield Parameter(f"input.{name}.weight", kernel, FIRST, std=self.init_std)
                yield Parameter(f"input.{name}.bias", (self.hidden,), FIRST)
        else:
            yield from linear_parameters(
                "input", (self.hidden, self.features), FIRST, self.init_std, bias=self.patch_bias
            )
        if self.position_count:
            yield Parameter("positions.weight", (self.position_count, self.hidden), FIRST, std=self.init_std)
        if self.class_token:
            yield Parameter("class_token", (self.hidden,), FIRST, std=self.init_std)
        if self.pre_norm:
            yield from self.norm_parameters("pre_norm", FIRST, partial=False)

    def final_parameters(self) -> Iterator[Parameter]:
        """Yield the parameters of the final norm, which reads whole segments if rows are pooled before it."""
        if self.final_norm:
            yield from self.norm_parameters("final_norm", LAST, partial=self.pool == 1)


@attrs.frozen(kw_only=True)
class Block(Transformer):
    """`block`: reads rows of width `hidden`, emits one row of that width for each."""


@attrs.frozen(kw_only=True)
class Gpt(Transformer):
    """`gpt`: reads tokens, with rows at the placeholders; its loss is the cross entropy on text.

    `vocab_padding` rows follow those of the vocabulary, so that tp divides them. No token reads them, their logits are
    minus infinity, and their gradients are zero.

    With `rotary_sections`, so many of the angles of a head follow the time, the height and the width of a position;
    `rotary_sections_interleaved` says that they take turns. After each of the first `deepstack` layers, rows that came
    beside the others are added to the hidden states at the placeholders.
    """

    vocab: int
    vocab_padding: int = 0
    tied_embeddings: bool = False
    rotary_sections: tuple[int, ...] = ()
    rotary_sections_interleaved: bool = False
    deepstack: int = 0

    causal = True
    has_loss = True
    reads_text = True

    @property
    def vocab_rows(self) -> int:
        """Rows of the token embedding."""
        return self.vocab + self.vocab_padding

    def first_parameters(self) -> Iterator[Parameter]:
        """Yield the token embedding."""
        copy = LAST if self.tied_embeddings else None
        yield self._of_vocab("embedding.weight", FIRST, copy)

    def last_parameters(self) -> Iterator[Parameter]:
        """Yield the output projection, unless the embedding is tied to it."""
        if not self.tied_embeddings:
            yield self._of_vocab("output.weight", LAST)

    def _of_vocab(self, name: str, end: str, copy: str | None = None) -> Parameter:
        shape, padding = (self.vocab_rows, self.hidden), self.vocab_padding
        return Parameter(name, shape, end, std=self.init_std, tp_dim=0, copy=copy, padding=padding)


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


def unpadded(options: BuiltIn | Mapping[str, Any]) -> BuiltIn | Mapping[str, Any]:
    """Return options without padding of the vocabulary, which only a layout needs."""
    return attrs.evolve(options, vocab_padding=0) if isinstance(options, Gpt) else options


def norm_parameters(
    name: str, width: int, layer: int | str, norm: str, *, partial: bool = False
) -> Iterator[Parameter]:
    """Yield the parameters of a norm: a weight, and for a layer norm a bias."""
    yield Parameter(f"{name}.weight", (width,), layer, constant=1.0, partial=partial)
    if norm == "layernorm":
        yield Parameter(f"{name}.bias", (width,), layer, partial=partial)


def linear_parameters(
    name: str, shape: tuple[int, int], layer: int | str, std: float, *, bias: bool = True
) -> Iterator[Parameter]:
    """Yield the parameters of a linear layer of shape (out, in) that every tp rank holds and computes whole."""
    yield Parameter(f"{name}.weight", shape, layer, std=std)
    if bias:
        yield Parameter(f"{name}.bias", shape[:1], layer)


def _parts(count: int, size: int) -> tuple[int, ...]:
    """Cut a count into parts of a size, the last of which may be smaller.

    >>> _parts(5, 2)
    (2, 2, 1)
    """
    return (size,) * (count // size) + ((count % size,) if count % size else ())


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
    emission: Emission = ONE_EACH

    layers = 1
    init_std = 0.02
    causal = False
    reads_text = False

    @property
    def hidden(self) -> int | None:
        """The width of the rows that it emits."""
        return self.width

    row_width = hidden

    def spans(self, grid: SegmentGrid) -> tuple[int, ...]:
        """Return the rows of a segment; what the network makes of them is not known."""
        return (math.prod(grid),)

    def expect(self, grid: SegmentGrid) -> None:
        """Raise ValueError, which says why, if the module cannot read a segment of a grid."""
        self.emission.rows(grid)

    def parameters(self) -> Iterator[Parameter]:
        """Yield nothing: its parameters are known only when it is built."""
        yield from ()
