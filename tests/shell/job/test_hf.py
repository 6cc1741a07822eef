"""Sizes are read from the files in which Hugging Face describes models."""

import json
import math

import pytest

from mimogrid.core.base.errors import PlanError
from mimogrid.core.job.models import Gpt, Vit
from mimogrid.shell.job import jobfile
from mimogrid.shell.job.jobs import open_job


LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
}
CLIP = {
    "num_hidden_layers": 24,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "patch_size": 14,
}
QWEN = {
    **LLAMA,
    "model_type": "qwen2_vl",
    "num_key_value_heads": 8,
    "vision_config": {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "patch_size": 14},
}
WHISPER = {
    "model_type": "whisper",
    "encoder_layers": 32,
    "d_model": 1280,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "num_mel_bins": 128,
}
JOB = """
[modules.m]
model = "{model}"
options = {{ config = "config.json"{more} }}
[data]
source = "synthetic"
[batch]
global_size = 1
"""


def read(tmp_path, model, config, more=""):
    """The module of a job whose options are in a file beside it."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "job.toml").write_text(JOB.format(model=model, more=more))
    return jobfile.load(tmp_path / "job.toml")


def test_a_llama_has_its_parameters(tmp_path):
    """6.74 billion: the gated MLP counts with its three matrices."""
    options = read(tmp_path, "gpt", LLAMA).modules["m"].options
    assert Gpt(layers=32, hidden=4096, heads=32, ffn=16512, vocab=32000) == options
    count = sum(math.prod(p.shape) for p in options.parameters() if p.name.endswith(".weight"))
    assert 6.74e9 == pytest.approx(count, rel=1e-3)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "clip", "vision_config": CLIP}, (24, 1024, 16, 4096, 588)),
        ({**CLIP, "model_type": "siglip_vision_model"}, (24, 1024, 16, 4096, 588)),
        (WHISPER, (32, 1280, 20, 5120, 256)),
        (QWEN, (32, 1280, 16, 5120, 1176)),
    ],
)
def test_encoders_are_read(tmp_path, config, expected):
    """The vision part of a whole model, or a file of its own; Whisper's encoder."""
    layers, hidden, heads, ffn, features = expected
    found = read(tmp_path, "vit", config).modules["m"].options
    assert Vit(layers=layers, hidden=hidden, heads=heads, ffn=ffn, features=features) == found


def test_a_file_has_a_text_part_too(tmp_path):
    """With its key-value heads."""
    assert 8 == read(tmp_path, "gpt", QWEN).modules["m"].options.kv_heads


def test_what_is_written_beside_goes_before(tmp_path):
    """And what is dumped holds sizes, no path."""
    spec = read(tmp_path, "gpt", LLAMA, more=", layers = 2")
    assert 2 == spec.modules["m"].options.layers
    assert "config" not in jobfile.dump(spec)


@pytest.mark.parametrize(
    ("config", "fact"),
    [
        ({**LLAMA, "model_type": "lama"}, "Did you mean 'llama'.*Known for a gpt: llama, mistral"),
        ({"model_type": "llama"}, "has no 'num_attention_heads'"),
        ([], "holds no table"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path, config, fact):
    """With what is known."""
    with pytest.raises(PlanError, match=fact):
        read(tmp_path, "gpt", config)


@pytest.mark.parametrize(
    ("config", "fact"),
    [
        ({**LLAMA, "hidden_size": "x"}, "no integer as 'hidden_size': \"x\""),
        ({**LLAMA, "text_config": 3}, "no table as 'text_config': 3"),
        ({**LLAMA, "hidden_size": 10**30}, "more than 64 bits"),
    ],
)
def test_a_size_that_is_none_is_said(tmp_path, config, fact):
    """With what stands there instead."""
    with pytest.raises(PlanError, match=fact):
        read(tmp_path, "gpt", config)


def test_an_unknown_architecture_is_one_problem(tmp_path):
    """Nothing is said of the layers of a module whose sizes are not known."""
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "model_type": "lama"}))
    (tmp_path / "job.toml").write_text(
        JOB.format(model="gpt", more="") + "[modules.m.grid]\npp = 2\ntp = 3\n"
    )
    with pytest.raises(PlanError) as error:
        open_job(tmp_path / "job.toml")
    assert ["modules.m.options.config"] == [problem.where for problem in error.value.problems]
