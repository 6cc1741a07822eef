"""A tiny LLaVA with its processor, made once."""

from pathlib import Path

import pytest

from stores import example


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the example's checkpoint, narrow."""
    folder: Path = tmp_path_factory.mktemp("llava") / "checkpoint"
    example("make").checkpoint(folder, hidden=16)
    return folder
