"""A step of a job's program, with the signature of megatron-core's schedule functions."""

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mimogrid.adapters.megatron.batches import Batch, examples_of, readings
from mimogrid.adapters.megatron.forward_step import (
    ForwardStep,
    HostLoss,
    Microbatch,
    first_of,
    microbatches_of,
)
from mimogrid.adapters.megatron.grids import LANGUAGE, roles_by_chunk
from mimogrid.adapters.megatron.groups import open_collections
from mimogrid.adapters.megatron.language import LanguageStage
from mimogrid.adapters.megatron.loop import LoopModel
from mimogrid.adapters.megatron.modality import Arrange
from mimogrid.adapters.megatron.networks import networks_of, unwrapped
from mimogrid.adapters.megatron.per_rank import PerRank, exchange
from mimogrid.adapters.megatron.readings import JOBS_OWN, Reader, Reading
from mimogrid.adapters.megatron.stages import from_specs
from mimogrid.adapters.megatron.states import to_job_state, to_megatron_state
from mimogrid.adapters.torch_module import Embedded, Example, Networks
from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.job.models import Gpt
from mimogrid.core.topology.topology import Module
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.megatron.names import ProcessGroupCollection
from mimogrid.shell.runtime.agreement import Outcome
from mimogrid.shell.world.world import first_failure


class ForwardBackward:
    """A step of a job, with the signature of Megatron's schedule functions.

    `embedded` is the job in the world that Megatron initialized. Its program runs the networks of `models`, one model
    for each chunk of this rank, or without models the networks of the job. `special_token_ids` are those of the
    modalities. `rows_of` names the argument of a modality's encoder that has the rows which its module reads
    (`batches`). `batches` says whether a forward step has the whole microbatch on every rank ("whole"), or the samples
    of the dp rank ("per_rank"). `outcome` has the result of the last training step, such as the grad norm; it is None
    before the first step and on an idle rank.
    """

    def __init__(
        self,
        embedded: Embedded,
        models: Sequence[nn.Module] = (),
        *,
        special_token_ids: Mapping[str, int] | None = None,
        rows_of: Mapping[str, str | Arrange] | None = None,
        collections: Mapping[str, ProcessGroupCollection] | None = None,
        batches: Literal["whole", "per_rank"] = "whole",
    ) -> None:
        self.embedded = embedded
        self.models = tuple(models)
        self.loop_models = [
            LoopModel(one, embedded, chunk, collections or {}) for chunk, one in enumerate(models)
        ]
        self.special_token_ids = special_token_ids or {}
        self.rows_of = rows_of or {}
        self.batches = batches

    @property
    def outcome(self) -> Outcome | None:
        """The result of the last training step."""
        return self.embedded.outcome

    @property
    def model(self) -> LoopModel | list[LoopModel] | None:
        """The model as a loop of Megatron holds it (`LoopModel`).

        It is a list on a rank with several chunks, and None on a rank without a model.
        """
        return self.loop_models[0] if len(self.loop_models) == 1 else self.loop_models or None

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
        """Run a step; return the reports of its loss functions, by microbatch, on the ranks of the last stage.

        `forward_step_func` is called on every rank of the job, once per microbatch, before the program starts
        (`forward_step`). It calls the model with a whole microbatch, all samples of all dp ranks, the same on every
        rank; or, with batches="per_rank", with the samples of the dp rank (`per_rank`). If it is None, the iterator has
        all samples of a microbatch as `Example`s; without an iterator they are the samples of the job. The loss is then
        the weighted cross entropy of the labels, and every rank of the job gets one dictionary of losses, each a mean
        over the tokens of the step.

        Gradients are complete: summed over all ranks that contribute and divided by the global counts. There is no
        `finalize_model_grads_func` to call. A job that updates its own weights has then done so.

        With `forward_only` networks are in evaluation mode, and nothing is trained. With `collect_non_loss_data` as
        well, the loss functions are called with ``non_loss_data=True``, and what they return is returned. Without a
        `forward_step_func` it is ``{"logits": ...}`` for each microbatch, the logits [tokens, V] of a dp rank sample
        after sample, on one rank of each dp rank of the last stage, and nothing on other ranks.

        Raises PlanError for what a job's program does not support (`forward_step`, `batches`), for another number of
        microbatches or another model than the job has, and for `collect_non_loss_data` in training; WorldError if a
        loss function counts other tokens than its mask.
        """
        problems = list(self._mismatches(model, num_microbatches))
        if collect_non_loss_data and not forward_only:
            fact = "the loop asks for collect_non_loss_data of a training step, whose logits are not kept."
            problems.append(Problem("schedule", fact, "Ask with forward_only=True."))
        if problems:
            raise PlanError(problems)
        if forward_step_func is not None:
            with self.embedded.preparing():
                asked, examples = self._prepared(forward_step_func, first_of(data_iterator))
            return self._by_host(asked, examples, forward_only=forward_only, collects=collect_non_loss_data)
        batch = None
        if data_iterator is not None:
            microbatches = first_of(data_iterator)
            batch = [example for _ in range(num_microbatches) for example in next(microbatches)]
        if collect_non_loss_data:
            return [{"logits": logits} for logits in self.embedded.answers(batch)]
        if forward_only:
            return self._in_words(self.embedded.evaluate(batch))
        outcome = self.embedded.step(batch)
        return self._in_words(None if outcome is None else outcome.losses)

    # -- with a forward step of the host program ------------------------------------------------------------------

    def _prepared(
        self, forward_step: ForwardStep, data_iterator: Any
    ) -> tuple[list[Microbatch], list[Example]]:
        """Call the forward step for each microbatch; return what it asks for, and the samples of the step."""
        runtime = self.embedded.runtime
        if runtime is None:
            return self._asked(forward_step, data_iterator), []
        if self.batches == "whole":
            asked = self._asked(forward_step, data_iterator)
            examples = [example for each in asked for example in self._examples(each.batch)]
            if self._languages:
                of_batches = (readings(each.batch, len(each.batch.input_ids)) for each in asked)
                self._read(dict(enumerate(itertools.chain(*of_batches))))
            return asked, examples
        joining = PerRank(
            runtime, _language(runtime.job), self.special_token_ids, self.rows_of, reader=self._reader
        )
        try:
            asked = self._asked(forward_step, data_iterator)
            of_ranks = [each.batch for each in asked]
            mine = joining.described(of_ranks)
        except Exception:
            with contextlib.suppress(RuntimeError):  # The others are gone.
                exchange(runtime, None)
            raise
        self._read(joining.readings(of_ranks))
        return asked, joining.examples(of_ranks, exchange(runtime, mine))

    @property
    def _languages(self) -> list[LanguageStage]:
        """The stages of the language model on this rank, if Megatron's networks run them."""
        runners = self.embedded.runtime.stages.values() if self.embedded.runtime else ()
        parts = (part for runner in runners for part in runner.network.modules())
        return [part for part in parts if isinstance(part, LanguageStage)]

    @property
    def _reader(self) -> Reader | None:
        """What the language model reads beside tokens; None on a rank without a stage of it."""
        role = self.embedded.role
        if role is None or not role.has_language_module:
            return None
        return next((stage.reader for stage in self._languages), JOBS_OWN)

    def _read(self, readings: Mapping[int, Reading]) -> None:
        for stage in self._languages:
            stage.readings = readings

    def _asked(self, forward_step: ForwardStep, data_iterator: Any) -> list[Microbatch]:
        job = self.embedded.job
        return microbatches_of(
            forward_step,
            data_iterator,
            self.loop_models[0] if self.loop_models else None,
            _language(job),
            rank=self.embedded.world.rank,
            total=job.spec.batch.global_size,
            whole=self.batches == "whole",
        )

    def _by_host(
        self, asked: Sequence[Microbatch], batch: Sequence[Example], *, forward_only: bool, collects: bool
    ) -> list[Any]:
        """Run a step on the microbatches of the host program's forward step, with its loss functions."""
        embedded = self.embedded
        if embedded.runtime is None:
            return []
        loss = HostLoss(asked, embedded.job.spec.batch.global_size, collects=collects)
        if forward_only:
            embedded.evaluate(batch, loss=loss)
        else:
            embedded.step(batch, loss=loss)
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
            reader=self._reader,
        )

    # -- with the job's own loss ---------------------------------------------------------------------------------

    def _in_words(self, losses: Mapping[str, float] | None) -> list[dict[str, Tensor]]:
        """Return losses under the names that they have in Megatron's programs."""
        if losses is None:
            return []
        names = sorted(losses, key=lambda name: name != LANGUAGE)
        said = {("lm loss" if name == LANGUAGE else f"{name} loss"): losses[name] for name in names}
        exact = torch.float64 if self.embedded.job.spec.precision == "fp64" else torch.float32
        return [{name: torch.tensor(loss, dtype=exact) for name, loss in said.items()}]

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the weights of a whole `MimoModel` by Megatron's names; all ranks call it, the first rank's are used.

        See `states.to_job_state`. The job must run the networks of a model. Raises WorldError if names or shapes
        differ from those of the model.
        """
        self.embedded.load_state_dict(to_job_state(state, LANGUAGE))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights of the whole model by Megatron's names, on the job's first rank; all ranks call it."""
        return to_megatron_state(self.embedded.state_dict(), LANGUAGE, self.embedded.job.topology.modules)

    def _mismatches(self, model: Any, microbatches: int) -> Iterator[Problem]:
        planned = _language(self.embedded.job).microbatches
        if self.embedded.job.topology.tokens_per_cell:
            fact = f"says how many microbatches a step has, and the loop asks for {microbatches}."
            yield Problem("batch.tokens_per_microbatch", fact, "Use batch.microbatches.")
        elif microbatches != planned:
            fact = f"the loop asks for {microbatches} microbatches, the job has {planned}."
            yield Problem("batch.microbatches", fact, f"Set it to {microbatches}.")
        asked = [unwrapped(m) for m in (model if isinstance(model, list) else [model]) if m is not None]
        if any(all(m is not own for own in self.models) for m in asked):
            fact = f"the loop trains a {type(asked[0]).__name__} that the job's program does not call."
            yield Problem("model", fact, "Say so before: forward_backward_func(job, model=model).")


def _language(job: Job) -> Module:
    """Return the language model of a job. Raises PlanError unless it has exactly one."""
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
    batches: Literal["whole", "per_rank"] = "whole",
    **options: Any,
) -> ForwardBackward:
    """Return a replacement for the function that megatron-core's `get_forward_backward_func` returns.

    A job is embedded in the process group that Megatron initialized, with these options (`Embedded`). The caller closes
    it: ``function.embedded.close()``.

    `model` is a `MimoStages` or `MimoModel` of this rank (None on a rank in no grid), or a list of them on a rank with
    several chunks. It may also be a `MimoModelConfig`: then this rank's part is built here on the job's groups, as
    ``function.model``. Without a model the job builds its own networks, and `special_token_ids` are those of the
    batches of a forward step. For `encoder_inputs` see `networks_of`, for `batches` `ForwardBackward`.
    """
    models = model if isinstance(model, list) else [model]
    if not special_token_ids:
        special_token_ids = next((getattr(unwrapped(one), "special_token_ids", None) for one in models), None)
    of_batches: dict[str, Any] = {
        "special_token_ids": special_token_ids,
        "rows_of": encoder_inputs,
        "batches": batches,
    }
    if isinstance(job, Embedded):
        return ForwardBackward(job, **of_batches)
    built = [unwrapped(one) for one in models if isinstance(one, nn.Module)]
    collections: dict[str, ProcessGroupCollection] = {}

    def networks(embedded: Embedded) -> Networks:
        collections.update(
            embedded.enter(open_collections(job.topology, embedded.groups, embedded.world, embedded.device))
        )
        role = embedded.role
        if role is None or role.is_idle:
            return {}
        if not built:
            for collection in collections.values():
                # On CUDA a stage would first sum tied weights over it. The job ties weights itself.
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
    return ForwardBackward(embedded, built, **of_batches, collections=collections)
