"""Layers: megatron-core's transformer layer, with parts that run in any dtype and on any device.

The specification keeps Megatron's layer, attention and MLP, and with tp > 1 its tensor-parallel linears. The core
attention (`attention`) and the norm are local. They never round: a module in fp64 computes everything in fp64.
"""

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn
from torch.nn import functional

from mimogrid.core.job.models import BuiltIn, Vit
from mimogrid.shell.megatron.attention import CoreAttention, Rotary
from mimogrid.shell.megatron.draws import BEHIND_ATTENTION, BEHIND_MLP, child, draw_of, dropped
from mimogrid.shell.megatron.rows import SEGMENTS, WINDOWS, PackedRow
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
        self.lora: nn.Module | None = None

    def forward(self, input: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]  # noqa: A002
        """Return the product, and no bias."""
        output = super().forward(input)
        return output if self.lora is None else output + self.lora(input), None


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
        self.lora: nn.Module | None = None

    def forward(self, input_: Tensor, *more: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        """Return the product, with what LoRA adds, and the bias where it is added later."""
        output, bias = super().forward(input_, *more, **options)  # type: ignore[misc]
        return output if self.lora is None else output + self.lora(input_), bias

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


class ReadsRow:
    """A part of a layer that reads the row which the layer computes."""

    row: PackedRow | None = None


class DropoutAdd(ReadsRow):
    """Stands for Megatron's `bias_dropout_add`: what is dropped hangs on the row, where that has keys to draw from."""

    def __init__(self, draw: int) -> None:
        self.draw = draw

    def __call__(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        """Return what adds an output and its bias to the hidden states."""
        keys = None if self.row is None else self.row.keys_between
        if keys is None:
            added: Callable[..., Tensor] = get_bias_dropout_add(training, fused)
            return added
        return functools.partial(_added, child(keys, self.draw))


class Layer(TransformerLayer):  # type: ignore[misc]
    """Megatron's layer, whose MLP and dropout hear of the row: Megatron tells only the attention.

    A recomputed layer says it again, since other microbatches may have been computed in between. The block's argument
    `attention_bias`, which is captured for recomputation as the row is, has what the first layers add to their outputs.
    `layer` is its number within the model. `readers` are further parts that read the row.
    """

    def __init__(self, *arguments: Any, layer: int, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.self_attn_bda = DropoutAdd(draw_of(BEHIND_ATTENTION, layer))
        self.mlp_bda = DropoutAdd(draw_of(BEHIND_MLP, layer))
        self.readers: list[ReadsRow] = []

    def forward(
        self,
        *arguments: Any,
        packed_seq_params: PackedRow | None = None,
        attention_bias: Sequence[Tensor] | None = None,
        **more: Any,
    ) -> Any:
        """Compute the layer; see Megatron's."""
        for part in (self.self_attn_bda, self.mlp, self.mlp_bda, *self.readers):
            if isinstance(part, ReadsRow):
                part.row = packed_seq_params
        hidden, context = super().forward(*arguments, packed_seq_params=packed_seq_params, **more)
        if attention_bias and self.layer_number <= len(attention_bias):
            hidden = hidden + attention_bias[self.layer_number - 1]
        return hidden, context


def _added(
    keys_S: Tensor, output: tuple[Tensor, Tensor | None], residual_S1H: Tensor, probability: float
) -> Tensor:
    added, bias = output
    return residual_S1H + dropped(added if bias is None else added + bias, keys_S, probability)


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
            qk_layernorm=model.qk_norm,  # From 0.19 on it refuses norms of heads that only the specification has.
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
    model: BuiltIn,
    *,
    layers: range,
    tp: int,
    weight_grads: WeightGradStore,
    mlps: Mapping[int, Any] = MappingProxyType({}),
) -> TransformerBlockSubmodules:
    """Return the specification of a stack of layers and its final norm.

    `layers` are numbered within the model. `mlps` are the specifications of the MLPs that are not dense, by layer.
    """
    dense = _dense(model, tp, weight_grads)
    return TransformerBlockSubmodules(
        layer_specs=[_layer_spec(model, layer, tp, weight_grads, mlps.get(layer, dense)) for layer in layers],
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


def _segmentation(model: BuiltIn, layer: int) -> dict[str, Any]:
    """Return how far the attention of a layer sees: within windows of a segment, or some positions back."""
    window = model.window_of(layer)
    if not isinstance(model, Vit):
        return {"window": window}
    return {"segmentation": WINDOWS if window else SEGMENTS}


def _layer_spec(model: BuiltIn, layer: int, tp: int, weight_grads: WeightGradStore, mlp: Any) -> ModuleSpec:
    column, row = _linears(tp, weight_grads, model.qkv_bias, model.out_bias)
    head_norm = LocalRMSNorm if model.qk_norm else None
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal if model.causal else AttnMaskType.padding},
        submodules=SelfAttentionSubmodules(
            linear_qkv=column,
            core_attention=functools.partial(
                CoreAttention, rotary=Rotary.of(model), layer=layer, **_segmentation(model, layer)
            ),
            linear_proj=row,
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )
    return ModuleSpec(
        module=Layer,
        params={"layer": layer},
        submodules=TransformerLayerSubmodules(
            input_layernorm=NORMS[model.norm],
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=NORMS[model.norm],
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )
