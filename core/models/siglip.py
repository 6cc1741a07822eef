"""SigLIP's vision tower: CLIP's without class token, with biased patches and a norm behind the layers."""

from collections.abc import Mapping
from typing import Any

import attrs

from mimogrid.core.models import clip
from mimogrid.core.models.config import Config, Family
from mimogrid.core.models.network import PublishedModule


DEFAULTS: Mapping[str, Any] = {
    **clip.DEFAULTS,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}


def read(config: Config) -> PublishedModule:
    """Return SigLIP's vision tower; the head that pools its rows is carried."""
    module = clip.tower(config, class_token=False, patch_bias=True, pre_norm=False, final_norm=True)
    head = f"{config.prefix('embeddings.patch_embedding.weight')}head.*"
    return attrs.evolve(module, carried=(*module.carried, head))


FAMILIES = (
    Family(
        model_type="siglip_vision_model",
        architectures=("SiglipVisionModel",),
        defaults=DEFAULTS,
        read=read,
        role="vision",
    ),
    Family(model_type="siglip", architectures=("SiglipModel",), defaults={}, read=clip.read_both),
)
