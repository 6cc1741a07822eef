"""Layers: megatron-core's transformer layer, with parts that run in any dtype and on any device.

The specification keeps Megatron's layer, attention and MLP, and with tp > 1 its tensor-parallel linears. The core
attention (rotary, then torch's scaled dot product) and the norm are local. They never round: a module in fp64 computes
everything in fp64, rotary angles included.

Shapes in names: S positions, B samples, N heads, D head width.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import attrs
import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn
from torch.nn import functional

from mimogrid.core.base.zigzag import WHOLE, ZigZag
from mimogrid.core.job.models import BuiltIn
from mimogrid.core.models.frequencies import frequencies, parse_scaling
from mimogrid.shell.device.device import sent
from mimogrid.shell.megatron.weight_grad_store import WeightGradStore


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": functools.partial(functional.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": functional.silu,
    "relu": functional.relu,
}

_RECOMPUTE: dict[str, dict[str, object]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}


@attrs.frozen
class Rotary:
    """The rotary positions of a model: angles per position of each pair of a head's values.

    `scaled` has the angles if a scaling stretches those of `base`, and `factor` multiplies cosines and sines.
    """

    base: float = 10_000.0
    scaled: tuple[float, ...] | None = None
    factor: float = 1.0

    @classmethod
    def of(cls, model: BuiltIn) -> "Rotary":
        """Return those of a model. Raises PlanError if its scaling is not known."""
        if not model.rotary_scaling:
            return cls(model.rotary_base)
        scaling = parse_scaling("rotary_scaling", model.rotary_scaling)
        angles = frequencies(model.head_width, model.rotary_base, scaling=scaling)
        return cls(model.rotary_base, angles, scaling.attention_factor)


class CoreAttention(nn.Module):
    """Rotary attention of the local heads. There may be fewer key-value heads than heads.

    Causal attention takes no mask. Other attention adds `attention_mask` to the scores: 0, or minus infinity for a key
    that is padding, broadcastable to [B, N, S, S]. None means that no key is padding.

    Under context parallelism S are this rank's positions (`zigzag`), and the keys and values of all ranks are gathered,
    rank after rank. A mask has its keys in that order.
    """

    def __init__(
        self,
        config: TransformerConfig,
        attn_mask_type: AttnMaskType,
        pg_collection: ProcessGroupCollection,
        rotary: Rotary = Rotary(),
        window: int = 0,
        **_: object,
    ) -> None:
        super().__init__()
        self.window = window
        self.rotary = rotary
        self.dropout = float(config.attention_dropout)
        self.causal = attn_mask_type is AttnMaskType.causal
        self.cp = pg_collection.cp
        self.cut = ZigZag(self.cp.rank(), self.cp.size())
        # Under sequence parallelism Megatron runs all of the block on the random states that differ along tp.
        self.forks = self.dropout > 0 and not config.sequence_parallel

    def forward(
        self,
        query_SBND: Tensor,
        key_SBND: Tensor,
        value_SBND: Tensor,
        attention_mask: Tensor | None,
        **_: object,
    ) -> Tensor:
        """Return [S, B, N * D]."""
        query, key = (self._rotated(heads) for heads in (query_SBND, key_SBND))
        draws = get_cuda_rng_tracker().fork() if self.forks and self.training else contextlib.nullcontext()
        with draws:
            if self.cut.size == 1:
                mask = (
                    self._in_window(len(query), len(query), query.device) if self.causal else attention_mask
                )
                mixed = self._attend(query, key, value_SBND, mask)
            else:
                mixed = self._attend_in_parts(query, key, value_SBND, attention_mask)
        return mixed.flatten(2)

    def _rotated(self, heads_SBND: Tensor) -> Tensor:
        positions, _, _, width = heads_SBND.shape
        cos, sin = rotary_table(
            positions, width, heads_SBND.dtype, heads_SBND.device, self.cut, rotary=self.rotary
        )
        turned: Tensor = _Rotation.apply(heads_SBND, cos, sin)  # type: ignore[no-untyped-call]
        return turned

    def _attend_in_parts(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Attend to the keys of all ranks. If causal, each of the two chunks attends to the keys up to its own."""
        both = gather_from_sequence_parallel_region(torch.cat((key, value), dim=-1), group=self.cp)
        if not self.causal:
            key, value = both.chunk(2, dim=-1)
            return self._attend(query, key, value, mask)
        pieces = both.chunk(2 * self.cut.size)
        in_order = torch.cat([pieces[place] for place in self.cut.gathered()[: self.cut.chunks[-1] + 1]])
        mixed = []
        for part, chunk in zip(query.chunk(2), self.cut.chunks, strict=True):
            keys = (chunk + 1) * len(part)
            key, value = in_order[:keys].chunk(2, dim=-1)
            earlier = self._in_window(len(part), keys, query.device)
            mixed.append(self._attend(part, key, value, earlier))
        return torch.cat(mixed)

    def _in_window(self, queries: int, keys: int, device: torch.device) -> Tensor | None:
        """Return which keys queries may see; None: all up to their own, where both are the same positions."""
        if not self.window and queries == keys:
            return None
        return _visible(queries, keys, self.window or keys, device)

    def _attend(self, query_SBND: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Attend with a mask, or causally if there is none and queries and keys are the same positions."""
        mixed_BNSD = functional.scaled_dot_product_attention(
            query_SBND.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=mask,
            is_causal=self.causal and mask is None,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=query_SBND.shape[2] != key.shape[2],
        )
        return mixed_BNSD.permute(2, 0, 1, 3)


@functools.lru_cache(maxsize=64)
def _visible(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """Return which of the first `keys` positions each of the last `queries` of them may see, [queries, keys].

    These are its own and the `window` - 1 before it.
    """
    earlier = keys - queries
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(earlier).triu(earlier - window + 1)


class _Rotation(torch.autograd.Function):
    """Rotates the halves (x, y) of each head to (x cos - y sin, y cos + x sin), position by position.

    Backward rotates the other way. Megatron's own function needs about thirty small operations, this one three.
    """

    @staticmethod
    def forward(ctx: Any, heads_SBND: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.table = cos, sin
        return _turned(heads_SBND, cos, sin, direction=1)

    @staticmethod
    def backward(ctx: Any, grad_SBND: Tensor) -> tuple[Tensor, None, None]:
        return _turned(grad_SBND, *ctx.table, direction=-1), None, None


def _turned(heads_SBND: Tensor, cos: Tensor, sin: Tensor, *, direction: int) -> Tensor:
    turned = heads_SBND * cos
    left, right = turned.chunk(2, dim=-1)
    x, y = heads_SBND.chunk(2, dim=-1)
    left.addcmul_(y, sin, value=-direction)
    right.addcmul_(x, sin, value=direction)
    return turned


@functools.lru_cache(maxsize=64)
def rotary_table(
    positions: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
    cut: ZigZag = WHOLE,
    *,
    rotary: Rotary = Rotary(),
) -> tuple[Tensor, Tensor]:
    """Return the cosines [S, 1, 1, D] and sines [S, 1, 1, D / 2] of S positions: those of `cut`, by default 0, 1, ...

    Angles are computed in the compute dtype, but at least in fp32.
    """
    exact: dict[str, Any] = {"dtype": torch.promote_types(dtype, torch.float32), "device": device}
    if rotary.scaled is None:
        turns = rotary.base ** -(torch.arange(0, width, 2, **exact) / width)
    else:
        turns = sent(torch.tensor(rotary.scaled, dtype=exact["dtype"]), device)
    places = sent(torch.tensor(cut.positions(positions * cut.size), dtype=exact["dtype"]), device)
    angles = torch.outer(places, turns)[:, None, None, :]
    cos, sin = torch.cat((angles, angles), dim=-1).cos(), angles.sin()
    if rotary.factor != 1:
        cos, sin = cos * rotary.factor, sin * rotary.factor
    return cos.to(dtype), sin.to(dtype)


class Affine(nn.Linear):
    """Torch's linear layer; a weight-grad store may put off the product of its weight gradient."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        dtype: torch.dtype | None,
        weight_grads: WeightGradStore,
        bias: bool = True,
    ) -> None:
        super().__init__(input_size, output_size, bias=bias, dtype=dtype)
        self.weight_grads = weight_grads

    def reset_parameters(self) -> None:
        """Do nothing: `weights.initialize` sets the weights."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Return the product with the bias added."""
        return self.weight_grads.multiply(
            lambda weight: functional.linear(input, weight, self.bias), self.weight, input
        )


class Linear(Affine):
    """Replaces Megatron's tensor-parallel linears for tp = 1: one operation instead of about eight.

    It always adds the bias, and returns None in its place.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        bias: bool,
        weight_grads: WeightGradStore,
        no_bias: bool = False,
        **_: object,
    ) -> None:
        super().__init__(
            input_size,
            output_size,
            dtype=config.params_dtype,
            weight_grads=weight_grads,
            bias=bias and not no_bias,
        )

    def forward(self, input: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]  # noqa: A002
        """Return the product, and no bias."""
        return super().forward(input), None


class _Sharded:
    """Adds to Megatron's tensor-parallel linears a weight-grad store, and a bias that is added after the product.

    Megatron adds the bias inside the product, where it gets no gradient if the weight is frozen.
    """

    def __init__(
        self,
        *arguments: Any,
        weight_grads: WeightGradStore,
        bias: bool,
        no_bias: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, bias=bias and not no_bias, **options)  # type: ignore[call-arg]
        self.weight_grads = weight_grads

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None, **how: Any) -> Tensor:  # noqa: A002
        """Multiply; under sequence parallelism the input is this rank's part of the positions."""
        multiply = super()._forward_impl  # type: ignore[misc]
        parts = how["tp_group"] if how["sequence_parallel"] else None
        product = self.weight_grads.multiply(
            lambda weight: multiply(input=input, weight=weight, bias=None, **how), weight, input, parts=parts
        )
        return product if bias is None else product + bias


class ColumnLinear(_Sharded, ColumnParallelLinear):  # type: ignore[misc]
    """A linear layer whose outputs are cut over tp."""


class RowLinear(_Sharded, RowParallelLinear):  # type: ignore[misc]
    """A linear layer whose inputs are cut over tp."""


class LocalLayerNorm(nn.LayerNorm):
    """Torch's layer norm, with Megatron's mark of parameters whose gradients are partial under sp."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: object) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class LocalRMSNorm(nn.RMSNorm):
    """Torch's RMS norm, with the same mark; half precision is computed in fp32, as torch does."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: object) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


NORMS = {"layernorm": LocalLayerNorm, "rmsnorm": LocalRMSNorm}
"""The norms by the name of the option; in Megatron's configuration they are `LayerNorm` and `RMSNorm`."""


def config_of(
    model: BuiltIn,
    *,
    layers: int,
    tp: int,
    sequence_parallel: bool,
    recompute: str,
    dtype: torch.dtype,
    more: Mapping[str, Any] = MappingProxyType({}),
) -> TransformerConfig:
    """Return Megatron's configuration of `layers` layers of a model; `more` has further entries.

    It describes these layers as a module on a pipeline of one rank, whatever the job's pipeline is. Otherwise Megatron
    derives stages itself, and drops layers of a `TransformerBlock`.
    """
    with warnings.catch_warnings():
        # The warning is meant for transformer-engine, whose fused attention has nothing to recompute.
        warnings.filterwarnings("ignore", message="If you are using transformer_engine as the transformer")
        return TransformerConfig(
            num_layers=layers,
            hidden_size=model.hidden,
            num_attention_heads=model.heads,
            num_query_groups=model.kv_heads,
            kv_channels=model.head_width,
            ffn_hidden_size=model.ffn,
            hidden_dropout=model.dropout,
            attention_dropout=model.dropout,
            activation_func=ACTIVATIONS[model.activation],
            gated_linear_unit=model.gated,
            normalization="LayerNorm" if model.norm == "layernorm" else "RMSNorm",
            layernorm_epsilon=model.norm_eps,
            add_bias_linear=True,  # Local linears go by the options besides.
            tensor_model_parallel_size=tp,
            sequence_parallel=sequence_parallel,
            pipeline_model_parallel_size=1,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            # `weights.initialize` draws the weights, for any layout alike; here they are only allocated.
            perform_initialization=False,
            use_cpu_initialization=True,
            # Fused kernels: for CUDA, in half precision, or with an approximated GELU.
            bias_activation_fusion=False,
            bias_dropout_fusion=False,
            masked_softmax_fusion=False,
            persist_layer_norm=False,
            apply_rope_fusion=False,
            cuda_graph_scope=[],
            gradient_accumulation_fusion=False,
            **{**_RECOMPUTE[recompute], **more},
        )


def block_spec(
    model: BuiltIn, *, layers: range, tp: int, weight_grads: WeightGradStore, mlps: Sequence[Any] = ()
) -> TransformerBlockSubmodules:
    """Return the specification of a stack of layers and its final norm.

    `layers` are numbered within the model. `mlps` are the specifications of the MLPs, layer by layer, if they
    are not dense.
    """
    chosen = mlps or [_dense(model, tp, weight_grads)] * len(layers)
    return TransformerBlockSubmodules(
        layer_specs=[
            _layer_spec(model, layer, tp, weight_grads, mlp)
            for layer, mlp in zip(layers, chosen, strict=True)
        ],
        layer_norm=NORMS[model.norm],
    )


def _linears(tp: int, weight_grads: WeightGradStore, bias_in: bool, bias_out: bool) -> Iterator[ModuleSpec]:
    """Yield the specifications of a pair of linears, the first cut by its outputs and the second by its inputs."""
    kinds = (ColumnLinear, RowLinear) if tp > 1 else (Linear, Linear)
    for kind, bias in zip(kinds, (bias_in, bias_out), strict=True):
        yield ModuleSpec(module=kind, params={"weight_grads": weight_grads, "no_bias": not bias})


def _dense(model: BuiltIn, tp: int, weight_grads: WeightGradStore) -> Any:
    column, row = _linears(tp, weight_grads, model.mlp_bias, model.mlp_bias)
    return mlp_of(MLPSubmodules(linear_fc1=column, linear_fc2=row), ffn=model.ffn)


def mlp_of(linears: MLPSubmodules, *, ffn: int) -> Any:
    """Return what a layer builds its MLP from: a specification for megatron-core 0.16, a function for 0.19."""
    if hasattr(MLP, "as_mlp_submodule"):
        return functools.partial(MLP.as_mlp_submodule, submodules=linears, ffn_hidden_size=ffn)
    return ModuleSpec(module=MLP, submodules=linears, params={"ffn_hidden_size": ffn})


def linears_of(mlp: Any) -> MLPSubmodules:
    """Return the linears in what a layer builds its MLP from."""
    found: MLPSubmodules = (
        mlp.keywords["submodules"] if isinstance(mlp, functools.partial) else mlp.submodules
    )
    return found


def _layer_spec(model: BuiltIn, layer: int, tp: int, weight_grads: WeightGradStore, mlp: Any) -> ModuleSpec:
    column, row = _linears(tp, weight_grads, model.qkv_bias, model.out_bias)
    head_norm = LocalRMSNorm if model.qk_norm else None
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal if model.causal else AttnMaskType.padding},
        submodules=SelfAttentionSubmodules(
            linear_qkv=column,
            core_attention=functools.partial(
                CoreAttention, rotary=Rotary.of(model), window=model.window_of(layer)
            ),
            linear_proj=row,
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=NORMS[model.norm],
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=NORMS[model.norm],
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )
