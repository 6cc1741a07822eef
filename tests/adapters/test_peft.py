"""LoRA of published checkpoints: peft loads what was trained, over transformers' model, and computes the same."""

import functools
import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

from checkpoints import WHOLES, batch, make
from mimogrid.adapters.huggingface import Job
from mimogrid.core.base.errors import PlanError
from mimogrid.core.job.peft import PREFIX
from mimogrid.shell.run.reference import Reference, double_precision, losses_and_gradients, reference
from mimogrid.shell.world.launch import Pool
from publishing import Seen
from scale import SCALE


# What peft 0.21 asks transformers 5.24 for.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SGD = {"name": "sgd", "lr": 0.5, "clip_norm": 0.0}
TWO = {"microbatches": 2}
LORA = {"rank": 3, "alpha": 5.0, "targets": ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]}
ALL = {"rank": 2, "targets": ["all-linear"]}


def layout(
    lora: Mapping[str, Any] = LORA, *, tables: Mapping[str, Any] | None = None, **grid: Any
) -> dict[str, Any]:
    """A layout of a language model with LoRA, which a step changes."""
    module = {"lora": dict(lora)}
    return {
        "grids": {"language": grid},
        "precision": "fp64",
        "optimizer": SGD,
        "modules": {"language": module},
        **(tables or {}),
    }


EVERY_DAY = [
    layout(tp=2, pp=2, tables={"batch": TWO}),
    layout(ALL, tp=2, sequence_parallel=True),
    layout(ALL, dp=2, tables={"optimizer": {**SGD, "sharded": True}}),
    layout(cp=2, tables={"schedule": {"name": "zb-h1"}}),
]
NIGHTLY = [
    layout(),
    layout(cp=2, tp=2, sequence_parallel=True),
    layout(tp=2, tables={"modules": {"language": {"lora": dict(LORA), "recompute": "full"}}}),
    layout(tp=2, sequence_parallel=True, tables={"schedule": {"name": "zb-h1"}}),
]


@functools.cache
def folder(name: str) -> Path:
    """A checkpoint that all tests of this file share."""
    return make(name, Path(tempfile.mkdtemp(), name))


def adapted(name: str, adapter: Path) -> Reference:
    """Transformers' model in double precision, with an adapter as peft loads it."""
    found = reference(folder(name))
    with double_precision(Counter()):
        loaded = peft.PeftModel.from_pretrained(found.model, str(adapter), is_trainable=True)
    assert {k for k, p in loaded.named_parameters() if p.requires_grad} >= {
        k for k, _ in loaded.named_parameters() if ".lora_" in k
    }
    return found


def step(of: Reference, inputs: Mapping[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss, and gradients by the names of an adapter's file."""
    with double_precision(Counter()):
        loss = of.model(**inputs, use_cache=False).loss
        loss.backward()
    return loss.item(), {
        PREFIX + name.replace(".modules_to_save", "").replace(".default", ""): p.grad
        for name, p in of.model.named_parameters()
        if p.grad is not None
    }


def assert_same(seen: Seen, expected: tuple[float, Mapping[str, torch.Tensor]]) -> None:
    """The loss and every gradient of a layout are those that are expected."""
    loss, gradients = expected
    assert seen.loss is not None
    assert abs(seen.loss - loss) < 1e-10 * loss
    saved = {name for name in seen.gradients if name.startswith(PREFIX)}
    assert saved == {name for name in gradients if ".lora_" in name}
    for name in saved:
        gradient = gradients[name].numpy()
        assert gradient.any(), name
        assert np.abs(seen.gradients[name] - gradient).max() < 1e-10 * np.abs(gradient).max(), name


@pytest.mark.world
@pytest.mark.parametrize("name", ["llama", "qwen3-moe"] if SCALE > 1 else ["llama"])
def test_peft_goes_on_where_a_layout_stopped(pool: Pool, tmp_path: Path, name: str) -> None:
    """After two steps peft has the loss, and the gradients of every A and B; merged weights have that loss."""
    layouts = EVERY_DAY + (NIGHTLY if SCALE > 1 else [])
    if name == "qwen3-moe":
        layouts = [layout(ALL, dp=2, ep=2), layout(ALL, tp=2)]
    batches = [batch(name, seed) for seed in range(3)]
    said = pool.run("publishing:adapted", 4, folder(name), layouts, batches, tmp_path)
    for number, seen in enumerate(said[0]):
        loss, gradients = step(adapted(name, tmp_path / str(number)), batches[-1])
        assert_same(seen, (loss, gradients))
        merged = losses_and_gradients(reference(tmp_path / f"{number}-merged"), batches[-1])
        assert abs(merged.loss - loss) < 1e-6 * loss  # on disk it is fp32


@pytest.mark.world
@pytest.mark.parametrize("name", WHOLES if SCALE > 1 else ("llava", "qwen2.5-vl"))
def test_towers_have_adapters_too(pool: Pool, tmp_path: Path, name: str) -> None:
    """A tower with LoRA of another rank, whose queries, keys and values may be one layer, and a whole projector."""
    tower = "audio" if name == "qwen2-audio" else "vision"
    found: dict[str, Any] = {
        "grids": {tower: {"tp": 2}, "language": {"pp": 2}},
        "precision": "fp64",
        "optimizer": SGD,
        "batch": TWO,
        "modules": {
            tower: {"lora": {**ALL, "alpha": 3.0}, "trainable": ["projector.*"]},
            "language": {"lora": dict(LORA)},
        },
    }
    batches = [batch(name, seed) for seed in range(2)]
    (seen,) = pool.run("publishing:adapted", 4, folder(name), [found], batches, tmp_path)[0]
    assert_same(seen, step(adapted(name, tmp_path / "0"), batches[-1]))
    config = json.loads((tmp_path / "0" / "adapter_config.json").read_text())
    assert config["modules_to_save"]


def test_a_target_that_is_nothing_is_refused() -> None:
    """With the nearest name; and LoRA in a frozen module is a contradiction."""
    with pytest.raises(PlanError, match="'q_prj' is no linear layer of module 'language'") as caught:
        Job.from_pretrained(folder("llama"), **layout({"rank": 2, "targets": ["q_prj"]}))
    assert "q_proj" in str(caught.value)
    tables = {"modules": {"language": {"lora": dict(LORA), "frozen": True}}}
    with pytest.raises(PlanError, match="says both lora and frozen"):
        Job.from_pretrained(folder("llama"), **layout(tables=tables))
