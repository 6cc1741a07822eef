"""Data: what a stage loads of its own share, checked against the description of the source.

A source describes every sample to every rank, and loads it where it is needed: rows on the first stage of a source
module, tokens on the first stage of a language model, targets on the last stage of a module with a loss.
"""

import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import torch

from mimogrid.core.base.errors import PlanError, WorldError
from mimogrid.core.base.samples import Sample
from mimogrid.core.job.models import Block, Gpt, Own, Regressor, Vit
from mimogrid.core.step.step import Share
from mimogrid.core.topology.topology import Module
from mimogrid.shell.device.device import sent
from mimogrid.shell.modules.packing import check_placeholders


EXACT = frozenset({"loss_weights", "targets"})
"""Inputs of losses, which stay in fp32 if the network computes in half precision."""


class Loads(Protocol):
    """The half of a source that touches data."""

    def load(self, sample_id: int, module: str) -> Mapping[str, torch.Tensor]:
        """Return a sample's tensors for a module; the first dim counts rows or positions."""
        ...


class LoadError(WorldError):
    """A sample that could not be loaded; the message names it and the module."""


def load_sample(source: Loads, sample_id: int, module: str) -> Mapping[str, torch.Tensor]:
    """Return a sample's tensors for a module. Raises LoadError for whatever the source raises but a PlanError."""
    try:
        return source.load(sample_id, module)
    except (LoadError, PlanError):
        raise
    except WorldError as error:
        raise LoadError(f"sample {sample_id}, module '{module}': {error}") from error
    except Exception as error:
        what = f"sample {sample_id}: loading it for module '{module}' raised {type(error).__name__}: {error}"
        raise LoadError(f"{what}\n{traceback.format_exc().rstrip()}") from error


class TimedSource:
    """A source that counts the seconds that its reader waits for data, and calls `before_load` before each load."""

    def __init__(self, source: Loads, before_load: Callable[[], None]) -> None:
        self.source = source
        self._before_load = before_load
        self._seconds = 0.0

    def load(self, sample_id: int, module: str) -> Mapping[str, torch.Tensor]:
        """Load a sample's tensors for a module."""
        begin = time.perf_counter()
        self._before_load()
        loaded = self.source.load(sample_id, module)
        self._seconds += time.perf_counter() - begin
        return loaded

    def lap(self) -> float:
        """Return the seconds since the last lap."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class Loader:
    """Loads shares onto a device, in the dtype of the run."""

    def __init__(self, source: Loads, *, device: torch.device, dtype: torch.dtype) -> None:
        self._source = source
        self.device = device
        self.dtype = dtype

    def inputs(self, module: Module, share: Share, *, entire: bool = False) -> dict[str, torch.Tensor]:
        """Return what the first stage of a module reads from the data, sample after sample.

        A source module reads its rows; with `entire`, all that its samples have for it. One of the user's reads what
        its samples have, whatever that is; those that lack the modality are not loaded for it.
        """
        if isinstance(module.model, Gpt):
            columns = self._columns(module, share, ("tokens",), share.lengths)
            # On the host: reading a value on the device waits for all of its work.
            check_placeholders(columns["tokens"], share)
            return self._joined(module, columns)
        if module.inputs:
            return {}
        if isinstance(module.model, Own):
            return self._load_all(module, zip(share.samples, share.rows[module.name], strict=True))
        columns = self._columns(module, share, ("rows",), share.rows[module.name], entire=entire)
        return self._joined(module, columns)

    def targets(self, module: Module, share: Share) -> dict[str, torch.Tensor]:
        """Return what the loss of a module's last stage compares its predictions with."""
        match module.model:
            case Gpt():
                columns = self._columns(module, share, ("labels", "loss_weights"), share.lengths)
                _check_units(module, share, columns["loss_weights"])
                return self._joined(module, columns)
            case Regressor():
                return self._load(module, share, ("targets",), share.lengths)
            case Own() if module.inputs:
                return self._load_all(module, ((sample, None) for sample in share.samples))
            case _:
                return {}

    def _load_all(
        self, module: Module, samples: Iterable[tuple[Sample, int | None]]
    ) -> dict[str, torch.Tensor]:
        """Return all that the source has for a module of the user's, besides the rows that other modules feed it.

        With each sample comes how many rows it was described to have; None for a module that is fed.
        """
        columns: dict[str, list[torch.Tensor]] = {}
        for sample, count in samples:
            if count == 0:
                continue
            loaded = load_sample(self._source, sample.id, module.name)
            if count and "rows" in loaded:
                _checked(loaded, "rows", sample, count, module.name)
            for name, tensor in loaded.items():
                columns.setdefault(name, []).append(tensor)
        if not columns and not module.inputs:
            raise WorldError(
                f"the source loads nothing for module '{module.name}' where samples have rows of it."
            )
        return {name: self._join(_alike(column, name, module.name)) for name, column in columns.items()}

    def _load(
        self, module: Module, share: Share, names: tuple[str, ...], counts: tuple[int, ...]
    ) -> dict[str, torch.Tensor]:
        return self._joined(module, self._columns(module, share, names, counts))

    def _columns(
        self,
        module: Module,
        share: Share,
        names: tuple[str, ...],
        counts: tuple[int, ...],
        *,
        entire: bool = False,
    ) -> dict[str, list[torch.Tensor]]:
        columns: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        for sample, count in zip(share.samples, counts, strict=True):
            if count:
                loaded = load_sample(self._source, sample.id, module.name)
                for name in names:
                    columns[name].append(_checked(loaded, name, sample, count, module.name))
                for name in loaded if entire else ():
                    if name not in names:
                        columns.setdefault(name, []).append(loaded[name])
        return columns

    def _joined(self, module: Module, columns: Mapping[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {
            name: self._join(column or [_nothing(name, module)], exact=name in EXACT)
            for name, column in columns.items()
        }

    def _join(self, column: list[torch.Tensor], *, exact: bool = False) -> torch.Tensor:
        joined, dtype = torch.cat(column), self.dtype
        if exact:
            dtype = torch.promote_types(dtype, torch.float32)
        if not joined.is_floating_point():
            dtype = joined.dtype
        return sent(joined.to(dtype), self.device)


def _nothing(name: str, module: Module) -> torch.Tensor:
    """Return what a dp rank without rows reads when it computes along with dp ranks that have some."""
    match name, module.model:
        case ["rows", Vit(features=width) | Block(hidden=width) | Regressor(hidden=width)]:
            return torch.empty(0, width or 0)
        case ["targets", Regressor(outputs=width)]:
            return torch.empty(0, width)
        case ["loss_weights", _]:
            return torch.empty(0)
        case _:
            return torch.empty(0, dtype=torch.int64)


def _alike(column: list[torch.Tensor], name: str, module: str) -> list[torch.Tensor]:
    """Check that the tensors of samples differ in the first dim at most. Raises WorldError."""
    shapes = {tuple(tensor.shape[1:]) for tensor in column}
    if len(shapes) > 1 or not column[0].dim():
        found = " and ".join(str(list(tensor.shape)) for tensor in column[:2])
        raise WorldError(
            f"the source loads '{name}' for module '{module}' in shapes such as {found}: samples are joined along "
            "the first dim, and the others must be equal. Pad or flatten them, and load their sizes beside them."
        )
    return column


def _checked(
    loaded: Mapping[str, torch.Tensor], name: str, sample: Sample, count: int, module: str
) -> torch.Tensor:
    if name not in loaded:
        raise WorldError(
            f"sample {sample.id}: the source loads no '{name}' for module '{module}', "
            f"only {', '.join(loaded) or 'nothing'}."
        )
    if len(loaded[name]) != count:
        raise WorldError(
            f"sample {sample.id}: the source described {count} rows or positions for module '{module}' "
            f"and loaded {len(loaded[name])} of '{name}'. describe and load must agree."
        )
    return loaded[name]


def _check_units(module: Module, share: Share, weights: list[torch.Tensor]) -> None:
    """Check that loss weights add up to the described count, by which the loss is divided."""
    described = sum(sample.units.get(module.name, sample.length) for sample in share.samples)
    loaded = sum(float(of_sample.double().sum()) for of_sample in weights)
    if abs(described - loaded) > 1e-6 * max(1.0, abs(described)):
        ids = f"{share.samples[0].id}..{share.samples[-1].id}"
        raise WorldError(
            f"samples {ids}: the loss weights loaded for module '{module.name}' add up to {loaded:g}, "
            f"the source described {described:g}. Give `units` in describe where weights are not 1 per token."
        )
