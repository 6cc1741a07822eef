"""Qwen2-Audio: Whisper's encoder, its rows averaged in pairs before the last norm, and a language model."""

from collections.abc import Mapping
from typing import Any

import attrs

from mimogrid.core.models import whisper
from mimogrid.core.models.config import Config, Family
from mimogrid.core.models.network import Model, Placeholder
from mimogrid.core.models.stack import linear


DEFAULTS: Mapping[str, Any] = {"audio_token_index": 151646}
DEFAULTS_AUDIO: Mapping[str, Any] = {
    **whisper.DEFAULTS,
    "num_mel_bins": 128,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "d_model": 1280,
}


def read(config: Config) -> Model:
    """Return both modules; the head is never tied, whatever the file says, as in transformers."""
    table = config.within("audio_config", defaults=DEFAULTS_AUDIO, at="audio_tower.")
    audio, untied = whisper.encoder(table), {"tie_word_embeddings": False}
    language = config.part(
        "text_config", role="language", otherwise="qwen2", at="language_model.", instead=untied
    )
    projector = f"{config.prefix('multi_modal_projector.linear.weight')}multi_modal_projector.linear"
    edge = linear(projector, "projector.language", (language.options["hidden"], audio.options["hidden"]))
    audio = attrs.evolve(
        audio, options={**audio.options, "pool": 2}, feeds=("language",), recipes={**audio.recipes, **edge}
    )
    token = config.integer(config.written("audio_token_id", "audio_token_index"), least=0)
    return Model(
        modules={"audio": audio, "language": language},
        placeholders={"audio": Placeholder(module="audio", token=token)},
    )


FAMILIES = (
    Family(
        model_type="qwen2_audio",
        architectures=("Qwen2AudioForConditionalGeneration",),
        defaults=DEFAULTS,
        read=read,
    ),
)
