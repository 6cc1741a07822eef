"""Published text models: loss and gradients of transformers on any layout, and folders that transformers loads."""

import functools
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from checkpoints import LANGUAGE, TEXT, batch, make, shapes
from mimogrid.adapters.huggingface import Job
from mimogrid.core.base.errors import PlanError
from mimogrid.core.models.mapping import slices
from mimogrid.shell.job import jobfile
from mimogrid.shell.job.published import published
from mimogrid.shell.modules.published import _held
from mimogrid.shell.run.reference import ReferenceStep, losses_and_gradients, reference
from mimogrid.shell.world.launch import Pool
from publishing import Seen
from scale import SCALE


MODELS = LANGUAGE
EVERY_DAY = ("llama3", "qwen2-windows", "qwen3", "qwen3-moe")
"""Tied and scaled; windows and biases; norms of queries and keys, heads of their own width, YaRN; experts."""
TWO = {"microbatches": 2}
FROZEN = {"lr": 0.0, "weight_decay": 0.0}


def layout(
    precision: str = "fp64", *, tables: Mapping[str, Any] | None = None, **grid: Any
) -> dict[str, Any]:
    """A layout on which a step changes no weight."""
    return {"grids": {"language": grid}, "precision": precision, "optimizer": FROZEN, **(tables or {})}


def module(**fields: Any) -> dict[str, Any]:
    """Fields of the module."""
    return {"language": fields}


LAYOUTS = {
    "one rank": layout(),
    "tp2 pp2": layout(tp=2, pp=2, tables={"batch": TWO}),
    "dp2": layout(dp=2),
    "cp2": layout(cp=2),
    "sp": layout(tp=2, sequence_parallel=True),
    "zb-h1": layout(pp=2, tables={"batch": TWO, "schedule": {"name": "zb-h1"}}),
}
MORE = {
    "dp2 pp2": layout(dp=2, pp=2, tables={"batch": TWO}),
    "cp2 tp2 sp": layout(cp=2, tp=2, sequence_parallel=True),
    "zb-h1 tp2, selective": layout(
        tp=2, tables={"schedule": {"name": "zb-h1"}, "modules": module(recompute="selective")}
    ),
    "zb-h1 sp": layout(tp=2, sequence_parallel=True, tables={"schedule": {"name": "zb-h1"}}),
    "full": layout(pp=2, tables={"modules": module(recompute="full")}),
    "shared update": layout(dp=2, tables={"optimizer": {**FROZEN, "sharded": True}}),
}


@functools.cache
def folder(name: str) -> Path:
    """A checkpoint that all tests of this file share."""
    return make(name, Path(tempfile.mkdtemp(), name))


@functools.cache
def expected(name: str) -> ReferenceStep:
    """What transformers computes in double precision."""
    return losses_and_gradients(reference(folder(name)), batch(name))


def differences(seen: Seen, of: ReferenceStep) -> tuple[float, float]:
    """How far the loss and any gradient are from the reference's, relative to the largest value of each."""
    assert seen.loss is not None
    assert seen.gradients.keys() == of.gradients.keys()
    worst = max(
        float(np.abs(seen.gradients[name] - gradient.numpy()).max() / gradient.abs().max())
        for name, gradient in of.gradients.items()
    )
    return abs(seen.loss - of.loss) / of.loss, worst


@pytest.mark.world
@pytest.mark.parametrize("name", MODELS if SCALE > 1 else EVERY_DAY)
def test_every_layout_has_the_gradients_of_transformers(pool: Pool, name: str) -> None:
    """By their names on disk: a vocabulary of 259 on tp=2 and three layers on pp=2 included."""
    layouts = LAYOUTS | (MORE if SCALE > 1 else {})
    said = pool.run("publishing:steps", 4, folder(name), list(layouts.values()), batch(name))
    for label, seen in zip(layouts, said[0], strict=True):
        assert max(differences(seen, expected(name))) < 1e-12, label


@pytest.mark.world
def test_grids_of_experts(pool: Pool) -> None:
    """Experts on ranks of their own, whole and in shards."""
    layouts = [layout(dp=2, ep=2), layout(tp=2, ep=2), layout(tp=2, dp=2, ep=2, expert_tp=2)]
    for seen in pool.run("publishing:steps", 4, folder("qwen3-moe"), layouts, batch("qwen3-moe"))[0]:
        assert max(differences(seen, expected("qwen3-moe"))) < 1e-12


@pytest.mark.world
def test_chunks(pool: Pool, tmp_path: Path) -> None:
    """Two virtual stages on each rank."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**TEXT, "num_hidden_layers": 4})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    chunks = layout(pp=2, tables={"batch": TWO, "modules": module(chunks=2)})
    (seen,) = pool.run("publishing:steps", 2, tmp_path, [chunks], batch("llama"))[0]
    assert max(differences(seen, losses_and_gradients(reference(tmp_path), batch("llama")))) < 1e-12


@pytest.mark.world
def test_lower_precisions(pool: Pool) -> None:
    """Fp32 is within 1e-5 of transformers in double precision, and bf16 trains."""
    single, half = pool.run(
        "publishing:steps", 2, folder("qwen3"), [layout("fp32", tp=2), layout("bf16", tp=2)], batch("qwen3")
    )[0]
    assert max(differences(single, expected("qwen3"))) < 1e-5
    assert differences(half, expected("qwen3"))[0] < 0.01


@pytest.mark.world
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_comes_in_goes_out(pool: Pool, tmp_path: Path, dtype: torch.dtype) -> None:
    """Equal tensors in their dtype, and every other file, from a checkpoint of several files."""
    source = make("qwen2", tmp_path / "in", dtype=dtype, shard="40KB")
    (source / "tokenizer.json").write_text("{}")
    assert (source / "model.safetensors.index.json").exists()
    pool.run("publishing:saved", 4, source, layout("fp32", tp=2, pp=2), [], tmp_path / "out")
    found, back = tensors(source), tensors(tmp_path / "out")
    assert found.keys() == back.keys()
    assert all(found[name].dtype == back[name].dtype == dtype for name in found)
    assert all(torch.equal(found[name], back[name]) for name in found)
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (source / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder."""
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.world
def test_what_has_trained_loads_into_transformers(pool: Pool, tmp_path: Path) -> None:
    """With the loss that the next step has; a batch of another size on the way changes nothing."""
    rule = {"optimizer": {"lr": 1e-2, "weight_decay": 0.0}}
    trains = layout("fp32", tp=2, pp=2, tables=rule)
    first, second = batch("llama"), batch("llama", seed=1, samples=((14,), (5,)))
    losses = pool.run("publishing:saved", 4, folder("llama"), trains, [first, second], tmp_path / "a")[0]
    again = pool.run("publishing:saved", 4, folder("llama"), trains, [first], tmp_path / "b")[0]
    assert losses[0] == again[0]
    assert losses_and_gradients(reference(tmp_path / "b"), second).loss == pytest.approx(losses[1], rel=1e-6)
    assert losses_and_gradients(reference(tmp_path / "a"), second).loss < losses[1]


# -- without a world ---------------------------------------------------------------------------------------


def test_check_says_what_was_split_and_padded() -> None:
    """And how large the model is: as large as the file."""
    said = Job.from_pretrained(folder("llama"), **layout(tp=2, pp=2)).check()
    values = sum(int(np.prod(shape)) for shape in shapes(folder("llama")).values())
    assert said.splitlines() == [
        "LlamaForCausalLM",
        f"language: {values:,} parameters, on tp=2 cp=1 dp=1 pp=2; layers: 1 | 2",
        "vocabulary: padded by 1 for tp; these are never predicted and never saved",
    ]


@pytest.mark.parametrize("name", MODELS)
def test_the_table_of_parameters_is_the_files(name: str) -> None:
    """Names and shapes of the recipes are those of the model that the job builds."""
    job = Job.from_pretrained(folder(name), **layout())
    recipes = job.checkpoint.model.modules["language"].recipes
    model = job.sized(1, 8).topology.modules["language"].model
    assert {p.name: p.shape for p in model.parameters()} == {n: r.shape for n, r in recipes.items()}


def test_a_rank_reads_its_slices_only() -> None:
    """The bytes that the ranks of tp=2 read are half of every sharded tensor."""
    job = Job.from_pretrained(folder("qwen3"), **layout(tp=2))
    recipes = job.checkpoint.model.modules["language"].recipes
    for parameter in job.sized(1, 8).topology.modules["language"].model.parameters():
        if parameter.tp_dim is None or parameter.shape != recipes[parameter.name].shape:
            continue  # Norms are whole on each rank; the padded vocabulary is not halved evenly.
        pieces = slices(recipes[parameter.name], *_held(parameter, rank=1, ranks=2))
        read = sum(np.prod([stop - start for start, stop in piece.bounds]) for piece in pieces)
        assert 2 * read == np.prod(parameter.shape), parameter.name


def test_a_job_file_starts_from_a_folder(tmp_path: Path) -> None:
    """Its options are the checkpoint's, and what it records reads back."""
    (tmp_path / "weights").symlink_to(folder("qwen3"))
    (tmp_path / "job.toml").write_text(
        '[modules.language]\nmodel = "gpt"\nweights = "weights"\n[data]\nsource = "synthetic"\n'
        "[batch]\nglobal_size = 2\n"
    )
    spec = jobfile.load(tmp_path / "job.toml")
    options: Any = spec.modules["language"].options
    assert (options.norm, options.head_width, options.qk_norm) == ("rmsnorm", 12, True)
    assert options.rotary_scaling["type"] == "yarn"
    assert jobfile.parsed(jobfile.dump(spec)) == spec


def refused(path: Path, **fields: Any) -> str:
    """What is said of a folder."""
    published.cache_clear()
    with pytest.raises(PlanError) as error:
        Job.from_pretrained(path, **{**layout(), **fields})
    return str(error.value)


def test_models_that_cannot_be_trained_are_named(tmp_path: Path) -> None:
    """A tower alone has no loss."""
    assert "CLIPVisionModel, which cannot be trained here" in refused(make("clip", tmp_path))


def spoiled(tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> str:
    """What is said of a checkpoint with other tensors."""
    source = make("llama", tmp_path)
    held = load_file(source / "model.safetensors")
    change(held)
    save_file(held, source / "model.safetensors")
    return refused(source)


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    """Missing, surplus and of another shape."""
    name = "model.layers.1.mlp.up_proj.weight"
    assert f"lacks 1 tensor: {name}" in spoiled(tmp_path / "a", lambda held: held.pop(name))
    assert "has besides 1 tensor: more" in spoiled(
        tmp_path / "b", lambda held: held.update(more=torch.ones(1))
    )
    assert f"{name} ((2, 2), not (84, 48))" in spoiled(
        tmp_path / "c", lambda held: held.update({name: torch.ones(2, 2)})
    )


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    """Pickled, truncated, not there, named in the index and not there, and an index that leads elsewhere."""
    source = make("llama", tmp_path / "a", shard="40KB")
    shards = sorted(source.glob("*.safetensors"))
    index = source / "model.safetensors.index.json"
    told = index.read_text()
    for place in ("../a/model.safetensors", "/etc/passwd", "..", 7):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": place}}))
        assert f"names {place!r}, which is no file of the folder" in refused(source)
    index.write_text("[" * 100_000)
    assert "is no JSON that can be read" in refused(source)
    index.write_text(told)
    data = shards[0].read_bytes()
    shards[0].write_bytes(data[:-100])
    assert f"end at byte {len(data)}; it has {len(data) - 100}" in refused(source)
    shards[0].unlink()
    assert f"{shards[0]}: cannot be read" in refused(source)
    for path in (*shards[1:], index):
        path.unlink()
    (source / "pytorch_model.bin").touch()
    assert "is pickled (.bin), which is never read here" in refused(source)
    assert "b: there is no such folder" in refused(tmp_path / "b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values": torch.ones(1)}, "batch.pixel_values: is nothing that the model reads"),
        ({"attention_mask": torch.tensor([[1, 0, 1]])}, "leaves out tokens between others"),
        (
            {"attention_mask": torch.tensor([[0, 1, 1]]), "labels": torch.tensor([[-100, 2, 3]])},
            "sample 0: has a label for its first token",
        ),
        ({"attention_mask": torch.tensor([[1, 1, 0]])}, "has labels of padding"),
        ({"labels": None}, "batch.labels: is missing"),
        ({"labels": [[1, 2, 3]]}, "batch.labels: is of the type list; expected a tensor"),
        (
            {"labels": torch.ones(1, 2).long()},
            r"batch.labels: has the shape \(1, 2\), and input_ids \(1, 3\)",
        ),
        ({"labels": torch.tensor([[1, 2, 259]])}, "sample 0: has 259 at token 2; the vocabulary has 259"),
        ({"labels": torch.tensor([[1, -5, 3]])}, "sample 0: has -5 at token 1.*\n.*does not count is -100"),
        ({"attention_mask": torch.ones(2, 3)}, r"batch.attention_mask: has the shape \(2, 3\)"),
        ({"input_ids": torch.tensor([1, 2, 3])}, r"batch.input_ids: has the shape \(3,\)"),
        ({"input_ids": torch.ones(0, 3).long()}, r"batch.input_ids: has the shape \(0, 3\)"),
        ({"input_ids": torch.ones(1, 3)}, "batch.input_ids: is of the dtype float32; expected integers"),
        ({"input_ids": torch.tensor([[1, -1, 3]])}, "batch.input_ids: sample 0: has -1 at token 1"),
    ],
)
def test_batches_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    """They are refused before anything is opened."""
    tokens = torch.tensor([[1, 2, 3]])
    given = {"input_ids": tokens, "labels": tokens, **change}
    running = Job.from_pretrained(folder("llama"), **layout()).open()
    with pytest.raises(PlanError, match=message):
        running.step({name: tensor for name, tensor in given.items() if tensor is not None})
