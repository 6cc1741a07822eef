"""The page on families: what it shows runs, and its example reads what transformers writes."""

import doctest
import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from safetensors import safe_open

from mimogrid.core.models.config import Config, Family
from mimogrid.core.models.families import BY_ARCHITECTURE
from mimogrid.core.models.network import Model, PublishedModule
from tiny_checkpoints import TEXT


PAGE = Path(__file__).parents[3] / "docs/models.md"


def test_the_examples_of_the_page() -> None:
    """They print what the page says."""
    assert doctest.testfile(str(PAGE), module_relative=False).failed == 0


def test_every_architecture_is_on_the_page() -> None:
    """And no other."""
    rows = [line.split("|")[1] for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    named = re.findall(r"`(\w+(?:Model|ForCausalLM|ForConditionalGeneration))`", "".join(rows))
    assert set(BY_ARCHITECTURE) == set(named)


@pytest.mark.parametrize("window", [None, 5])
def test_the_family_that_is_added(window: int | None, tmp_path: Path) -> None:
    """The file that the page shows reads a Mistral: its options are there, and every tensor is in one recipe."""
    (text,) = (
        block
        for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
        if "FAMILIES" in block
    )
    file: dict[str, Any] = {}
    exec(text, file)
    (family,) = file["FAMILIES"]
    assert isinstance(family, Family)
    hf.MistralForCausalLM(hf.MistralConfig(**TEXT, sliding_window=window)).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as tensors:
        shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    config = Config(json.loads((tmp_path / "config.json").read_text()), family.defaults, shapes)
    module = family.read(config)
    assert isinstance(module, PublishedModule)
    assert not config.problems
    assert not list(Model(modules={family.role: module}).differences(shapes))
    assert (window or 0) == module.option("window")
