"""Agreement: what all ranks tell each other at the end of a step, and what follows from it.

Before anything is updated, all ranks gather one small record from each (gradient norm, losses, finiteness, the
digest of the samples that the next step will use, a request to stop, how long it computed). Every rank reads the same
records in the same order, so all clip by the same norm, and all take the step or none does; no two ranks go on to
different samples, and all stop after the same step.
"""

import hashlib
from collections.abc import Mapping, Sequence

import attrs
import torch

from mimogrid.core.base.errors import WorldError
from mimogrid.core.faults.stragglers import StepTimes
from mimogrid.core.step.step import Step
from mimogrid.core.update.decision import SkipState, decide
from mimogrid.core.update.learning_rate import learning_rate
from mimogrid.core.update.reductions import NORM_TERMS, loss_weight, sum_of_terms
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.runtime.execute import Timed


@attrs.frozen
class Outcome:
    """What a step came to, the same on every rank.

    `losses` are those of each module, and as ``NAME.aux`` what spreads its tokens over experts, divided by their
    counts and without weights. `skipped` says why nothing was updated; "": the step was taken. `loss_scale` is what
    the losses were multiplied by before their backward. `stops` says that a rank was asked to stop, `step_times`
    how long each was busy in the step before. `all_saved`: see `step.RankRuntime`. `timeline` is this rank's own.
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
    timeline: tuple[Timed, ...] = ()

    @property
    def taken(self) -> bool:
        """Whether all ranks took the step; else none did."""
        return not self.skipped


@attrs.frozen
class Record:
    """What a rank says at the end of a step.

    `terms` sum to the squares of its part of the gradient (`core.update.reductions.exact_terms`), `losses` are its
    parts of the sums of losses, `step_times` the seconds that it was busy and that it loaded data in the step before.
    """

    finite: bool
    has_saved: bool
    terms: tuple[float, ...]
    losses: Mapping[str, float]
    digest: tuple[float, float]
    stops: bool
    step_times: tuple[float, float]

    def packed(self) -> list[float]:
        """Return the record as numbers, all exact in fp64; `agreed` reads them."""
        return [
            self.finite,
            self.has_saved,
            *self.terms,
            *self.losses.values(),
            *self.digest,
            self.stops,
            *self.step_times,
        ]


@attrs.frozen
class Agreed:
    """What the ranks agree on: the outcome of a step, and what the decision on the next one hangs on."""

    outcome: Outcome
    skip_state: SkipState


def agreed(
    records: torch.Tensor,
    *,
    job: Job,
    index: int,
    step: Step,
    following: Step,
    skip_state: SkipState,
    stages_by_rank: Mapping[int, str],
) -> Agreed:
    """Read the records [ranks, values] of step `index`, packed. Raises WorldError where samples differ."""
    spec = job.spec
    flags, terms, sums, digests, stops, step_times = records.split(
        [2, NORM_TERMS, len(step.units), 2, 1, 2], dim=1
    )
    all_finite, all_saved = flags.bool().all(dim=0).tolist()
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
        stops=bool(stops.any()),
        all_saved=all_saved,
        step_times=tuple(
            StepTimes(rank, stages_by_rank[rank], *step_times)
            for rank, step_times in zip(job.topology.ranks, step_times.tolist(), strict=True)
        ),
    )
    return Agreed(outcome, next_skip_state)


def means_of(step: Step, sums: Sequence[float]) -> dict[str, float]:
    """Divide the sums of losses by their counts; a loss without anything to judge is 0."""
    return {
        name: total / units if units else 0.0
        for total, (name, units) in zip(sums, step.units.items(), strict=True)
    }


def digest_of(step: Step) -> tuple[float, float]:
    """Return a hash, as two numbers of 48 bits, of how a step's samples are described; exact in fp64."""
    facts = [(s.id, s.length, s.rows, s.placeholders, s.units) for s in step.samples]
    hashed = hashlib.blake2b(repr(facts).encode(), digest_size=12).digest()
    return float(int.from_bytes(hashed[:6], "big")), float(int.from_bytes(hashed[6:], "big"))


def check_digests(
    ranks: Sequence[int],
    step: Step,
    digests: torch.Tensor,
    remedy: str = "a source's describe must depend on nothing but the sample's id",
) -> None:
    """Compare the digests [ranks, 2] of what each rank takes the samples of a step to be."""
    differ = [r for r, row in zip(ranks, digests, strict=True) if not row.equal(digests[0])]
    if differ:
        ids = f"{step.samples[0].id}..{step.samples[-1].id}"
        raise WorldError(f"ranks {differ} describe samples {ids} differently than rank {ranks[0]}: {remedy}.")
