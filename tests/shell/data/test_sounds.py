"""Sounds become mels as transformers has them; what is none, or too long, is left out."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import tomlkit
import torch
from transformers import AutoProcessor

from mimogrid.core.base.errors import PlanError
from mimogrid.shell.data.conversations import LeftOutError
from mimogrid.shell.data.encoding import waveform
from mimogrid.shell.data.index import LEFT_OUT
from mimogrid.shell.job.jobs import open_job
from stores import indexed, listener, sound, write_lines


RATE = 16_000


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny Qwen2-Audio."""
    folder: Path = tmp_path_factory.mktemp("listener") / "checkpoint"
    return listener(folder)


def wave(samples: np.ndarray, rate: int = RATE, kind: str = "WAV", subtype: str | None = None) -> bytes:
    """Return the bytes of a sound."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


NOISE = np.random.default_rng(0).uniform(-0.5, 0.5, 4000).astype(np.float32)


def test_a_sound_is_the_mean_of_its_channels_at_the_rate_of_the_processor() -> None:
    """Whatever its kind of file; resampled as transformers does it."""
    stereo = np.stack([NOISE, -NOISE / 2], axis=1)
    assert np.allclose(waveform(wave(stereo, subtype="FLOAT"), "a", RATE, None), NOISE / 4, atol=1e-7)
    assert np.abs(waveform(wave(NOISE, kind="FLAC"), "a", RATE, RATE) - NOISE).max() < 1e-4
    slow = waveform(wave(NOISE, rate=8000, subtype="FLOAT"), "a", RATE, RATE)
    assert np.array_equal(slow, soxr.resample(NOISE, 8000, RATE, quality="HQ"))
    assert len(slow) == 8000


@pytest.mark.parametrize(
    ("raw", "reason", "why"),
    [
        (b"", "broken sound", None),
        (b"no sound at all", "broken sound", None),
        (wave(NOISE)[:4000], "broken sound", "cut off"),
        (wave(NOISE, kind="FLAC")[:3000], "broken sound", None),
        (wave(np.where(NOISE > 0.4, np.nan, NOISE), subtype="FLOAT"), "broken sound", "finite"),
        (wave(NOISE[:0]), "empty sound", "no samples"),
        (wave(np.zeros(RATE + 1, np.float32), kind="FLAC"), "long sound", "at most 1 s"),
        (wave(np.zeros(8001, np.float32), rate=8000), "long sound", "at most 1 s"),
    ],
)
def test_what_is_no_sound_has_its_reason(raw: bytes, reason: str, why: str | None) -> None:
    """A sound that was cut would be a shorter one with the same answer; one that is too long, too."""
    with pytest.raises(LeftOutError, match=why) as caught:
        waveform(raw, "a.wav", RATE, RATE)
    assert caught.value.reason == reason


def test_sounds_are_described_and_loaded_as_the_processor_has_them(checkpoint: Path, tmp_path: Path) -> None:
    """Sounds in all three forms, two in a sample, and texts among them; bad ones are counted."""
    names = [sound(tmp_path, f"{n}.wav", n, seconds=(n + 2) / 5) for n in range(3)]
    sound(tmp_path, "long.wav", seconds=1.1)
    (tmp_path / "cut.wav").write_bytes((tmp_path / "0.wav").read_bytes()[:-9])
    records = [
        {"id": "asked", "audio": names[0], "question": "What is it", "answer": "A bird"},
        {"id": "heard", "audio": names[1], "answer": "A cat"},
        {"id": "text", "question": "What is it", "answer": "A bird"},
        {
            "id": "two",
            "messages": [
                {"role": "user", "content": "<audio> What <audio> is it"},
                {"role": "assistant", "content": "A cat"},
            ],
            "audios": names[1:],
        },
        {"id": "long", "audio": "long.wav", "answer": "A cat"},
        {"id": "cut", "audio": "cut.wav", "answer": "A cat"},
        {"id": "gone", "audio": "gone.wav", "answer": "A cat"},
        {"id": "image", "image": "0.png", "answer": "A cat"},
    ]
    index, _ = indexed(write_lines(tmp_path / "store.jsonl", records), checkpoint)
    assert [index[row]["id"] for row in range(len(index))] == ["asked", "heard", "text", "two"]
    lines = map(json.loads, (index.folder / LEFT_OUT).read_text().splitlines())
    assert [(line["id"], line["reason"]) for line in lines] == [
        ("long", "long sound"),
        ("cut", "broken sound"),
        ("gone", "missing file"),
        ("image", "missing file"),
    ]
    path = tmp_path / "job.toml"
    projector = {"language": {"kind": "linear"}}
    audio = {"model": "vit", "weights": str(checkpoint), "feeds": ["language"], "projector": projector}
    tables = {
        "modules": {"audio": audio, "language": {"model": "gpt", "weights": str(checkpoint)}},
        "data": {"source": "conversations", "options": {"index": "store.index", "shuffle": False}},
        "batch": {"global_size": 4},
    }
    path.write_text(tomlkit.dumps(tables))
    source = open_job(path).source
    assert source is not None
    processor = AutoProcessor.from_pretrained(checkpoint)
    waves = [soundfile.read(tmp_path / name, dtype="float32")[0] for name in names[1:]]
    prompt = (
        "<s> USER: <|audio_bos|> <|AUDIO|> <|audio_eos|> What <|audio_bos|> <|AUDIO|> <|audio_eos|> is it"
    )
    made = processor(
        text=f"{prompt} ASSISTANT: A cat </s>", audio=waves, sampling_rate=RATE, return_tensors="pt"
    )
    tokens, masks = made["input_ids"][0], made["feature_attention_mask"]
    described, text = source.describe(3), source.load(3, "language")
    assert torch.equal(text["tokens"], tokens.masked_fill(tokens == processor.audio_token_id, -1))
    assert described.length + sum(map(len, described.placeholders.values())) == len(tokens)
    frames = [
        features[:, : grid[0]].t()
        for features, grid in zip(made["input_features"], described.segments["audio"], strict=True)
    ]
    assert torch.equal(source.load(3, "audio")["rows"], torch.cat(frames))
    assert described.rows["audio"] == sum(map(len, frames))
    assert all(
        grid[0] >= int(mask.sum()) - 1 for grid, mask in zip(described.segments["audio"], masks, strict=True)
    )
    assert source.describe(2).rows.get("audio", 0) == 0


def test_a_model_of_images_hears_nothing(llava: Path, tmp_path: Path) -> None:
    """A store of sounds for it has no samples."""
    records = [{"audio": sound(tmp_path, "a.wav"), "answer": "1"}]
    with pytest.raises(PlanError, match="1 processor"):
        indexed(write_lines(tmp_path / "store.jsonl", records), llava)
