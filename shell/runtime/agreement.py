"""Agreement: the record that all ranks exchange at the end of a step, and what follows from it.

Before anything is updated, all ranks gather one small record of each: gradient norm, losses, finiteness, a digest of
the samples of the next step, whether it was asked to stop, how long it computed, how much memory it took. Every rank
reads the same records in the same order. So all ranks clip by the same norm, take the step or skip it together, go on
to the same samples, and stop after the same step.

A batch that a host gives its ranks is compared in the same way, before the step (`check_batch`).
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import attrs
import torch

from mimogrid.core.base.errors import EchoError, WorldError
from mimogrid.core.faults.stragglers import StepTimes
from mimogrid.core.step.step import Step
from mimogrid.core.update.decision import SkipState, decide
from mimogrid.core.update.learning_rate import learning_rate
from mimogrid.core.update.reductions import NORM_TERMS, exact_terms, loss_weight, sum_of_terms
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.runtime.exchange import gather_values
from mimogrid.shell.runtime.execute import Timed, busy_s
from mimogrid.shell.runtime.rank import RankRuntime
from mimogrid.shell.runtime.stage import StageStep, losses_of


@attrs.frozen
class Outcome:
    """The results of a step, the same on every rank but for the timeline.

    Attributes:
        loss: the loss of the job.
        losses: the loss of each module, and as ``NAME.aux`` its auxiliary loss; each divided by its count, and without
            its weight in the loss of the job.
        gradient_norm: the norm of the whole gradient.
        learning_rate: the learning rate of the step.
        loss_scale: what losses were multiplied by before their backward.
        skipped: why nothing was updated; "" where the step was taken.
        stops: whether a rank was asked to stop.
        all_saved: whether all ranks have ended their part of the save in flight (`RankRuntime.has_saved`).
        step_times: how long each rank was busy in the step before.
        peak_bytes: the most memory that each rank took so far.
        timeline: what this rank did.
    """

    loss: float
    losses: Mapping[str, float]
    gradient_norm: float
    learning_rate: float
    loss_scale: float
    skipped: str
    stops: bool
    all_saved: bool
    step_times: tuple[StepTimes, ...]
    peak_bytes: tuple[int, ...] = ()
    timeline: tuple[Timed, ...] = ()

    @property
    def taken(self) -> bool:
        """Whether all ranks took the step; else none did."""
        return not self.skipped


@attrs.frozen
class Record:
    """What a rank reports at the end of a step.

    Attributes:
        finite: whether all of its gradients are finite.
        has_saved: whether it has ended its part of the save in flight.
        terms: add up to the squared norm of its part of the gradient (`core.update.reductions.exact_terms`).
        losses: its part of each loss sum.
        digest: a hash of the samples of the next step (`samples_digest`).
        stops: whether it was asked to stop.
        step_times: the seconds that it was busy, and that it loaded data, in the step before.
        peak_bytes: the most memory that it took so far.
    """

    finite: bool
    has_saved: bool
    terms: tuple[float, ...]
    losses: Mapping[str, float]
    digest: tuple[float, float]
    stops: bool
    step_times: tuple[float, float]
    peak_bytes: int

    def packed(self) -> list[float]:
        """Return the record as numbers, all exact in fp64; `read_records` unpacks them."""
        return [
            self.finite,
            self.has_saved,
            *self.terms,
            *self.losses.values(),
            *self.digest,
            self.stops,
            *self.step_times,
            self.peak_bytes,
        ]


@attrs.frozen
class Agreed:
    """What the ranks agree on: the outcome of a step, and what the decision on the next one depends on."""

    outcome: Outcome
    skip_state: SkipState


def agree(
    runtime: RankRuntime, stages: Iterable[StageStep], index: int, step: Step, following: Step
) -> Agreed:
    """Exchange the records of step `index`; all ranks call it. Raises WorldError where samples differ.

    Gradients are divided by the loss scale first. All of them must be finite, also those that do not count in the norm
    because another rank holds a copy.
    """
    buffers = runtime.buffers.values()
    if runtime.skip_state.scale != 1:
        for buffer in buffers:
            buffer.scale(1 / runtime.skip_state.scale)
    mine = Record(
        finite=all(buffer.is_finite for buffer in buffers),
        has_saved=runtime.has_saved,
        terms=exact_terms(partial for buffer in buffers for partial in buffer.partials()),
        losses=losses_of(stages, step),
        digest=samples_digest(following),
        stops=runtime.stop_request.is_received,
        step_times=(busy_s(runtime.last_timeline), runtime.last_load_s),
        peak_bytes=runtime.device.peak_bytes(),
    )
    packed = torch.tensor(mine.packed(), dtype=torch.float64, device=runtime.device.torch)
    return read_records(
        gather_values(runtime, packed).cpu(),
        job=runtime.job,
        index=index,
        step=step,
        following=following,
        skip_state=runtime.skip_state,
        stages_by_rank=runtime.stages_by_rank,
    )


def read_records(
    records: torch.Tensor,
    *,
    job: Job,
    index: int,
    step: Step,
    following: Step,
    skip_state: SkipState,
    stages_by_rank: Mapping[int, str],
) -> Agreed:
    """Return what follows from the packed records [ranks, values] of step `index`."""
    spec = job.spec
    flags, terms, sums, digests, stops, step_times, peaks = records.split(
        [2, NORM_TERMS, len(step.units), 2, 1, 2, 1], dim=1
    )
    all_finite, all_saved = (all(column) for column in zip(*flags.tolist(), strict=True))
    check_digests(job.topology.ranks, following, digests)
    losses = means_of(step, sums.sum(dim=0).tolist())
    loss = sum(loss_weight(job.topology, name) * mean for name, mean in losses.items())
    norm = sum_of_terms(terms.flatten().tolist()) ** 0.5
    next_skip_state, skipped = decide(
        skip_state, spec.optimizer, loss=loss, norm=norm, finite=all_finite, half=spec.precision == "fp16"
    )
    outcome = Outcome(
        loss=loss,
        losses=losses,
        gradient_norm=norm,
        learning_rate=learning_rate(spec.optimizer, step=index, steps=spec.train.steps),
        loss_scale=skip_state.scale,
        skipped=skipped,
        stops=any(stops.flatten().tolist()),
        all_saved=all_saved,
        step_times=tuple(
            StepTimes(rank, stages_by_rank[rank], *step_times)
            for rank, step_times in zip(job.topology.ranks, step_times.tolist(), strict=True)
        ),
        peak_bytes=tuple(int(peak) for peak in peaks.flatten().tolist()),
    )
    return Agreed(outcome, next_skip_state)


def means_of(step: Step, sums: Sequence[float]) -> dict[str, float]:
    """Divide the sums of losses by their counts; a loss over nothing is 0."""
    return {
        name: total / units if units else 0.0
        for total, (name, units) in zip(sums, step.units.items(), strict=True)
    }


def samples_digest(step: Step) -> tuple[float, float]:
    """Return a hash of how a step's samples are described, as two numbers of 48 bits, exact in fp64."""
    facts = [(s.id, s.length, s.rows, s.placeholders, s.segments, s.intervals, s.units) for s in step.samples]
    hashed = hashlib.blake2b(repr((facts, step.cells)).encode(), digest_size=12).digest()
    return float(int.from_bytes(hashed[:6], "big")), float(int.from_bytes(hashed[6:], "big"))


def check_digests(
    ranks: Sequence[int],
    step: Step,
    digests: torch.Tensor,
    remedy: str = "a source's describe must depend on nothing but the sample's id",
) -> None:
    """Compare the digests [ranks, 2] of a step's samples. Raises WorldError where they differ."""
    rows = digests.tolist()
    differ = [r for r, row in zip(ranks, rows, strict=True) if row != rows[0]]
    if differ:
        ids = [sample.id for sample in step.samples]
        raise WorldError(
            f"ranks {differ} describe samples {min(ids)}..{max(ids)} differently than rank {ranks[0]}: {remedy}."
        )


def check_batch(runtime: RankRuntime, step: Step) -> None:
    """Compare the batches that a host gave the ranks for a step; all ranks call it, or `report_no_batch`.

    Raises WorldError where they differ, and EchoError where another rank has none.
    """
    ranks = runtime.topology.ranks
    mine = torch.tensor(samples_digest(step), dtype=torch.float64, device=runtime.device.torch)
    digests = gather_values(runtime, mine).cpu()
    without = [rank for rank, row in zip(ranks, digests, strict=True) if row.isnan().any()]
    if without:
        raise EchoError(
            f"rank {runtime.rank} was cut off: ranks {without} have no batch for this step, and say why"
        )
    check_digests(ranks, step, digests, "give every rank the same batch, whole and in the same order")


def report_no_batch(runtime: RankRuntime) -> None:
    """Take part in `check_batch` on a rank that could not make its batch."""
    gather_values(runtime, torch.full((2,), torch.nan, dtype=torch.float64, device=runtime.device.torch))
