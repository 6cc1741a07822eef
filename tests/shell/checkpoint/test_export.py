"""Export and inspect: what a run left, for others and for people."""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import checkpoint as dcp

from mimogrid.core.base.units import in_bytes
from mimogrid.shell.cli import main as cli
from mimogrid.shell.job.jobs import open_job
from mimogrid.shell.world.launch import Pool


pytestmark = pytest.mark.world

DIGITS = Path(__file__).resolve().parents[3] / "examples" / "digits" / "job.toml"
CUT = ["modules.language.grid.tp=2", "modules.vision.grid.dp=1", "modules.vision.grid.pp=2"]


@pytest.fixture(scope="module")
def run(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, its parameters cut over tp and pp, with two checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    job = open_job(DIGITS, ["train.steps=2", "train.checkpoint_every=1", "train.evaluate=false", *CUT])
    pool.run("mimogrid.shell.run.train:in_world", job.topology.world_size, job, None, str(folder))
    return folder


@pytest.fixture(scope="module")
def weights(run: Path) -> Mapping[str, torch.Tensor]:
    """Its final weights, as its ranks put them together."""
    return load_file(run / "weights.safetensors")


def test_safetensors_are_the_weights(run: Path, weights: Mapping[str, torch.Tensor], tmp_path: Path) -> None:
    """One file for each module, under the names inside of it, and what the modules are."""
    assert 0 == cli.main(["export", str(run), "--to", "safetensors", "--out", str(tmp_path / "out")])
    assert ["config.json", "language.safetensors", "vision.safetensors"] == names(tmp_path / "out")
    exported = {
        f"{module}.{name}": tensor
        for module in ("language", "vision")
        for name, tensor in load_file(tmp_path / "out" / f"{module}.safetensors").items()
    }
    assert_equal(weights, exported)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert 2 == config["step"]
    assert ("gpt", 16) == (
        config["modules"]["language"]["model"],
        config["modules"]["language"]["options"]["vocab"],
    )


def test_large_modules_are_cut_into_files(
    run: Path, weights: Mapping[str, torch.Tensor], tmp_path: Path
) -> None:
    """No file has more than what was asked for, and an index says which parameter is where."""
    most = ["--max-shard-gb", "0.0002"]
    assert 0 == cli.main(["export", str(run), "--to", "safetensors", *most, "--out", str(tmp_path)])
    found = {}
    for module in ("language", "vision"):
        index = json.loads((tmp_path / f"{module}.safetensors.index.json").read_text())
        files = sorted(set(index["weight_map"].values()))
        assert 1 < len(files)
        for file in files:
            tensors = load_file(tmp_path / file)
            assert sum(tensor.nbytes for tensor in tensors.values()) <= 200_000
            assert {file} == {index["weight_map"][name] for name in tensors}
            found |= {f"{module}.{name}": tensor for name, tensor in tensors.items()}
    assert_equal(weights, found)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_reads_what_is_exported_as_dcp(
    run: Path, weights: Mapping[str, torch.Tensor], tmp_path: Path
) -> None:
    """Its own reader fills tensors by our names."""
    checkpoint = run / "checkpoints" / "step-00000002"
    assert 0 == cli.main(["export", str(checkpoint), "--to", "dcp", "--out", str(tmp_path / "out")])
    loaded = {name: torch.full_like(tensor, torch.nan) for name, tensor in weights.items()}
    dcp.load(loaded, checkpoint_id=tmp_path / "out", no_dist=True)
    assert_equal(weights, loaded)


def test_nothing_is_written_over(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder with something in it is refused; without --out the export lies in the run."""
    (tmp_path / "mine").touch()
    assert 2 == cli.main(["export", str(run), "--to", "dcp", "--out", str(tmp_path)])
    assert "--out" in capsys.readouterr().err
    shutil.copytree(run / "checkpoints", tmp_path / "run" / "checkpoints")
    assert 0 == cli.main(["export", str(tmp_path / "run"), "--to", "safetensors"])
    assert (tmp_path / "run" / "step-00000002-safetensors" / "config.json").is_file()
    (tmp_path / "file").touch()
    assert 2 == cli.main(["export", str(run), "--to", "safetensors", "--out", str(tmp_path / "file" / "out")])
    assert "cannot be written" in capsys.readouterr().err


def test_damage_is_not_exported(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint that is not whole is refused by the name of its file; `inspect` says the same, and what is whole."""
    shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")
    victim = next((tmp_path / "checkpoints" / "step-00000002").glob("shard-*"))
    victim.write_bytes(victim.read_bytes()[:-1])
    assert 2 == cli.main(["export", str(tmp_path), "--to", "dcp"])
    assert victim.name in capsys.readouterr().err
    assert 2 == cli.main(["inspect", str(tmp_path)])
    said = capsys.readouterr()
    assert "step-00000001  whole\nstep-00000002  damaged\n" in said.out
    assert victim.name in said.err
    assert 2 == cli.main(["inspect", str(tmp_path), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert [True, False] == [checkpoint["whole"] for checkpoint in told["checkpoints"]]
    assert "step-00000001" == told["contents"]["name"]
    assert "mv" in told["problems"][0]["remedy"]


def test_inspect_says_what_is_in_it(
    run: Path, weights: Mapping[str, torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps, modules, parameters, bytes, states, and the layout that it was written with."""
    assert 0 == cli.main(["inspect", str(run), "--json"])
    contents = json.loads(capsys.readouterr().out)["contents"]
    assert (2, 2, "fp32") == (contents["step"], contents["steps_taken"], contents["precision"])
    assert 128 == contents["data"]["next_sample"]
    assert {"exp_avg", "exp_avg_sq"} < set(contents["optimizer_states"])
    for module, facts in contents["modules"].items():
        own = [tensor for name, tensor in weights.items() if name.startswith(f"{module}.")]
        assert (len(own), sum(t.nbytes for t in own)) == (facts["parameters"], facts["bytes"])
    assert (2, 2) == tuple(contents["modules"]["language"]["written_by"][axis] for axis in ("tp", "pp"))
    assert {"tp": [1, 2, 4], "pp": [1, 2]} == contents["modules"]["language"]["fits"]
    assert 0 == cli.main(["inspect", str(run)])
    assert "tp in 1, 2, 4" in capsys.readouterr().out


def test_verifying_says_how_far_it_is(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every file but the manifests is read, piece by piece; standard output is as without it."""
    assert 0 == cli.main(["inspect", str(run)])
    expected = capsys.readouterr().out
    assert 0 == cli.main(["inspect", str(run), "--verify"])
    said = capsys.readouterr()
    assert expected == said.out
    files = [path for path in run.glob("checkpoints/*/*") if path.name != "manifest.json"]
    total = in_bytes(sum(path.stat().st_size for path in files))
    assert f"read {total} of {total}" in said.err.splitlines()[-1]


FITTING = {
    "as it was written": [],
    "another layout": [
        "modules.language.grid.tp=4",
        "modules.language.grid.pp=1",
        "modules.vision.grid.dp=4",
    ],
    "colocated, shared updates": ["modules.language.grid.offset=0", "optimizer.sharded=true"],
    "in half precision": ["precision=bf16"],
}
MEANT = {"optimizer.name": "adam", "modules.vision.frozen": "true", "seed": "7"}
NOT_FITTING = {
    "wider": (["modules.vision.options.hidden=128"], "'vision.input.bias', the job needs [128]"),
    "deeper": (["modules.language.options.layers=4"], "has no 'language.layers.2."),
    "more states": (["optimizer.options.amsgrad=true"], "has no 'optimizer.max_exp_avg_sq."),
}


@pytest.mark.parametrize("overrides", FITTING.values(), ids=FITTING)
def test_a_job_that_fits(run: Path, capsys: pytest.CaptureFixture[str], overrides: list[str]) -> None:
    """Every legal layout of the same model can go on from it."""
    assert 0 == cli.main(["inspect", str(run), "--job", str(DIGITS), *given(overrides)])
    assert "fits" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(("key", "value"), MEANT.items())
def test_a_job_that_trains_otherwise_fits_where_that_is_meant(
    run: Path, capsys: pytest.CaptureFixture[str], key: str, value: str
) -> None:
    """The tensors are the same: the key must be named."""
    command = ["inspect", str(run), "--job", str(DIGITS), *given([f"{key}={value}"])]
    assert 2 == cli.main(command)
    assert f"--changed {key}" in capsys.readouterr().err
    assert 0 == cli.main([*command, "--changed", key])
    assert 2 == cli.main([*command, "--changed", "data"])


@pytest.mark.parametrize(("overrides", "said"), NOT_FITTING.values(), ids=NOT_FITTING)
def test_a_job_that_does_not_fit(
    run: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], said: str
) -> None:
    """Which parameter or state is in the way is said."""
    assert 2 == cli.main(["inspect", str(run), "--job", str(DIGITS), *given(overrides)])
    assert said in capsys.readouterr().err
    assert 2 == cli.main(["inspect", str(run), "--json", "--job", str(DIGITS), *given(overrides)])
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert not told["ok"]
    assert any(said in problem["message"] for problem in told["problems"])


def test_inspect_imports_no_torch(run: Path) -> None:
    """Headers and manifests are JSON."""
    code = (
        "import sys; from mimogrid.shell.cli import main as cli\n"
        f"code = cli.main(['inspect', {str(run)!r}, '--job', {str(DIGITS)!r}])\n"
        "print(code, sorted({'torch', 'numpy', 'safetensors'} & set(sys.modules)))"
    )
    environment = {"PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "0 []" == done.stdout.splitlines()[-1]


@pytest.mark.parametrize("command", [["inspect"], ["export", "--to", "dcp"]])
def test_a_folder_without_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    """It is named, and what is wanted is said."""
    for folder, said in ((tmp_path, "holds no checkpoint"), (tmp_path / "none", "is not a folder")):
        assert 2 == cli.main([*command, str(folder)])
        text = capsys.readouterr().err
        assert str(folder) in text
        assert said in text


def given(overrides: list[str]) -> list[str]:
    """Overrides as arguments."""
    return [argument for override in overrides for argument in ("--set", override)]


def names(folder: Path) -> list[str]:
    """The files of a folder."""
    return sorted(path.name for path in folder.iterdir())


def assert_equal(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    """Bit by bit."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
