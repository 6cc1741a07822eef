"""Stacks: the recipes of transformer layers, from their options and from a family's names on disk.

A family gives a table: what we call a part, and what it is called in a layer on disk. Several names are several
tensors that are one of ours (query, key, value; gate, up); one name where we would have several is a fused tensor.

>>> names = {"mlp.up": ("gate_proj", "up_proj"), "mlp.down": "down_proj"}
>>> options = {"hidden": 2, "mlp_bias": False}
>>> for name, recipe in mlp(options, names, "model.layers.0.", "layers.0.", ffn=3).items():
...     print(name, recipe.shape, [rows.tensor.name for rows in recipe.parts])
layers.0.mlp.up.weight (6, 2) ['model.layers.0.gate_proj.weight', 'model.layers.0.up_proj.weight']
layers.0.mlp.down.weight (2, 3) ['model.layers.0.down_proj.weight']
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from mimogrid.core.models.mapping import Recipe, Shape, Stored, by_group, stacked, whole
from mimogrid.core.models.network import option


Options = Mapping[str, Any]
Names = Mapping[str, str | tuple[str, ...]]
Recipes = dict[str, Recipe]
Mlp = Callable[[Options, Names, str, int], Recipes]


def layers(options: Options, names: Names, prefix: str, mlp_of: Mlp | None = None) -> Recipes:
    """Return the recipes of all layers; on disk layer n begins with `prefix`, n and a point.

    `mlp_of(options, names, disk, layer)` gives those of a layer's MLP, where it is not a dense one.
    """
    recipes: Recipes = {}
    for n in range(options["layers"]):
        disk, ours = f"{prefix}{n}.", f"layers.{n}."
        recipes |= attention(options, names, disk, ours)
        recipes |= norm(options, f"{disk}{names['mlp_norm']}", f"{ours}mlp_norm")
        if mlp_of:
            recipes |= mlp_of(options, names, disk, n)
        else:
            recipes |= mlp(options, names, disk, ours, ffn=options["ffn"])
    return recipes


def attention(options: Options, names: Names, disk: str, ours: str) -> Recipes:
    """Return the recipes of a layer's attention and of the norm before it."""
    hidden, heads, width = options["hidden"], options["heads"], head_width(options)
    recipes = norm(options, f"{disk}{names['attention_norm']}", f"{ours}attention_norm")
    recipes[f"{ours}attention.qkv.weight"] = _qkv(options, names, disk, "weight", (hidden,))
    if option(options, "qkv_bias"):
        recipes[f"{ours}attention.qkv.bias"] = _qkv(options, names, disk, "bias", ())
    if option(options, "qk_norm"):
        for part in ("attention.q_norm", "attention.k_norm"):
            recipes[f"{ours}{part}.weight"] = whole(Stored(f"{disk}{names[part]}.weight", (width,)))
    return recipes | linear(
        f"{disk}{names['attention.out']}",
        f"{ours}attention.out",
        (hidden, heads * width),
        bias=option(options, "out_bias"),
    )


def mlp(options: Options, names: Names, disk: str, ours: str, *, ffn: int) -> Recipes:
    """Return the recipes of a dense MLP; a gated one has the gate and then what it opens as one matrix."""
    hidden, bias = options["hidden"], option(options, "mlp_bias")
    up, down = names["mlp.up"], names["mlp.down"]
    recipes: Recipes = {}
    for kind, columns in (("weight", (hidden,)), *((("bias", ()),) if bias else ())):
        parts = up if isinstance(up, tuple) else (up,)
        stored = [Stored(f"{disk}{part}.{kind}", (ffn, *columns)) for part in parts]
        recipes[f"{ours}mlp.up.{kind}"] = stacked(stored, columns)
    return recipes | linear(f"{disk}{down}", f"{ours}mlp.down", (hidden, ffn), bias=bias)


def linear(disk: str, ours: str, shape: tuple[int, int], *, bias: bool = True) -> Recipes:
    """Return the recipes of a linear layer of shape (out, in)."""
    recipes = {f"{ours}.weight": whole(Stored(f"{disk}.weight", shape))}
    if bias:
        recipes[f"{ours}.bias"] = whole(Stored(f"{disk}.bias", shape[:1]))
    return recipes


def norm(options: Options, disk: str, ours: str, *, width: int | None = None) -> Recipes:
    """Return the recipes of a norm, as wide as the hidden states where `width` does not say otherwise."""
    kinds = ("weight", "bias") if option(options, "norm") == "layernorm" else ("weight",)
    shape = (width or options["hidden"],)
    return {f"{ours}.{kind}": whole(Stored(f"{disk}.{kind}", shape)) for kind in kinds}


def patches(disk: str, hidden: int, kernel: Shape, *, bias: bool) -> Recipes:
    """Return the recipes of the embedding of patches: a convolution whose kernel we have as one row."""
    weight = Stored(f"{disk}.weight", (hidden, *kernel))
    recipes = {"input.weight": whole(weight, (hidden, math.prod(kernel)))}
    return recipes | ({"input.bias": whole(Stored(f"{disk}.bias", (hidden,)))} if bias else {})


def merger(
    options: Options, disk: str, names: tuple[str, ...], ours: str, width: int, *, wide: bool = False
) -> Recipes:
    """Return the recipes of a merger, which makes one row of a square of them.

    It has a norm, which is `wide` where it comes after the merge, and two linear layers, to rows of a `width`.
    """
    merged = options["hidden"] * options["merge"] ** 2
    recipes = norm(options, f"{disk}{names[0]}", f"{ours}.norm", width=merged if wide else None)
    recipes |= linear(f"{disk}{names[1]}", f"{ours}.up", (merged, merged))
    return recipes | linear(f"{disk}{names[2]}", f"{ours}.down", (width, merged))


def head_width(options: Options) -> int:
    """Return the width of a head."""
    width: int = options.get("head_width") or options["hidden"] // options["heads"]
    return width


def _qkv(options: Options, names: Names, disk: str, kind: str, columns: Shape) -> Recipe:
    heads, groups, width = options["heads"], options.get("kv_heads", options["heads"]), head_width(options)
    rows = (heads * width, groups * width, groups * width)
    named = names["attention.qkv"]
    if isinstance(named, str):
        stored = Stored(f"{disk}{named}.{kind}", (sum(rows), *columns))
        query, key, value = ((stored, sum(rows[:i])) for i in range(3))
    else:
        query, key, value = (
            (Stored(f"{disk}{name}.{kind}", (count, *columns)), 0)
            for name, count in zip(named, rows, strict=True)
        )
    has_key = kind == "weight" or option(options, "k_bias")
    return by_group(
        query,
        key if has_key else None,
        value,
        groups=groups,
        heads=heads // groups,
        width=width,
        columns=columns,
    )
