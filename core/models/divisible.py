"""Divisible: what a job says of a published module so that a grid can cut what does not divide.

A vocabulary is padded to a multiple of tp, and layers are split as evenly as can be over the stages:

>>> divisible({"grid": {"tp": 2, "pp": 2}}, {"layers": 3, "vocab": 259})
{'grid': {'tp': 2, 'pp': 2}, 'split': [1, 2], 'options': {'vocab_padding': 1}}
>>> divisible({"grid": {"pp": 3}}, {"layers": 3, "vocab": 259})
{'grid': {'pp': 3}}
"""

from collections.abc import Mapping
from typing import Any

from mimogrid.core.base.samples import share
from mimogrid.core.models.network import option


def divisible(module: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a module's table in a job file with the `split` and the `vocab_padding` that its grid needs.

    What the table says already stays. `options` are those of the checkpoint.
    """
    table, grid = dict(module), module.get("grid", {})
    layers, stages = options["layers"], grid.get("pp", 1) * module.get("chunks", 1)
    if layers > stages > 1:
        # Rows of deepstack join layers of the first stage.
        first = max(layers // stages, option(options, "deepstack"))
        split = [first, *(len(share(stage, stages - 1, layers - first)) for stage in range(stages - 1))]
        if len(set(split)) > 1 and min(split) > 0:
            table.setdefault("split", split)
    if padding := -options.get("vocab", 0) % grid.get("tp", 1):
        table["options"] = {"vocab_padding": padding, **table.get("options", {})}
    return table
