"""A step of a job's program, called as megatron-core's schedule functions are."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mimogrid.adapters.megatron.grids import LANGUAGE
from mimogrid.adapters.megatron.groups import open_collections
from mimogrid.adapters.megatron.modality import Arrange
from mimogrid.adapters.megatron.networks import networks_of, unwrapped
from mimogrid.adapters.megatron.stages import from_specs
from mimogrid.adapters.megatron.states import to_job_state, to_megatron_state
from mimogrid.adapters.torch_module import Embedded, Example, Networks
from mimogrid.core.errors import PlanError, Problem
from mimogrid.shell.agreement import Outcome
from mimogrid.shell.jobs import Job


class ForwardBackward:
    """A step of a job, called as Megatron's schedule functions are.

    `embedded` is the job in the world that Megatron initialized. Its program is what runs, with the networks of
    `model`; where that is None, the job's own. There is no `forward_step_func`: the program has the data, and the
    loss is the cross entropy of the tokens by their weights, summed and divided by the counts of the whole step.
    """

    def __init__(self, embedded: Embedded, model: nn.Module | None = None) -> None:
        self.embedded = embedded
        self.model = model

    def __call__(
        self,
        *,
        forward_step_func: None,
        data_iterator: Iterator[Sequence[Example]] | None,
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
    ) -> list[dict[str, Tensor]]:
        """Run a step; return one dictionary of losses, the same on every rank of the job, and none where it idles.

        An iterator gives, microbatch by microbatch, all of its samples; without one they are the job's own.
        Gradients come out finished: summed over all ranks that have to be and divided by the global counts, so
        there is no `finalize_model_grads_func` to call. A job that updates its weights itself has done so.

        With `forward_only` nothing but the losses comes out, of networks in evaluation mode. With
        `collect_non_loss_data` besides, it is what the loss would judge: on one rank of each data lane of the
        last stage, for every microbatch the logits [tokens, V] of that lane, sample after sample, as
        ``{"logits": ...}``; nothing on other ranks. Megatron returns losses on the last stage only, one for every
        microbatch; their mean is the mean over tokens only where all have as many, and here it is always.

        Raises PlanError for a `forward_step_func`, whose loss would not be the one that trains, where the number of
        microbatches is not the job's, where another model is to be trained than the one that is embedded, and for
        `collect_non_loss_data` in training.
        """
        job = self.embedded.job
        problems = list(self._misfits(model, num_microbatches))
        if forward_step_func is not None:
            fact = "has a loss function of its own, which the job's program would not call."
            remedy = (
                "Pass None where the loss is the cross entropy of the labels by loss_weights; "
                "where it is another, make the language model a module of your own, which returns it "
                "(docs/own-modules.md)."
            )
            problems.append(Problem("forward_step_func", fact, remedy))
        if collect_non_loss_data and not forward_only:
            fact = "the loop asks for collect_non_loss_data of a training step, whose logits are not kept."
            problems.append(Problem("schedule", fact, "Ask with forward_only=True."))
        if problems:
            raise PlanError(problems)
        batch = None
        if data_iterator is not None:
            batch = [example for _ in range(num_microbatches) for example in next(data_iterator)]
        if collect_non_loss_data:
            return [{"logits": logits} for logits in self.embedded.answers(batch)]
        losses = self.embedded.evaluate(batch) if forward_only else _losses(self.embedded.step(batch))
        if losses is None:
            return []
        names = sorted(losses, key=lambda name: name != LANGUAGE)
        said = {("lm loss" if name == LANGUAGE else f"{name} loss"): losses[name] for name in names}
        exact = torch.float64 if job.spec.precision == "fp64" else torch.float32
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

    def _misfits(self, model: Any, microbatches: int) -> Iterator[Problem]:
        planned = self.embedded.job.spec.batch.microbatches
        if microbatches != planned:
            fact = f"the loop asks for {microbatches} microbatches, the job has {planned}."
            yield Problem("batch.microbatches", fact, f"Set it to {microbatches}.")
        asked = [unwrapped(m) for m in (model if isinstance(model, list) else [model]) if m is not None]
        if any(m is not self.model for m in asked):
            fact = f"the loop trains a {type(asked[0]).__name__} that the job's program does not call."
            yield Problem("model", fact, "Say so before: forward_backward_func(job, model=model).")


def _losses(outcome: Outcome | None) -> Mapping[str, float] | None:
    return None if outcome is None else outcome.losses


def forward_backward_func(
    job: Job | Embedded,
    model: Any = None,
    *,
    encoder_inputs: Mapping[str, str | Arrange] | None = None,
    **options: Any,
) -> ForwardBackward:
    """Return a drop-in for what megatron-core's `get_forward_backward_func` returns.

    A job is embedded in the process group that Megatron initialized, with these options (`Embedded`); who
    calls this closes it: ``function.embedded.close()``.

    `model` is what trains: a `MimoStages` or `MimoModel` that this rank has built (None on a rank in no grid), or a
    `MimoModelConfig`, of which this rank's part is built here, over the job's groups; it is then
    ``function.model``. Without one the job builds its own networks, of the sizes that the job says. For
    `encoder_inputs` see `networks_of`.
    """
    if isinstance(job, Embedded):
        return ForwardBackward(job)
    built: list[nn.Module] = [unwrapped(model)] if isinstance(model, nn.Module) else []

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
            made = from_specs(
                model.language_model_spec,
                model.modality_submodules_spec,
                model.special_token_ids or {},
                role=role,
                collections=collections,
            )
            built.append(made)
        return networks_of(built[0], job, role.rank, encoder_inputs)

    embedded = Embedded(job, **options) if model is None else Embedded(job, networks, **options)
    return ForwardBackward(embedded, *built)
