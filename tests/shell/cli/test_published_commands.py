"""From a folder to a folder: init, check, train, parity and export of published checkpoints."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from checkpoints import LANGUAGE, VOCABULARY, WHOLES, make, rename
from mimogrid.core.base.errors import PlanError
from mimogrid.shell.cli import start
from mimogrid.shell.cli.arguments import ParityArgs
from mimogrid.shell.cli.main import main
from mimogrid.shell.job.jobs import open_job
from mimogrid.shell.job.published import published
from mimogrid.shell.run.reference_parity import ReferenceReport
from mimogrid.shell.world.launch import Pool
from running import trained
from scale import SCALE


TEXTS = '''
"""Sentences, a token for each byte; each byte is predicted from those before it."""

from mimogrid.core.base.samples import Sample
from mimogrid.core.job.spec import SourceFacts

SENTENCES = (b"grids of ranks", b"a bucket is reduced", b"F0 B0", b"one rank sends, one receives")


class Texts:
    def facts(self):
        return SourceFacts(sequence=32, vocab=256)

    def describe(self, sample_id):
        sentence = SENTENCES[sample_id % len(SENTENCES)]
        return Sample(sample_id, len(sentence), {}, units={"language": len(sentence) - 1.0})

    def load(self, sample_id, module):
        import torch

        tokens = torch.tensor(list(SENTENCES[sample_id % len(SENTENCES)]))
        weights = torch.ones(len(tokens))
        weights[-1] = 0
        return {"tokens": tokens, "labels": tokens.roll(-1), "loss_weights": weights}


def texts():
    return Texts()
'''


def init(folder: Path, out: Path, *more: str) -> Path:
    """Write the job file of a checkpoint."""
    published.cache_clear()
    assert 0 == main(["init", str(folder), "--out", str(out), *more])
    return out


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What a command that is refused says."""
    published.cache_clear()
    assert 2 == main([*map(str, words)])
    return capsys.readouterr().err


def tensors(folder: Path) -> Mapping[str, torch.Tensor]:
    """All tensors of a folder."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(one: Path, other: Path) -> None:
    """Two folders have the same files, to the byte."""
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in other.iterdir())
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name


# -- init --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*LANGUAGE, *WHOLES])
def test_init_writes_a_job_that_is_legal(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For every family: `check` accepts it, and all parameters that a job has of the files are said."""
    folder = make(name, tmp_path / name)
    job = init(folder, tmp_path / "job.toml")
    assert 0 == main(["check", str(job)])
    model = published(folder).model
    values = sum(tensor.numel() for name, tensor in tensors(folder).items() if not model.is_carried(name))
    assert f"{values:,} parameters" in job.read_text()
    said = [
        int(word.replace(",", ""))
        for word in re.findall(r" ([\d,]+) +(?:all|[\d.]+%)", capsys.readouterr().out)
    ]
    assert values == sum(said)
    assert f'weights = "{folder}"' in job.read_text()


def test_init_lays_modules_out(tmp_path: Path) -> None:
    """On so many GPUs; a vocabulary that tp does not divide is padded, and layers are split."""
    path = init(make("llama", tmp_path / "llama"), tmp_path / "job.toml", "--gpus", "4", "--gpu", "h100")
    job = open_job(path)
    module = job.topology.modules["language"]
    options: Any = job.spec.modules["language"].options
    assert job.topology.world_size == 4
    assert not (VOCABULARY + options.vocab_padding) % module.grid.extent("tp")
    assert sum(len(info.layers) for info in module.stages) == 3


def test_init_names_the_folder_from_the_job_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So both can be moved together; the default is job.toml here."""
    make("llama", tmp_path / "models" / "llama")
    (tmp_path / "jobs").mkdir()
    monkeypatch.chdir(tmp_path / "jobs")
    published.cache_clear()
    assert 0 == main(["init", "../models/llama"])
    assert 'weights = "../models/llama"' in Path("job.toml").read_text()
    shutil.move(tmp_path / "jobs", tmp_path / "moved")
    assert open_job(tmp_path / "moved" / "job.toml").spec.modules["language"].weights == str(
        tmp_path / "models" / "llama"
    )


def test_init_writes_over_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is there stays, unless it is meant; what is not legal is not written."""
    folder, out = make("llama", tmp_path / "llama"), tmp_path / "job.toml"
    out.write_text("mine")
    assert "is there already" in refused(capsys, "init", folder, "--out", out)
    assert "mine" == out.read_text()
    init(folder, out, "--force")
    assert "[modules.language]" in out.read_text()
    make("llava", tmp_path / "llava")
    assert "FOLDER: there is none" in refused(capsys, "init", "--out", tmp_path / "other.toml")
    assert "--gpus: and --gpu need each other" in refused(capsys, "init", folder, "--gpus", "4", "--force")
    assert "'h1000' is not known" in refused(
        capsys, "init", folder, "--gpus", "4", "--gpu", "h1000", "--out", tmp_path / "new.toml"
    )
    assert ["job.schema.json", out.name, "llama", "llava"] == sorted(path.name for path in tmp_path.iterdir())


# -- there and back ----------------------------------------------------------------------------------------


@pytest.mark.world
def test_from_a_folder_to_a_folder(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """init, check, train three steps on a source of one's own, export; transformers then has the logits of the job."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "texts.py").write_text(TEXTS)
    folder = make("llama", tmp_path / "llama")
    job = init(folder, tmp_path / "job.toml")
    mine = ["data.source=texts:texts", "data.options={}", "batch.global_size=4"]
    layout = ["modules.language.grid.tp=2", "modules.language.options.vocab_padding=1"]
    train = ["train.steps=3", "train.evaluate=false", "optimizer.lr=1e-3"]
    assert 0 == main(["check", str(job), *(word for key in (*mine, *layout) for word in ("--set", key))])
    report = trained(pool, open_job(job, [*mine, *layout, *train]), tmp_path / "run")
    assert report["losses"][2] < report["losses"][0]

    assert 0 == main(["export", "run", "--to", "hf", "tuned"])
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "tuned")
    assert sorted(path.name for path in folder.iterdir()) == sorted(p.name for p in Path("tuned").iterdir())
    trains = tensors(folder)
    assert all(not torch.equal(tensor, trains[name]) for name, tensor in tensors(tmp_path / "tuned").items())

    again = open_job(init(tmp_path / "tuned", tmp_path / "again.toml"), [*mine, "precision=fp64", *layout])
    found: ReferenceReport = pool.run("mimogrid.shell.run.reference_parity:in_world", 2, again, 1)[0]
    assert found.passed, found
    assert found.largest < 1e-12
    assert any("RMSNorm" in lift for lift in found.lifted)
    assert {"model.embed_tokens.weight", "lm_head.weight"} < {d.parameter for d in found.parity.worst}
    assert "RMSNorm" in str(found)
    tokens = torch.tensor([list(b"F0 B0")])
    assert model(tokens).logits.shape == (1, 5, VOCABULARY)


LANGUAGE_TP = ["modules.language.grid.tp=2", "modules.language.options.vocab_padding=1"]
LANGUAGE_PP = ["modules.language.grid.pp=2", "modules.language.split=[1,2]"]
ROUND = {
    "tied, in shards, padded over tp": ("qwen2", LANGUAGE_TP, "fp32"),
    "frozen, in half precision, over stages": (
        "llama3",
        [*LANGUAGE_PP, 'modules.language.frozen=["embedding*"]'],
        "bf16",
    ),
    "a tower of which not all layers are used": ("llava", ["modules.vision.grid.dp=2", *LANGUAGE_PP], "bf16"),
    "a tower that transformers runs": (
        "qwen2-audio",
        [
            "modules.audio.model=hf:in#audio_tower",
            "modules.audio.grid.dp=2",
            "data.options.features.audio=10",
        ],
        "bf16",
    ),
    "a tower of no family, up to a layer": ("llava-dinov2", ["modules.vision.grid.dp=2"], "fp32"),
}


@pytest.mark.world
@pytest.mark.parametrize(("name", "layout", "precision"), ROUND.values(), ids=ROUND)
def test_without_training_equal_bytes_leave(
    pool: Pool, tmp_path: Path, name: str, layout: list[str], precision: str
) -> None:
    """In another layout and precision than before; with what lies beside the weights, and without pickles."""
    dtype = torch.bfloat16 if precision == "fp32" else torch.float32
    folder = make(name, tmp_path / "in", dtype=dtype, shard="40KB" if precision == "fp32" else "1GB")
    for file in ("tokenizer.json", "preprocessor_config.json", "pytorch_model.bin"):
        (folder / file).write_text("{}")
    still = ["train.steps=1", "train.evaluate=false", "optimizer.lr=0.0", f"precision={precision}"]
    trained(pool, open_job(init(folder, tmp_path / "job.toml"), [*layout, *still]), tmp_path / "run")
    assert 0 == main(["export", str(tmp_path / "run"), "--to", "hf", "--out", str(tmp_path / "out")])
    (folder / "pytorch_model.bin").unlink()
    assert_same(folder, tmp_path / "out")


@pytest.mark.world
@pytest.mark.parametrize("name", WHOLES if SCALE > 1 else ("qwen2.5-vl", "llava"))
def test_wholes_have_the_gradients_of_transformers(pool: Pool, name: str, tmp_path: Path) -> None:
    """From a source of rows: images, a video and sounds of several sizes, and samples without any."""
    job = init(make(name, tmp_path / name), tmp_path / "job.toml")
    tower = next(iter(open_job(job).topology.graph.sources))
    grids = {
        "qwen2.5-vl": "[[1,2,4],[1,6,4],[3,4,2]]",
        "qwen3-vl": "[[1,2,4],[1,6,4]]",
        "qwen2-audio": "[[20],[15],[9]]",
    }
    several = [f"data.options.grids.{tower}={grids[name]}"] if name in grids else []
    keys = ["precision=fp64", *several, f"data.options.absent.{tower}=0.3", "batch.global_size=6"]
    found: ReferenceReport = pool.run(
        "mimogrid.shell.run.reference_parity:in_world", 3, open_job(job, [*keys, *LANGUAGE_TP]), 1
    )[0]
    assert found.passed, found
    assert found.largest < 1e-12


@pytest.fixture(scope="module")
def run(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of old names and a head besides its tied embedding, and a run that trained it."""
    path = tmp_path_factory.mktemp("old")
    folder = make("llama3", path / "in")
    rename(folder, r"^model\.", "")
    held = load_file(folder / "model.safetensors")
    held["lm_head.weight"] = held["embed_tokens.weight"].clone()
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    job = open_job(
        init(folder, path / "job.toml"), ["train.steps=1", "train.evaluate=false", "optimizer.lr=0.1"]
    )
    trained(pool, job, path / "run")
    return path


@pytest.mark.world
def test_old_names_are_written_as_they_were(run: Path, tmp_path: Path) -> None:
    """Names without a prefix; a head that the embedding is tied to is written with it."""
    assert 0 == main(["export", str(run / "run"), "--to", "hf", str(tmp_path / "out")])
    before, after = tensors(run / "in"), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert "layers.0.mlp.up_proj.weight" in after
    assert torch.equal(after["lm_head.weight"], after["embed_tokens.weight"])
    assert not torch.equal(after["lm_head.weight"], before["lm_head.weight"])


@pytest.mark.world
def test_a_folder_that_has_moved(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Is named where it is now; another checkpoint, and a folder that is not empty, are refused."""
    moved = tmp_path / "moved"
    shutil.copytree(run / "run", tmp_path / "run")
    (run / "in").rename(moved)
    try:
        said = refused(capsys, "export", tmp_path / "run", "--to", "hf", tmp_path / "out")
        assert f"{run / 'in'}: the modules start from this folder, and it is not there any more" in said
        assert "--from FOLDER" in said
        assert 0 == main(
            ["export", str(tmp_path / "run"), "--to", "hf", str(tmp_path / "out"), "--from", str(moved)]
        )
    finally:
        moved.rename(run / "in")
    assert (tmp_path / "out" / "config.json").is_file()
    said = refused(capsys, "export", tmp_path / "run", "--to", "hf", tmp_path / "out")
    assert "is not empty" in said
    other = make("qwen3", tmp_path / "other")
    said = refused(capsys, "export", tmp_path / "run", "--to", "hf", tmp_path / "new", "--from", other)
    assert "language.layers.0.attention.k_norm.weight: is missing in the run, and [12] in" in said
    said = refused(capsys, "export", tmp_path / "run", "--to", "dcp", "--from", other)
    assert "--from: is not for dcp" in said


@pytest.mark.world
def test_a_run_that_started_from_no_folder(
    pool: Pool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Is refused by `export --to hf` and by `parity --reference`, with the way out."""
    job = tmp_path / "job.toml"
    job.write_text(
        '[modules.language]\nmodel = "gpt"\noptions = { layers = 1, hidden = 8, heads = 2, vocab = 8 }\n'
        '[data]\nsource = "synthetic"\n[batch]\nglobal_size = 2\n[train]\nevaluate = false\n'
    )
    trained(pool, open_job(job), tmp_path / "run")
    said = refused(capsys, "export", tmp_path / "run", "--to", "hf")
    assert "modules.language.weights: is not there" in said
    assert "--to safetensors" in said
    said = refused(capsys, "parity", job, "--reference", "transformers", "--set", "precision=bf16")
    assert "precision: is bf16" in said or "modules.language.weights" in said


def test_parity_needs_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, how to get it is said before any process starts."""
    job = open_job(init(make("llama", tmp_path / "llama"), tmp_path / "job.toml"), ["precision=bf16"])
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(PlanError) as error:
        start.parity(job, ParityArgs(job=tmp_path / "job.toml", reference="transformers"))
    assert "transformers is not installed" in str(error.value)
    assert "mimogrid[hf]" in str(error.value)
    assert "precision: is bf16" in str(error.value)


def test_the_same_folder_twice_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder is named once: behind --to, or with --out."""
    said = refused(capsys, "export", tmp_path, "--to", "hf", "a", "--out", "b")
    assert "--out: is named besides a" in said
    assert 2 == main(["export", "a", "--to", "hf", "b", "c"])
    assert "unrecognized arguments: b c" in capsys.readouterr().err
