"""Published weights: a rank reads its slices of a checkpoint's tensors, and the first rank writes such tensors.

Values change their dtype on the way and nothing else: they are rounded only where a dtype holds fewer bits.
"""

import contextlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.job.models import Parameter
from mimogrid.core.models.mapping import inverse, padded, shard_rows, slices
from mimogrid.shell.job.published import INDEX, ONE_FILE, Published, published
from mimogrid.shell.modules.weights import Shards, cut_over


@torch.no_grad()
def load_published(
    folder: Path,
    weights: Mapping[str, nn.Parameter],
    parameters: Sequence[Parameter],
    *,
    module: str,
    groups: Shards,
) -> tuple[Parameter, ...]:
    """Set the local weights of a stage to this rank's slices of a checkpoint; return parameters that it lacks.

    Raises PlanError if the folder does not hold the module.
    """
    found = published(folder)
    recipes = found.module(module).recipes
    with contextlib.ExitStack() as stack:
        files: dict[str, Any] = {}
        for parameter in parameters:
            if parameter.name not in recipes:
                continue
            recipe = padded(recipes[parameter.name], parameter.padding)
            weight = weights[parameter.name]
            over = cut_over(parameter, groups)
            rows, columns = _held(parameter, rank=over.rank(), ranks=over.size())
            weight.zero_()
            for piece in slices(recipe, rows, columns):
                file = found.tensors[piece.name].file
                if file not in files:
                    files[file] = stack.enter_context(safe_open(folder / file, framework="pt"))
                values = files[file].get_slice(piece.name)[tuple(slice(*bounds) for bounds in piece.bounds)]
                target = weight[piece.rows.start : piece.rows.stop]
                target.copy_(values.reshape(target.shape))
    return tuple(parameter for parameter in parameters if parameter.name not in recipes)


def _held(parameter: Parameter, *, rank: int, ranks: int) -> tuple[tuple[range, ...] | None, range | None]:
    """Return the rows and the columns of a parameter that a rank holds; None: all."""
    if parameter.tp_dim is None:
        return None, None
    held = shard_rows(parameter.shape[parameter.tp_dim], rank=rank, ranks=ranks, blocks=parameter.tp_blocks)
    return (held, None) if parameter.tp_dim == 0 else (None, held[0])


def published_tensors(found: Published, module: str, full: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as the checkpoint has them, by its names, from full tensors by our names in the module.

    A tensor of which `full` lacks any part is left out.
    """
    recipes = found.module(module).recipes
    return {
        stored.name: torch.cat([full[source.name][source.start : source.stop] for source in sources]).reshape(
            stored.shape
        )
        for stored, sources in inverse(recipes).items()
        if all(source.name in full for source in sources)
    }


# -- writing -----------------------------------------------------------------------------------------------


def write_published(
    out: Path, found: Published, tensors: Mapping[str, Tensor], *, bytes_most: int = 5_000_000_000
) -> None:
    """Write a folder as the checkpoint's: `tensors` in its dtypes, and all else that it holds as it is.

    A file has at most `bytes_most`, unless one tensor has more. Raises PlanError if the folder is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PlanError([Problem(str(out), "is not empty.", "Name a folder that is new or empty.")])
    out.mkdir(parents=True, exist_ok=True)
    for path in found.folder.iterdir():
        if path.is_file() and path.suffix not in _WEIGHTS and path.name != INDEX:
            shutil.copyfile(path, out / path.name)
    files: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for name in found.tensors:
        tensor = _in_dtype(found, name, tensors.get(name))
        if files[-1] and size + tensor.nbytes > bytes_most:
            files.append({})
            size = 0
        files[-1][name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    count = len(files)
    names = (
        [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)] if count > 1 else [ONE_FILE]
    )
    for file, held in zip(names, files, strict=True):
        save_file(held, out / file, metadata={"format": "pt"})
    if count > 1:
        places = {name: file for file, held in zip(names, files, strict=True) for name in held}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (out / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


_WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth"})
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def _in_dtype(found: Published, name: str, tensor: Tensor | None) -> Tensor:
    """Return a tensor in its dtype on disk; what no module holds is copied."""
    if tensor is None:
        with safe_open(found.folder / found.tensors[name].file, framework="pt") as file:
            copied: Tensor = file.get_tensor(name)
            return copied
    return tensor.to(_DTYPES[found.tensors[name].dtype]).contiguous()
