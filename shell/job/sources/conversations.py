"""Conversations: the samples of an index, shuffled anew in every epoch.

    [data]
    source = "conversations"
    options = { index = "train.index" }

The index has the tokens and the sizes of all images and sounds, so describing a sample opens nothing, and a language
model loads from the index alone. A tower reads the images or sounds of its own samples from the store, through the
processor of the checkpoint. Store, media and processor must be those that were indexed.
"""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from mimogrid.core.base.errors import PlanError, Problem, WorldError
from mimogrid.core.base.samples import Sample
from mimogrid.core.data.order import Order
from mimogrid.core.data.record import LANGUAGE, expanded
from mimogrid.core.job.graph import ModuleGraph
from mimogrid.core.job.spec import JobSpec, SourceFacts
from mimogrid.core.models.families import read_config
from mimogrid.core.models.network import Model
from mimogrid.shell.data.conversations import LeftOutError
from mimogrid.shell.data.index import Index, check_processor, check_store, digest
from mimogrid.shell.data.store import Store
from mimogrid.shell.job.tables import converted, new_converter
from mimogrid.shell.job.textfiles import json_of, read_text


if TYPE_CHECKING:
    import torch

    from mimogrid.shell.data.encoding import Encoder


PLACEHOLDER = -1


@attrs.frozen(kw_only=True)
class Options:
    """`[data] options`. The checkpoint is by default that of the modules' weights, or else that of the index.

    `sequence` is the number of positions of a language sequence; by default those of the longest sample. `digest` is
    that of the index's rows; reading a job file fills it in, so that a resumed run has the index that it began with.
    """

    index: str
    checkpoint: str | None = None
    sequence: int | None = None
    shuffle: bool = True
    digest: str | None = None


@attrs.frozen(eq=False)
class Conversations:
    """The samples of an index in an order without end. The checkpoint's processor makes rows of images and sounds."""

    index: Index
    order: Order
    checkpoint: Path
    store: Store

    def describe(self, sample_id: int) -> Sample:
        """Return the counts of a sample, from its row of the index."""
        return self.index.record(self.order.at(sample_id)).described(sample_id, LANGUAGE)

    def load(self, sample_id: int, module: str) -> "Mapping[str, torch.Tensor]":
        """Return a language model's tokens, labels and weights, or a tower's rows.

        Raises WorldError if an image or a sound is not the one that was indexed.
        """
        row = self.order.at(sample_id)
        return self._text(row) if module == LANGUAGE else {"rows": self._rows(row, module)}

    def _text(self, row: int) -> "Mapping[str, torch.Tensor]":
        import torch  # noqa: PLC0415 -- descriptions need no torch

        text = torch.tensor(self.index.tokens(row))
        placeholders = list(expanded(self.index.runs(row, "runs")))
        length = len(text) + len(placeholders)
        takes_row, counts = torch.zeros(length, dtype=torch.bool), torch.zeros(length, dtype=torch.bool)
        takes_row[placeholders] = True
        counts[list(expanded(self.index.runs(row, "counted")))] = True
        tokens = torch.full((length,), PLACEHOLDER).masked_scatter(~takes_row, text)
        return {
            "tokens": tokens,
            "labels": tokens.roll(-1).where(counts, 0),
            "loss_weights": counts.to(torch.float32),
        }

    def _rows(self, row: int, module: str) -> "torch.Tensor":
        encoder = _encoder(self.checkpoint)
        kinds, objects = set[str](), []
        for kind, place, then in self.index.media(row):
            if encoder.module(kind) != module:
                continue
            try:
                raw = self.store.read(place)
                if digest(raw) != then:
                    raise self._changed(row, f"{place!r} is another {kind} than the one that was indexed")
                objects.append(encoder.decoded(kind, raw, place))
            except LeftOutError as error:
                raise self._changed(row, error.fact) from None
            kinds.add(kind)
        assert len(kinds) == 1, "a module reads one kind of media"
        return encoder.rows(kinds.pop(), objects)

    def _changed(self, row: int, fact: str) -> WorldError:
        sample = self.index.record(row).id
        return WorldError(f"sample '{sample}' of {self.index.folder}: {fact}. Index the store again.")


@functools.lru_cache(maxsize=2)
def _encoder(checkpoint: Path) -> "Encoder":
    """Return the encoder of a checkpoint. A process reads one when it loads its first image or sound."""
    from mimogrid.shell.data.encoding import Encoder  # noqa: PLC0415 -- imports transformers

    return Encoder.of(checkpoint)


def conversations(
    spec: JobSpec, graph: ModuleGraph, options: Mapping[str, Any]
) -> tuple[Conversations | None, SourceFacts, tuple[Problem, ...]]:
    """Return the source of an index, and the facts for the plan; or the problems of the options."""
    read = converted(new_converter(), options, Options, ("data", "options"))
    if read.value is None:
        return None, SourceFacts(), tuple(Problem(f.where, f.message, f.remedy) for f in read.problems)
    chosen = read.value
    try:
        index = Index(Path(chosen.index))
        check_store(index)
        checkpoint = _checkpoint(spec, index, chosen)
        check_processor(index, checkpoint)
        model = read_config(
            json_of(read_text(checkpoint / "config.json", "Name the folder of a checkpoint."))
        )
    except PlanError as error:
        return None, SourceFacts(), error.problems
    problems = (*_modules(graph, model, index), *_contents(spec, chosen, index))
    if problems:
        return None, SourceFacts(), problems
    source = Conversations(
        index,
        Order(seed=spec.seed, count=len(index), shuffle=chosen.shuffle),
        checkpoint,
        index.store(),
    )
    return source, facts_of(model, chosen.sequence or index.facts.longest), ()


def facts_of(model: Model, sequence: int) -> SourceFacts:
    """Return the facts of conversations for the model of a checkpoint, with so many positions at most."""
    return SourceFacts(
        sequence=sequence,
        vocab=model.modules[LANGUAGE].options["vocab"],
        features={name: m.options["features"] for name, m in model.modules.items() if name != LANGUAGE},
        targets=False,
    )


def _checkpoint(spec: JobSpec, index: Index, chosen: Options) -> Path:
    """Return the folder of the processor. Raises PlanError where the modules have weights of several."""
    if chosen.checkpoint is not None:
        return Path(chosen.checkpoint)
    folders = sorted({module.weights for module in spec.modules.values() if module.weights})
    if len(folders) > 1:
        message = f"could be each of {', '.join(folders)}, from which modules start."
        remedy = "Name the one whose processor made the index."
        raise PlanError([Problem("data.options.checkpoint", message, remedy)])
    return Path(folders[0]) if folders else (index.folder / index.facts.processor).resolve()


def _modules(graph: ModuleGraph, model: Model, index: Index) -> Iterator[Problem]:
    """Yield which modules of the checkpoint the job lacks."""
    if graph.texts != (LANGUAGE,):
        message = f"is read by a language model called '{LANGUAGE}'; the job has {', '.join(graph.texts) or 'none'}."
        yield Problem("data.source", message, f"Write [modules.{LANGUAGE}].")
    for name in sorted({placeholder.module for placeholder in model.placeholders.values()}):
        if name not in graph.sources:
            message = f"{index.folder} has rows for a module '{name}' that nothing feeds; the job has none."
            yield Problem("data.source", message, f'Write [modules.{name}] with feeds = ["{LANGUAGE}"].')


def _contents(spec: JobSpec, chosen: Options, index: Index) -> Iterator[Problem]:
    """Yield why an index is not the one that the options are for."""
    if chosen.digest not in {None, index.facts.digest}:
        message = f"is {chosen.digest}, and the rows of {index.folder} have {index.facts.digest}."
        yield Problem(
            "data.options.digest", message, "Name the index that is meant, or leave the digest out."
        )
    longest = index.facts.longest
    if spec.data.overflow == "error" and (chosen.sequence or longest) < longest:
        message = f"is {chosen.sequence}; the longest sample of {index.folder} takes {longest} positions."
        remedy = f"Set sequence = {longest} or more, index with --max-tokens {chosen.sequence}, or set data.overflow."
        yield Problem("data.options.sequence", message, remedy)
