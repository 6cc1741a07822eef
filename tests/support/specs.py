"""Specs: a small multimodal model as a program for Megatron specifies it, on the CPU."""

from typing import Any

import attrs
import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.mimo.config import MimoModelConfig
from megatron.core.models.mimo.submodules.audio import AudioModalitySubmodules
from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mimogrid.core.job.models import Gpt
from mimogrid.shell.megatron.layers import block_spec
from mimogrid.shell.megatron.weight_grad_store import WeightGradStore


IMAGE, HIDDEN, VOCAB, SEQUENCE, PIXELS = 30, 16, 32, 12, 5
LAYER = block_spec(
    Gpt(layers=1, hidden=HIDDEN, heads=4, vocab=VOCAB), layers=range(1), tp=1, weight_grads=WeightGradStore()
).layer_specs[0]


def config(*, pp: int = 1, layers: int = 2, **changes: Any) -> TransformerConfig:
    """A configuration that runs on the CPU."""
    return TransformerConfig(
        num_layers=layers,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        pipeline_model_parallel_size=pp,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        cuda_graph_scope=[],
        **{"hidden_dropout": 0.0, "attention_dropout": 0.0, **changes},
    )


class Pixels(nn.Module):
    """An encoder: rows of pixels [R, P] through a linear layer."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.linear = nn.Linear(PIXELS, hidden)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return [R, H]."""
        return self.linear(pixels)


class Images(nn.Module):
    """An encoder of images [N, 2, P], each with a brightness [N]: two rows [2 N, H]."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.linear = nn.Linear(PIXELS, hidden)

    def forward(self, images: Tensor, brightness: Tensor) -> Tensor:
        """Return [2 N, H]."""
        return self.linear(images * brightness[:, None, None]).flatten(0, 1)


class Frames(Images):
    """The same, with the rows of each image beside each other: [N, 2, H]."""

    def forward(self, images: Tensor, brightness: Tensor) -> Tensor:
        """Return [N, 2, H]."""
        return super().forward(images, brightness).unflatten(0, (-1, 2))


class Doubling(nn.Module):
    """An encoder of which every stage doubles what comes in: pixels on the first, hidden states later."""

    def __init__(self, *, pre_process: bool = True) -> None:
        super().__init__()
        self.pre_process = pre_process
        self.given: Tensor | None = None

    def set_input_tensor(self, hidden: Tensor) -> None:
        """Take what the stage before sent."""
        self.given = hidden

    def forward(
        self, hidden_states: Tensor | None = None, attention_mask: None = None, pixels: Tensor | None = None
    ) -> Tensor:
        """Return [R, P]."""
        given = pixels if self.pre_process else self.given
        assert given is not None
        return 2 * given


def language(*, pp: int = 1, **params: Any) -> ModuleSpec:
    """A language model of two layers."""
    made = {
        "config": config(pp=pp),
        "transformer_layer_spec": LAYER,
        "vocab_size": VOCAB,
        "max_sequence_length": SEQUENCE,
        "position_embedding_type": "none",
    }
    return ModuleSpec(module=GPTModel, params=made | params)


def vision(
    encoder: type = Pixels, *, projected: bool = True, in_features: int = 8, **params: Any
) -> ModuleSpec:
    """Images through one encoder, projected to the language model's width."""
    parts: dict[str, Any] = {"encoders": {"eye": ModuleSpec(module=encoder, params=params)}}
    if projected:
        linear = ModuleSpec(module=nn.Linear, params={"in_features": in_features, "out_features": HIDDEN})
        parts["input_projections"] = [linear]
    return ModuleSpec(module=VisionModalitySubmodules, params={}, submodules=parts)


def audio() -> ModuleSpec:
    """Sounds through one encoder, projected to the language model's width."""
    linear = ModuleSpec(module=nn.Linear, params={"in_features": 6, "out_features": HIDDEN})
    encoders = {"ear": ModuleSpec(module=Pixels, params={"hidden": 6})}
    parts = {"encoders": encoders, "input_projections": [linear]}
    return ModuleSpec(module=AudioModalitySubmodules, params={}, submodules=parts)


def model_config(**fields: Any) -> MimoModelConfig:
    """Both of them."""
    made = {
        "language_model_spec": language(),
        "modality_submodules_spec": {"vision": vision(hidden=8)},
        "special_token_ids": {"vision": IMAGE},
    }
    return MimoModelConfig(**(made | fields))


def batch() -> dict[str, Any]:
    """Two sequences with five placeholders, which lie apart."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, IMAGE, (2, SEQUENCE), generator=generator)
    ids[0, 1:4] = ids[1, [5, 7]] = IMAGE
    return {
        "input_ids": ids,
        "position_ids": torch.arange(SEQUENCE).repeat(2, 1),
        "attention_mask": None,
        "modality_inputs": {"vision": {"eye": {"pixels": torch.randn(5, PIXELS, generator=generator)}}},
    }


@attrs.frozen
class OneOf:
    """As much of a process group as the building of a stage asks for."""

    place: int
    members: int

    def rank(self) -> int:
        """The place among the members."""
        return self.place

    def size(self) -> int:
        """How many there are."""
        return self.members
