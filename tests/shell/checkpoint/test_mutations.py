"""Mutations: whatever is done to a checkpoint, it is refused by name, or what it loads is bitwise the same."""

import collections
import contextlib
import io
import os
import random
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import attrs
import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

import layouts
from edits import edited
from mimogrid.core.job.spec import JobSpec, LossScaleSpec, OptimizerSpec, SkipSpec
from mimogrid.shell.checkpoint import manifest
from mimogrid.shell.checkpoint.index import read_index
from mimogrid.shell.cli import main as cli
from scale import SCALE, drawn
from updates import Seen


pytestmark = pytest.mark.world

EDITS = 2000 if SCALE > 1 else drawn(120)
STEP = "step-00000002"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

Tensors = Mapping[str, torch.Tensor]


def jobs() -> dict[str, JobSpec]:
    """A job of dp ranks, one with tp, pp and tied embeddings, and one with experts and sharded updates."""
    tied = {"lm": {"options": {"tied_embeddings": True}}, "enc": {"frozen": True}}
    experts = layouts.job("lm(1,1,2)@0", precision="fp16", changes={"lm": {"options": {"experts": 4}}})
    lm = experts.modules["lm"]
    rule = OptimizerSpec(
        sharded=True, loss_scale=LossScaleSpec(initial=256.0), skip_above=SkipSpec(norm=50.0, window=2)
    )
    return {
        "dp": layouts.job("lm(1,1,2)@0", precision="fp32"),
        "tp, pp, tied": layouts.job("enc(1,1,1)@0 lm(2,2,1)@1", precision="bf16", changes=tied),
        "experts, sharded": attrs.evolve(
            experts, modules={"lm": attrs.evolve(lm, grid=attrs.evolve(lm.grid, ep=2))}, optimizer=rule
        ),
    }


@pytest.fixture(scope="module")
def checkpoints(
    train: Callable[..., list[Seen]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A checkpoint of each job, after two steps."""
    found = {}
    for name, spec in jobs().items():
        folder = tmp_path_factory.mktemp("job")
        train(spec, range(2), None, folder)
        found[name] = folder / STEP
    return found


def loaded(checkpoint: Path) -> Tensors:
    """Every tensor of a checkpoint, as torch's reader gives it to a run."""
    index = read_index(checkpoint)
    tensors = {name: torch.full(of.shape, torch.nan, dtype=DTYPES[of.dtype]) for name, of in index.items()}
    dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(checkpoint)), no_dist=True)
    return tensors


def inspected(checkpoint: Path) -> tuple[int, str]:
    """The exit code of the command line, and what it says is wrong."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        return cli.main(["inspect", str(checkpoint)]), said.getvalue()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_an_edited_checkpoint_is_refused_or_loads_the_same(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """None loads other values, and none ends in a traceback."""
    seed = int(os.environ.get("MIMOGRID_TEST_SEED", secrets.randbits(32)))
    print(f"MIMOGRID_TEST_SEED={seed}")  # noqa: T201
    whole = {name: loaded(checkpoint) for name, checkpoint in checkpoints.items()}
    assert {0} == {inspected(checkpoint)[0] for checkpoint in checkpoints.values()}
    counts: collections.Counter[str] = collections.Counter()
    for i in range(EDITS):
        job, draw = list(checkpoints)[i % 3], random.Random(f"{seed}/{i}")
        original = Path(shutil.copytree(checkpoints[job], tmp_path / str(i) / STEP))
        folder, what = edited(original, draw)
        context = f"MIMOGRID_TEST_SEED={seed}, edit {i} of '{job}': {what}"
        code, said = inspected(folder)
        if code:
            names = {manifest.MANIFEST, folder.name, *(path.name for path in checkpoints[job].iterdir())}
            assert (2, True) == (code, any(name in said for name in names)), f"{context}\n{said}"
        else:
            after = loaded(folder)
            assert after.keys() == whole[job].keys(), context
            assert all(map(same, after.values(), whole[job].values())), context
        counts[f"{what}: {'refused' if code else 'harmless'}"] += 1
        shutil.rmtree(tmp_path / str(i))
    print("\n".join(f"{count:5} {what}" for what, count in sorted(counts.items())))  # noqa: T201


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit by bit."""
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))
