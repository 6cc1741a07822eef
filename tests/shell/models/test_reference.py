"""The reference is what it says: double precision all through, transformers' loss, and the names of the files."""

import functools
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from checkpoints import (
    CLIPS,
    IGNORED,
    LANGUAGE,
    SAMPLES,
    VIDEO,
    VIDEOS,
    WHOLES,
    WITH_VIDEOS,
    Batch,
    batch,
    make,
    rename,
    shapes,
)
from mimogrid.core.base.errors import PlanError
from mimogrid.core.models.positions import frame_interval, merged, multimodal_positions
from mimogrid.shell.run.reference import (
    Reference,
    ReferenceStep,
    double_precision,
    losses_and_gradients,
    reference,
)


NAMES = (*LANGUAGE, *WHOLES)


@functools.cache
def folder(name: str) -> Path:
    """A checkpoint that all tests of this file share."""
    return make(name, Path(tempfile.mkdtemp(), name))


@functools.cache
def exact(name: str) -> Reference:
    """The reference in double precision that all tests of this file share."""
    return reference(folder(name))


def everything(name: str) -> Batch:
    """A batch with all that a model reads."""
    return batch(name, samples=SAMPLES + VIDEOS) if name in WITH_VIDEOS else batch(name)


def apart(ours: ReferenceStep, theirs: ReferenceStep) -> float:
    """How far gradients are apart, by the scale of each, or of the model's largest where it is tiny.

    Some gradients are zero but for rounding: keys' biases without rotary positions shift all scores alike.
    """
    floor = 1e-2 * max(float(gradient.abs().max()) for gradient in theirs.gradients.values())
    return max(
        float((ours.gradients[name].double() - gradient.double()).abs().max())
        / max(float(gradient.abs().max()), floor)
        for name, gradient in theirs.gradients.items()
    )


class Narrow(TorchDispatchMode):
    """The operations, of forward and of backward, that make a tensor of less than double precision."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.is_floating_point()
                and tensor.dtype != torch.float64
            ):
                self.seen.add(f"{func}: {tensor.dtype}")
        return made


@pytest.mark.parametrize("name", NAMES)
def test_all_is_double(name: str) -> None:
    """No operation of a step makes anything narrower than double precision."""
    model, inputs = exact(name), everything(name)
    # The seconds between frames of a video are data, and what positions are made of.
    inputs.pop("second_per_grid_ts", None)
    inputs |= {key: tensor.double() for key, tensor in inputs.items() if tensor.is_floating_point()}
    with Narrow() as narrow:
        losses_and_gradients(model, inputs)
    assert set() == narrow.seen


@pytest.mark.parametrize("name", NAMES)
def test_finite_differences(name: str) -> None:
    """Gradients are those of the loss: five points along a direction give the same slope to 1e-7."""
    model, inputs = exact(name), everything(name)
    losses_and_gradients(model, inputs)
    gradients = {
        parameter: parameter.grad.clone()
        for parameter in model.model.parameters()
        if parameter.grad is not None
    }
    generator = torch.Generator().manual_seed(0)
    for parameter, gradient in list(gradients.items())[:: len(gradients) // 3]:
        noise = torch.randn(gradient.shape, generator=generator, dtype=gradient.dtype)
        direction = gradient / gradient.norm() + noise / noise.norm()
        slope = _slope(model, inputs, parameter, direction)
        assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-7)


def _slope(model: Reference, inputs: Batch, parameter: torch.Tensor, direction: torch.Tensor) -> float:
    kept, width, losses = parameter.detach().clone(), 2e-4, []
    for steps in (-2, -1, 1, 2):
        with torch.no_grad():
            parameter.copy_(kept + steps * width * direction)
            with double_precision(Counter()):
                losses.append(model.model(**inputs, use_cache=False).loss.item())
    with torch.no_grad():
        parameter.copy_(kept)
    return (losses[0] - 8 * losses[1] + 8 * losses[2] - losses[3]) / (12 * width)


@pytest.mark.parametrize("name", NAMES)
def test_single_precision_as_it_is(name: str) -> None:
    """In single precision nothing is lifted, and loss and gradients are off by about 1e-6."""
    model = reference(folder(name), torch.float32)
    single, double = (losses_and_gradients(r, everything(name)) for r in (model, exact(name)))
    assert () == model.lifted
    assert single.loss == pytest.approx(double.loss, rel=1e-6)
    assert 1e-8 < apart(single, double) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_names_are_those_on_disk(name: str) -> None:
    """Every gradient has the name and the shape of a tensor in the folder; what is unused has none."""
    found = losses_and_gradients(exact(name), everything(name)).gradients
    on_disk = shapes(folder(name))
    assert {key: on_disk[key] for key in found} == {key: tuple(tensor.shape) for key, tensor in found.items()}
    # The layer after the one taken, its norm, pooling heads, and fixed positions.
    unused = {
        "llava": ("vision_tower.encoder.layers.2.", "vision_tower.post_layernorm."),
        "llava-siglip": ("vision_tower.head.", "vision_tower.post_layernorm."),
        "qwen2-audio": ("audio_tower.embed_positions.",),
    }.get(name, ())
    assert {key for key in on_disk if key.startswith(unused)} == set(on_disk) - set(found)


def test_names_of_older_versions(tmp_path: Path) -> None:
    """A folder with older names gives the same gradients under those names; so does one in shards."""
    whole = losses_and_gradients(exact("llava"), batch("llava"))
    older = make("llava", tmp_path / "older")
    rename(older, r"^vision_tower\.", "vision_tower.vision_model.")
    found = losses_and_gradients(reference(older), batch("llava"))
    assert whole.loss == found.loss
    assert {
        name.replace("vision_tower.", "vision_tower.vision_model.") for name in whole.gradients
    } == found.gradients.keys()
    shards = make("llava", tmp_path / "shards", shard="50KB")
    assert len(list(shards.glob("*.safetensors"))) > 1
    found = losses_and_gradients(reference(shards), batch("llava"))
    assert whole.loss == found.loss
    assert all(torch.equal(found.gradients[name], gradient) for name, gradient in whole.gradients.items())


def test_experts_lie_apart() -> None:
    """Experts are fused in memory and apart in the folder."""
    found = losses_and_gradients(exact("qwen3-moe"), batch("qwen3-moe")).gradients
    assert (20, 48) == found["model.layers.2.mlp.experts.5.up_proj.weight"].shape


@pytest.mark.parametrize("name", NAMES)
def test_the_loss(name: str) -> None:
    """The loss is the mean over labelled tokens, each predicted by the one before, or over a given number."""
    inputs = everything(name)
    found = losses_and_gradients(exact(name), inputs)
    labels = inputs["labels"][:, 1:]
    expected = functional.cross_entropy(
        found.logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=IGNORED
    )
    assert found.loss == pytest.approx(float(expected), rel=1e-12)
    halved = losses_and_gradients(exact(name), inputs, num_items_in_batch=2 * int((labels != IGNORED).sum()))
    assert halved.loss == pytest.approx(found.loss / 2, rel=1e-12)
    assert all(
        torch.allclose(halved.gradients[key] * 2, gradient, rtol=1e-9, atol=1e-14)
        for key, gradient in found.gradients.items()
    )


def test_nothing_stays_lifted() -> None:
    """After a step, torch's precisions are as they were."""
    losses_and_gradients(exact("llama"), batch("llama"))
    assert (
        torch.float32
        == torch.get_default_dtype()
        == torch.ones(1).dtype
        == torch.ones(1).double().float().dtype
    )
    config = transformers.LlamaConfig.from_pretrained(folder("llama"))
    assert torch.float32 == transformers.LlamaForCausalLM(config).model.rotary_emb.inv_freq.dtype


def test_what_is_lifted() -> None:
    """The lifts are listed by the functions that asked for single precision."""
    losses_and_gradients(exact("llama"), batch("llama"))
    model = "models.llama.modeling_llama"
    assert (
        "loss.loss_utils.ForCausalLMLoss: float",
        f"{model}.LlamaRMSNorm.forward: to",
        f"{model}.LlamaRotaryEmbedding.compute_default_rope_parameters: arange",
        f"{model}.LlamaRotaryEmbedding.forward: float",
        f"{model}.LlamaRotaryEmbedding.forward: to",
        f"{model}.eager_attention_forward: softmax",
    ) == exact("llama").lifted


@pytest.mark.parametrize("name", WHOLES)
def test_text_alone(name: str) -> None:
    """A batch of text has no gradients of towers."""
    found = losses_and_gradients(exact(name), batch(name, samples=((5,), (8,)))).gradients
    assert not [key for key in found if "vis" in key or "audio" in key or "projector" in key]


@pytest.mark.parametrize("name", WITH_VIDEOS)
def test_kinds_of_tokens_are_made(name: str) -> None:
    """A batch of an older processor, without kinds of tokens, comes to the same."""
    inputs = everything(name)
    expected = losses_and_gradients(exact(name), inputs).loss
    del inputs["mm_token_type_ids"]
    assert expected == losses_and_gradients(exact(name), inputs).loss


# -- what transformers does otherwise, and what that comes to


def test_without_kinds_of_tokens() -> None:
    """Without kinds Qwen2.5-VL gives images the positions of text, and says nothing; Qwen3-VL refuses."""
    inputs = batch("qwen2.5-vl")
    with_kinds = losses_and_gradients(exact("qwen2.5-vl"), inputs).loss
    del inputs["mm_token_type_ids"]
    with torch.no_grad():
        assert abs(exact("qwen2.5-vl").model(**inputs).loss.item() - with_kinds) > 1e-3
        inputs = batch("qwen3-vl")
        del inputs["mm_token_type_ids"]
        with pytest.raises(ValueError, match="mm_token_type_ids"):
            exact("qwen3-vl").model(**inputs)


def test_text_after_a_long_video() -> None:
    """After a video that lasts longer than its sides, text of Qwen2.5-VL begins before the video has ended.

    The model was trained with text that goes on from the largest position + 1, as our positions do. Positions
    may be part of a batch.
    """
    inputs = batch("qwen2.5-vl", samples=((2, "video", 6),)) | {"second_per_grid_ts": torch.tensor([2.0])}
    (tokens,) = inputs["input_ids"].tolist()
    places = [place for place, token in enumerate(tokens) if token == VIDEO]
    ours = torch.tensor(
        multimodal_positions(len(tokens), places, [merged(CLIPS[0], 2)], [frame_interval(2, 2.0)])
    )
    theirs, _ = exact("qwen2.5-vl").model.model.get_rope_index(
        inputs["input_ids"],
        inputs["mm_token_type_ids"],
        video_grid_thw=inputs["video_grid_thw"],
        second_per_grid_ts=inputs["second_per_grid_ts"],
    )
    assert ours[:, : places[-1] + 1].equal(theirs[:, 0, : places[-1] + 1])
    assert [8, 6] == [int(positions[0, places[-1] + 1]) for positions in (ours, theirs[:, 0])]
    losses = [
        losses_and_gradients(exact("qwen2.5-vl"), inputs | more).loss
        for more in ({}, {"position_ids": ours[:, None]})
    ]
    assert abs(losses[0] - losses[1]) > 1e-2


def test_fixed_positions_are_not_trained() -> None:
    """Loading makes Whisper's fixed positions trainable; here they are fixed, as the model's class has them."""
    positions = "audio_tower.embed_positions.weight"
    loaded = transformers.Qwen2AudioForConditionalGeneration.from_pretrained(folder("qwen2-audio"))
    assert loaded.model.get_parameter(positions).requires_grad
    assert not exact("qwen2-audio").model.model.get_parameter(positions).requires_grad


def test_audio_depends_on_two_frames_of_padding() -> None:
    """The convolutions read two frames beyond a clip's end: what stands there is part of the loss, and no more is."""
    inputs = batch("qwen2-audio")
    expected = losses_and_gradients(exact("qwen2-audio"), inputs).loss
    places = torch.arange(inputs["input_features"].shape[-1])
    ends = inputs["feature_attention_mask"].sum(-1)[:, None, None]
    for kept, same in ((0, False), (1, False), (2, True)):
        cut = inputs["input_features"] * (places < ends + kept)
        found = losses_and_gradients(exact("qwen2-audio"), inputs | {"input_features": cut}).loss
        assert same == (expected == found)
        assert same or abs(expected - found) > 1e-4


def test_double_precision_alone_does_not_suffice() -> None:
    """Without lifting, a model in double precision is a millionth off, a thousand times what parity allows."""
    model = transformers.LlamaForCausalLM.from_pretrained(
        folder("llama"), dtype=torch.float64, attn_implementation="eager"
    )
    model(**batch("llama")).loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    lifted = losses_and_gradients(exact("llama"), batch("llama"))
    assert 1e-7 < apart(ReferenceStep(0.0, lifted.logits, found), lifted) < 1e-5


def test_padding_has_no_gradient() -> None:
    """The row of the padding token has no gradient, even where it is a token of the text."""
    inputs = batch("llama")
    inputs["input_ids"][:, 1] = 0
    found = losses_and_gradients(exact("llama"), inputs).gradients
    assert 0 == found["model.embed_tokens.weight"][0].abs().max()


# -- bad input


def test_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    """A folder without a configuration or weights, of an unknown model, or with a tensor missing, is refused."""
    with pytest.raises(PlanError, match=r"has no model\.safetensors"):
        reference(tmp_path)
    made = make("llama", tmp_path / "made")
    tensors = load_file(made / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.up" not in name},
        made / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(PlanError, match=r"lacks 1 of the model's tensors, such as model\.layers\.1\.mlp\.up"):
        reference(made)
    config = json.loads((made / "config.json").read_text()) | {"architectures": ["LamaForCausalLM"]}
    (made / "config.json").write_text(json.dumps(config))
    with pytest.raises(PlanError, match="no architecture 'LamaForCausalLM'"):
        reference(made)
