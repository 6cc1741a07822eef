"""The trainer: a job of a published checkpoint behind the names that users of transformers know.

    trainer = Trainer(job, TrainingArguments("out", max_steps=100), train_dataset=conversations)
    trainer.train()
    trainer.save_model("tuned")

Every rank makes a trainer and calls its methods in the same order, in a world that torchrun or the program has made. A
step's samples depend on the seed and its number only, on any layout. Callbacks run on every rank; what they decide on
the job's first rank counts on all.

    output_dir/checkpoint-100/    what `save_model` writes, and
        state.safetensors         weights and optimizer states as the job has them, full tensors
        state.json                the number of the next step, and what decides on updates
        trainer_state.json        transformers' `TrainerState`
"""

import json
import math
import os
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import attrs
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers.trainer_callback import TrainerControl, TrainerState

from mimogrid.adapters.huggingface.arguments import SCHEDULES, Arguments
from mimogrid.adapters.huggingface.conversations import Conversations, encoder_of
from mimogrid.adapters.huggingface.job import Job, Running
from mimogrid.adapters.torch_module import FACTS
from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.data.record import LANGUAGE
from mimogrid.core.update.learning_rate import learning_rate
from mimogrid.shell.checkpoint.files import write_file
from mimogrid.shell.data.batches import Encoded


CHECKPOINT = re.compile(r"checkpoint-(\d+)")
STATE, FACTS_FILE, TRAINER_STATE = "state.safetensors", "state.json", "trainer_state.json"

ROUNDED = 64
"""Positions that lengths are rounded to."""

T = TypeVar("T")


@attrs.frozen
class TrainOutput:
    """What `train` returns: the number of steps so far, the mean loss of those that ran, and further numbers."""

    global_step: int
    training_loss: float
    metrics: dict[str, float]


class Trainer:
    """Trains a job on conversations."""

    def __init__(  # noqa: PLR0917 -- transformers' order
        self,
        job: Job,
        args: Any,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: Sequence[Any] | None = None,
    ) -> None:
        """Make a trainer.

        Args:
            job: The job (`Job.from_pretrained`). If it has an `optimizer`, that counts; else that of `args` does.
            args: transformers' `TrainingArguments`, or `Arguments`.
            train_dataset: A map-style data set of conversations (`adapters.huggingface.conversations`).
            eval_dataset: Another one, for `evaluate`.
            processing_class: The processor; None: that of the checkpoint.
            callbacks: transformers' callbacks, or classes of them.

        Raises PlanError for arguments that contradict the job or that nothing here does.
        """
        self.args = args
        self.own = Arguments.of(args)
        if self.own.eval_strategy != "no" and eval_dataset is None:
            fact = f"is '{self.own.eval_strategy}', and there is no eval_dataset."
            raise PlanError([Problem("args.eval_strategy", fact, "Give an eval_dataset, or write no.")])
        self.encoder = encoder_of(processing_class, job.checkpoint.folder, job.checkpoint.model)
        self.processing_class = processing_class if processing_class is not None else self.encoder.processor
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.microbatches = self._microbatches(job)
        grid = job.tables["modules"][LANGUAGE]["grid"]
        self.samples = self.own.per_device_train_batch_size * int(grid.get("dp", 1)) * self.microbatches
        self.steps_per_epoch = len(train_dataset) // self.samples if train_dataset is not None else 0
        self.steps = self._steps()
        self.job = self._completed(job)
        self.callbacks = [
            callback() if isinstance(callback, type) else callback for callback in callbacks or ()
        ]
        self.control = TrainerControl()
        self.state = TrainerState(
            max_steps=self.steps,
            num_train_epochs=math.ceil(self.own.num_train_epochs),
            train_batch_size=self.own.per_device_train_batch_size,
            logging_steps=self.own.interval(self.own.logging_steps, self.steps),
            eval_steps=self.own.interval(self.own.eval_steps, self.steps),
            save_steps=self.own.interval(self.own.save_steps, self.steps),
        )
        self._running: Running | None = None
        self._loss_sum, self._losses = 0.0, 0
        self._call("on_init_end")

    # -- what users call -----------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | Path | bool | None = None) -> TrainOutput:
        """Train to the last step, from the beginning or from a checkpoint; True: the newest in `output_dir`."""
        if self.train_dataset is None or not self.steps:
            fact = f"has {0 if self.train_dataset is None else len(self.train_dataset)} items, a step {self.samples}."
            raise PlanError([Problem("train_dataset", fact, "Give more, or make steps smaller.")])
        self.control.should_training_stop = False
        if resume_from_checkpoint:
            self._load(resume_from_checkpoint)
        data = Conversations(self.train_dataset, self.encoder, "train_dataset")
        self._mark_first_rank()
        begin, first = time.monotonic(), self.state.global_step
        total = 0.0
        self._loss_sum, self._losses = 0.0, 0
        self._call("on_train_begin")
        while self.state.global_step < self.steps and not self.control.should_training_stop:
            total += self._train_step(data)
        self._call("on_train_end")
        seconds, taken = time.monotonic() - begin, self.state.global_step - first
        metrics = {
            "train_runtime": seconds,
            "train_samples_per_second": taken * self.samples / max(seconds, 1e-9),
        }
        return TrainOutput(self.state.global_step, total / max(taken, 1), metrics)

    def evaluate(self, eval_dataset: Any = None) -> dict[str, float]:
        """Return the loss on a data set, the mean over its labelled tokens; training goes on as if it were not."""
        items = self.eval_dataset if eval_dataset is None else eval_dataset
        if items is None or not len(items):
            raise PlanError([Problem("eval_dataset", "is missing or empty.", "Give one to the trainer.")])
        data, begin = Conversations(items, self.encoder, "eval_dataset"), time.monotonic()
        loss = count = 0.0
        for start in range(0, len(data), self.samples):
            batch = [data.sample(i) for i in range(start, min(start + self.samples, len(data)))]
            tokens = sum(each.sample.units[LANGUAGE] for each in batch)
            batch += [_uncounted(batch[-1])] * (self.samples - len(batch))
            found = self._open().losses_of(batch, longest=_longest(batch))
            loss += tokens * self._shared(None if found is None else found[LANGUAGE])
            count += tokens
        metrics = {"eval_loss": loss / max(count, 1.0), "eval_runtime": time.monotonic() - begin}
        metrics["epoch"] = self.state.epoch
        self._note_best(metrics)
        self._log({name: value for name, value in metrics.items() if name != "epoch"})
        self._call("on_evaluate", metrics=metrics)
        return metrics

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Write the checkpoint with the weights of now; of a job with LoRA the adapter, as peft writes it."""
        folder = Path(output_dir or self.own.output_dir)
        partial = folder / ".partial"
        self._open().save_pretrained(partial, merge=not self._has_lora)
        if self._is_first:
            if self._has_lora:
                self.processing_class.save_pretrained(partial)
            for path in partial.iterdir():
                path.replace(folder / path.name)
            partial.rmdir()

    def close(self) -> None:
        """Destroy the process groups of the job, and no others. May be called twice."""
        if self._running is not None:
            self._running.close()

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- a step --------------------------------------------------------------------------------------------

    def _train_step(self, data: Conversations) -> float:
        """Train a step and do what is due after it; return its loss."""
        step = self.state.global_step
        if step % self.steps_per_epoch == 0:
            self._call("on_epoch_begin")
        self._call("on_step_begin")
        batch = [data.sample(index) for index in self._order(step, len(data))]
        outcome = self._open().step_on(batch, longest=_longest(batch))
        loss, norm = self._shared(None if outcome is None else (outcome.loss, outcome.gradient_norm))
        self.state.global_step = step + 1
        self.state.epoch = self.state.global_step / self.steps_per_epoch
        self._loss_sum, self._losses = self._loss_sum + loss, self._losses + 1
        self._due()
        self._call("on_step_end")
        self._act(norm)
        if self.state.global_step % self.steps_per_epoch == 0:
            self._due(epoch=True)
            self._call("on_epoch_end")
            self._act(norm)
        return float(loss)

    def _order(self, step: int, count: int) -> list[int]:
        """Return the items of a step: each epoch has an order of its own."""
        epoch, place = divmod(step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(self.own.seed + epoch)
        order: list[int] = torch.randperm(count, generator=generator).tolist()
        return order[place * self.samples : (place + 1) * self.samples]

    def _due(self, *, epoch: bool = False) -> None:
        """Set what the strategies ask for at this step, or at the end of an epoch."""
        kind, last = "epoch" if epoch else "steps", self.state.global_step >= self.steps
        for action, every in (("log", "logging"), ("evaluate", "eval"), ("save", "save")):
            strategy = getattr(self.own, f"{every}_strategy")
            due = epoch or self.state.global_step % getattr(self.state, f"{every}_steps") == 0
            if strategy == kind and due:
                setattr(self.control, f"should_{action}", True)
        if last and not epoch and self.own.save_strategy == "steps":
            self.control.should_save = True
        self.control.should_training_stop |= last

    def _act(self, norm: float) -> None:
        """Log, evaluate and save as the first rank decided."""
        flags = [f"should_{action}" for action in ("log", "evaluate", "save", "training_stop")]
        log, evaluate, save, stop = self._shared([getattr(self.control, flag) for flag in flags])
        self.control.should_log = self.control.should_evaluate = self.control.should_save = False
        self.control.should_training_stop = stop
        if log and self._losses:
            optimizer, step = self._spec.optimizer, self.state.global_step - 1
            self._log(
                {
                    "loss": self._loss_sum / self._losses,
                    "grad_norm": norm,
                    "learning_rate": learning_rate(optimizer, step=step, steps=self.steps),
                }
            )
            self._loss_sum, self._losses = 0.0, 0
        if evaluate:
            self.evaluate()
        if save:
            self._save()

    def _log(self, logs: dict[str, float]) -> None:
        entry = {**logs, "epoch": self.state.epoch}
        self.state.log_history.append({**entry, "step": self.state.global_step})
        self._call("on_log", logs=entry)

    def _note_best(self, metrics: dict[str, float]) -> None:
        name = self.own.metric_for_best_model or "eval_loss"
        value, best = (
            metrics.get(name if name.startswith("eval_") else f"eval_{name}"),
            self.state.best_metric,
        )
        if value is not None and (
            best is None or (value > best if self.own.greater_is_better else value < best)
        ):
            self._best = value, self.state.global_step

    _best: tuple[float, int] | None = None

    def _call(self, event: str, **more: Any) -> None:
        """Let callbacks know; each may return another control."""
        for callback in self.callbacks:
            control = getattr(callback, event)(
                self.args, self.state, self.control, processing_class=self.processing_class, **more
            )
            if control is not None:
                self.control = control
        if event == "on_evaluate" and self._best is not None:  # Callbacks compare with the best before.
            self.state.best_metric, self.state.best_global_step = self._best

    # -- checkpoints ---------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Write a checkpoint, and remove the oldest beyond the limit."""
        folder = Path(self.own.output_dir) / f"checkpoint-{self.state.global_step}"
        partial = folder.with_name(f"{folder.name}.partial")
        if self._is_first:
            shutil.rmtree(partial, ignore_errors=True)
        self.save_model(partial)
        state = self._open().state_dict()
        if self._is_first:
            facts = state.pop(FACTS)
            if self.state.best_global_step == self.state.global_step:
                self.state.best_model_checkpoint = str(folder)
            write_file(partial / STATE, state)
            (partial / FACTS_FILE).write_text(json.dumps(facts), encoding="utf-8")
            self.state.save_to_json(str(partial / TRAINER_STATE))
            shutil.rmtree(folder, ignore_errors=True)
            partial.replace(folder)
            self._prune()
        self._call("on_save")

    def _prune(self) -> None:
        limit = self.own.save_total_limit
        for folder in _checkpoints(Path(self.own.output_dir))[: -limit if limit else 0]:
            shutil.rmtree(folder)

    def _load(self, wanted: str | Path | bool) -> None:
        """Load a checkpoint, which the first rank chooses and reads. Raises PlanError on all ranks if there is none."""
        folder = self._checkpoint(wanted)
        is_there = self._shared((folder / STATE).is_file())
        if not is_there:
            remedy = "Name one, or train from the beginning."
            raise PlanError([Problem(str(folder), "is no checkpoint of this trainer.", remedy)])
        state: dict[str, Any] = {}
        written = ""
        if self._is_first:
            state = {**load_file(folder / STATE), FACTS: json.loads((folder / FACTS_FILE).read_text())}
            written = (folder / TRAINER_STATE).read_text(encoding="utf-8")
        self._open().load_state_dict(state)
        self.state = TrainerState(**json.loads(self._shared(written)))

    def _checkpoint(self, wanted: str | Path | bool) -> Path:
        """Return the folder to resume from; True: the newest that this rank sees."""
        if wanted is not True:
            return Path(str(wanted))
        found = _checkpoints(Path(self.own.output_dir))
        return found[-1] if found else Path(self.own.output_dir, "checkpoint-*")

    # -- the job -------------------------------------------------------------------------------------------

    def _microbatches(self, job: Job) -> int:
        """Return the microbatches of a step. Raises PlanError where job and arguments contradict each other."""
        asked = self.own.gradient_accumulation_steps
        written = int(job.tables.get("batch", {}).get("microbatches", asked))
        if asked not in {1, written}:
            fact = f"is {asked}, and the job has {written} microbatches."
            raise PlanError([Problem("args.gradient_accumulation_steps", fact, "Say it in one place.")])
        return written

    def _steps(self) -> int:
        if self.own.max_steps > 0:
            return self.own.max_steps if self.steps_per_epoch else 0
        return math.ceil(self.own.num_train_epochs * self.steps_per_epoch)

    def _completed(self, job: Job) -> Job:
        """Return the job with the number of its steps, and the optimizer that `args` describes if it has none."""
        own, warmup = self.own, self.own.warmup_steps
        optimizer = {
            "name": "adamw",
            "lr": own.learning_rate,
            "betas": [own.adam_beta1, own.adam_beta2],
            "eps": own.adam_epsilon,
            "weight_decay": own.weight_decay,
            "clip_norm": own.max_grad_norm,
            "warmup_steps": math.ceil(warmup * self.steps) if 0 < warmup < 1 else int(warmup),
            "decay": SCHEDULES[own.lr_scheduler_type],
        }
        tables = {
            **job.tables,
            "optimizer": job.tables.get("optimizer", optimizer),
            "batch": {**job.tables.get("batch", {}), "microbatches": self.microbatches},
            "train": {**job.tables.get("train", {}), "steps": max(self.steps, 1)},
        }
        completed = attrs.evolve(job, tables=tables)
        sized = completed.sized(self.samples, 1)  # It raises what is wrong before anything starts.
        self._spec, self._first = sized.spec, min(sized.topology.ranks)
        return completed

    def _open(self) -> Running:
        if self._running is None:
            self._running = self.job.open()
        return self._running

    @property
    def _has_lora(self) -> bool:
        return any(module.lora is not None for module in self._spec.modules.values())

    @property
    def _is_first(self) -> bool:
        return not dist.is_initialized() or dist.get_rank() == self._first

    def _mark_first_rank(self) -> None:
        self.state.is_world_process_zero = self._is_first
        self.state.is_local_process_zero = os.environ.get("LOCAL_RANK", "0" if self._is_first else "1") == "0"

    def _shared(self, value: T | None) -> T:
        """Return on every rank what the job's first rank has."""
        found: list[Any] = [value]
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.broadcast_object_list(found, src=self._first)
        return found[0]  # type: ignore[no-any-return]


def _checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first."""
    found = [(CHECKPOINT.fullmatch(path.name), path) for path in folder.glob("checkpoint-*")]
    return [
        path for _, path in sorted((int(match[1]), path) for match, path in found if match and path.is_dir())
    ]


def _longest(batch: Sequence[Encoded]) -> int:
    """Return a length that all samples have at most, rounded up: a job is opened again for a larger one."""
    return -(-max(len(each.tensors[LANGUAGE]["tokens"]) for each in batch) // ROUNDED) * ROUNDED


def _uncounted(each: Encoded) -> Encoded:
    """Return a sample that counts nothing in the loss."""
    text = each.tensors[LANGUAGE]
    weights = torch.zeros_like(text["loss_weights"])
    return Encoded(
        attrs.evolve(each.sample, units={LANGUAGE: 0.0}),
        {**each.tensors, LANGUAGE: {**text, "loss_weights": weights}},
    )
