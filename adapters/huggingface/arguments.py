"""Arguments: what the trainer reads of transformers' `TrainingArguments`, under its names and with its defaults.

A `TrainingArguments` can be given as it is. What it asks for and a job says elsewhere, or nothing here does, is refused
by name.
"""

from collections.abc import Iterator
from typing import Any

import attrs

from mimogrid.core.base.errors import PlanError, Problem


@attrs.frozen(kw_only=True)
class Arguments:
    """What a training run takes.

    A step has `per_device_train_batch_size` samples for each dp rank of the language model in each of
    `gradient_accumulation_steps` microbatches. A last batch with fewer samples is left out. Strategies are "no",
    "steps" or "epoch". `max_steps` below 1: as many as the epochs have.
    """

    output_dir: str
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    num_train_epochs: float = 3.0
    max_steps: int = -1
    learning_rate: float = 5e-5
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    lr_scheduler_type: str = "linear"
    warmup_steps: float = 0
    logging_strategy: str = "steps"
    logging_steps: float = 500
    eval_strategy: str = "no"
    eval_steps: float | None = None
    save_strategy: str = "steps"
    save_steps: float = 500
    save_total_limit: int | None = None
    seed: int = 42
    metric_for_best_model: str | None = None
    greater_is_better: bool | None = None
    load_best_model_at_end: bool = False

    @classmethod
    def of(cls, args: Any) -> "Arguments":
        """Return what another object with such attributes says. Raises PlanError for what cannot be done."""
        found = {
            field.name: _plain(getattr(args, field.name))
            for field in attrs.fields(cls)
            if hasattr(args, field.name)
        }
        own = cls(**found)
        if problems := [*_unheard(args), *_impossible(own)]:
            raise PlanError(problems)
        return own

    def interval(self, steps: float | None, total: int) -> int:
        """Return every how many steps something happens; a number below 1 is a part of all steps."""
        every = self.logging_steps if steps is None else steps
        return max(1, round(every * total) if 0 < every < 1 else int(every))


def _plain(value: Any) -> Any:
    """Return the word that a member of an enumeration is."""
    return getattr(value, "value", value)


_ELSEWHERE = {
    "bf16": 'Job.from_pretrained(..., precision="bf16")',
    "fp16": 'Job.from_pretrained(..., precision="fp16")',
    "gradient_checkpointing": 'Job.from_pretrained(..., modules={"language": {"recompute": "full"}})',
    "deepspeed": "the grids of the job",
    "fsdp": "the grids of the job",
    "label_smoothing_factor": "Running.step of a loss of yours",
    "neftune_noise_alpha": "nothing here",
    "group_by_length": "nothing here: rows are packed",
    "use_liger_kernel": "nothing here",
}
"""Arguments that are not read, and what says the same."""
SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
}
"""Schedules of the learning rate, and what the job calls them."""
STRATEGIES = ("no", "steps", "epoch")


def _unheard(args: Any) -> Iterator[Problem]:
    for name, instead in _ELSEWHERE.items():
        value = getattr(args, name, None)
        if value:
            yield Problem(f"args.{name}", f"is {value!r}, which is not read.", f"It is said by {instead}.")


def _impossible(args: Arguments) -> Iterator[Problem]:
    if args.lr_scheduler_type not in SCHEDULES:
        yield Problem(
            "args.lr_scheduler_type", f"is '{args.lr_scheduler_type}'.", f"Known: {', '.join(SCHEDULES)}."
        )
    for name in ("logging_strategy", "eval_strategy", "save_strategy"):
        if getattr(args, name) not in STRATEGIES:
            yield Problem(f"args.{name}", f"is '{getattr(args, name)}'.", f"Known: {', '.join(STRATEGIES)}.")
    if args.load_best_model_at_end:
        fact = "is true; the best checkpoint is not loaded."
        yield Problem(
            "args.load_best_model_at_end", fact, "Load trainer.state.best_model_checkpoint yourself."
        )
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        if getattr(args, name) < 1:
            yield Problem(f"args.{name}", f"is {getattr(args, name)}.", "Use 1 or more.")
