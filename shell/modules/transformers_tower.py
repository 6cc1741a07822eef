"""transformers' own network as a tower: ``model = "hf:FOLDER#vision_tower"``.

It is a module of the user's that nobody has to write: the job's reader makes a table of it (`shell.job.published`), and
`build` makes the network. It reads the same rows as the converted tower, patches of images of one size, and emits the
same rows; the projector behind it is the job's. It is one stage, on dp ranks only. Its parameters have the names that
the tensors have in the folder. It needs transformers.
"""

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.shell.job.published import CONFIG, published


class PatchesTower(nn.Module):
    """A vision tower of transformers that reads patches of images as rows.

    `grid` and `patch` say how patches of (channels, height, width) lie in an image; `skips` is 1 if the class token is
    not emitted.
    """

    def __init__(self, tower: nn.Module, prefix: str, *, grid: Sequence[int], patch: int, skips: int) -> None:
        super().__init__()
        self.side, self.patch, self.skips = tuple(grid[1:]), patch, skips
        self._tower = (tower,)  # It is registered once, under its prefix.
        network, names = tower, [*filter(None, prefix.split("."))]
        for name in reversed(names[1:]):
            outer = nn.Module()
            outer.add_module(name, network)
            network = outer
        self.add_module(names[0], network)

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the rows that the last of its layers gives; see `OwnNetwork`."""
        high, wide = self.side
        patches = inputs["rows"].unflatten(1, (-1, self.patch, self.patch)).unflatten(0, (-1, high, wide))
        pixels = patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
        hidden = self._tower[0](pixel_values=pixels, output_hidden_states=True).hidden_states[-1]
        return {"rows": hidden[:, self.skips :].flatten(0, 1)}


def build(*, folder: str, module: str) -> nn.Module:
    """Return the tower of a checkpoint folder with its weights; `module` names it in the checkpoint.

    Raises PlanError if transformers is not installed.
    """
    found = published(Path(folder))
    described = found.model.modules[module]
    first = next(iter(described.recipes["input.weight"].tensors)).name
    prefix = first.removesuffix("embeddings.patch_embedding.weight")
    tower = _empty(json.loads(Path(folder, CONFIG).read_text(encoding="utf-8")), described.option("layers"))
    weights: dict[str, Tensor] = {}
    for name in tower.state_dict():
        place = found.tensors[f"{prefix}{name}"]
        with safe_open(Path(folder, place.file), framework="pt") as file:
            weights[name] = file.get_tensor(f"{prefix}{name}")
    tower.load_state_dict(weights)
    skips = int(described.option("class_token") and not described.option("emit_class_token"))
    assert described.grid is not None
    return PatchesTower(tower, prefix, grid=described.grid, patch=described.patch[-1], skips=skips)


def _empty(config: Mapping[str, Any], layers: int) -> nn.Module:
    """Return the tower as transformers builds it, up to the layer whose rows are read, without what comes after."""
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        fact = "transformers is not installed, whose own tower this is."
        raise PlanError([Problem("modules", fact, "Run: pip install 'mimogrid[hf]'.")]) from error
    table = dict(config["vision_config"])
    kind = table.pop("model_type", "clip_vision_model")
    vision = transformers.AutoConfig.for_model(kind, **{**table, "vision_use_head": False})
    tower: Any = transformers.AutoModel.from_config(vision, attn_implementation="sdpa", dtype=torch.float32)
    tower.encoder.layers = tower.encoder.layers[:layers]
    tower.post_layernorm = nn.Identity()
    return tower  # type: ignore[no-any-return]
