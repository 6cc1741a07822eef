"""The trainer: names of transformers in front of a job, on any layout."""

import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mimogrid.adapters.huggingface import Arguments, Job, Trainer
from mimogrid.core.base.errors import PlanError
from mimogrid.shell.world.launch import Pool
from scale import nightly
from training import conversations


EXAMPLE = Path(__file__).parents[2] / "examples" / "llava" / "make.py"
LORA = {
    "grids": {"vision": {}, "language": {"tp": 2}},
    "modules": {
        "vision": {"trainable": ["projector.*"]},
        "language": {"lora": {"rank": 4, "targets": ["q_proj", "v_proj"]}},
    },
}
ARGS: dict[str, Any] = {
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "save_steps": 3,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint and the stores of the example, small."""
    found = importlib.util.spec_from_file_location("make_llava", EXAMPLE)
    assert found
    assert found.loader
    make: ModuleType = importlib.util.module_from_spec(found)
    found.loader.exec_module(make)
    folder = tmp_path_factory.mktemp("llava")
    make.checkpoint(folder / "checkpoint", hidden=16)
    source = make.digits(0, ("vision",), ("language",))
    make.store(folder, "train", source, 16)
    make.store(folder, "held_out", source.held_out(task="read"), 6)
    return folder


@nightly
@pytest.mark.world
def test_a_run_resumes_bitwise(pool: Pool, made: Path, tmp_path: Path) -> None:
    """Over two epochs, on ranks of which one idles; callbacks see every event, and what they decide counts."""
    whole, cut = str(tmp_path / "whole"), str(tmp_path / "cut")
    runs = [
        {"args": ARGS | {"output_dir": whole}, "save": str(tmp_path / "saved")},
        {"args": ARGS | {"output_dir": cut}, "stop_after": 3},
        {"args": ARGS | {"output_dir": cut, "save_total_limit": 1}, "resume": True},
    ]
    said = pool.run("training:run", 4, made, LORA, runs)
    assert said[0] == said[1] == said[2] == said[3]
    once, first, second = said[0]
    assert [f"step {n}" for n in range(1, 7)] == [event for event in once.events if event.startswith("step")]
    assert once.losses == first.losses + second.losses
    assert once.losses[-1] < once.losses[0]
    assert first.events + second.events == once.events[:-2]
    assert "save 6" == once.events[-3]
    assert ["checkpoint-6"] == sorted(path.name for path in Path(cut).iterdir())
    resumed, straight = (
        load_file(Path(folder, "checkpoint-6", "state.safetensors")) for folder in (cut, whole)
    )
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    saved = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "processor_config.json"} <= saved


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"bf16": True}, 'args.bf16: is True, which is not read.\n.*precision="bf16"'),
        ({"lr_scheduler_type": "polynomial"}, "Known: linear, cosine"),
        ({"load_best_model_at_end": True}, "the best checkpoint is not loaded"),
        ({"per_device_train_batch_size": 0}, "Use 1 or more"),
        ({"eval_strategy": "steps"}, "there is no eval_dataset"),
        ({"gradient_accumulation_steps": 2}, "the job has 4 microbatches"),
    ],
)
def test_arguments_that_cannot_be_are_refused(made: Path, args: dict[str, Any], words: str) -> None:
    """By name, with what says the same."""
    job = Job.from_pretrained(made / "checkpoint", **LORA, batch={"microbatches": 4})
    with pytest.raises(PlanError, match=words):
        Trainer(job, SimpleNamespace(output_dir="out", **args))


def test_items_may_hold_images(made: Path) -> None:
    """Objects of Pillow are read as their files are, and a broken item is named."""
    records = conversations(made, "train")
    as_file = next(record for record in records if "image" in record)
    with Image.open(as_file["image"]) as image:
        image.load()
    as_object = {**as_file, "image": image}
    job = Job.from_pretrained(made / "checkpoint", **LORA)
    from mimogrid.adapters.huggingface.conversations import Conversations, encoder_of  # noqa: PLC0415

    encoder = encoder_of(None, job.checkpoint.folder, job.checkpoint.model)
    data = Conversations([as_file, as_object, {"messages": 7}], encoder, "train_dataset")
    one, other = data.sample(0), data.sample(1)
    assert one.sample == other.sample
    assert torch.equal(one.tensors["vision"]["rows"], other.tensors["vision"]["rows"])
    with pytest.raises(PlanError, match=r"train_dataset\[2\]: no conversation"):
        data.sample(2)


def test_steps_follow_from_epochs(made: Path) -> None:
    """A last batch that is not full is left out; a set that is too small for one step is refused."""
    job = Job.from_pretrained(made / "checkpoint", **LORA)
    records = conversations(made, "train")
    args = {"output_dir": "out", "per_device_train_batch_size": 5, "num_train_epochs": 2}
    assert 6 == Trainer(job, Arguments(**args), records).steps
    with pytest.raises(PlanError, match="has 4 items, a step 5"):
        Trainer(job, Arguments(**args), records[:4]).train()
