"""Own: modules and sources of a user's, for jobs that name them as ``own:function``.

Two kinds: honest ones (an encoder, a judge with a loss, samples written down one by one), and such as fail on
purpose, on one rank and at one moment. They are imported by the processes of the pool.
"""

import math
import os
import signal
from collections.abc import Mapping
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mimogrid.core.base.samples import Sample
from mimogrid.core.job.graph import ModuleGraph
from mimogrid.core.job.spec import SourceFacts
from mimogrid.shell.job.sources.synthetic import PLACEHOLDER, Synthetic, synthetic


# -- modules -----------------------------------------------------------------------------------------------


def describe(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """What every module here says of itself."""
    return {"width": options["width"]} if "width" in options else {}


class Encoder(nn.Module):
    """Rows of the data through two linear layers."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.up = nn.Linear(features, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Emit one row for each that comes in."""
        assert inputs["lengths"].sum() == len(inputs["rows"])
        return {"rows": self.down(self.up(inputs["rows"]).tanh())}


def encoder(*, width: int, features: int) -> nn.Module:
    """Build an encoder."""
    return Encoder(width, features)


class Judge(nn.Module):
    """A loss over the rows of its feeders: each sample's squares, once through a linear layer."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, 2)

    def forward(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the sum over rows."""
        fed = [tensor for name, tensor in inputs.items() if not name.startswith("lengths")]
        assert sum(map(len, fed)) == inputs["lengths"].sum()
        return {"loss": torch.stack([self.linear(rows).square().sum() for rows in fed]).sum()}


def judge(*, features: int) -> nn.Module:
    """Build a judge."""
    return Judge(features)


class Passing(nn.Module):
    """Rows as they came; nothing to train."""

    def forward(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the rows of the only feeder, or those of the data."""
        (rows,) = (tensor for name, tensor in inputs.items() if not name.startswith("lengths"))
        return {"rows": rows}


def passing(*, width: int) -> nn.Module:
    """Build one that passes rows on."""
    return Passing()


class Fragile(Encoder):
    """An encoder to which something happens on one rank, in its `call`-th forward."""

    def __init__(self, width: int, features: int, rank: int, call: int, event: str) -> None:
        super().__init__(width, features)
        self.rank, self.call, self.event, self.calls = rank, call, event, 0

    def forward(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Emit rows, unless this is the rank and the moment."""
        self.calls += 1
        rows = super().forward(inputs)["rows"]
        if dist.get_rank() != self.rank or self.calls != self.call:
            return {"rows": rows}
        match self.event:
            case "raise":
                raise ZeroDivisionError("the encoder broke on purpose")
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "exit":
                os._exit(3)
            case "overflow":
                rows.register_hook(lambda gradient: gradient * torch.inf)
            case "silent":
                return {}
            case "short":
                return {"rows": rows[:1].sum(1, keepdim=True)}
            case "judge":
                return {"rows": rows, "loss": rows.sum()}
        return {"rows": rows}


def fragile(*, width: int, features: int, rank: int, call: int, event: str) -> nn.Module:
    """Build an encoder that fails."""
    return Fragile(width, features, rank, call, event)


# -- sources -----------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Written(Synthetic):
    """Synthetic samples, some of which lack a modality; placeholders among the text, weights that are not 1.

    `missing` names, per source module, the samples of each step (`size` of them) that have no rows of it.
    """

    missing: Mapping[str, tuple[int, ...]]
    size: int
    spread: bool

    def describe(self, sample_id: int) -> Sample:
        """Return the counts of a sample."""
        drawn = super().describe(sample_id)
        lacks = [name for name, ids in self.missing.items() if sample_id % self.size in ids]
        sample = attrs.evolve(drawn, rows={**drawn.rows, **dict.fromkeys(lacks, 0)})
        if not self.spread:
            return sample
        emitted = self.graph.rows_out(sample)
        places = {
            name: _every_other(emitted[name] - sample.length, emitted[name]) for name in self.graph.texts
        }
        return attrs.evolve(
            sample, placeholders=places, units=dict.fromkeys(places, 0.25 * sample.length * (sample_id % 3))
        )

    def _text(self, sample: Sample, module: str, vocab: int, placeholders: int) -> Mapping[str, Tensor]:
        packed = super()._text(sample, module, vocab, placeholders)
        if not self.spread:
            return packed
        places = torch.tensor(sample.placeholders[module], dtype=torch.int64)
        text = torch.ones(placeholders + sample.length, dtype=torch.bool)
        text[places] = False
        spread = {name: torch.zeros_like(tensor) for name, tensor in packed.items()}
        for name, tensor in spread.items():
            tensor[text] = packed[name][placeholders:]
        spread["tokens"][~text] = PLACEHOLDER
        spread["loss_weights"] *= 0.25 * (sample.id % 3)
        return spread


def _every_other(count: int, total: int) -> tuple[int, ...]:
    """`count` of `total` places: every other one from the second while they last, then the first free ones."""
    odd = list(range(1, total, 2))[:count]
    free = [place for place in range(total) if place not in odd]
    return tuple(sorted(odd + free[: count - len(odd)]))


def written(
    *,
    graph: ModuleGraph,
    models: Mapping[str, Any],
    seed: int,
    size: int = 1,
    missing: Mapping[str, list[int]] | None = None,
    spread: bool = False,
    **options: Any,
) -> "WithFacts":
    """Return samples that lack what `missing` says; further options are those of `synthetic`."""
    made, facts, problems = synthetic(graph=graph, models=models, seed=seed, options=options)
    assert made is not None, problems
    fields = {field.name: getattr(made, field.name) for field in attrs.fields(Synthetic)}
    lacks = {name: tuple(ids) for name, ids in (missing or {}).items()}
    return WithFacts(Written(**fields, missing=lacks, size=size, spread=spread), facts)


@attrs.frozen
class WithFacts:
    """A source that also says what the plan needs to know."""

    inner: Written
    known: SourceFacts

    def facts(self) -> SourceFacts:
        """Return the facts."""
        return self.known

    def describe(self, sample_id: int) -> Sample:
        """Describe as the inner source does."""
        return self.inner.describe(sample_id)

    def load(self, sample_id: int, module: str) -> Mapping[str, Tensor]:
        """Load as the inner source does."""
        return self.inner.load(sample_id, module)


@attrs.frozen
class Lying(WithFacts):
    """A source with one wrong sample.

    `wrong` says what: its ``describe`` differs from process to process, its ``rows``, ``labels`` or ``loss_weights``
    are not as described, loading it ``raises``, or its floats are ``nan``.
    """

    wrong: str
    sample_id: int

    def describe(self, sample_id: int) -> Sample:
        """Describe."""
        sample = super().describe(sample_id)
        if self.wrong == "describe" and sample_id == self.sample_id:
            return attrs.evolve(sample, rows={**sample.rows, "elsewhere": os.getpid()})
        return sample

    def load(self, sample_id: int, module: str) -> Mapping[str, Tensor]:
        """Load."""
        loaded = dict(super().load(sample_id, module))
        if sample_id == self.sample_id and self.wrong == "raises":
            raise FileNotFoundError(2, "No such file or directory", "/data/17.jpg")
        if sample_id == self.sample_id and self.wrong == "nan":
            return {
                name: value * math.nan if value.is_floating_point() else value
                for name, value in loaded.items()
            }
        if sample_id != self.sample_id or self.wrong not in loaded:
            return loaded
        if self.wrong == "loss_weights":
            return loaded | {self.wrong: loaded[self.wrong] * 2}
        return loaded | {self.wrong: loaded[self.wrong][1:]}


def lying(
    *,
    graph: ModuleGraph,
    models: Mapping[str, Any],
    seed: int,
    wrong: str,
    sample_id: int,
    **options: Any,
) -> Lying:
    """Return samples of which one is wrong."""
    honest = written(graph=graph, models=models, seed=seed, **options)
    return Lying(honest.inner, honest.known, wrong, sample_id)
