"""PEFT: the LoRA of a job as an adapter that the library peft loads, or merged into the weights.

Values come row by row from whoever has them, a checkpoint in files or a running job: ``rows(name, start, stop)``
returns rows of one of our full tensors, by ``module.parameter``.
"""

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import attrs
import torch
from torch import Tensor

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.job.lora import MARK, Lora
from mimogrid.core.job.models import BuiltIn
from mimogrid.core.job.peft import (
    CONFIG,
    PREFIX,
    TENSORS,
    StoredPair,
    config_of,
    in_memory,
    path_of,
    stored_pairs,
)
from mimogrid.core.job.placement import trainable_names
from mimogrid.core.job.spec import ModuleSpec
from mimogrid.core.models.mapping import ParameterRows
from mimogrid.shell.device.values import DTYPE_NAMES, values_of
from mimogrid.shell.job import tensorfile
from mimogrid.shell.job.published import Published
from mimogrid.shell.job.tensorfile import TensorEntry


RowsOf = Callable[[str, int, int], Tensor]


@attrs.frozen(eq=False)
class Adapters:
    """The LoRA of all modules of a job that started from a checkpoint.

    Attributes:
        found: The checkpoint.
        pairs: By the name of the tensor on disk that each is beside.
        loras: Those of the modules that have one.
        saved: The paths on disk of the layers that train whole.
    """

    found: Published
    pairs: Mapping[str, StoredPair]
    loras: tuple[Lora, ...]
    saved: tuple[str, ...]


def adapters_of(found: Published, modules: Mapping[str, ModuleSpec], names: Iterable[str]) -> Adapters:
    """Return the LoRA of a job's modules; `names` are those of all its parameters, ``module.parameter``."""
    pairs: dict[str, StoredPair] = {}
    loras: list[Lora] = []
    saved: dict[str, None] = {}
    listed = tuple(names)
    for name, module in modules.items():
        own = tuple(each.removeprefix(f"{name}.") for each in listed if each.startswith(f"{name}."))
        recipes = found.recipes(name, own)
        if module.lora is not None:
            assert isinstance(module.options, BuiltIn)
            pairs |= {pair.weight: pair for pair in stored_pairs(name, module.options, module.lora, recipes)}
            loras.append(module.lora)
        trained = trainable_names(module, own)
        for parameter in own:
            if MARK not in parameter and parameter in trained:
                saved |= {path_of(tensor.name): None for tensor in recipes[parameter].tensors}
    return Adapters(found, pairs, tuple(loras), tuple(saved))


def joined(sources: Sequence[ParameterRows], rows: RowsOf) -> Tensor:
    """Return a tensor on disk from the rows of ours that it is, [rows, ...]."""
    pieces = [rows(source.name, source.start, source.stop) for source in sources]
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def merged(weight: Tensor, pair: StoredPair | None, rows: RowsOf) -> Tensor:
    """Return a weight on disk with its pair added to it, rounded once to the wider dtype of both."""
    if pair is None:
        return weight
    a, b = joined(pair.a, rows), joined(pair.b, rows)
    product = b.double() @ a.double()
    whole = weight.double() + pair.scale * product.view(weight.shape)
    return whole.to(torch.promote_types(weight.dtype, a.dtype))


def adapter_tensors(adapters: Adapters, rows: RowsOf) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Yield the names of A and B of every pair in an adapter's file, and what returns each."""
    for path, pair in _by_path(adapters).items():
        for letter, sources in (("A", pair.a), ("B", pair.b)):
            yield f"{PREFIX}{path}.lora_{letter}.weight", functools.partial(joined, sources, rows)


def write_adapter(
    folder: Path, adapters: Adapters, rows: RowsOf, tensor_of: Callable[[str], Tensor | None]
) -> None:
    """Write an adapter into a folder that is there.

    `tensor_of` returns a tensor of the checkpoint with the values of now, where it has been part of the job. Raises
    PlanError for what an adapter cannot hold.
    """
    if problems := list(_problems(adapters)):
        raise PlanError(problems)
    has_towers, found = _has_towers(adapters), adapters.found
    entries = [(name, read()) for name, read in adapter_tensors(adapters, rows)]
    for name in found.tensors:
        if path_of(name) in adapters.saved:
            tensor = tensor_of(name)
            if tensor is not None:
                path, _, kind = name.rpartition(".")
                entries.append((f"{PREFIX}{in_memory(path, has_towers=has_towers)}.{kind}", tensor))
    config = config_of(
        _by_path(adapters),
        adapters.loras,
        base=str(found.folder),
        saved=[in_memory(path, has_towers=has_towers) for path in adapters.saved],
        has_towers=has_towers,
    )
    tensorfile.write(folder / TENSORS, map(_entry, *zip(*entries, strict=True)), {"format": "pt"})
    tensorfile.write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def _entry(name: str, tensor: Tensor) -> TensorEntry:
    return TensorEntry(
        name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), functools.partial(values_of, tensor)
    )


def _by_path(adapters: Adapters) -> dict[str, StoredPair]:
    has_towers = _has_towers(adapters)
    return {
        in_memory(path_of(weight), has_towers=has_towers): pair for weight, pair in adapters.pairs.items()
    }


def _has_towers(adapters: Adapters) -> bool:
    return len(adapters.found.model.modules) > 1


def _problems(adapters: Adapters) -> Iterator[Problem]:
    if not adapters.pairs:
        yield Problem("modules", "no module has LoRA, so there is no adapter.", "Write --to hf.")
    dense = [weight for weight in adapters.pairs if ".mlp." in weight]
    if dense and any(".experts." in name for name in adapters.found.tensors):
        fact = f"'{path_of(dense[0])}' has LoRA, and peft takes such names of a model with experts for the experts'."
        yield Problem("modules", fact, "Leave it out of the targets, or write --to hf, which merges LoRA.")
    for path in adapters.saved:
        tensors = [name for name in adapters.found.tensors if path_of(name) == path]
        if ".experts." in path or not all(name.endswith((".weight", ".bias")) for name in tensors):
            fact = f"'{path}' trains besides, and peft saves no such layer beside an adapter."
            yield Problem("modules", fact, "Write --to hf, which merges the adapter into the weights.")
