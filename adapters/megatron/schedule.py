"""A step of a job's program, called as megatron-core's schedule functions are."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mimogrid.adapters.megatron.batches import Batch, examples_of
from mimogrid.adapters.megatron.forward_step import (
    ForwardStep,
    HostLoss,
    Microbatch,
    first_of,
    microbatches_of,
)
from mimogrid.adapters.megatron.grids import LANGUAGE, roles_by_chunk
from mimogrid.adapters.megatron.groups import open_collections
from mimogrid.adapters.megatron.modality import Arrange
from mimogrid.adapters.megatron.networks import networks_of, unwrapped
from mimogrid.adapters.megatron.stages import from_specs
from mimogrid.adapters.megatron.states import to_job_state, to_megatron_state
from mimogrid.adapters.torch_module import Embedded, Example, Networks
from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.job.models import Gpt
from mimogrid.core.topology.topology import Module
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.runtime.agreement import Outcome
from mimogrid.shell.world.world import first_failure


class ForwardBackward:
    """A step of a job, called as Megatron's schedule functions are.

    `embedded` is the job in the world that Megatron initialized. Its program is what runs, with the networks of
    `models`, one for each chunk of this rank; where there are none, the job's own. `special_token_ids` are those of
    the modalities, and `rows_of` says which argument of a modality's encoder is the rows that its module reads
    (`batches`). `outcome` is what the last training step came to: its gradient norm, whether it was taken; None
    before the first one and on a rank that idles.
    """

    def __init__(
        self,
        embedded: Embedded,
        models: Sequence[nn.Module] = (),
        *,
        special_token_ids: Mapping[str, int] | None = None,
        rows_of: Mapping[str, str | Arrange] | None = None,
    ) -> None:
        self.embedded = embedded
        self.models = tuple(models)
        self.special_token_ids = special_token_ids or {}
        self.rows_of = rows_of or {}
        self.outcome: Outcome | None = None

    @property
    def model(self) -> nn.Module | list[nn.Module] | None:
        """What trains, as Megatron's loops have it: a list where this rank has several chunks, None where nothing."""
        return self.models[0] if len(self.models) == 1 else list(self.models) or None

    def __call__(
        self,
        *,
        forward_step_func: ForwardStep | None,
        data_iterator: Any,
        model: Any,
        num_microbatches: int,
        seq_length: int,
        micro_batch_size: int,
        decoder_seq_length: int | None = None,
        forward_only: bool = False,
        collect_non_loss_data: bool = False,
        first_val_step: bool | None = None,
        adjust_tensor_shapes_fn: Any = None,
        p2p_communicator: Any = None,
        pg_collection: Any = None,
        force_all_reduce: bool | None = False,
    ) -> list[Any]:
        """Run a step; return what its loss functions report, microbatch by microbatch, on the ranks of the last stage.

        `forward_step_func` is called on every rank of the job, once for each microbatch, before the program starts,
        with `data_iterator` and what stands for this rank's model (`forward_step`). It calls that with a whole
        microbatch, all samples of all dp ranks, the same on every rank, and returns what comes back and a loss
        function. Where it is None, the iterator gives all samples of a microbatch as `Example`s, or there is none and
        they are the job's own; the loss is the cross entropy of the labels by their weights, and every rank of the
        job gets one dictionary of losses, each a mean over the tokens of the step.

        Gradients come out finished: summed over all ranks that have to be and divided by the global counts, so
        there is no `finalize_model_grads_func` to call. A job that updates its weights itself has done so.

        With `forward_only` nothing but the losses comes out, of networks in evaluation mode. With
        `collect_non_loss_data` besides, it is what the loss functions return of an output with
        ``non_loss_data=True``; without a `forward_step_func` it is what the loss would judge: on one rank of each
        dp rank of the last stage, for every microbatch the logits [tokens, V] of that dp rank, sample after sample, as
        ``{"logits": ...}``; nothing on other ranks.

        Raises PlanError for what a job's program cannot do (`forward_step`, `batches`), where the number of
        microbatches is not the job's, where another model is to be trained than the one that is embedded, and for
        `collect_non_loss_data` in training; WorldError where a loss function counts other tokens than its mask.
        """
        problems = list(self._mismatches(model, num_microbatches))
        if collect_non_loss_data and not forward_only:
            fact = "the loop asks for collect_non_loss_data of a training step, whose logits are not kept."
            problems.append(Problem("schedule", fact, "Ask with forward_only=True."))
        if problems:
            raise PlanError(problems)
        if forward_step_func is not None:
            with self.embedded.preparing():
                asked = self._asked(forward_step_func, first_of(data_iterator))
                needed = asked if self.embedded.runtime is not None else ()
                examples = [example for each in needed for example in self._examples(each.batch)]
            return self._by_host(asked, examples, forward_only=forward_only, collects=collect_non_loss_data)
        batch = None
        if data_iterator is not None:
            given = first_of(data_iterator)
            batch = [example for _ in range(num_microbatches) for example in next(given)]
        if collect_non_loss_data:
            return [{"logits": logits} for logits in self.embedded.answers(batch)]
        if forward_only:
            return self._in_words(self.embedded.evaluate(batch))
        self.outcome = self.embedded.step(batch)
        return self._in_words(None if self.outcome is None else self.outcome.losses)

    # -- with a forward step of the host's ---------------------------------------------------------------------

    def _asked(self, forward_step: ForwardStep, data_iterator: Any) -> list[Microbatch]:
        job = self.embedded.job
        return microbatches_of(
            forward_step,
            data_iterator,
            self.models[0] if self.models else None,
            _language(job),
            rank=self.embedded.world.rank,
            total=job.spec.batch.global_size,
        )

    def _by_host(
        self, asked: Sequence[Microbatch], batch: Sequence[Example], *, forward_only: bool, collects: bool
    ) -> list[Any]:
        """Run a step on what the host's forward step said, with its loss functions."""
        embedded = self.embedded
        if embedded.runtime is None:
            return []
        loss = HostLoss(asked, embedded.job.spec.batch.global_size, collects=collects)
        if forward_only:
            embedded.evaluate(batch, loss=loss)
        else:
            self.outcome = embedded.step(batch, loss=loss)
        with first_failure(embedded.world):
            loss.check()
        return loss.reports

    def _examples(self, batch: Batch) -> list[Example]:
        job = self.embedded.job
        language = _language(job)
        return examples_of(
            batch,
            language,
            self.special_token_ids,
            samples=job.spec.batch.global_size // language.microbatches,
            sequence=job.topology.sequence,
            rows_of=self.rows_of,
        )

    # -- with the job's own loss ---------------------------------------------------------------------------------

    def _in_words(self, losses: Mapping[str, float] | None) -> list[dict[str, Tensor]]:
        """Return losses by the names that Megatron's programs give them."""
        if losses is None:
            return []
        names = sorted(losses, key=lambda name: name != LANGUAGE)
        said = {("lm loss" if name == LANGUAGE else f"{name} loss"): losses[name] for name in names}
        exact = torch.float64 if self.embedded.job.spec.precision == "fp64" else torch.float32
        return [{name: torch.tensor(loss, dtype=exact) for name, loss in said.items()}]

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up the weights of a whole `MimoModel`, by Megatron's names; all ranks call it, the first one's count.

        See `states.to_job_state`. For a job with networks of a model; raises WorldError where names or
        shapes are of another.
        """
        self.embedded.load_state_dict(to_job_state(state, LANGUAGE))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights of the whole model by Megatron's names, on the job's first rank; all ranks call it."""
        return to_megatron_state(self.embedded.state_dict(), LANGUAGE, self.embedded.job.topology.modules)

    def _mismatches(self, model: Any, microbatches: int) -> Iterator[Problem]:
        planned = _language(self.embedded.job).microbatches
        if microbatches != planned:
            fact = f"the loop asks for {microbatches} microbatches, the job has {planned}."
            yield Problem("batch.microbatches", fact, f"Set it to {microbatches}.")
        asked = [unwrapped(m) for m in (model if isinstance(model, list) else [model]) if m is not None]
        if any(all(m is not own for own in self.models) for m in asked):
            fact = f"the loop trains a {type(asked[0]).__name__} that the job's program does not call."
            yield Problem("model", fact, "Say so before: forward_backward_func(job, model=model).")


def _language(job: Job) -> Module:
    """Return the language model of a job. Raises PlanError where it has none, or several."""
    found = [module for module in job.topology.modules.values() if isinstance(module.model, Gpt)]
    if len(found) != 1:
        fact = f"the job has {len(found)} language models; Megatron's schedules know one."
        raise PlanError([Problem("modules", fact, "Step the job by itself (`Embedded`).")])
    return found[0]


def forward_backward_func(
    job: Job | Embedded,
    model: Any = None,
    *,
    encoder_inputs: Mapping[str, str | Arrange] | None = None,
    special_token_ids: Mapping[str, int] | None = None,
    **options: Any,
) -> ForwardBackward:
    """Return a drop-in for what megatron-core's `get_forward_backward_func` returns.

    A job is embedded in the process group that Megatron initialized, with these options (`Embedded`); who
    calls this closes it: ``function.embedded.close()``.

    `model` is what trains: a `MimoStages` or `MimoModel` that this rank has built (None on a rank in no grid), a list
    of them where it has several chunks, or a `MimoModelConfig`, of which this rank's part is built here, over the
    job's groups; it is then ``function.model``. Without one the job builds its own networks, of the sizes that the
    job says, and a forward step's batches have the `special_token_ids` that are given here. For `encoder_inputs` see
    `networks_of`.
    """
    given = model if isinstance(model, list) else [model]
    if not special_token_ids:
        special_token_ids = next((getattr(unwrapped(one), "special_token_ids", None) for one in given), None)
    told: dict[str, Any] = {"special_token_ids": special_token_ids, "rows_of": encoder_inputs}
    if isinstance(job, Embedded):
        return ForwardBackward(job, **told)
    built = [unwrapped(one) for one in given if isinstance(one, nn.Module)]

    def networks(embedded: Embedded) -> Networks:
        collections = embedded.enter(
            open_collections(job.topology, embedded.groups, embedded.world, embedded.device)
        )
        role = embedded.role
        if role is None or role.is_idle:
            return {}
        if not built:
            for collection in collections.values():
                # A stage would begin by summing tied weights over it, on CUDA. The job ties its own way.
                collection.embd = None
            built.extend(
                from_specs(
                    model.language_model_spec,
                    model.modality_submodules_spec,
                    model.special_token_ids or {},
                    role=of_chunk,
                    collections=collections,
                    vp_stage=chunk,
                )
                for chunk, of_chunk in enumerate(roles_by_chunk(job.topology, role.rank))
            )
        return networks_of(built, job, role.rank, encoder_inputs)

    embedded = Embedded(job, **options) if model is None else Embedded(job, networks, **options)
    return ForwardBackward(embedded, built, **told)
