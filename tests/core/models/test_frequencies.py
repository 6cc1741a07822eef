"""Rotary frequencies, by hand; tests/shell/models compares them with another implementation."""

import math

import pytest

from mimogrid.core.base.errors import PlanError
from mimogrid.core.models.frequencies import LinearScaling, Llama3, Yarn, axes, frequencies, parse_scaling


LLAMA3 = Llama3(factor=8, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=8192)


def test_a_part_of_a_head_turns() -> None:
    """A fraction of the width has the frequencies of a head as wide as the fraction."""
    assert frequencies(8, 500.0) == frequencies(32, 500.0, fraction=0.25)


def test_linear() -> None:
    """A linear scaling divides every frequency."""
    assert (0.25, 0.0025) == frequencies(4, 10_000.0, scaling=LinearScaling(factor=4))


def test_llama3_keeps_short_waves_and_stretches_long_ones() -> None:
    """Short wavelengths stay, long ones are eight times as long, and nothing else lies outside of the two."""
    plain, scaled = frequencies(128, 500_000.0), frequencies(128, 500_000.0, scaling=LLAMA3)
    ratios = [a / b for a, b in zip(plain, scaled, strict=True)]
    assert 1 == ratios[0]
    assert 8 == pytest.approx(ratios[-1])
    assert ratios == sorted(ratios)
    waves = [2 * math.pi / frequency for frequency in plain]
    assert all(1 == ratio for ratio, wave in zip(ratios, waves, strict=True) if wave < 8192 / 4)
    assert all(8 == pytest.approx(r) for r, wave in zip(ratios, waves, strict=True) if wave > 8192)


def test_yarn() -> None:
    """YaRN keeps the fastest pair, divides the slowest, and lets cosines and sines grow by a tenth of a log."""
    yarn = Yarn(factor=4, original_max_position_embeddings=32768)
    plain, scaled = frequencies(128, 1e6), frequencies(128, 1e6, scaling=yarn)
    assert plain[0] == scaled[0]
    assert plain[-1] / 4 == pytest.approx(scaled[-1])
    assert 0.1 * math.log(4) + 1 == yarn.attention_factor
    assert 1.5 == Yarn(factor=4, original_max_position_embeddings=8, attention_factor=1.5).attention_factor
    assert (
        1 == Yarn(factor=4, original_max_position_embeddings=8, mscale=2, mscale_all_dim=2).attention_factor
    )


def test_sections() -> None:
    """Sections of published models: chunks, and every third pair."""
    assert (0,) * 16 + (1,) * 24 + (2,) * 24 == axes((16, 24, 24), interleaved=False)
    turned = axes((24, 20, 20), interleaved=True)
    assert [24, 20, 20] == [turned.count(axis) for axis in range(3)]
    assert (0, 1, 2) * 20 + (0,) * 4 == turned


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"type": "dynamic", "factor": 2.0}, "the rotary scaling 'dynamic' is not known"),
        (
            {"type": "yarn", "factor": 2.0},
            "'yarn' needs 'original_max_position_embeddings', which is missing",
        ),
        ({"type": "linear", "factor": 2.0, "beta_fast": 1}, "'linear' has no such option"),
        ({"type": "linear", "factor": "two"}, "'two' is not a number"),
        ({"factor": 2.0}, "the rotary scaling None is not known"),
    ],
)
def test_wrong_scalings(options: dict[str, object], said: str) -> None:
    """A scaling that is unknown, incomplete or no number is refused with its place."""
    with pytest.raises(PlanError, match=said):
        parse_scaling("modules.language.rotary_scaling", options)


def test_options_of_a_checkpoint() -> None:
    """The options have the names that checkpoints give them; null is as good as absent."""
    options = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "attention_factor": None}
    assert Yarn(factor=4.0, original_max_position_embeddings=8) == parse_scaling("x", options)
    options = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "attention_factor": 2.0}
    assert 2 == parse_scaling("x", options).attention_factor
