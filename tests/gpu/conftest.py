"""A GPU, or a reason why there is none; processes that may use it; and a summary of what was measured."""

import importlib.util
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mimogrid.shell.world.launch import Pool


SUMMARY = Path("gpu.json")


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Eight processes that may use CUDA."""
    with Pool(8, may_use_cuda=True) as pool:
        yield pool


@pytest.fixture(scope="session")
def summary() -> Iterator[dict[str, Any]]:
    """What each test found; written to `gpu.json` and printed at the end. Without a GPU no test is run."""
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    engine = importlib.util.find_spec("transformer_engine") is not None
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "transformer_engine": engine,
    }
    yield found
    text = json.dumps(found, indent=2)
    SUMMARY.write_text(text + "\n")
    print(f"\n{text}")  # noqa: T201 -- what `nox -s gpu` is for
