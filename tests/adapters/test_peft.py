"""LoRA of published checkpoints: peft loads what was trained, over transformers' model, and computes the same."""

import functools
import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoints import WHOLES, batch, make
from mimogrid.adapters.huggingface import Job
from mimogrid.core.base.errors import PlanError
from mimogrid.core.job.peft import PREFIX, StoredPair
from mimogrid.core.models.mapping import ParameterRows
from mimogrid.shell.checkpoint.index import read_index
from mimogrid.shell.checkpoint.manifest import newest_of
from mimogrid.shell.cli.main import main
from mimogrid.shell.job.jobs import open_job
from mimogrid.shell.modules.peft import adapters_of, merged, write_adapter
from mimogrid.shell.run.reference import Reference, double_precision, losses_and_gradients, reference
from mimogrid.shell.world.launch import Pool
from publishing import Seen
from running import trained
from scale import SCALE, nightly


pytestmark = [
    # What peft 0.21 asks transformers 5.24 for, and what it expects of every adapter of a model with experts.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings(r"ignore:The following \w+_pattern keys did not match:RuntimeWarning"),
]

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


def with_adapter(model: Any, adapter: Path, **options: Any) -> Any:
    """Load an adapter over a model of transformers, as users of peft do."""
    from peft import PeftModel  # noqa: PLC0415 -- it takes a second, and every worker collects this file

    return PeftModel.from_pretrained(model, str(adapter), **options)


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
        loaded = with_adapter(found.model, adapter, is_trainable=True)
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


@nightly
@pytest.mark.world
@pytest.mark.parametrize("name", ["llama", "qwen3-moe"] if SCALE > 1 else ["llama"])
def test_peft_goes_on_where_a_layout_stopped(pool: Pool, tmp_path: Path, name: str) -> None:
    """After two steps peft has the loss, and the gradients of every A and B; merged weights have that loss."""
    layouts = EVERY_DAY + (NIGHTLY if SCALE > 1 else [])
    if name == "qwen3-moe":
        attention = {**ALL, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]}
        layouts = [layout(attention, dp=2, ep=2), layout(attention, tp=2)]
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


@pytest.mark.world
def test_logits_are_alike_in_single_precision(pool: Pool, tmp_path: Path) -> None:
    """Ours, those of peft over transformers' model, and those of the merged checkpoint, to 1e-5."""
    inputs = [batch("llama", seed) for seed in range(2)]
    single = layout(ALL, tp=2) | {"precision": "fp32"}
    ours = pool.run("publishing:answered", 2, folder("llama"), single, inputs, tmp_path)[0]
    model = reference(folder("llama"), torch.float32).model
    plain = counted(model, inputs[-1])
    loaded = with_adapter(model, tmp_path / "adapter")
    adapter = counted(loaded, inputs[-1])
    merged = counted(reference(tmp_path / "merged", torch.float32).model, inputs[-1])
    found = torch.from_numpy(np.concatenate(ours))
    scale = adapter.abs().max()
    assert 0.01 < (plain - adapter).abs().max() / scale
    assert 1e-5 > (found - adapter).abs().max() / scale
    assert 1e-5 > (merged - adapter).abs().max() / scale
    assert 1e-5 > (counted(loaded.merge_and_unload(), inputs[-1]) - adapter).abs().max() / scale


def counted(model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The logits of every token that is no padding."""
    with torch.no_grad():
        logits: torch.Tensor = model(**inputs, use_cache=False).logits
    return logits[inputs["attention_mask"].bool()]


def test_a_merged_weight_is_as_exact_as_the_wider_of_both() -> None:
    """A base in bf16 does not round what is added to it."""
    a, b = torch.full((1, 2), 0.1), torch.tensor([[1e-3], [0.0]])
    pair = StoredPair("w", 2.0, 1, (ParameterRows("a", 0, 1),), (ParameterRows("b", 0, 2),))
    rows = {"a": a, "b": b}
    found = merged(torch.ones(2, 2, dtype=torch.bfloat16), pair, lambda name, *_: rows[name])
    assert torch.float32 is found.dtype
    assert [1 + 2e-4, 1.0] == pytest.approx(found[:, 0].tolist(), abs=1e-7)


@pytest.mark.world
def test_a_run_leaves_an_adapter(pool: Pool, tmp_path: Path) -> None:
    """From a job file to peft: in bf16 the base stays in bf16 and what trains has fp32, the means included."""
    job = tmp_path / "job.toml"
    job.write_text(
        f'weights = "{folder("qwen3")}"\nprecision = "bf16"\n[modules.language]\n'
        'lora = { rank = 2, targets = ["layers.[01].*.q_proj", "down_proj"] }\n'
        "grid = { pp = 2 }\nsplit = [2, 1]\n"
        '[data]\nsource = "synthetic"\n'
        "[batch]\nglobal_size = 4\nmicrobatches = 2\n[optimizer]\nlr = 0.1\nema = 0.5\n"
        "[train]\nsteps = 2\nevaluate = false\n"
    )
    trained(pool, open_job(job), tmp_path / "run")
    checkpoint = newest_of(tmp_path / "run")
    dtypes = {name: tensor.dtype for name, tensor in read_index(checkpoint).items()}
    assert "BF16" == dtypes["language.layers.0.mlp.down.weight"]
    assert "F32" == dtypes["language.layers.0.mlp.down.lora.down.a"]
    adapters = []
    for more in ([], ["--ema"]):
        out = tmp_path / f"adapter{len(more)}"
        assert 0 == main(["export", str(tmp_path / "run"), "--to", "peft", "--out", str(out), *more])
        loaded = with_adapter(reference(folder("qwen3")).model, out)
        adapters.append({n: p for n, p in loaded.named_parameters() if ".lora_" in n})
    paths = {name.partition(".lora_")[0].removeprefix(PREFIX) for name in adapters[0]}
    assert paths == {
        *(f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)),
        *(f"model.layers.{n}.mlp.down_proj" for n in (0, 1, 2)),
    }
    assert all(bool(value.any()) for value in adapters[0].values())
    assert any(not torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])


def test_an_adapter_that_peft_would_misread_is_refused(tmp_path: Path) -> None:
    """Peft takes the MLP of a dense layer for experts, where a model has any."""
    job = Job.from_pretrained(folder("qwen3-moe"), **layout(ALL))
    spec = job.sized(1, 1).spec
    adapters = adapters_of(job.checkpoint, spec.modules, ())
    with pytest.raises(PlanError, match=r"'model\.layers\.1\.mlp\.gate_proj' has LoRA"):
        write_adapter(tmp_path, adapters, lambda *_: torch.zeros(1), {}.get)


def test_a_target_that_is_nothing_is_refused() -> None:
    """With the nearest name; and LoRA in a frozen module is a contradiction."""
    with pytest.raises(PlanError, match="'q_prj' is no linear layer of module 'language'") as caught:
        Job.from_pretrained(folder("llama"), **layout({"rank": 2, "targets": ["q_prj"]}))
    assert "q_proj" in str(caught.value)
    tables = {"modules": {"language": {"lora": dict(LORA), "frozen": True}}}
    with pytest.raises(PlanError, match="says both lora and frozen"):
        Job.from_pretrained(folder("llama"), **layout(tables=tables))
