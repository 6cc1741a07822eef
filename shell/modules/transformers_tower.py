"""transformers' own network as a tower: ``model = "hf:FOLDER#vision_tower"``, or ``#visual`` or ``#audio_tower``.

It is a module of the user's that nobody has to write: the job's reader makes a table of it (`shell.job.published`), and
`build` makes the network. It reads the same rows as the converted tower, and emits the same rows:

    images   of one size, as patches; the projector behind the tower is the job's
    patches  of images and clips of any size, with their grids; the tower merges and projects them itself
    sounds   of any length; each is padded to the longest; the projector behind the tower is the job's

It is one stage, on dp ranks only. Its parameters have the names that the tensors have in the folder. It computes in the
job's precision, but where transformers casts to single precision. It needs transformers.
"""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.models.network import PublishedModule
from mimogrid.shell.job.published import CONFIG, Published, part_of, published, tower_prefix


class TransformersTower(nn.Module):
    """A tower of transformers, whose parameters are called `prefix` and what they are called there.

    `weight_names` are those in the files, where transformers has others in memory.
    """

    def __init__(self, tower: nn.Module, prefix: str) -> None:
        super().__init__()
        self.weight_names: Mapping[str, str] = {}
        self._tower = (tower,)  # It is registered once, under its prefix.
        network, names = tower, [*filter(None, prefix.split("."))]
        for name in reversed(names[1:]):
            outer = nn.Module()
            outer.add_module(name, network)
            network = outer
        self.add_module(names[0], network)

    @property
    def tower(self) -> Any:
        """The network of transformers."""
        return self._tower[0]

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the rows of all segments, one after the other; see `OwnNetwork`."""
        raise NotImplementedError


class ImagesTower(TransformersTower):
    """A vision tower that reads whole images of one size.

    `grid` and `patch` say how patches of (channels, height, width) lie in an image; `skips` is 1 if the class token is
    not emitted. `layer` is the one whose rows are read, counted from 1.
    """

    def __init__(
        self, tower: nn.Module, prefix: str, *, grid: Sequence[int], patch: int, skips: int, layer: int
    ) -> None:
        super().__init__(tower, prefix)
        self.side, self.patch, self.skips, self.layer = tuple(grid[1:]), patch, skips, layer

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the rows that a layer gives."""
        high, wide = self.side
        patches = inputs["rows"].unflatten(1, (-1, self.patch, self.patch)).unflatten(0, (-1, high, wide))
        pixels = patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
        hidden = self.tower(pixel_values=pixels, output_hidden_states=True).hidden_states[self.layer]
        return {"rows": hidden[:, self.skips :].flatten(0, 1)}


class PatchesTower(TransformersTower):
    """A vision tower that reads patches with their grids, and merges them."""

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the merged rows."""
        return {"rows": self.tower(inputs["rows"], grid_thw=inputs["grids"]).pooler_output}


class SoundsTower(TransformersTower):
    """An audio tower that reads whole sounds of `longest` frames, of which two make a position and four a row."""

    def __init__(self, tower: nn.Module, prefix: str, *, longest: int) -> None:
        super().__init__(tower, prefix)
        self.longest = longest

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the rows of each sound; no position sees one of the padding."""
        frames = inputs["grids"][:, 0]
        sounds = pad_sequence(inputs["rows"].split(frames.tolist()), batch_first=True)
        sounds = functional.pad(sounds, (0, 0, 0, self.longest - sounds.shape[1])).transpose(1, 2)
        counts, places = frames // 2, torch.arange(self.longest // 2, device=frames.device)
        seen = (places < counts[:, None])[:, None, None, :].expand(-1, 1, len(places), -1)
        mask = torch.zeros_like(seen, dtype=sounds.dtype).masked_fill(~seen, torch.finfo(sounds.dtype).min)
        hidden = self.tower(sounds, attention_mask=mask).last_hidden_state
        of_each = (rows[: count // 2] for rows, count in zip(hidden, counts.tolist(), strict=True))
        return {"rows": torch.cat([*of_each])}


def build(*, folder: str, module: str) -> nn.Module:
    """Return the tower of a checkpoint folder with its weights; `module` names it in the checkpoint.

    Raises PlanError if transformers is not installed or does not have the tower, or the folder lacks a tensor of it.
    """
    found = published(Path(folder))
    described = found.model.modules[module]
    prefix = tower_prefix(described)
    tower, names = _empty(found, prefix, described)
    weights: dict[str, Tensor] = {}
    for name, stored in names.items():
        if stored not in found.tensors:
            fact = f"lacks {stored}, which transformers has in this tower."
            raise PlanError([Problem(str(found.folder), fact, "Download the checkpoint again.")])
        with safe_open(found.folder / found.tensors[stored].file, framework="pt") as file:
            weights[name] = file.get_tensor(stored)
    tower.load_state_dict(weights, strict=False)
    if described.option("stem") == "whisper":
        return SoundsTower(tower, prefix, longest=2 * described.option("position_count"))
    if described.grid is None:
        return PatchesTower(tower, prefix)
    skips = int(described.option("class_token") and not described.option("emit_class_token"))
    found_tower = ImagesTower(
        tower,
        prefix,
        grid=described.grid,
        patch=described.patch[-1],
        skips=skips,
        layer=described.option("layers"),
    )
    found_tower.weight_names = {f"{prefix}{name}": stored for name, stored in names.items()}
    _drop_unused(found_tower, torch.ones(described.grid[1] * described.grid[2], described.option("features")))
    return found_tower


def _drop_unused(tower: TransformersTower, rows: Tensor) -> None:
    """Make buffers of the parameters that rows do not depend on: nothing trains, decays or saves them."""
    tower.eval()  # Training may leave layers out at random.
    tower({"rows": rows})["rows"].sum().backward()
    tower.train()
    for module in tower.modules():
        for name, parameter in [*module.named_parameters(recurse=False)]:
            if parameter.grad is None:
                delattr(module, name)
                module.register_buffer(name, parameter.detach(), persistent=False)
            parameter.grad = None


def _empty(found: Published, prefix: str, described: PublishedModule) -> tuple[Any, dict[str, str]]:
    """Return the tower as transformers builds it, and the names in the files of its parameters."""
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        fact = "transformers is not installed, whose own tower this is."
        raise PlanError([Problem("modules", fact, "Run: pip install 'mimogrid[hf]'.")]) from error
    try:
        architecture = getattr(transformers, found.config["architectures"][0])
        with torch.device("meta"):
            whole: nn.Module = architecture._from_config(
                architecture.config_class.from_dict(dict(found.config))
            )
    except (AttributeError, KeyError, ValueError) as error:
        fact = f"transformers {transformers.__version__} cannot make its tower: {error}."
        raise PlanError(
            [Problem(str(found.folder / CONFIG), fact, "Install a version that has it.")]
        ) from error
    ((place, there),) = (each for each in whole.named_modules() if each[0].split(".")[-1] == part_of(prefix))
    kind: Any = type(there)
    config: Any = there.config
    if described.grid is not None:
        config.vision_use_head = False  # of a SigLIP; it reads no rows that leave
    tower = kind._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    known = {name: f"{prefix}{name}" for name, _ in tower.named_parameters()}
    renamed = {
        name: _stored_name(whole, f"{place}.{name}", prefix)
        for name, stored in known.items()
        if stored not in found.tensors
    }
    return tower, known | renamed


def _stored_name(whole: nn.Module, name: str, prefix: str) -> str:
    """Return the name in the files of a parameter of a whole that transformers calls otherwise in memory."""
    loading = importlib.import_module("transformers.core_model_loading")
    with torch.no_grad():
        stored, *_ = loading.revert_weight_conversion(whole, {name: whole.get_parameter(name)})
    return f"{prefix}{stored.partition(f'{part_of(prefix)}.')[2]}"
