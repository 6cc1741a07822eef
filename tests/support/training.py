"""Training: what the ranks of a world do with the trainer of published checkpoints, ``training:function``."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from transformers import TrainerCallback

from hosts import host
from mimogrid.adapters.huggingface import Arguments, Job, Trainer
from mimogrid.shell.device.place import RankPlace


Layout = Mapping[str, Any]


@attrs.define
class Seen(TrainerCallback):
    """The events of a run as callbacks see them; a run is stopped after a step, and saved after others."""

    stop_after: int = 0
    events: list[str] = attrs.field(factory=list)
    losses: list[float] = attrs.field(factory=list)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> Any:
        """Count, and decide."""
        self.events.append(f"step {state.global_step}")
        control.should_training_stop |= state.global_step == self.stop_after
        return control

    def on_log(self, args: Any, state: Any, control: Any, *, logs: Mapping[str, float], **more: Any) -> None:
        """Keep the losses."""
        if "loss" in logs:
            self.losses.append(logs["loss"])

    def on_evaluate(
        self, args: Any, state: Any, control: Any, *, metrics: Mapping[str, float], **more: Any
    ) -> None:
        """Note the loss."""
        self.events.append(f"evaluate {metrics['eval_loss']:.9f}")

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Note it."""
        self.events.append(f"save {state.global_step}")


def conversations(folder: Path, name: str) -> list[dict[str, Any]]:
    """The records of a store of the example, with whole names of images."""
    records: list[dict[str, Any]] = json.loads((folder / f"{name}.json").read_text())
    for record in records:
        if "image" in record:
            record["image"] = str(folder / "images" / record["image"])
    return records


def run(place: RankPlace, folder: Path, layout: Layout, runs: Sequence[Mapping[str, Any]]) -> list[Seen]:
    """Train one run after the other: `args` of each, whether it resumes, and after which step it stops."""
    found = []
    with host(place):
        for each in runs:
            seen = Seen(stop_after=each.get("stop_after", 0))
            job = Job.from_pretrained(folder / "checkpoint", **layout)
            data = {
                f"{k}_dataset": conversations(folder, v)
                for k, v in (("train", "train"), ("eval", "held_out"))
            }
            with Trainer(job, Arguments(**each["args"]), **data, callbacks=[seen]) as trainer:
                trainer.train(resume_from_checkpoint=each.get("resume"))
                if each.get("save"):
                    seen.events.append(f"at the end {trainer.evaluate()['eval_loss']:.9f}")
                    trainer.save_model(each["save"])
            found.append(seen)
    return found
