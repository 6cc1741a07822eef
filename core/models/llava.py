"""LLaVA 1.5: a vision tower, of which some layer's rows go through two linear layers into a language model."""

from collections.abc import Mapping
from typing import Any

import attrs

from mimogrid.core.models.config import Config, Family
from mimogrid.core.models.network import THEIRS, Model, Placeholder, PublishedModule
from mimogrid.core.models.stack import linear


DEFAULTS: Mapping[str, Any] = {
    "image_token_index": 32000,
    "projector_hidden_act": "gelu",
    "vision_feature_select_strategy": "default",
    "vision_feature_layer": -2,
    "multimodal_projector_bias": True,
    "tie_word_embeddings": False,
}


def read(config: Config) -> Model:
    """Return both modules."""
    vision = config.part(
        "vision_config", role="vision", otherwise="clip_vision_model", at="vision_tower.", unknown=_unknown
    )
    text = config.within("text_config", defaults={})
    tied = {"tie_word_embeddings": bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings"))}
    language = config.part(
        "text_config", role="language", otherwise="llama", at="language_model.", instead=tied
    )
    hidden, bias = language.options["hidden"], config.flag("multimodal_projector_bias")
    activation = config.activation("projector_hidden_act")
    table = {"kind": "mlp", "ffn": hidden, "activation": activation, "bias": bias}
    prefix = f"{config.prefix('multi_modal_projector.linear_1.weight')}multi_modal_projector."
    edge = linear(f"{prefix}linear_1", "projector.language.up", (hidden, vision.options["hidden"]), bias=bias)
    edge |= linear(f"{prefix}linear_2", "projector.language.down", (hidden, hidden), bias=bias)
    vision = _shortened(config, vision)
    vision = attrs.evolve(
        vision, feeds=("language",), projector={"language": table}, recipes={**vision.recipes, **edge}
    )
    token = config.integer(config.written("image_token_id", "image_token_index"), least=0)
    return Model(
        modules={"vision": vision, "language": language},
        placeholders={"image": Placeholder(module="vision", token=token)},
    )


_SIZES = ("patch_size", "image_size", "num_hidden_layers", "hidden_size", "num_attention_heads")
"""What a table must say of a tower that no family here reads."""


def _unknown(table: Config) -> PublishedModule | None:
    """Return a tower of no family here, for images of one size: the rows that it reads, and where its tensors lie."""
    if any(name not in table.values for name in _SIZES):
        return None
    patch, pixels = table.integer("patch_size"), table.integer("image_size")
    side = pixels // patch
    first = next((name for name in table.names if f".{name}".find(f".{_PREFIX}") >= 0), "")
    prefix = first[: first.find(_PREFIX) + len(_PREFIX)] if first else _PREFIX
    channels = attrs.evolve(table, defaults={"num_channels": 3}).integer("num_channels")
    options = {
        "layers": table.integer("num_hidden_layers"),
        "hidden": table.integer("hidden_size"),
        "heads": table.integer("num_attention_heads"),
        "features": channels * patch**2,
        "class_token": any(name.startswith(prefix) and name.endswith(_CLASS_TOKENS) for name in table.names),
    }
    return PublishedModule(
        model=THEIRS,
        options=options,
        patch=(1, patch, patch),
        grid=(1, side, side),
        carried=(f"{prefix}*",),
    )


_PREFIX = "vision_tower."
_CLASS_TOKENS = ("cls_token", "class_token", "class_embedding")


def _shortened(config: Config, vision: PublishedModule) -> PublishedModule:
    """Return the tower up to the layer whose rows the language model reads; what comes after is carried."""
    layers, layer = vision.options["layers"], config.get("vision_feature_layer")
    strategy = config.get("vision_feature_select_strategy")
    if type(layer) is not int or not -layers <= layer <= layers or layer == 0:
        message = f"is {layer}; a tower of {layers} layers gives the rows of one, from -{layers} to {layers}."
        config.problem("vision_feature_layer", message, "Use a checkpoint that takes one layer.")
        return vision
    if strategy not in ("default", "full"):
        config.problem("vision_feature_select_strategy", f"is '{strategy}'.", "Known: default, full.")
    if strategy == "default" and not vision.option("class_token"):
        message = "is 'default', which drops the class token, and the tower has none."
        config.problem("vision_feature_select_strategy", message, 'Write "full".')
    kept = layer if layer > 0 else layers + 1 + layer
    unused = ("final_norm.", *(f"layers.{n}." for n in range(kept, layers)))
    dropped = {name: recipe for name, recipe in vision.recipes.items() if name.startswith(unused)}
    names = sorted({tensor.name for recipe in dropped.values() for tensor in recipe.tensors})
    emits = strategy == "full" and vision.option("class_token")
    options = {"layers": kept, "final_norm": False, "emit_class_token": emits}
    return attrs.evolve(
        vision,
        options={**vision.options, **options},
        recipes={name: recipe for name, recipe in vision.recipes.items() if name not in dropped},
        carried=(*vision.carried, *names),
    )


FAMILIES = (
    Family(
        model_type="llava", architectures=("LlavaForConditionalGeneration",), defaults=DEFAULTS, read=read
    ),
)
