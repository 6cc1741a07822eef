"""A run on indexes goes on from the number of its step: on other grids, and with other weights of a mixture."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import tomlkit
import torch
from safetensors.torch import load_file

from mimogrid.core.job.changes import refused
from mimogrid.shell.job.jobs import Job, open_job
from mimogrid.shell.world.launch import Pool
from running import trained
from scale import nightly, nightly_only
from stores import image, indexed, record, write_lines


pytestmark = pytest.mark.world

OTHER = ("modules.vision.grid.dp=1", "modules.language.grid.pp=2")


@pytest.fixture
def folder(llava: Path, tmp_path: Path) -> Path:
    """Return a folder with two indexes, and a job of the tiny LLaVA."""
    names = [image(tmp_path, f"{n}.png", n) for n in range(12)]
    indexed(write_lines(tmp_path / "images.jsonl", [record(n, name) for n, name in enumerate(names)]), llava)
    indexed(write_lines(tmp_path / "texts.jsonl", [record(n, answer=str(n)) for n in range(5)]), llava)
    return tmp_path


def job(folder: Path, llava: Path, *, weight: int, steps: int, settings: tuple[str, ...] = ()) -> Job:
    """Return the job with a weight of the images, where the texts have 1."""
    mix = [
        {"source": "conversations", "options": {"index": f"{name}.index"}, "weight": share}
        for name, share in (("images", weight), ("texts", 1))
    ]
    vision: dict[str, Any] = {"model": "vit", "weights": str(llava), "feeds": ["language"]}
    vision |= {"projector": {"language": {"kind": "mlp", "ffn": 16}}, "grid": {"dp": 2}}
    tables = {
        "precision": "fp64",
        "modules": {
            "vision": vision,
            "language": {"model": "gpt", "weights": str(llava), "grid": {"offset": 0}},
        },
        "data": {"mix": mix},
        "batch": {"global_size": 4, "microbatches": 2},
        "optimizer": {"lr": 1e-2},
        "train": {"steps": steps, "evaluate": False},
    }
    path = folder / "job.toml"
    path.write_text(tomlkit.dumps(tables))
    return open_job(path, settings)


def goes_on(pool: Pool, job: Job, run: Path, changed: tuple[str, ...] = ()) -> list[float]:
    """Go on with a run that has ended, to the end of a longer job; return its losses."""
    for name in ("weights.safetensors", "report.json"):
        (run / name).unlink()
    losses: list[float] = trained(pool, job, run, resume=True, changed=changed)["losses"]
    return losses


@pytest.mark.parametrize("ends", [(1, 2, 3), *nightly_only([(2, 4, 6)])])
def test_the_number_of_the_step_is_all_that_a_resumed_run_needs(
    pool: Pool, folder: Path, llava: Path, ends: tuple[int, int, int]
) -> None:
    """Stopped after other weights began, it is bitwise the run that went on."""
    first, second, last = ends
    run = folder / "run"
    trained(pool, job(folder, llava, weight=3, steps=first), run)
    specs = [job(folder, llava, weight=weight, steps=last).spec for weight in (3, 1)]
    assert [change.key for change in refused(*specs, accepted=())] == ["data.mix"]
    stopped = shutil.copytree(run, folder / "stopped")
    losses = goes_on(pool, job(folder, llava, weight=1, steps=last), run, ("data.mix",))
    goes_on(pool, job(folder, llava, weight=1, steps=second), stopped, ("data.mix",))
    assert losses == goes_on(pool, job(folder, llava, weight=1, steps=last), stopped)
    weights = [load_file(each / "weights.safetensors") for each in (run, stopped)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@nightly
def test_on_other_grids_it_goes_on_alike(pool: Pool, folder: Path, llava: Path) -> None:
    """And with other weights otherwise than with those that it began with."""
    trained(pool, job(folder, llava, weight=3, steps=2), folder / "run")
    elsewhere, unchanged = (shutil.copytree(folder / "run", folder / name) for name in ("elsewhere", "same"))
    losses = goes_on(pool, job(folder, llava, weight=1, steps=6), folder / "run", ("data.mix",))
    other = job(folder, llava, weight=1, steps=6, settings=OTHER)
    assert pytest.approx(losses, rel=1e-9) == goes_on(pool, other, elsewhere, ("data.mix",))
    kept = goes_on(pool, job(folder, llava, weight=3, steps=6), unchanged)
    assert losses[:2] == kept[:2]
    assert losses[2:] != kept[2:]


def test_samples_are_those_of_the_weights_at_the_step(folder: Path, llava: Path) -> None:
    """As if the new weights had been there from the first step, on any layout."""
    jobs = [job(folder, llava, weight=1, steps=6, settings=more) for more in ((), OTHER)]
    before = job(folder, llava, weight=3, steps=6)
    for step in range(6):
        first, second = (each.step(step).samples for each in jobs)
        assert first == second
        assert [sample.id for sample in first] == list(range(4 * step, 4 * step + 4))
        assert [bool(sample.rows) for sample in first] == [True, False, True, False]
        assert [bool(sample.rows) for sample in before.step(step).samples] == [True, True, True, False]
