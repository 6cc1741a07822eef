"""Conversations become tokens, labels and rows as transformers has them; only assistants count."""

import io
import json
import re
import shutil
from pathlib import Path

import attrs
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from mimogrid.core.base.errors import PlanError
from mimogrid.shell.data.conversations import Conversation, LeftOutError, Medium, conversation
from mimogrid.shell.data.encoding import Encoder, decoded
from stores import image, record


@pytest.fixture(scope="module")
def encoder(llava: Path) -> Encoder:
    """Return the encoder of the tiny LLaVA, whose template marks what assistants say."""
    return Encoder.of(llava)


def without_marks(encoder: Encoder) -> Encoder:
    """Return an encoder whose template is the same, but does not mark what assistants say."""
    return attrs.evolve(encoder, template=re.sub(r"\{%-? (end)?generation -?%\}", "", encoder.template))


TWO_IMAGES: Conversation = conversation(
    json.dumps(
        {
            "id": "a",
            "image": ["a.png", "b.png"],
            "conversations": [
                {"from": "human", "value": "<image> Read <image>"},
                {"from": "gpt", "value": "3 1"},
                {"from": "human", "value": "Copy 7"},
                {"from": "gpt", "value": "7"},
            ],
        }
    ).encode(),
    "",
)


def pictures(tmp_path: Path) -> list[Image.Image]:
    """Return two images of different sizes."""
    for seed, (name, size) in enumerate({"a.png": (32, 8), "b.png": (11, 40)}.items()):
        image(tmp_path, name, seed, size)
    return [decoded((tmp_path / name).read_bytes(), name) for name in ("a.png", "b.png")]


def test_only_what_assistants_say_counts(encoder: Encoder, tmp_path: Path) -> None:
    """Both turns of the assistant with their ends, each token under the one before it; nothing else."""
    text = encoder.encode(TWO_IMAGES, pictures(tmp_path)).tensors["language"]
    said = [encoder.text([label]) for label in text["labels"][text["loss_weights"] > 0].tolist()]
    assert said == ["3", "1", "</s>", "7", "</s>"]
    places = text["loss_weights"].nonzero().flatten()
    assert text["tokens"][places + 1].tolist()[:-1] == text["labels"][places].tolist()[:-1]


def test_rows_are_what_the_processor_makes(encoder: Encoder, llava: Path, tmp_path: Path) -> None:
    """Tokens and pixels of transformers' processor, called as its documentation says; the images alone are the same."""
    images = pictures(tmp_path)
    encoded = encoder.encode(TWO_IMAGES, images)
    processor = AutoProcessor.from_pretrained(llava)
    prompt = "<s> USER: <image> Read <image> ASSISTANT: 3 1 </s> USER: Copy 7 ASSISTANT: 7 </s>"
    made = processor(text=prompt, images=images, return_tensors="pt", add_special_tokens=False)
    tokens = made["input_ids"][0]
    assert torch.equal(encoded.tensors["language"]["tokens"], tokens.masked_fill(tokens == 4, -1))
    assert encoded.sample.segments == {"vision": ((1, 4, 4), (1, 4, 4))}
    assert encoded.sample.placeholders == {"language": tuple((tokens == 4).nonzero().flatten().tolist())}
    patches = made["pixel_values"].unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).reshape(32, -1)
    assert torch.equal(encoded.tensors["vision"]["rows"], patches)
    assert torch.equal(encoder.rows("image", images), patches)


def test_a_template_without_marks_counts_the_same(encoder: Encoder, tmp_path: Path) -> None:
    """What a turn adds to the conversation before it is what its marks enclose."""
    images = pictures(tmp_path)
    first, second = (each.encode(TWO_IMAGES, images) for each in (encoder, without_marks(encoder)))
    for name, tensor in first.tensors["language"].items():
        assert torch.equal(tensor, second.tensors["language"][name]), name


def test_a_template_that_rewrites_earlier_turns_is_refused(encoder: Encoder, tmp_path: Path) -> None:
    """As templates do that cut what an assistant has thought out of its earlier turns."""
    plain = without_marks(encoder).template
    cut = "{% set last = messages | length - 1 %}" + plain.replace(
        "ASSISTANT:\n", "ASSISTANT:{% if loop.index0 < last %} |{% endif %}\n"
    )
    assert cut != plain
    with pytest.raises(LeftOutError) as caught:
        attrs.evolve(encoder, template=cut).encode(TWO_IMAGES, pictures(tmp_path))
    assert caught.value.reason == "template"


@pytest.mark.parametrize("token", ["<image>", "</s>"])
def test_a_special_token_in_a_text_is_refused(encoder: Encoder, token: str) -> None:
    """It would stand for an image that is not there, or end a turn. A marker of the store never gets there."""
    spoken = conversation(json.dumps(record(0)).encode(), "")
    parts = attrs.evolve(spoken.turns[0], parts=(f"Read {token}",))
    with pytest.raises(LeftOutError) as caught:
        encoder.encode(attrs.evolve(spoken, turns=(parts, *spoken.turns[1:])), [])
    assert caught.value.reason == "control token"


def test_a_conversation_without_an_answer_has_nothing_to_learn(encoder: Encoder) -> None:
    """It is left out, not counted as a sample of zero."""
    spoken = conversation(json.dumps(record(0)).encode(), "")
    with pytest.raises(LeftOutError) as caught:
        encoder.encode(attrs.evolve(spoken, turns=spoken.turns[:1]), [])
    assert caught.value.reason == "no counted token"


def test_a_model_of_text_takes_its_tokenizer(llava: Path, tmp_path: Path) -> None:
    """The folder of a language model has no processor; templates with marks and without agree there, too."""
    folder = tmp_path / "text"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(llava / name, folder / name)
    whole = json.loads((llava / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**whole["text_config"], "architectures": ["LlamaForCausalLM"]})
    )
    table = json.loads((folder / "tokenizer_config.json").read_text())
    table.pop("processor_class", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(table))
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %} USER: {{ m.content }}"
        "{% else %} ASSISTANT:{% generation %} {{ m.content }} {{ eos_token }}{% endgeneration %}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    encoder = Encoder.of(folder)
    spoken = conversation(json.dumps(record(0)).encode(), "")
    first = encoder.encode(spoken, []).tensors["language"]
    plain = re.sub(r"\{% (end)?generation %\}", "", template)
    second = attrs.evolve(encoder, template=plain).encode(spoken, []).tensors["language"]
    assert encoder.text(first["labels"][first["loss_weights"] > 0].tolist()) == "3 1 4 </s>"
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(LeftOutError, match="text only"):
        encoder.encode(
            attrs.evolve(spoken, turns=(attrs.evolve(spoken.turns[0], parts=(Medium("image"),)),)),
            [Image.new("RGB", (8, 8))],
        )


def test_a_folder_without_a_processor_or_a_template_is_refused(llava: Path, tmp_path: Path) -> None:
    """With the way out."""
    with pytest.raises(PlanError, match="has no processor"):
        Encoder.of(tmp_path)
    bare = shutil.copytree(llava, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(PlanError, match="no chat template") as caught:
        Encoder.of(bare)
    assert "save_pretrained" in caught.value.problems[0].remedy


def test_images_are_upright_and_in_colour(tmp_path: Path) -> None:
    """As transformers loads them."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("L", (20, 10), 7).save(tmp_path / "a.jpg", exif=exif)
    found = decoded((tmp_path / "a.jpg").read_bytes(), "a.jpg")
    assert (found.mode, found.size) == ("RGB", (10, 20))


def test_broken_and_huge_images_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image of more pixels than Pillow decodes may fill the memory."""
    image(tmp_path, "a.png", size=(64, 64))
    raw = (tmp_path / "a.png").read_bytes()
    for broken in (b"", b"no image", raw[: len(raw) // 2], raw[:40] + bytes(40) + raw[80:]):
        with pytest.raises(LeftOutError) as caught:
            decoded(broken, "a.png")
        assert caught.value.reason == "broken image"
    for limit in (64 * 64 - 1, 64 * 64 // 2 - 1):  # a warning, and an error
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(LeftOutError) as caught:
            decoded(raw, "a.png")
        assert caught.value.reason == "huge image"


def test_postscript_is_no_image() -> None:
    """Pillow would run Ghostscript on it."""
    written = io.BytesIO()
    Image.new("RGB", (4, 4)).save(written, "EPS")
    with pytest.raises(LeftOutError, match="is PostScript") as caught:
        decoded(written.getvalue(), "a.eps")
    assert caught.value.reason == "broken image"
