"""Batches of the ranks' own: each dp rank of a module iterates over its own samples, as Megatron's loaders do.

A rank of the language model has its tokens, masks and labels, and a rank of an encoder has that encoder's inputs. Dp
rank i of n has the samples that a job gives it: the i-th of n even parts of the microbatch, in order. Before a step the
ranks exchange descriptions of their samples, which are small, so every rank knows all samples of the step; tensors stay
where they are.

Different loaders can be at different samples. So what names a sample is compared over all ranks that have it: its
`sample_ids` if the batches have them, and its tokens if those of the encoders have `input_ids` too. (Megatron's loaders
draw the samples of each module from seeds of their own, and nothing compares them.)
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch.distributed as dist
from torch import Tensor

from mimogrid.adapters.megatron.batches import Batch, check_text, parts_of, readings, samples_of, text_of
from mimogrid.adapters.megatron.readings import READS_MASKS, Reader, Reading
from mimogrid.adapters.torch_module import Example
from mimogrid.core.base.errors import EchoError, PlanError, Problem, WorldError
from mimogrid.core.base.samples import Sample
from mimogrid.core.topology.topology import Module
from mimogrid.shell.runtime.rank import RankRuntime


@attrs.frozen
class Described:
    """What a rank says of the samples that it has of a microbatch.

    `samples` are descriptions, from ranks of the language model. `names` has for each sample what names it, by kind.
    """

    module: str
    first: int
    names: tuple[Mapping[str, str], ...]
    samples: tuple[Sample, ...] = ()


@attrs.frozen(eq=False)
class PerRank:
    """Joins the batches of the ranks; `tokens`, `rows_of` and `reader` are those of `batches.examples_of`."""

    runtime: RankRuntime
    language: Module
    tokens: Mapping[str, int]
    rows_of: Mapping[str, Any]
    reader: Reader | None = READS_MASKS

    def readings(self, batches: Sequence[Batch]) -> dict[int, Reading]:
        """Return what this rank's language model reads of samples beside their tokens, by place in the step."""
        return {
            place: reading
            for microbatch, batch in enumerate(batches)
            for module, part in self._parts(microbatch)
            if module is self.language
            for place, reading in zip(part, readings(batch, len(part)), strict=False)
        }

    def described(self, batches: Sequence[Batch]) -> list[Described]:
        """Describe the samples of this rank's batches, microbatch by microbatch.

        Raises PlanError for batches that do not fit the job, and for a rank whose modules have different samples.
        """
        return [
            Described(
                module.name,
                part.start,
                _names(batch, len(part)),
                tuple(self._samples(batch, len(part))) if module is self.language else (),
            )
            for microbatch, batch in enumerate(batches)
            for module, part in self._parts(microbatch)
            if self._has_part(batch, module)
        ]

    def examples(self, batches: Sequence[Batch], every: Sequence[Sequence[Described]]) -> list[Example]:
        """Return the samples of a step; those of other ranks have no tensors. `every` is what all ranks say.

        Raises WorldError where ranks have different samples, or nobody describes one.
        """
        samples = _joined(every, self._total)
        tensors: list[dict[str, Mapping[str, Tensor]]] = [{} for _ in samples]
        for microbatch, batch in enumerate(batches):
            for module, part in self._parts(microbatch):
                if not self._has_part(batch, module):
                    continue
                for place, of_sample in zip(
                    part, self._tensors(batch, module, samples[part.start : part.stop]), strict=True
                ):
                    tensors[place][module.name] = of_sample
        return [Example(sample, of) for sample, of in zip(samples, tensors, strict=True)]

    @property
    def _total(self) -> int:
        return self.runtime.job.spec.batch.global_size

    def _parts(self, microbatch: int) -> list[tuple[Module, range]]:
        """Return the modules of this rank that read data, each with its samples. The language model is first."""
        topology = self.runtime.topology
        feeders = [edge.source for edge in self.language.inputs]
        hosted = [
            topology.modules[name]
            for name in (self.language.name, *feeders)
            if name in self.runtime.role.modules
        ]
        found = [
            (module, module.samples(module.dp_rank_of(self.runtime.rank), microbatch, self._total))
            for module in hosted
        ]
        if len({(part.start, part.stop) for _, part in found}) > 1:
            said = "; ".join(f"{module.name}: {part.start}..{part.stop - 1}" for module, part in found)
            fact = f"rank {self.runtime.rank} has different samples of its modules ({said})."
            raise PlanError(
                [Problem("batches", fact, "Give every rank the whole microbatch (batches='whole').")]
            )
        return found

    def _has_part(self, batch: Batch, module: Module) -> bool:
        """Whether a batch has what a module reads; a stage between the first and the last may have nothing."""
        if module is self.language:
            return batch.input_ids is not None
        return self.runtime.role.is_first_stage(module.name)

    def _samples(self, batch: Batch, count: int) -> list[Sample]:
        sequence = self.runtime.topology.sequence
        check_text(batch, self.language, self.tokens, samples=count, sequence=sequence, reader=self.reader)
        return samples_of(batch, self.language, self.tokens)

    def _tensors(
        self, batch: Batch, module: Module, samples: Sequence[Sample]
    ) -> Sequence[Mapping[str, Tensor]]:
        if module is self.language:
            feeders = [edge.source for edge in module.inputs]
            text = text_of(batch, batch.input_ids.cpu(), [self.tokens[name] for name in feeders])
            return [{key: column[i] for key, column in text.items()} for i in range(len(samples))]
        counts = [sample.rows[module.name] for sample in samples]
        return parts_of(batch, module.name, counts, self.rows_of.get(module.name))


def exchange(runtime: RankRuntime, mine: Sequence[Described] | None) -> list[Sequence[Described]]:
    """Return what every rank of the job says; all of them call it, with None where a rank has no batch.

    Raises EchoError on the other ranks then.
    """
    every: list[Any] = [None] * runtime.group.size()
    dist.all_gather_object(every, mine, group=runtime.group)
    without = [rank for rank, said in zip(runtime.topology.ranks, every, strict=True) if said is None]
    if without and mine is not None:
        raise EchoError(
            f"rank {runtime.rank} was cut off: ranks {without} have no batch for this step, and say why"
        )
    return every


def _names(batch: Batch, count: int) -> tuple[Mapping[str, str], ...]:
    """Return what names each sample of a batch."""
    found: list[dict[str, str]] = [{} for _ in range(count)]
    if batch.input_ids is not None:
        for name, row in zip(found, batch.input_ids.cpu(), strict=True):
            name["tokens"] = hashlib.blake2b(row.numpy().tobytes(), digest_size=8).hexdigest()
    if batch.sample_ids is not None:
        for name, number in zip(found, batch.sample_ids.tolist(), strict=True):
            name["id"] = str(number)
    return tuple(found)


def _joined(every: Sequence[Sequence[Described]], total: int) -> list[Sample]:
    """Return the descriptions of all samples of a step, after comparing what the ranks say of each."""
    samples: list[Sample | None] = [None] * total
    seen: list[dict[str, tuple[str, str]]] = [{} for _ in range(total)]
    for said in (said for of_rank in every for said in of_rank):
        for place, names in enumerate(said.names, start=said.first):
            for kind, name in names.items():
                module, known = seen[place].setdefault(kind, (said.module, name))
                if known != name:
                    raise WorldError(
                        f"sample {place} of the step has the {kind} {known} in a batch of '{module}' and {name} in one "
                        f"of '{said.module}'. Let the loaders of all modules go through the samples in one order."
                    )
        for place, sample in enumerate(said.samples, start=said.first):
            if samples[place] is not None and samples[place] != attrs.evolve(sample, id=place):
                raise WorldError(
                    f"two ranks of '{said.module}' describe sample {place} of the step differently. "
                    "Give all ranks of a dp rank the same batch."
                )
            samples[place] = attrs.evolve(sample, id=place)
    lacking = [place for place, sample in enumerate(samples) if sample is None]
    if lacking:
        raise WorldError(
            f"no rank has the tokens of samples {lacking} of the step. Give them to a stage of the language model."
        )
    return [sample for sample in samples if sample is not None]
