"""Networks: what a checkpoint holds, as modules of a job with a recipe for each of their parameters.

>>> options = {"layers": 2, "hidden": 8, "heads": 2, "class_token": True}
>>> clip = PublishedModule(model="vit", options=options, grid=(1, 4, 4))
>>> clip.table()["options"]
{'layers': 2, 'hidden': 8, 'heads': 2, 'class_token': True}
>>> clip.rows_out((1, 4, 4))
16
"""

import fnmatch
from collections.abc import Iterator, Mapping
from typing import Any

import attrs

from mimogrid.core.base.errors import Problem
from mimogrid.core.models.mapping import Recipe, Shape
from mimogrid.core.models.positions import frames_seen
from mimogrid.core.models.segments import Emission


DEFAULTS: dict[str, Any] = {
    "norm": "layernorm",
    "norm_eps": 1e-5,
    "activation": "gelu",
    "gated": False,
    "qkv_bias": True,
    "k_bias": True,
    "out_bias": True,
    "mlp_bias": True,
    "qk_norm": False,
    "positions": "rotary",
    "position_count": 0,
    "position_interpolation": "none",
    "rotary_base": 10_000.0,
    "rotary_scaling": {},
    "rotary_sections": [],
    "rotary_sections_interleaved": False,
    "window": 0,
    "full_layers": [],
    "experts": 0,
    "top_k": 2,
    "norm_top_k": True,
    "dense_layers": [],
    "tied_embeddings": False,
    "deepstack": 0,
    "deepstack_layers": [],
    "stem": "patch",
    "patch_bias": True,
    "class_token": False,
    "emit_class_token": False,
    "pre_norm": False,
    "final_norm": True,
    "merge": 1,
    "pool": 1,
}
"""What an option is where a job file leaves it out."""


THEIRS = "transformers"
"""The model of a tower of which nothing is known but which rows it reads and emits."""


def option(options: Mapping[str, Any], name: str) -> Any:
    """Return one of a module's options, or its default."""
    return options[name] if name in options else DEFAULTS[name]


@attrs.frozen(kw_only=True)
class PublishedModule:
    """A network of a checkpoint as a module of a job.

    Attributes:
        model: `gpt` or `vit`; or `THEIRS`, a tower of no family here, which transformers itself runs.
        options: of the model; those that a job file may leave out may be missing.
        recipes: of every parameter, by its name in the module.
        frozen: patterns of parameters that never train.
        carried: patterns of tensors on disk that no parameter is made of; an export copies them.
        copies: tensors on disk that are another one again, such as the head of a tied embedding; each by its name.
        feeds: the modules that read its rows.
        projector: per module that it feeds, the table of the edge's projector; no entry: one linear layer.
        patch: what one input row covers: (frames, height, width) in pixels, or (1,), a frame of audio.
        grid: rows of every segment along these; None: segments differ.
    """

    model: str
    options: Mapping[str, Any]
    recipes: Mapping[str, Recipe] = attrs.field(factory=dict[str, Recipe])
    frozen: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()
    copies: Mapping[str, str] = attrs.field(factory=dict[str, str])
    feeds: tuple[str, ...] = ()
    projector: Mapping[str, Mapping[str, Any]] = attrs.field(factory=dict[str, Mapping[str, Any]])
    patch: Shape = ()
    grid: Shape | None = None

    def option(self, name: str) -> Any:
        """Return an option, or its default."""
        return option(self.options, name)

    def table(self) -> dict[str, Any]:
        """Return the module's table in a job file, without what has its default."""
        derived = {
            "kv_heads": self.options["heads"],
            "head_width": self.options["hidden"] // self.options["heads"],
        }
        defaults = DEFAULTS | derived
        table: dict[str, Any] = {
            "model": self.model,
            "feeds": list(self.feeds),
            "frozen": list(self.frozen),
            "projector": {target: dict(projector) for target, projector in self.projector.items()},
            "options": {
                name: v for name, v in self.options.items() if name not in defaults or v != defaults[name]
            },
        }
        return {key: value for key, value in table.items() if value}

    def grid_of(self, *size: int) -> Shape:
        """Return the grid of a segment of (frames, height, width) pixels, or of so many frames of audio.

        Raises ValueError for an image that is not whole patches, or not of the one size that the module takes, and for
        more frames of audio than there are positions.
        """
        if self.option("stem") == "whisper":
            most = 2 * self.option("position_count")
            if size[0] > most:
                raise ValueError(f"has {size[0]} frames, and the module has positions for {most}")
            return (min(frames_seen(size[0]), most),)
        grid = (
            -(-size[0] // self.patch[0]),
            *(n // p for p, n in zip(self.patch[1:], size[1:], strict=True)),
        )
        if self.grid not in {None, grid}:
            raise ValueError(f"{size} makes a grid of {grid}, and the module takes {self.grid} only")
        if self.grid is None and any(n % p for p, n in zip(self.patch[1:], size[1:], strict=True)):
            raise ValueError(f"{size} is no whole number of patches of {self.patch}")
        return grid

    def rows_out(self, grid: Shape) -> int:
        """Return how many rows the module emits for a segment of a grid.

        Raises ValueError for a grid that cannot be merged.
        """
        emission = Emission(
            stride=2 if self.option("stem") == "whisper" else 1,
            merge=self.option("merge"),
            pool=self.option("pool"),
            extra=int(self.option("emit_class_token")),
        )
        return emission.rows(grid)


@attrs.frozen(kw_only=True)
class Placeholder:
    """What stands in a text where rows go, one token for each row.

    Attributes:
        module: the module that emits the rows.
        token: the token's id.
        per_second: how far multimodal positions go on in a second of video; 0: every frame is a segment of its own,
            or the language model has no such positions.
    """

    module: str
    token: int
    per_second: int = 0


BUFFERS = ("*rotary_emb.inv_freq", "*.position_ids")
"""Tables that files of old transformers hold and that nothing reads."""


@attrs.frozen(kw_only=True)
class Model:
    """A checkpoint: its modules by name, and its placeholders by what they stand for (image, video, audio)."""

    modules: Mapping[str, PublishedModule]
    placeholders: Mapping[str, Placeholder] = attrs.field(factory=dict[str, Placeholder])

    def rows_of(self, kind: str, *size: int) -> int:
        """Return how many rows, and placeholders, an input of a kind and size makes; see `PublishedModule.grid_of`.

        Raises ValueError for a size that the module cannot take.
        """
        module = self.modules[self.placeholders[kind].module]
        return module.rows_out(module.grid_of(*size))

    def recipes(self) -> dict[str, Recipe]:
        """Return the recipes of all parameters, by ``module.parameter``."""
        return {
            f"{name}.{parameter}": recipe
            for name, module in self.modules.items()
            for parameter, recipe in module.recipes.items()
        }

    def original(self, name: str) -> str:
        """Return of which tensor on disk one is a copy; by default of itself."""
        return next((m.copies[name] for m in self.modules.values() if name in m.copies), name)

    def is_carried(self, name: str) -> bool:
        """Whether a tensor on disk that is in no recipe is copied by an export."""
        patterns = (pattern for module in self.modules.values() for pattern in module.carried)
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in (*patterns, *BUFFERS))

    def differences(self, found: Mapping[str, Shape]) -> Iterator[Problem]:
        """Yield what is wrong with the tensors of a checkpoint, given their names and shapes."""
        expected = {t.name: t.shape for recipe in self.recipes().values() for t in recipe.tensors}
        missing = [name for name in expected if name not in found]
        surplus = [
            name for name in found if self.original(name) not in expected and not self.is_carried(name)
        ]
        misshapen = [
            f"{name} ({shape}, not {expected[self.original(name)]})"
            for name, shape in found.items()
            if tuple(shape) != expected.get(self.original(name), tuple(shape))
        ]
        remedy = "Check that the config.json and the files are of one checkpoint."
        for fact, names in (
            ("lacks", missing),
            ("has besides", surplus),
            ("has in another shape", misshapen),
        ):
            if names:
                listed = ", ".join(sorted(names)[:_LISTED]) + (" ..." if len(names) > _LISTED else "")
                tensors = "1 tensor" if len(names) == 1 else f"{len(names)} tensors"
                yield Problem("checkpoint", f"{fact} {tensors}: {listed}.", remedy)


_LISTED = 5
