"""Batches: the arguments of a program's `MimoModel` as samples of a job.

A batch is a whole microbatch with the samples of all dp ranks, the same on every rank. Each rank then loads what its
stages need. The description of a sample follows from its token ids: positions with the special token of a modality take
rows of that modality, and all other positions are text.

The tensors of a modality are split over samples along their first dim. If a microbatch has N items and R rows, each
item has R / N rows (patches of an image). If that does not give each sample whole items, each sample that has rows has
one item.

Shapes in names: B samples, S positions.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from mimogrid.adapters.megatron.modality import SequenceFirst
from mimogrid.adapters.megatron.readings import READS_MASKS, Reader, Reading, readings_of, unreadable
from mimogrid.adapters.torch_module import Example
from mimogrid.core.base.errors import PlanError, Problem, nearest
from mimogrid.core.base.samples import Sample
from mimogrid.core.job.models import Gpt
from mimogrid.core.topology.topology import Module


Arguments = Mapping[str, Mapping[str, Any]]
"""The arguments of a modality's encoders, by encoder and by argument."""


@attrs.frozen(eq=False)
class Batch:
    """The arguments of `MimoModel.forward` for one microbatch.

    `labels` [B, S] may be None if the loss function takes logits. Without `loss_mask` [B, S] every position counts.
    `sample_ids` [B] is no argument of the model; ranks with batches of their own compare it (`per_rank`).
    """

    input_ids: Tensor
    position_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    loss_mask: Tensor | None = None
    labels: Tensor | None = None
    modality_inputs: Mapping[str, Arguments | None] | None = None
    packing_kwargs: Any = None
    sample_ids: Tensor | None = None

    @property
    def weights(self) -> Tensor:
        """The loss weight of each position [B, S], on the CPU."""
        ones = torch.ones_like(self.input_ids, dtype=torch.float32)
        return (ones if self.loss_mask is None else self.loss_mask).cpu()


def examples_of(
    batch: Batch,
    language: Module,
    tokens: Mapping[str, int],
    *,
    samples: int,
    sequence: int,
    rows_of: Mapping[str, str | Callable[..., Any]],
    reader: Reader | None = READS_MASKS,
) -> list[Example]:
    """Return the samples of a batch for a job whose language model is `language`.

    `tokens` are the special tokens by modality. `rows_of` names for a modality the tensor with the rows that the job's
    module reads. By default it is the only tensor of the modality, if it has one entry for each placeholder. The other
    tensors keep their names. `reader` says what the model reads beside tokens; None: this rank does not know.

    Raises PlanError with everything in the batch that the job does not support: shapes, positions that do not count
    up, masks that the model does not read, modalities that the job or the batch lacks, tokens outside the vocabulary.
    """
    problems = list(_mismatches(batch, language, samples=samples, sequence=sequence, reader=reader))
    feeders = [edge.source for edge in language.inputs]
    problems += _strangers(batch, feeders, tokens)
    if not problems:
        problems += _unknown_tokens(batch, language, [tokens[name] for name in feeders])
    if problems:
        raise PlanError(problems)
    ids_BS = batch.input_ids.cpu()
    described = samples_of(batch, language, tokens)
    counts = {name: [sample.rows[name] for sample in described] for name in feeders}
    parts = {name: parts_of(batch, name, counts[name], rows_of.get(name)) for name in feeders}
    text = text_of(batch, ids_BS, [tokens[name] for name in feeders])
    return [
        Example(
            sample,
            {language.name: {key: column[i] for key, column in text.items()}}
            | {name: of_samples[i] for name, of_samples in parts.items() if counts[name][i]},
        )
        for i, sample in enumerate(described)
    ]


def samples_of(batch: Batch, language: Module, tokens: Mapping[str, int]) -> list[Sample]:
    """Describe the samples of a batch by their tokens."""
    ids_BS, feeders = batch.input_ids.cpu(), [edge.source for edge in language.inputs]
    places = {name: _places(ids_BS, tokens[name]) for name in feeders}
    return [
        _sample(i, ids_BS.shape[1], {name: places[name][i] for name in feeders}, language.name, units)
        for i, units in enumerate(batch.weights.double().sum(dim=1).tolist())
    ]


def readings(batch: Batch, samples: int) -> list[Reading]:
    """Return what the language model reads of each sample of a batch beside its tokens.

    A stage between the first and the last may have no tokens, but the rest; with nothing at all the list is empty.
    """
    packing, mask = batch.packing_kwargs, batch.attention_mask
    with_positions = [of for of in (batch.input_ids, batch.position_ids, mask) if of is not None]
    if with_positions:
        positions = with_positions[0].shape[-1]
    elif packing is not None:
        positions = int(packing["cu_seqlens_q"][-1]) // samples
    else:
        return []
    return readings_of(batch.position_ids, mask, packing, (samples, positions))


def check_text(
    batch: Batch,
    language: Module,
    tokens: Mapping[str, int],
    *,
    samples: int,
    sequence: int,
    reader: Reader | None,
) -> None:
    """Raise PlanError with what a job does not support in the language model's arguments."""
    problems = list(_mismatches(batch, language, samples=samples, sequence=sequence, reader=reader))
    feeders = [edge.source for edge in language.inputs]
    problems += _unnamed(feeders, tokens)
    if not problems:
        problems += _unknown_tokens(batch, language, [tokens[name] for name in feeders])
    if problems:
        raise PlanError(problems)


def _sample(
    i: int, positions: int, places: Mapping[str, Sequence[int]], language: str, units: float
) -> Sample:
    """Describe a sample. Placeholders are left out if they are the leading positions, feeder after feeder."""
    order = tuple(place for of_feeder in places.values() for place in of_feeder)
    leading = order == tuple(range(len(order)))
    return Sample(
        id=i,
        length=positions - len(order),
        rows={name: len(of_feeder) for name, of_feeder in places.items()},
        placeholders={} if leading else {language: order},
        units={language: units},
    )


def _places(ids_BS: Tensor, token: int) -> list[list[int]]:
    """Return for each sample the positions of a token."""
    found: list[list[int]] = [[] for _ in ids_BS]
    for sample, position in (ids_BS == token).nonzero().tolist():
        found[sample].append(position)
    return found


def text_of(batch: Batch, ids_BS: Tensor, special: Sequence[int]) -> dict[str, Tensor]:
    """Return what the language model reads, each [B, S]; tokens are -1 at placeholders."""
    is_special = torch.isin(ids_BS, torch.tensor(special, dtype=ids_BS.dtype))
    labels = torch.zeros_like(ids_BS) if batch.labels is None else batch.labels.cpu()
    return {
        "tokens": ids_BS.masked_fill(is_special, -1),
        "labels": labels,
        "loss_weights": batch.weights,
    }


# -- modalities --------------------------------------------------------------------------------------------


def parts_of(
    batch: Batch, name: str, counts: Sequence[int], rows_of: str | Callable[..., Any] | None
) -> list[dict[str, Tensor]]:
    """Return the tensors of a modality, sample by sample; `counts` are the placeholders of each.

    With several encoders their names are ``ENCODER.ARGUMENT``; ``items.ENCODER`` has the number of a sample's items.
    """
    by_encoder = (batch.modality_inputs or {}).get(name) or {}
    arguments = {
        f"{encoder}.{argument}" if len(by_encoder) > 1 else argument: value
        for encoder, of_encoder in by_encoder.items()
        for argument, value in of_encoder.items()
        if value is not None
    }
    whole: dict[str, Tensor] = {}
    for argument, value in arguments.items() if any(counts) else ():
        where = f"modality_inputs.{name}.{argument}"
        if not isinstance(value, Tensor):
            fact = (
                f"is a {type(value).__name__}; the items of a tensor can be split over samples, this cannot."
            )
            raise PlanError([Problem(where, fact, "Give it to the encoder as it is built.")])
        whole[argument] = value
    first = rows_of.argument if isinstance(rows_of, SequenceFirst) else None
    cut = {
        argument: (_by_sample if argument == first else _cut)(
            value, counts, f"modality_inputs.{name}.{argument}"
        )
        for argument, value in whole.items()
    }
    if len(by_encoder) > 1:
        cut |= _items_of(cut, name)
    rows = _rows(whole, cut, counts, first or rows_of)
    return [{**{a: parts[i] for a, parts in cut.items()}, "rows": rows[i]} for i in range(len(counts))]


def _items_of(cut: Mapping[str, Sequence[Tensor]], name: str) -> dict[str, Sequence[Tensor]]:
    """Return the numbers of items of each sample, by encoder; PlanError if an encoder's tensors differ in them."""
    found: dict[str, list[int]] = {}
    for argument, parts in cut.items():
        items = [len(part) for part in parts]
        if items != found.setdefault(argument.partition(".")[0], items):
            fact = "has other numbers of items than another tensor of its encoder, which is one of several."
            remedy = "Give one item of each tensor for each of the others, or make the encoder a modality."
            raise PlanError([Problem(f"modality_inputs.{name}.{argument}", fact, remedy)])
    return {f"items.{encoder}": [torch.tensor([n]) for n in items] for encoder, items in found.items()}


def _rows(
    whole: Mapping[str, Tensor],
    cut: Mapping[str, Sequence[Tensor]],
    counts: Sequence[int],
    rows_of: str | Callable[..., Any] | None,
) -> Sequence[Tensor]:
    """Return the rows of each sample; their width is 0 if the encoder makes them from other tensors."""
    if isinstance(rows_of, str) and rows_of in cut:
        return cut[rows_of]
    if len(cut) == 1:
        ((argument, only),) = cut.items()
        if len(whole[argument]) == sum(counts):
            return only
    return [torch.empty(count, 0) for count in counts]


def _by_sample(value_SBF: Tensor, counts: Sequence[int], where: str) -> Sequence[Tensor]:
    """Split a tensor [S, B, F] over samples, [S, F] each. Every sample has S rows (`SequenceFirst`)."""
    if (
        value_SBF.dim() != _BLOCK
        or tuple(value_SBF.shape[:2]) != (counts[0], len(counts))
        or len(set(counts)) > 1
    ):
        fact = (
            f"has the shape {list(value_SBF.shape)}, declared [positions, samples, features]; "
            f"the {len(counts)} samples have {_some(counts)} placeholders."
        )
        raise PlanError([Problem(where, fact, "Give as many positions as each sample has placeholders.")])
    return value_SBF.unbind(1)


def _cut(value: Tensor, counts: Sequence[int], where: str) -> Sequence[Tensor]:
    """Split the items of a tensor over samples, in proportion to their rows, or one for each sample that has rows.

    Raises PlanError for a tensor that may as well be [positions, samples, features].
    """
    items, rows = len(value), sum(counts)
    if value.dim() == _BLOCK and len(counts) > 1 and value.shape[1] == len(counts):
        raise PlanError([_ambiguous(value, counts, where)])
    if all(items * count % rows == 0 for count in counts):
        sizes = [items * count // rows for count in counts]
    elif items == sum(1 for count in counts if count):
        sizes = [int(count > 0) for count in counts]
    else:
        raise PlanError([_uneven(items, counts, where)])
    parts: Sequence[Tensor] = value.split(sizes)
    return parts


def _ambiguous(value: Tensor, counts: Sequence[int], where: str) -> Problem:
    fact = (
        f"has the shape {list(value.shape)} for {len(counts)} samples: it may be [positions, samples, features] or "
        "[items, rows, features], and each would give the samples other rows."
    )
    argument = where.rpartition(".")[2]
    remedy = (
        f"Declare the first with encoder_inputs={{...: SequenceFirst('{argument}')}}. For the second give "
        "`Example`s with tensors of their own."
    )
    return Problem(where, fact, remedy)


_BLOCK = 3
"""The number of dims of a block of positions and samples."""


def _uneven(items: int, counts: Sequence[int], where: str) -> Problem:
    fact = (
        f"has {items} items for {sum(counts)} placeholders, which are not as many for each: "
        f"the samples have {_some(counts)}."
    )
    remedy = "Give one item for each row or sample, or pass `Example`s with tensors of their own."
    return Problem(where, fact, remedy)


# -- what a job does not support ---------------------------------------------------------------------------


def _mismatches(
    batch: Batch, language: Module, *, samples: int, sequence: int, reader: Reader | None
) -> Iterator[Problem]:
    """Yield wrong shapes, and arguments that a job does not support."""
    shape = tuple(batch.input_ids.shape)
    if len(shape) != 2 or shape[0] != samples:  # noqa: PLR2004 -- [B, S]
        fact = f"has the shape {shape}; a microbatch of the job has {samples} samples, of all its dp ranks."
        yield Problem("input_ids", fact, "Give every rank the whole microbatch, [samples, positions].")
        return
    if shape[1] > sequence or (language.cp > 1 and shape[1] != sequence):
        fact = f"has {shape[1]} positions, the job sequences of {sequence}."
        yield Problem("input_ids", fact, "Cut or pad it, or open the job with another max_sequence_length.")
    for name in ("labels", "loss_mask"):
        tensor = getattr(batch, name)
        if tensor is not None and tuple(tensor.shape) != shape:
            fact = f"has the shape {tuple(tensor.shape)}, input_ids has {shape}."
            yield Problem(name, fact, "Give one value for each position.")
    yield from unreadable(
        batch.position_ids, batch.attention_mask, batch.packing_kwargs, shape, reader, language.cp
    )


def _unnamed(feeders: Sequence[str], tokens: Mapping[str, int]) -> Iterator[Problem]:
    """Yield modalities without a special token."""
    for name in feeders:
        if name not in tokens:
            fact = f"feeds the language model, and has no special token; there are those of {sorted(tokens)}."
            yield Problem(f"modules.{name}", fact, "Name it: special_token_ids={...}.")


def _strangers(batch: Batch, feeders: Sequence[str], tokens: Mapping[str, int]) -> Iterator[Problem]:
    """Yield modalities that only the batch or only the job has."""
    yield from _unnamed(feeders, tokens)
    for name in (name for name in feeders if name in tokens):
        has_rows = bool((batch.input_ids == tokens[name]).any())
        inputs = (batch.modality_inputs or {}).get(name)
        if has_rows and not inputs:
            fact = f"there are placeholders for '{name}', and no input."
            yield Problem(f"modality_inputs.{name}", fact, "Give its encoder's arguments.")
        items = sum(map(_items, (inputs or {}).values()))
        if items and not has_rows:
            fact = f"has {items} items, and input_ids no placeholder for them (token {tokens[name]})."
            remedy = "Give no items, or see whether special_token_ids are those of the batch."
            yield Problem(f"modality_inputs.{name}", fact, remedy)
    for name in (batch.modality_inputs or {}).keys() - set(feeders):
        yield Problem("modality_inputs", f"the job has no modality '{name}'.", nearest(name, tuple(feeders)))


def _items(arguments: Mapping[str, Any]) -> int:
    return max(
        (len(each) for each in arguments.values() if isinstance(each, Tensor) and each.dim()), default=0
    )


def _unknown_tokens(batch: Batch, language: Module, special: Sequence[int]) -> Iterator[Problem]:
    """Yield tokens of the text, and labels that count, that are outside the vocabulary."""
    assert isinstance(language.model, Gpt)
    vocab, ids_BS = language.model.vocab, batch.input_ids.cpu()
    is_text = ~torch.isin(ids_BS, torch.tensor(special, dtype=ids_BS.dtype))
    read = ("input_ids", ids_BS, is_text, "Special tokens of modalities are those of special_token_ids.")
    judged = (
        "labels",
        batch.labels,
        batch.weights != 0,
        "Let loss_mask be 0 where there is nothing to predict.",
    )
    for name, tokens, counts, remedy in (read, judged):
        if tokens is None:
            continue
        found = tokens.cpu()[counts & ((tokens.cpu() < 0) | (tokens.cpu() >= vocab))]
        if len(found):
            fact = f"has {len(found)} tokens beyond the vocabulary of {vocab}, among them {int(found[0])}."
            yield Problem(name, fact, remedy)


def _some(counts: Sequence[int], most: int = 8) -> str:
    shown = ", ".join(map(str, counts[:most]))
    return f"{shown}, ..." if len(counts) > most else shown
