"""Export: the weights of a checkpoint in formats that others read, by one process without a world.

    safetensors   a file for each module (`vision.safetensors`), with parameters under their names in the module;
                  several files and an index for a large module; and `config.json`, which describes the modules
    dcp           torch's distributed checkpoint, for `torch.distributed.checkpoint.load`, with ``module.parameter``
                  as name. torch pickles its metadata. We write this format and never read it.
    hf            the folder that the run started from (``weights``), with the weights of the run: the same names, files
                  and dtypes, and everything else as it is there; LoRA is merged into the weights
    peft          an adapter, which the library peft loads over that folder: LoRA, and layers that trained besides

The weights are the main parameters: fp32 where the network computes in half precision. Only one tensor at a time is in
memory, assembled from its parts. Files are not memory-mapped, because pages that were read would stay resident. The
folder gets its name when it is complete.
"""

import functools
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.job.lora import MARK
from mimogrid.core.job.optimizers import EMA
from mimogrid.core.job.spec import ModuleSpec
from mimogrid.core.models.mapping import ParameterRows, inverse
from mimogrid.core.update.contents import OPTIMIZER
from mimogrid.shell.checkpoint import manifest
from mimogrid.shell.checkpoint.index import IndexedTensor, read_index
from mimogrid.shell.checkpoint.jsonfile import canonical
from mimogrid.shell.checkpoint.manifest import CHECKPOINTS, PARTIAL
from mimogrid.shell.cli.arguments import ExportArgs
from mimogrid.shell.cli.output import print_json
from mimogrid.shell.device.values import TORCH_DTYPES, values_of
from mimogrid.shell.job import jobfile, tensorfile
from mimogrid.shell.job.published import Published, origin_of
from mimogrid.shell.job.tensorfile import StoredTensor, TensorEntry
from mimogrid.shell.modules.peft import Adapters, adapters_of, joined, merged, write_adapter
from mimogrid.shell.modules.published import write_published
from mimogrid.shell.world.waiting import waiting


def run(args: ExportArgs) -> int:
    """Export the newest checkpoint of a run, or the one that is named."""
    if args.source is not None and args.to not in _OF_A_CHECKPOINT:
        raise PlanError([Problem("--from", f"is not for {args.to}.", "Leave it out, or write --to hf.")])
    if args.target is not None and args.out is not None:
        raise PlanError([Problem("--out", f"is named besides {args.target}.", "Name one of the two.")])
    checkpoint = manifest.newest_of(args.folder)
    out = args.target or args.out or _beside(checkpoint, args.to)
    with manifest.reading(checkpoint), waiting("writing weights", silent=args.json) as shown:
        files = export(
            checkpoint,
            out,
            to=args.to,
            bytes_most=int(args.max_shard_gb * 1e9),
            source=args.source,
            ema=args.ema,
            tell=shown.tell,
        )
    if args.json:
        print_json({"checkpoint": str(checkpoint), "out": str(out), "files": files})
    else:
        print(f"{checkpoint.name} -> {out}: {', '.join(files)}")
    return 0


def export(
    checkpoint: Path,
    out: Path,
    *,
    to: str,
    bytes_most: int,
    source: Path | None = None,
    ema: bool = False,
    tell: Callable[[int, int], None] = lambda *_: None,
) -> list[str]:
    """Write the weights of a whole checkpoint into a new folder; return the names of the files. Raises PlanError.

    No file of the format safetensors has more than `bytes_most`, unless a single parameter has. `source` stands in for
    the folder that the run started from. With `ema` the running means stand in for the weights that train. `tell` is
    told how many bytes of the weights were read, and of how many.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PlanError([Problem(str(out), "is not empty.", "Name a folder that is new or empty: --out.")])
    kept = read_index(checkpoint)
    index = {n: s for n, s in kept.items() if not n.startswith(OPTIMIZER)}
    means = (
        {name: f"{OPTIMIZER}{EMA}.{name}" for name in index if f"{OPTIMIZER}{EMA}.{name}" in kept}
        if ema
        else {}
    )
    if ema and not means:
        remedy = "Leave --ema out; a run keeps means with optimizer.ema = 0.999."
        raise PlanError([Problem(str(checkpoint), "has no running means of its weights.", remedy)])
    index |= {name: kept[mean] for name, mean in means.items()}
    origin = _origin(checkpoint, index, source) if to in _OF_A_CHECKPOINT else None
    partial = out.with_name(out.name + PARTIAL)
    try:
        manifest.remove([partial])
        partial.mkdir(parents=True)
        weights = _weights(checkpoint, index, means, tell)
        if origin is not None and to == "peft":
            write_adapter(
                partial, origin.adapters, weights.rows, functools.partial(_published, weights, origin)
            )
        elif origin is not None:
            write_published(partial, origin.found, functools.partial(_published, weights, origin))
        elif to == "dcp":
            _write_dcp(partial, weights)
        else:
            _write_safetensors(partial, weights, checkpoint, bytes_most)
        partial.replace(out)
    except PlanError:
        manifest.remove([partial])
        raise
    except (OSError, dcp.api.CheckpointException) as error:
        manifest.remove([partial])
        remedy = "Name a folder on a disk with space, where you may write: --out."
        raise PlanError([Problem(str(out), f"cannot be written: {error}.", remedy)]) from None
    return sorted(path.name for path in out.iterdir())


def _beside(checkpoint: Path, to: str) -> Path:
    """Return the default folder of an export: in the run, named after the checkpoint and the format."""
    parent = checkpoint.resolve().parent
    folder = parent.parent if parent.name == CHECKPOINTS else parent
    return folder / f"{checkpoint.name}-{to}"


# -- reading -----------------------------------------------------------------------------------------------


@attrs.frozen(eq=False)
class Weights:
    """The weights of a checkpoint, assembled one by one: its `index`, and the tensors in its files.

    `means` are the names in the files of those that a running mean stands in for. `on_read` is called with how many
    bytes were read.
    """

    checkpoint: Path
    index: Mapping[str, IndexedTensor]
    files: Mapping[str, Mapping[str, StoredTensor]]
    means: Mapping[str, str]
    on_read: Callable[[int], None] = lambda _: None

    def full(self, name: str) -> torch.Tensor:
        """Return a full tensor."""
        shape = self.index[name].shape
        return self.rows(name, 0, shape[0] if shape else 1).view(shape)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows [start, stop) of a full tensor."""
        stored = self.index[name]
        whole = torch.empty((stop - start, *stored.shape[1:]), dtype=TORCH_DTYPES[stored.dtype])
        for part in stored.parts:
            (begin, *columns), (count, *widths) = part.offsets or (0,), part.shape or (1,)
            first, last = max(start, begin), min(stop, begin + count)
            if first >= last:
                continue
            places = (slice(o, o + n) for o, n in zip(columns, widths, strict=True))
            target = whole[(slice(first - start, last - start), *places)]
            block = target if target.is_contiguous() else torch.empty_like(target)
            in_file = self.files[part.file][self.means.get(name, name)]
            skip = (first - begin) * ((in_file.end - in_file.begin) // count)
            tensorfile.read_into(self.checkpoint / part.file, in_file, values_of(block), skip=skip)
            if block is not target:
                target.copy_(block)
        self.on_read(whole.nbytes)
        return whole


def _weights(
    checkpoint: Path,
    index: Mapping[str, IndexedTensor],
    means: Mapping[str, str],
    tell: Callable[[int, int], None],
) -> Weights:
    names = {part.file for stored in index.values() for part in stored.parts}
    files = {name: tensorfile.header_of(checkpoint / name) for name in names}
    read, total = 0, sum(stored.bytes for stored in index.values())

    def on_read(count: int) -> None:
        nonlocal read
        read += count
        tell(read, total)

    return Weights(checkpoint, index, files, means, on_read)


# -- safetensors -------------------------------------------------------------------------------------------


def _write_safetensors(folder: Path, weights: Weights, checkpoint: Path, bytes_most: int) -> None:
    facts = manifest.read_manifest(checkpoint)
    modules: dict[str, list[str]] = {}
    for name in sorted(weights.index):
        modules.setdefault(name.partition(".")[0], []).append(name)
    files = {
        module: _write_module(folder, module, weights, names, bytes_most) for module, names in modules.items()
    }
    spec = jobfile.recorded(facts["job"], checkpoint / manifest.MANIFEST)
    config = {
        **{key: facts[key] for key in ("step", "steps_taken", "job")},
        "precision": spec.precision,
        "versions": facts.get("versions", {}),
        "modules": {
            name: {
                "model": module.model,
                "options": _options(module),
                "feeds": module.feeds,
                "files": files.get(name, []),
            }
            for name, module in spec.modules.items()
        },
    }
    tensorfile.write_text(folder / "config.json", canonical(config))


def _options(module: ModuleSpec) -> Mapping[str, Any]:
    """Return the options of a module's model as plain values."""
    options: Any = module.options
    return attrs.asdict(options) if attrs.has(type(options)) else options


def _write_module(
    folder: Path, module: str, weights: Weights, names: list[str], bytes_most: int
) -> list[str]:
    """Write one module; return the names of its files."""

    def entry(name: str) -> TensorEntry:
        stored = weights.index[name]
        inside = name.removeprefix(f"{module}.")
        return TensorEntry(inside, stored.dtype, stored.shape, lambda: values_of(weights.full(name)))

    shards = _shards(weights, names, bytes_most)
    if len(shards) == 1:
        files = [f"{module}.safetensors"]
    else:
        files = [f"{module}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        where = {
            n.removeprefix(f"{module}."): file for file, of in zip(files, shards, strict=True) for n in of
        }
        total = sum(weights.index[name].bytes for name in names)
        index = {"metadata": {"total_size": total}, "weight_map": where}
        tensorfile.write_text(folder / f"{module}.safetensors.index.json", json.dumps(index, indent=1) + "\n")
    for file, of in zip(files, shards, strict=True):
        tensorfile.write(folder / file, map(entry, of), {"format": "pt"})
    return files


def _shards(weights: Weights, names: list[str], bytes_most: int) -> list[list[str]]:
    """Group parameters into files of at most `bytes_most`; a larger parameter gets its own file."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name in names:
        size = weights.index[name].bytes
        if shards[-1] and filled + size > bytes_most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


# -- hf ----------------------------------------------------------------------------------------------------


@attrs.frozen(eq=False)
class Origin:
    """The checkpoint that a run started from, for each of its tensors the rows of the run's that it is, and LoRA."""

    found: Published
    sources: Mapping[str, tuple[ParameterRows, ...]]
    adapters: Adapters


def _published(weights: Weights, origin: Origin, name: str) -> torch.Tensor | None:
    """Return a tensor of the checkpoint with the weights of the run; None if the run has none of it."""
    if name not in origin.sources:
        return None
    whole = joined(origin.sources[name], weights.rows).view(origin.found.tensors[name].shape)
    return merged(whole, origin.adapters.pairs.get(name), weights.rows)


def _origin(checkpoint: Path, index: Mapping[str, IndexedTensor], source: Path | None) -> Origin:
    """Return what a run started from. Raises PlanError where that is no folder, or cannot hold the run's weights."""
    where = checkpoint / manifest.MANIFEST
    modules = jobfile.recorded(manifest.read_manifest(checkpoint)["job"], where).modules
    found = origin_of({name: module.weights for name, module in modules.items()}, source)
    sources: dict[str, tuple[ParameterRows, ...]] = {}
    problems: list[Problem] = []
    for module in modules:
        own = {n: stored.shape for n, stored in index.items() if n.startswith(f"{module}.") and MARK not in n}
        inside = [name.removeprefix(f"{module}.") for name in own]
        recipes = {f"{module}.{name}": recipe for name, recipe in found.recipes(module, inside).items()}
        for name in sorted(own.keys() | recipes.keys()):
            ours, theirs = own.get(name), recipes[name].shape if name in recipes else None
            if ours != theirs:
                message = f"is {_shape(ours)} in the run, and {_shape(theirs)} in {found.folder}."
                problems.append(Problem(name, message, _OTHERWISE))
        sources |= {stored.name: rows for stored, rows in inverse(recipes).items()}
    if problems:
        raise PlanError(problems[:SHOWN])
    return Origin(found, sources, adapters_of(found, modules, index))


_OF_A_CHECKPOINT = ("hf", "peft")
"""Formats of a run that started from a published checkpoint."""
SHOWN = 8
"""How many parameters that do not fit are named."""
_OTHERWISE = "Its weights leave as --to safetensors."


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))


# -- dcp ---------------------------------------------------------------------------------------------------


def _write_dcp(folder: Path, weights: Weights) -> None:
    """Write tensors one by one, as torch's planner asks for their values; the state dict has only their shapes."""
    shapes = {
        name: torch.empty(stored.shape, dtype=TORCH_DTYPES[stored.dtype], device="meta")
        for name, stored in weights.index.items()
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is meant
        dcp.save(
            shapes,
            storage_writer=dcp.FileSystemWriter(folder, single_file_per_rank=True, sync_files=True),
            planner=_Streaming(weights),
            no_dist=True,
        )


class _Streaming(DefaultSavePlanner):
    """Gives torch a tensor when torch writes it.

    torch keeps all tensors of a file, so each tensor's memory is freed when torch asks for the next one.
    """

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self._weights = weights
        self._written = torch.empty(0)

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        self._written.untyped_storage().resize_(0)
        self._written = self._weights.full(index.fqn).clone()  # memory that numpy has seen cannot be resized
        return self._written

    def transform_object(self, write_item: WriteItem, object: torch.Tensor) -> torch.Tensor:  # noqa: A002
        return object
