"""Slices of published checkpoints: what each rank of a large layout reads of the files."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import attrs
import pytest
import torch
from safetensors import safe_open
from torch import nn

from mimogrid.core.models.families import read_config
from mimogrid.core.topology.topology import StageInfo
from mimogrid.shell.job.jobs import open_job
from mimogrid.shell.job.published import INDEX, published
from mimogrid.shell.job.tensorfile import size_of
from mimogrid.shell.modules import published as loading
from mimogrid.shell.modules.weights import shard_shape


TP, PP = 8, 4
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 8,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "intermediate_size": 2816,
    "vocab_size": 32000,
}
JOB = f"""
[modules.language]
weights = "large"
grid = {{ tp = {TP}, pp = {PP} }}
[data]
source = "mimogrid.shell.job.host:samples"
options = {{ sequence = 128 }}
[batch]
global_size = 4
microbatches = 4
"""


@attrs.frozen
class Group:
    """A process group that only knows where it is."""

    place: int
    count: int

    def rank(self) -> int:
        """Where this rank is."""
        return self.place

    def size(self) -> int:
        """How many ranks there are."""
        return self.count


@attrs.frozen
class Groups:
    """The groups of a tp rank."""

    tp: Any
    expert_tp: Any


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 200 MB of zeros in two files, which take no place on a disk."""
    folder = tmp_path_factory.mktemp("checkpoint") / "large"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tensors = {t.name: t.shape for recipe in read_config(CONFIG).recipes().values() for t in recipe.tensors}
    places: dict[str, str] = {}
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
        header, end, file = {}, 0, f"model-{number}.safetensors"
        for name in names:
            begin, end = end, end + size_of("BF16", tensors[name])
            header[name] = {"dtype": "BF16", "shape": tensors[name], "data_offsets": [begin, end]}
            places[name] = file
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + end)
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    (folder.parent / "job.toml").write_text(JOB)
    return folder


@contextmanager
def counted() -> Iterator[Callable[[], int]]:
    """Count the bytes that are read of files of safetensors."""
    read = 0

    class Piece:
        def __init__(self, piece: Any) -> None:
            self._piece = piece

        def __getitem__(self, bounds: Any) -> torch.Tensor:
            nonlocal read
            values: torch.Tensor = self._piece[bounds]
            read += values.nbytes
            return values

    @contextmanager
    def opened(*arguments: Any, **more: Any) -> Iterator[Any]:
        with safe_open(*arguments, **more) as file:
            yield _Opened(file)

    class _Opened:  # It offers slices only: whoever reads a whole tensor fails.
        def __init__(self, file: Any) -> None:
            self._file = file

        def get_slice(self, name: str) -> Piece:
            return Piece(self._file.get_slice(name))

    with patch.object(loading, "safe_open", opened):
        yield lambda: read


def read_of(folder: Path, info: StageInfo, tp_rank: int) -> tuple[int, int]:
    """The bytes that a rank reads, and those of the weights that it holds, in the files' dtype."""
    weights = {
        parameter.name: nn.Parameter(
            torch.full(shard_shape(parameter, tp_size=TP), torch.nan, dtype=torch.bfloat16)
        )
        for parameter in info.parameters
    }
    with counted() as read:
        lacking = loading.load_published(
            folder,
            weights,
            info.parameters,
            module="language",
            groups=Groups(Group(tp_rank, TP), Group(0, 1)),
        )
        assert not lacking
        assert not any(bool(weight.isnan().any()) for weight in weights.values())
        return read(), sum(weight.nbytes for weight in weights.values())


def test_a_rank_reads_what_it_holds(folder: Path) -> None:
    """Not a byte more: on tp=8, pp=4 a thirty-second of the layers, and all ranks together each sharded byte once."""
    stages = open_job(folder.parent / "job.toml").topology.modules["language"].stages
    total = sum(
        tensor.stored.end - tensor.stored.begin for tensor in published(folder.resolve()).tensors.values()
    )
    ends = 2 * size_of("BF16", (32000, 1024)) + size_of("BF16", (1024,))
    read, held = read_of(folder, stages[1], tp_rank=3)
    assert read == held
    norms = 2 * 2 * size_of("BF16", (1024,))
    assert read - norms == (total - ends - PP * norms) / (TP * PP)
    assert read < 1.01 * total / (TP * PP)
    of_all = [read_of(folder, info, rank)[0] for info in stages for rank in range(TP)]
    replicated = PP * norms + size_of("BF16", (1024,))
    assert sum(of_all) == total + (TP - 1) * replicated
