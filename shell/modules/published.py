"""Published weights: a rank reads its slices of a checkpoint's tensors, and the first rank writes such tensors.

Values change their dtype on the way and nothing else: they are rounded only where a dtype holds fewer bits.
"""

import contextlib
import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.job.models import Parameter
from mimogrid.core.models.mapping import inverse, padded, shard_rows, slices
from mimogrid.shell.device.values import TORCH_DTYPES, values_of
from mimogrid.shell.job import tensorfile
from mimogrid.shell.job.published import INDEX, PICKLED, Published, published
from mimogrid.shell.job.tensorfile import TensorEntry
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

    A tensor of which `full` lacks any part is left out. A tower that transformers runs has the checkpoint's names.
    """
    recipes = found.recipes(module, full.keys())
    return {
        stored.name: torch.cat([full[source.name][source.start : source.stop] for source in sources]).reshape(
            stored.shape
        )
        for stored, sources in inverse(recipes).items()
        if all(source.name in full for source in sources)
    }


# -- writing -----------------------------------------------------------------------------------------------


def write_published(out: Path, found: Published, tensor_of: Callable[[str], Tensor | None]) -> None:
    """Write a folder as the checkpoint's, with other values: the same files, index and dtypes, and all else as it is.

    `tensor_of` returns what stands in the place of a tensor of the checkpoint, in any floats, or None where that is
    copied. It is called for one after the other, when they are written. Raises PlanError if the folder is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PlanError([Problem(str(out), "is not empty.", "Name a folder that is new or empty.")])
    out.mkdir(parents=True, exist_ok=True)
    for path in found.folder.iterdir():
        if path.is_file() and not _holds_weights(path):
            shutil.copyfile(path, out / path.name)
    files: dict[str, list[TensorEntry]] = {}
    for name, tensor in found.tensors.items():
        entry = TensorEntry(
            name, tensor.dtype, tensor.shape, functools.partial(_values, found, name, tensor_of)
        )
        files.setdefault(tensor.file, []).append(entry)
    for file, entries in files.items():
        tensorfile.write(out / file, entries, {"format": "pt"})


_WEIGHTS = (*PICKLED, ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx")


def _holds_weights(path: Path) -> bool:
    """Whether a file holds weights, or says which file does, besides the index that is written."""
    return path.suffix in _WEIGHTS or (path.name.endswith(".index.json") and path.name != INDEX)


def _values(found: Published, name: str, tensor_of: Callable[[str], Tensor | None]) -> memoryview:
    """Return the bytes of a tensor in its dtype on disk."""
    tensor, dtype = tensor_of(found.model.original(name)), TORCH_DTYPES.get(found.tensors[name].dtype)
    if tensor is None or dtype is None:
        return _stored(found, name)
    if torch.promote_types(tensor.dtype, dtype) != tensor.dtype:
        # It was rounded when it was read. If it has not changed since, what it was read from is exact.
        whole = _stored(found, name)
        source = torch.frombuffer(whole, dtype=dtype).view(tensor.shape)
        if torch.equal(source.to(tensor.dtype), tensor):
            return whole
    return values_of(tensor.to(dtype))


def _stored(found: Published, name: str) -> memoryview:
    """Return the bytes of a tensor as they are in the checkpoint."""
    tensor = found.tensors[name]
    values = memoryview(bytearray(tensor.stored.end - tensor.stored.begin))
    tensorfile.read_into(found.folder / tensor.file, tensor.stored, values)
    return values
