"""Published wholes: towers and a language model on grids of their own have the loss and gradients of transformers."""

import functools
import re
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from checkpoints import MODELS, SAMPLES, VIDEOS, WHOLES, WITH_VIDEOS, batch, make, padded_left
from mimogrid.adapters.huggingface import Job
from mimogrid.core.base.errors import PlanError
from mimogrid.shell.data.batches import examples_of
from mimogrid.shell.job import jobfile
from mimogrid.shell.job.published import published
from mimogrid.shell.run.reference import ReferenceStep, losses_and_gradients, reference
from mimogrid.shell.world.launch import Pool
from publishing import Seen
from scale import SCALE, nightly_only


NEAR = 1e-9
FROZEN = {"lr": 0.0, "weight_decay": 0.0}
TWO = {"microbatches": 2}
ZB = {"name": "zb-h1"}
FLOOR = 1e-3
TOWER = {"qwen2-audio": "audio"}


def layout(
    tower: Mapping[str, Any], language: Mapping[str, Any], *, precision: str = "fp64", **tables: Any
) -> dict[str, Any]:
    """A layout on which a step changes no weight; in its tables the tower is called `tower`."""
    return {
        "grids": {"tower": tower, "language": language},
        "precision": precision,
        "optimizer": FROZEN,
    } | tables


EVERY_DAY = {
    "dp2 | tp2 pp2": layout({"dp": 2}, {"tp": 2, "pp": 2, "offset": 0}, batch=TWO),
    "cp2 | cp2": layout({"cp": 2}, {"cp": 2}),
    "sp | sp": layout({"tp": 2, "sequence_parallel": True}, {"tp": 2, "sequence_parallel": True}),
    "zb-h1": layout({}, {"pp": 2}, batch=TWO, schedule=ZB),
}
NIGHTLY = {
    "one rank": layout({}, {"offset": 0}),
    "tp2 | dp2": layout({"tp": 2}, {"dp": 2}),
    "cp2 tp2 sp, all colocated": layout(
        {"cp": 2, "tp": 2, "sequence_parallel": True},
        {"cp": 2, "tp": 2, "sequence_parallel": True, "offset": 0},
    ),
    "zb-h1, sp": layout(
        {"tp": 2, "sequence_parallel": True}, {"tp": 2, "sequence_parallel": True}, schedule=ZB
    ),
    "selective | full": layout(
        {},
        {"pp": 2},
        batch=TWO,
        modules={"tower": {"recompute": "selective"}, "language": {"recompute": "full"}},
    ),
    "shared update": layout({"dp": 2}, {"dp": 2}, optimizer={**FROZEN, "sharded": True}),
}
LAYOUTS = EVERY_DAY | (NIGHTLY if SCALE > 1 else {})


def layouts_of(name: str) -> dict[str, dict[str, Any]]:
    """Two layouts that are not those of the next whole; at a larger scale, all."""
    labels, first = list(LAYOUTS), WHOLES.index(name)
    mine = labels if SCALE > 1 else [labels[(first + i) % len(labels)] for i in range(2)]
    return {label: LAYOUTS[label] for label in mine}


@functools.cache
def folder(name: str) -> Path:
    """A checkpoint that all tests of this file share."""
    return make(name, Path(tempfile.mkdtemp(), name))


@functools.cache
def modules(name: str) -> Mapping[str, str]:
    """The module that each tensor of a checkpoint is of; those of a tower of no family are in no recipe."""
    known = {
        tensor.name: module
        for module, described in published(folder(name)).model.modules.items()
        for recipe in described.recipes.values()
        for tensor in recipe.tensors
    }
    return defaultdict(lambda: TOWER.get(name, "vision"), known)


def differences(name: str, seen: Seen, of: ReferenceStep) -> tuple[float, float]:
    """How far the loss and any gradient are from the reference's, relative to the largest value of each.

    A gradient is not compared more finely than a thousandth of the largest of its module: that of a key's bias is zero
    in theory where nothing turns.
    """
    assert seen.loss is not None
    assert seen.gradients.keys() == of.gradients.keys()
    largest: dict[str, float] = {}
    for tensor, gradient in of.gradients.items():
        module = modules(name)[tensor]
        largest[module] = max(largest.get(module, 0.0), float(gradient.abs().max()))
    worst = max(
        float(np.abs(seen.gradients[tensor] - gradient.numpy()).max())
        / max(float(gradient.abs().max()), FLOOR * largest[modules(name)[tensor]])
        for tensor, gradient in of.gradients.items()
    )
    return abs(seen.loss - of.loss) / of.loss, worst


@functools.cache
def expected(name: str) -> ReferenceStep:
    """What transformers computes in double precision."""
    return losses_and_gradients(reference(folder(name)), batch(name))


def of(name: str, written: Mapping[str, Any]) -> dict[str, Any]:
    """A layout of a model, whose tower has a name of its own."""
    tower = TOWER.get(name, "vision")
    renamed = {
        table: {tower if key == "tower" else key: value for key, value in written[table].items()}
        for table in ("grids", "modules")
        if table in written
    }
    return {**written, **renamed}


def seen_on(
    pool: Pool, name: str, layouts: Sequence[Mapping[str, Any]], given: Mapping[str, Any], path: Path
) -> list[Seen]:
    """What the first rank sees of one step on each of some layouts."""
    written = [of(name, one) for one in layouts]
    seen: list[Seen] = pool.run("publishing:steps", 4, path, written, given)[0]
    return seen


@pytest.mark.world
@pytest.mark.parametrize("name", WHOLES)
def test_every_layout_has_the_gradients_of_transformers(pool: Pool, name: str) -> None:
    """By their names on disk: images of several sizes, two of them in a sample, and a sample of text."""
    layouts = layouts_of(name)
    seen = seen_on(pool, name, list(layouts.values()), batch(name), folder(name))
    found = {label: differences(name, one, expected(name)) for label, one in zip(layouts, seen, strict=True)}
    assert all(max(differs) < NEAR for differs in found.values()), found


@pytest.mark.world
@pytest.mark.parametrize("name", WITH_VIDEOS)
def test_clips_beside_images(pool: Pool, name: str) -> None:
    """Clips and images of one sample go through one tower, in the order of their placeholders."""
    given = batch(name, samples=(*VIDEOS, *SAMPLES))
    (seen,) = seen_on(pool, name, [layout({"tp": 2}, {"pp": 2, "cp": 2, "offset": 0})], given, folder(name))
    assert max(differences(name, seen, losses_and_gradients(reference(folder(name)), given))) < NEAR


THEIRS = {
    "llava": ("vision_tower", NEAR),
    "llava-siglip": ("vision_tower", NEAR),
    "qwen2.5-vl": ("visual", 1e-5),  # Its norms and angles are single precision in transformers.
    "qwen2-audio": ("audio_tower", NEAR),
    "llava-dinov2": ("vision_tower", NEAR),  # No family here has it, so nobody need ask for it.
}


@pytest.mark.world
@pytest.mark.parametrize(
    "name", ["llava", "qwen2.5-vl", "llava-dinov2", *nightly_only(["llava-siglip", "qwen2-audio"])]
)
def test_a_tower_that_transformers_runs(pool: Pool, name: str) -> None:
    """It has the gradients of the converted one, on dp ranks of its own."""
    part, near = THEIRS[name]
    theirs = {"tower": {"model": f"hf:{folder(name)}#{part}"}}
    layouts = [layout({"dp": 2}, {"tp": 2}, modules=theirs), layout({}, {"pp": 2}, batch=TWO, modules=theirs)]
    if name == "llava-dinov2":
        layouts[1] = layout({}, {"pp": 2}, batch=TWO)
    for seen in seen_on(pool, name, layouts, batch(name), folder(name)):
        assert max(differences(name, seen, expected(name))) < near


@pytest.mark.world
@pytest.mark.parametrize("name", ["llava", "qwen2.5-vl"])
def test_padding_on_the_left(pool: Pool, name: str) -> None:
    """It is cut off as well as that on the right: what positions are counted from changes nothing."""
    given = padded_left(batch(name))
    (seen,) = seen_on(pool, name, [layout({}, {"dp": 2}, batch=TWO)], given, folder(name))
    assert max(differences(name, seen, losses_and_gradients(reference(folder(name)), given))) < NEAR


@pytest.mark.world
def test_chunks(pool: Pool, tmp_path: Path) -> None:
    """Two virtual stages on each rank of a tower and of a language model."""
    name, (architecture, config_of) = "llava", MODELS["llava"]
    config = config_of()
    config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers = 5, 4
    torch.manual_seed(0)
    getattr(transformers, architecture)(config).save_pretrained(tmp_path)
    chunks = {"tower": {"chunks": 2}, "language": {"chunks": 2}}
    (seen,) = seen_on(
        pool, name, [layout({"pp": 2}, {"pp": 2}, batch=TWO, modules=chunks)], batch(name), tmp_path
    )
    of_theirs = losses_and_gradients(reference(tmp_path), batch(name))
    assert seen.loss == pytest.approx(of_theirs.loss, rel=NEAR)
    for tensor, gradient in of_theirs.gradients.items():
        np.testing.assert_allclose(
            seen.gradients[tensor], gradient.numpy(), rtol=0, atol=NEAR, err_msg=tensor
        )


@pytest.mark.world
def test_what_does_not_train(pool: Pool) -> None:
    """A frozen tower has no gradients, and a batch without images gives zeros where transformers gives none."""
    frozen = layout({"dp": 2}, {"tp": 2}, modules={"tower": {"frozen": True}})
    (seen,) = seen_on(pool, "qwen3-vl", [frozen], batch("qwen3-vl"), folder("qwen3-vl"))
    trained = {name for name, module in modules("qwen3-vl").items() if module == "language"}
    of_language = {n: g for n, g in expected("qwen3-vl").gradients.items() if n in trained}
    assert (
        max(differences("qwen3-vl", seen, attrs.evolve(expected("qwen3-vl"), gradients=of_language))) < NEAR
    )
    text = batch("qwen3-vl", samples=((9,), (4,)))
    (seen,) = seen_on(pool, "qwen3-vl", [layout({"dp": 2}, {"tp": 2})], text, folder("qwen3-vl"))
    theirs = losses_and_gradients(reference(folder("qwen3-vl")), text)
    assert not any(
        gradient.any() for name, gradient in seen.gradients.items() if name not in theirs.gradients
    )
    both = attrs.evolve(seen, gradients={name: seen.gradients[name] for name in theirs.gradients})
    assert max(differences("qwen3-vl", both, theirs)) < NEAR


@pytest.mark.world
def test_lower_precisions(pool: Pool) -> None:
    """Fp32 is within 1e-5 of transformers in double precision; in bf16 the loss is within 1 %."""
    layouts = [layout({"dp": 2}, {"tp": 2}, precision=precision) for precision in ("fp32", "bf16")]
    single, half = seen_on(pool, "qwen2.5-vl", layouts, batch("qwen2.5-vl"), folder("qwen2.5-vl"))
    assert max(differences("qwen2.5-vl", single, expected("qwen2.5-vl"))) < 1e-5
    assert differences("qwen2.5-vl", half, expected("qwen2.5-vl"))[0] < 0.01


@pytest.mark.world
def test_what_comes_in_goes_out(pool: Pool, tmp_path: Path) -> None:
    """All tensors of a whole are written as they were, those that no module has included."""
    written = layout({"tp": 2}, {"pp": 2}, precision="fp32")
    pool.run("publishing:saved", 4, folder("llava"), of("llava", written), [], tmp_path / "out")
    found, back = (load_file(path / "model.safetensors") for path in (folder("llava"), tmp_path / "out"))
    assert found.keys() == back.keys()
    assert all(torch.equal(found[name], back[name]) for name in found)


@pytest.mark.world
@pytest.mark.parametrize("name", ["qwen3-vl", "qwen2-audio"])
def test_what_has_trained_loads_into_transformers(pool: Pool, name: str, tmp_path: Path) -> None:
    """With the loss that the next step has, whatever the layout."""
    rule = {"lr": 1e-2, "weight_decay": 0.1}
    written = of(name, layout({"dp": 2}, {"tp": 2, "pp": 2, "offset": 0}, precision="fp32", optimizer=rule))
    first, second = batch(name), batch(name, seed=1)
    losses = pool.run("publishing:saved", 4, folder(name), written, [first, second], tmp_path / "a")[0]
    pool.run("publishing:saved", 4, folder(name), written, [first], tmp_path / "b")
    assert losses_and_gradients(reference(tmp_path / "b"), second).loss == pytest.approx(losses[1], rel=1e-5)
    assert losses_and_gradients(reference(tmp_path / "a"), second).loss < losses[1]


# -- without a world ---------------------------------------------------------------------------------------


def test_check_lists_all_modules() -> None:
    """With their ranks, layers and parameters."""
    said = Job.from_pretrained(folder("llava"), **of("llava", EVERY_DAY["dp2 | tp2 pp2"])).check()
    assert re.fullmatch(
        r"LlavaForConditionalGeneration\n"
        r"vision: [\d,]+ parameters, on tp=1 cp=1 dp=2 pp=1; layers: 2\n"
        r"language: [\d,]+ parameters, on tp=2 cp=1 dp=1 pp=2; layers: 1 \| 2\n"
        r"vocabulary: padded by 1 for tp; these are never predicted and never saved",
        said,
    )


@pytest.mark.parametrize(
    ("name", "written", "message"),
    [
        ("qwen3-vl", layout({"pp": 2}, {}), "has layer 0, and the last stage, where rows leave, begins at"),
        (
            "qwen3-vl",
            layout({}, {}, modules={"tower": {"recompute": "full"}}),
            "lists layers whose rows leave, and recompute = 'full' keeps what goes into a layer only",
        ),
        ("qwen3-vl", layout({}, {"pp": 3}), "is 2, and the first stage, where rows come in, has 1 layers"),
        ("qwen2.5-vl", layout({}, {"tp": 4}), "splits 2 key-value heads over tp=4"),
        ("llava", layout({"tp": 3}, {}), "splits 4 attention heads over tp=3"),
        (
            "llava-dinov2",
            layout({"tp": 2}, {}),
            "module 'vision' is your own: the plan cannot cut it over tp=2",
        ),
        (
            "llava",
            layout({"tp": 2}, {}, modules={"tower": {"model": "hf:#vision_tower"}}),
            "module 'vision' is your own: the plan cannot cut it over tp=2",
        ),
        (
            "qwen2.5-vl",
            layout({}, {}, modules={"tower": {"model": "hf:#vision_tower"}}),
            "names 'vision_tower'; transformers calls this tower 'visual'",
        ),
        (
            "qwen2.5-vl",
            layout({"pp": 2}, {}, modules={"tower": {"model": "hf:#visual"}}),
            "module 'vision' is your own: the plan cannot cut it over pp=2",
        ),
        (
            "qwen3-vl",
            layout({}, {}, modules={"tower": {"model": "hf:#visual"}}),
            "has rows of inner layers that join the language model",
        ),
    ],
)
def test_what_cannot_be_computed_is_refused(name: str, written: Mapping[str, Any], message: str) -> None:
    """With the reason, before anything starts."""
    with pytest.raises(PlanError, match=re.escape(message)):
        Job.from_pretrained(folder(name), **of(name, with_folder(written, folder(name))))


def with_folder(written: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A layout whose modules name a folder."""
    modules = {
        name: {
            key: value.replace("hf:#", f"hf:{path}#") if key == "model" else value
            for key, value in of.items()
        }
        for name, of in written.get("modules", {}).items()
    }
    return {**written, "modules": modules}


def test_a_job_file_names_a_tower_of_transformers(tmp_path: Path) -> None:
    """What the file means is recorded, and reads back."""
    (tmp_path / "folder").symlink_to(folder("llava-siglip"))
    (tmp_path / "job.toml").write_text(
        'weights = "folder"\n[modules.vision]\nmodel = "hf:folder#vision_tower"\n[modules.language]\n'
        '[data]\nsource = "synthetic"\n[batch]\nglobal_size = 2\n'
    )
    spec = jobfile.load(tmp_path / "job.toml")
    vision = spec.modules["vision"]
    assert vision.width == 32
    assert vision.feeds == ("language",)
    assert vision.projector["language"].kind == "mlp"
    assert jobfile.parsed(jobfile.dump(spec)) == spec


def test_grids_are_for_all_modules() -> None:
    """A module without a grid is named."""
    with pytest.raises(PlanError, match="grids: there is no grid for the module 'vision'"):
        Job.from_pretrained(folder("llava"), grids={"language": {}})


def changed(name: str, **tensors: Any) -> str:
    """What is said of a batch with other tensors; None: without them."""
    given = {key: tensor for key, tensor in {**batch(name), **tensors}.items() if tensor is not None}
    with pytest.raises(PlanError) as error:
        examples_of(published(folder(name)).model, given)
    return str(error.value)


def test_batches_that_do_not_fit() -> None:
    """Counts that do not match are named, with the sample and the numbers."""
    llava, qwen, audio = (batch(name) for name in ("llava", "qwen2.5-vl", "qwen2-audio"))
    assert (
        "batch.pixel_values: has 1 more of its kind 'image' than the tokens have placeholders for"
        in changed("llava", pixel_values=torch.cat([llava["pixel_values"], llava["pixel_values"][:1]]))
    )
    assert "sample 3: token 1 stands for a row of the kind 'image', and there is none left" in changed(
        "llava", pixel_values=llava["pixel_values"][:-1]
    )
    assert "the model takes images of 3 channels and 12 x 12 pixels" in changed(
        "llava", pixel_values=torch.ones(4, 3, 20, 12)
    )
    assert "batch.image_grid_thw: is missing" in changed("qwen2.5-vl", image_grid_thw=None)
    grids = qwen["image_grid_thw"]
    for none in (grids.float(), grids[:, :2], 0 * grids):
        assert "batch.image_grid_thw: has the shape" in changed("qwen2.5-vl", image_grid_thw=none)
    assert "has the shape (120, 96); image_grid_thw has 60 patches" in changed(
        "qwen2.5-vl", image_grid_thw=grids[:-1]
    )
    assert "sample 0: has 6 placeholders from token 4 on, where the next segment" in changed(
        "qwen2.5-vl", image_grid_thw=grids.roll(1, 0), pixel_values=qwen["pixel_values"]
    )
    assert "cannot be merged 2 by 2" in changed(
        "qwen2.5-vl", image_grid_thw=grids.where(grids != 6, 3), pixel_values=qwen["pixel_values"][:-42]
    )
    assert "has the shape (4, 10, 18); the model takes 10 mels of 20 frames" in changed(
        "qwen2-audio", input_features=audio["input_features"][..., :18]
    )
    assert "batch.feature_attention_mask: has the shape (1, 20)" in changed(
        "qwen2-audio", feature_attention_mask=audio["feature_attention_mask"][:1]
    )
    assert "batch.second_per_grid_ts: has 1 numbers for 2 videos" in said_of_videos()
    assert "batch.input_features: is nothing that the model reads" in changed(
        "llava", input_features=torch.ones(1)
    )


def said_of_videos() -> str:
    """What is said of clips of which one has no seconds."""
    given = batch("qwen2.5-vl", samples=VIDEOS)
    with pytest.raises(PlanError) as error:
        examples_of(
            published(folder("qwen2.5-vl")).model, {**given, "second_per_grid_ts": torch.tensor([1.0])}
        )
    return str(error.value)
