"""The command `plan`, and the job files that it writes."""

import json
import random
from pathlib import Path

import pytest

from mimogrid.shell.cli.main import main
from mimogrid.shell.job import jobfile
from scale import nightly


ROOT = Path(__file__).parents[3]
JOB = """
[modules.vision]
model = "vit"
feeds = ["language"]
options = { layers = 2, hidden = 512, heads = 8 }

[modules.language]
model = "gpt"
grid = { pp = 2 }
options = { layers = 4, hidden = 1024, heads = 12, ffn = 4096, vocab = 32000 }

[data]
source = "synthetic"
options = { sequence = 256, rows = { vision = [64, 64] } }

[batch]
global_size = 8
microbatches = 4
"""


@pytest.fixture
def job(tmp_path):
    """A job file of two modules on three ranks."""
    path = tmp_path / "job.toml"
    path.write_text(JOB.replace("heads = 12", "heads = 8"))
    return path


def planned(capsys, *arguments):
    """The exit code of `plan --json`, and what it prints."""
    code = main(["plan", *map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_the_winner_is_a_job_that_other_commands_take(job, tmp_path, capsys):
    """It loads to what was planned, is legal, and can be simulated."""
    out = tmp_path / "best.toml"
    code, found = planned(capsys, job, "--gpus", 4, "--gpu", "h100", "--out", out)
    assert 0 == code
    best = found["layouts"][0]
    assert jobfile.dump(jobfile.load(out)) == best["job"]
    for command in ("check", "simulate"):
        assert 0 == main([command, str(out), "--json"])
        capsys.readouterr()


def drawn_job(seed, kind="counted"):
    """A job of one to three modules with equal or ragged rows, some absent, and options of `plan`.

    Its microbatches are `counted`, or have a `limit` of tokens, or samples are assigned to them by `cost`.
    """
    draw = random.Random(seed)
    encoders = ["vision", "audio"][: draw.randint(0, 2)]
    text = ""
    for name in encoders:
        frozen = "frozen = true\n" * draw.randint(0, 1)
        layers, hidden = draw.randint(1, 6), 64 * draw.randint(4, 16)
        text += f'[modules.{name}]\nmodel = "vit"\nfeeds = ["language"]\n{frozen}'
        text += f"options = {{ layers = {layers}, hidden = {hidden}, heads = 8, features = 48 }}\n"
    hidden = 128 * draw.randint(4, 16)
    text += (
        f'[modules.language]\nmodel = "gpt"\noptions = {{ layers = {draw.randint(2, 8)}, hidden = {hidden}, '
    )
    text += "heads = 8, vocab = 32000 }\n"
    rows = ", ".join(f"{name} = [{draw.choice([64, 8])}, 64]" for name in encoders)
    absent = ", ".join(f"{name} = 0.3" for name in encoders if draw.random() < 0.5)
    options = f"sequence = 256, rows = {{ {rows} }}, absent = {{ {absent} }}"
    text += f'[data]\nsource = "synthetic"\noptions = {{ {options} }}\n'
    text += f"[batch]\nglobal_size = {draw.choice([6, 8, 16])}\n"
    if kind == "limit":
        text += f"tokens_per_microbatch = {draw.randint(256, 1200)}\n"
        text += f'balance = "{draw.choice(["none", "cost"])}"\n'
    else:
        text += "microbatches = 2\n" + 'balance = "cost"\n' * (kind == "cost")
    words = ["--gpus", str(draw.randint(1, 9)), "--gpu", draw.choice(["h100", "a100", "l40s"])]
    for option, values in {
        "--precision": ["bf16", "fp16", "fp64"],
        "--efficiency": ["0.3", "0.7"],
        "--memory-gb": ["4", "20"],
    }.items():
        words += [option, draw.choice(values)] if draw.random() < 0.5 else []
    return text, words


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["counted", "limit", "cost"])
def test_the_file_is_the_promise(tmp_path, capsys, seed, kind):
    """What `plan` says of its winner, `simulate` and `check` say of the file: time, memory, bubble, precision, fit."""
    text, options = drawn_job(seed, kind)
    job, out = tmp_path / "job.toml", tmp_path / "best.toml"
    job.write_text(text)
    code, found = planned(capsys, job, *options, "--out", out)
    if code:
        assert found["nearest_miss"]
        return
    best = found["layouts"][0]
    said = {}
    for command in ("check", "simulate"):
        assert 0 == main([command, str(out), "--json"])
        said[command] = json.loads(capsys.readouterr().out)
        assert (found["precision"], found["gpu"]) == (said[command]["precision"], said[command]["gpu"])
        assert found["memory_bytes"] == said[command]["memory_bytes"]
        most = {name: held["bytes"] for name, held in said[command]["memory"].items()}
        assert best["peak_bytes_by_module"] == most
        assert said[command]["fits"]
    simulated = said["simulate"]
    assert best["step_time"] == pytest.approx(simulated["step_time"], rel=1e-12)
    assert best["bubble"] == pytest.approx(simulated["bubble"], rel=1e-9, abs=1e-12)
    # Other steps may have more: microbatches under a limit of tokens, samples of a cell by cost.
    peak = max(simulated["peak_bytes"].values())
    assert best["peak_bytes"] == peak if kind == "counted" else best["peak_bytes"] >= peak
    tokens = best["tokens_per_s_per_gpu"] * found["gpus"]
    assert tokens == pytest.approx(simulated["tokens_per_s"], rel=1e-9)


def test_a_slow_precision_is_warned_of(job, capsys):
    """With the line to write; not where the GPU is about as fast in it."""
    assert 0 == main(["check", str(job), "--gpu", "h100"])
    said = capsys.readouterr().out
    assert "Precision fp32 on h100, 80 GB each." in said
    assert (
        'h100 computes 14.8 x as fast in bf16 as in fp32. At the top of the job file: precision = "bf16".'
        in said
    )
    assert 0 == main(["check", str(job), "--gpu", "h100", "--precision", "bf16"])
    assert "Warning" not in capsys.readouterr().out


def test_check_says_what_does_not_fit(job, capsys):
    """The rank that holds most, and by how much it is short."""
    assert 0 == main(["check", str(job), "--gpu", "h100", "--memory-gb", "0.5"])
    assert "Does not fit: rank 2 of language is short by" in capsys.readouterr().out


def test_every_layout_says_what_scripts_ask_for(job, capsys):
    """The keys are always there; those of layouts that cannot run are null."""
    _, found = planned(capsys, job, "--gpus", 2, "--gpu", "h100")
    assert found["costs"].startswith("assumed: FLOPs at 50%")
    for layout in found["layouts"]:
        assert {"job", "step_time", "tokens_per_s_per_gpu", "peak_bytes", "reason"} <= set(layout)
    own = [layout for layout in found["layouts"] if layout["own"]]
    assert ["needs 3 GPUs of 2" in layout["reason"] for layout in own] == [True]


def test_illegal_sizes_are_told_with_their_reason(job, capsys):
    """Of eight heads a tensor-parallel size of 16 takes none, but vocab and heads allow 8 within a node."""
    job.write_text(JOB.replace("heads = 12, ffn = 4096", "heads = 4, ffn = 4096"))
    _, found = planned(capsys, job, "--gpus", 8, "--gpu", "h100")
    reasons = [layout["reason"] for layout in found["layouts"] if layout["kind"] == "illegal"]
    assert any("tp=8" in reason and "4" in reason for reason in reasons)


def test_nothing_fits(job, capsys):
    """Exit code 1, with the nearest miss; in words, too."""
    arguments = [job, "--gpus", 2, "--gpu", "h100", "--memory-gb", 0.01]
    code, found = planned(capsys, *arguments)
    assert 1 == code
    assert "short by" in found["nearest_miss"]
    assert 1 == main(["plan", *map(str, arguments)])
    assert "The closest one: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "fact"),
    [
        (["--gpu", "h1000"], "'h1000' is not known"),
        (["--gpu", "h100", "--precision", "fp7"], "'fp7' is not known"),
        (["--gpu", "h100", "--efficiency", "2"], "is 2.0"),
        (["--gpu", "h100", "--memory-gb", "-1"], "is -1.0"),
        (["--gpu", "h100", "--pin", "langage.tp=2"], "--pin langage.tp=2: the job has no module 'langage'"),
        (["--gpu", "h100", "--pin", "language.dp=8"], "language.dp=8 needs 8 GPUs of 4"),
    ],
)
def test_wrong_arguments_are_said(job, capsys, more, fact):
    """As problems, with exit code 2."""
    assert 2 == main(["plan", str(job), "--gpus", "4", *more])
    assert fact in capsys.readouterr().err


def test_a_search_ends_at_its_time_limit(job, capsys):
    """With the best layout so far and how much faster another one may be."""
    code, found = planned(capsys, job, "--gpus", 8, "--gpu", "h100", "--time-limit", 0)
    assert (0, True) == (code, found["stopped"])
    assert found["layouts"][0]["step_time"] > 0
    assert 0 == main(["plan", str(job), "--gpus", "8", "--gpu", "h100", "--time-limit", "0"])
    assert "The search was stopped." in capsys.readouterr().out


def test_the_written_job_has_what_is_pinned(job, tmp_path, capsys):
    """And so has every layout that may be the winner; the job's own, which has not, says so."""
    out = tmp_path / "best.toml"
    pins = ["--pin", "language.tp=2", "--pin", "*.cp=1", "--pin", "microbatches=2", "--pin", "schedule=1f1b"]
    code, found = planned(capsys, job, "--gpus", 4, "--gpu", "h100", "--out", out, *pins)
    assert 0 == code
    spec = jobfile.load(out)
    assert (2, "1f1b") == (spec.batch.microbatches, spec.schedule.name)
    assert 2 == spec.modules["language"].grid.tp
    assert {1} == {module.grid.cp for module in spec.modules.values()}
    [own] = [layout for layout in found["layouts"] if layout["own"]]
    assert "not as pinned (language.tp=2, microbatches=2)" in own["reason"]


def test_a_layout_is_shown_once(capsys):
    """Also where pins leave so few that the standard layout is one of the best."""
    pins = ["--pin", "language.tp=2", "--pin", "*.cp=1", "--pin", "microbatches=4", "--pin", "schedule=1f1b"]
    code, found = planned(capsys, ROOT / "examples/first/job.toml", "--gpus", 8, "--gpu", "h100", *pins)
    assert 0 == code
    assert any("one grid for all" in layout["reason"] for layout in found["layouts"])
    jobs = [layout["job"] for layout in found["layouts"]]
    assert len(jobs) == len(set(jobs))


@nightly
def test_a_published_layout_is_beaten_per_allocated_gpu(capsys):
    """Seventeen of twenty-four GPUs are active in it."""
    _, found = planned(capsys, ROOT / "examples/plans/qwen27b_24.toml", "--gpus", 24, "--gpu", "h200")
    [own] = [layout for layout in found["layouts"] if layout["own"]]
    assert 17 == own["active_gpus"]
    assert found["layouts"][0]["tokens_per_s_per_gpu"] > own["tokens_per_s_per_gpu"]
