"""The command `simulate` and its costs files."""

import json
import math
import sys
import xml.etree.ElementTree as ET

import pytest

from mimogrid.core.base.errors import PlanError
from mimogrid.core.job.costs import EdgeCosts, StageCosts
from mimogrid.core.job.schedules import SCHEDULES
from mimogrid.shell.cli import simulate, timing
from mimogrid.shell.cli.main import main
from mimogrid.shell.job import costfile
from mimogrid.shell.job.jobs import open_job
from mimogrid.shell.world import waiting


JOB = """
[modules.vision]
model = "vit"
feeds = ["language"]
options = { layers = 2, hidden = 8, heads = 2 }

[modules.language]
model = "gpt"
grid = { pp = 2 }
options = { layers = 2, hidden = 8, heads = 2, vocab = 16 }

[data]
source = "synthetic"

[batch]
global_size = 8
microbatches = 8
"""

COSTS = """
[stages."vision.0"]
forward = 1
backward = 2.0
[stages."language.0"]
forward = 1.0
backward = 2.0
[stages."language.1"]
forward = 1.0
input_gradient = 1.5
weight_gradient = 0.5
[edges]
latency = 0.25
[edges."vision -> language"]
bytes_per_s = 1e9
overlap = false
[machine]
cores = 2
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    """The path of a job file in the current folder, with a costs file beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "job.toml").write_text(JOB)
    (tmp_path / "costs.toml").write_text(COSTS)
    return tmp_path / "job.toml"


def problems(job, text):
    """What is wrong with a costs file."""
    (job.parent / "costs.toml").write_text(text)
    with pytest.raises(PlanError) as caught:
        costfile.read(job.parent / "costs.toml", open_job(job).topology)
    return {problem.where: f"{problem.message} {problem.remedy}" for problem in caught.value.problems}


def test_a_costs_file_is_read(job):
    """What holds on all edges holds on one that adds to it."""
    costs = costfile.read(job.parent / "costs.toml", open_job(job).topology)
    assert StageCosts(forward=1.0, input_gradient=1.5, weight_gradient=0.5) == costs.stages["language.1"]
    assert 2.0 == costs.stages["language.1"].whole_backward
    assert EdgeCosts(latency=0.25) == costs.edge
    assert EdgeCosts(latency=0.25, bytes_per_s=1e9, overlap=False) == costs.edges["vision -> language"]
    assert 2 == costs.cores


def test_every_problem_of_a_costs_file_is_told(job):
    """With its place, and the nearest name."""
    found = problems(
        job,
        '[stages."vision.1"]\n[stages."language.0"]\nforward = -1.0\n'
        '[edges."vision -> langage"]\n[machine]\ncores = 0\n',
    )
    assert {'stages."vision.1"', 'stages."language.0".forward', "machine.cores"} <= set(found)
    assert "Did you mean 'vision -> language'?" in found['edges."vision -> langage"']


@pytest.mark.parametrize(
    ("text", "where", "words"),
    [
        ("[stages.x]\nforwards = 1.0\n", "stages.x.forwards", "Did you mean 'forward'?"),
        ("[edges]\nlatenci = 1.0\n", "edges.latenci", "Did you mean 'latency'?"),
        ("[edges]\nbytes_per_s = 0\n", "edges.bytes_per_s", "more than 0"),
        ('[stages."vision.0"]\nbackward = 1.0\nweight_gradient = 1.0\n', 'stages."vision.0"', "halves"),
    ],
)
def test_a_wrong_value_of_a_costs_file_is_told(job, text, where, words):
    """Like a wrong value of a job file."""
    assert words in problems(job, text)[where]


def test_a_costs_file_that_is_none(job, capsys):
    """Not there, or no TOML: exit code 2 and the name of the file."""
    assert 2 == main(["simulate", str(job), "--costs", "nowhere.toml"])
    assert "nowhere.toml: there is no such file" in capsys.readouterr().err
    (job.parent / "costs.toml").write_text("[stages")
    assert 2 == main(["simulate", str(job), "--costs", "costs.toml"])
    assert "is not TOML" in capsys.readouterr().err


def test_simulate_says_what_a_program_wants_to_know(job, capsys):
    """Without costs it assumes some, by layers, and says so."""
    assert 0 == main(["simulate", str(job), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["costs"].startswith("assumed")
    assert found["ratio_to_limit"] == found["step_time"] / found["limit"] >= 1
    assert {"vision.0": 3, "language.0": 2, "language.1": 1} == found["peak_in_flight"]
    assert {"warm_up", "edge", "slower_module", "drain", "ragged", "jitter"} == set(found["idle"])
    assert sum(found["idle"].values()) == pytest.approx(found["bubble"] * 3 * found["step_time"])
    assert {"0", "1", "2"} == set(found["peak_bytes"]) == set(found["busy"]) == set(found["idle_by_rank"])
    assert found["peak_bytes"] == {rank: peak["bytes"] for rank, peak in found["peaks"].items()}
    assert found["step_time"] == sum(segment["end"] - segment["begin"] for segment in found["critical_path"])
    assert found["step_time"] == sum(found["critical_path_shares"].values())
    assert [[0], [1], [2]] == found["classes"]
    assert 8 / found["step_time"] == found["samples_per_s"]
    assert open_job(job).step(0).tokens / found["step_time"] == found["tokens_per_s"]


def test_simulate_uses_the_costs_that_it_is_given(job, capsys):
    """Three equal stages: (M + P - 1) * 3."""
    equal = '[stages."{}"]\nforward = 1.0\nbackward = 2.0\n'
    stages = ("vision.0", "language.0", "language.1")
    (job.parent / "costs.toml").write_text("".join(map(equal.format, stages)))
    assert 0 == main(["simulate", str(job), "--costs", "costs.toml", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (30.0, 30.0, "from costs.toml") == (found["step_time"], found["limit"], found["costs"])


def test_simulate_draws_for_people(job, capsys):
    """A row per rank, the numbers, and which costs these are."""
    assert 0 == main(["simulate", str(job)])
    printed = capsys.readouterr().out
    assert "rank 2  language.1 |" in printed
    assert "x the lower bound; bubble " in printed
    assert "No costs given: each layer counts 1 unit forward" in printed


def test_simulate_writes_pictures(job, capsys):
    """SVG that parses, JSON that Perfetto opens; a folder that is not there is the user's mistake."""
    assert 0 == main(["simulate", str(job), "--svg", "a.svg", "--trace", "a.json"])
    assert "{http://www.w3.org/2000/svg}svg" == ET.parse(job.parent / "a.svg").getroot().tag
    assert json.loads((job.parent / "a.json").read_text())["traceEvents"]
    assert 2 == main(["simulate", str(job), "--svg", "nowhere/a.svg"])
    assert "cannot be written" in capsys.readouterr().err


def test_every_schedule_is_told_with_its_reason(job, capsys):
    """What is legal in numbers, and what is not in words."""
    assert 0 == main(["simulate", str(job), "--schedule", "all", "--json"])
    found = json.loads(capsys.readouterr().out)["schedules"]
    assert set(SCHEDULES) == set(found)
    assert {"vision.0": 8, "language.0": 8, "language.1": 8} == found["gpipe"]["peak_in_flight"]
    assert found["1f1b"]["peak_in_flight"]["vision.0"] < 8
    illegal = {name for name, value in found.items() if "problems" in value}
    assert 0 == main(["simulate", str(job), "--schedule", "all"])
    printed = capsys.readouterr().out.splitlines()
    assert illegal == {line.split(":")[0] for line in printed if ": schedule.name: " in line}


def test_another_schedule_than_the_jobs(job, capsys):
    """And a name that is none is the user's mistake."""
    assert 0 == main(["simulate", str(job), "--schedule", "gpipe", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert ("gpipe", 8) == (found["schedule"], found["peak_in_flight"]["vision.0"])
    assert 2 == main(["simulate", str(job), "--schedule", "gpip"])
    assert "--schedule: 'gpip' is no schedule.\n    Did you mean 'gpipe'?" in capsys.readouterr().err


def test_two_jobs_are_compared(job, capsys):
    """--set is for the first alone, so a job can be compared with itself under other keys."""
    command = ["simulate", str(job), "--compare", str(job), "--set", "modules.language.grid.pp=1"]
    assert 0 == main([*command, "--json"])
    found = json.loads(capsys.readouterr().out)
    first, second = found["jobs"]
    assert (2, 3) == (first["ranks"], second["ranks"])
    assert found["ratio"] == pytest.approx(second["step_time"] / first["step_time"])
    assert 0 == main(command)
    printed = capsys.readouterr().out
    slower = min(found["jobs"], key=lambda one: one["samples_per_s"])
    assert (
        f"x as many samples/s as {job.parent.name}/job.toml ({'first' if slower is first else 'second'})"
        in (printed)
    )


def test_each_of_two_jobs_has_costs_of_its_own(job, capsys):
    """One file for both, or one for each."""
    other = '[stages."language.0"]\nforward = 1.0\n'
    (job.parent / "other.toml").write_text(other)
    (job.parent / "small.toml").write_text(JOB.replace("pp = 2", "pp = 1"))
    command = ["simulate", str(job), "--compare", "small.toml", "--costs", "costs.toml", "--json"]
    assert 2 == main(command)
    assert 'stages.\\"language.1\\"' in capsys.readouterr().out
    assert 0 == main([*command, "--costs", "other.toml"])
    assert 8.0 == json.loads(capsys.readouterr().out)["jobs"][1]["step_time"]


def test_ragged_data_is_compared_with_what_is_dealt_by_cost(job, capsys):
    """A step with its samples in order and the same one balanced, whichever of both the job asks for."""
    ragged = [
        "simulate",
        str(job),
        "--ragged",
        "--set",
        "batch.global_size=64",
        "--set",
        "modules.language.grid.dp=2",
    ]
    assert 0 == main([*ragged, "--json"])
    found = json.loads(capsys.readouterr().out)["imbalance"]
    assert found["step_s"]["cost"] < found["step_s"]["none"]
    assert found["idle_s"]["cost"] < found["idle_s"]["none"]
    assert 0 == main([*ragged, "--json", "--set", "batch.balance='cost'"])
    balanced = json.loads(capsys.readouterr().out)
    assert found == balanced["imbalance"]
    assert 0 == main(ragged)
    assert f"if all actions took their means: step {found['even_s']:.6g} s." in capsys.readouterr().out


def test_uneven_steps_are_drawn(job, capsys):
    """The same seed draws the same, and draws are told with their median and spread."""

    def simulated(*options):
        assert 0 == main(["simulate", str(job), "--json", *options])
        return json.loads(capsys.readouterr().out)

    even, ragged, uneven = simulated(), simulated("--ragged"), simulated("--ragged", "--jitter", "0.2")
    assert even["idle"] == {**ragged["idle"], "ragged": 0.0}
    assert 0 != ragged["idle"]["ragged"] == uneven["idle"]["ragged"]
    assert 0 == ragged["idle"]["jitter"] != uneven["idle"]["jitter"]
    assert uneven == simulated("--ragged", "--jitter", "0.2")
    assert uneven != simulated("--ragged", "--jitter", "0.2", "--seed", "1")
    assert ragged != simulated("--ragged", "--step", "1")
    drawn = simulated("--jitter", "0.2", "--draws", "3")
    each = [simulated("--jitter", "0.2", "--seed", str(seed))["step_time"] for seed in range(3)]
    assert each == drawn["draws"]
    assert 0 == main(["simulate", str(job), "--jitter", "0.2", "--draws", "3"])
    assert f"Median of 3 draws: {sorted(each)[1]:.6g} s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--draws", "2"], "--draws: would all be the same."),
        (["--jitter", "-1"], "--jitter: is -1."),
        (["--draws", "0"], "--draws: is 0."),
        (["--step", "-1"], "--step: is -1."),
        (["--schedule", "all", "--svg", "a.svg"], "--svg, --html, --trace: show one schedule."),
        (["--compare", "job.toml", "--trace", "a.json"], "--trace: shows one job."),
        (["--costs", "a.toml", "--costs", "b.toml"], "--costs: is given 2 times."),
        (
            ["--schedule", "all", "--compare", "job.toml"],
            "--compare: compares two jobs under one schedule.",
        ),
    ],
)
def test_options_that_do_not_go_together(job, capsys, options, words):
    """Exit code 2, what is wrong, and the way out."""
    assert 2 == main(["simulate", str(job), *options])
    assert words in capsys.readouterr().err


def test_a_world_too_large_to_draw_is_told_by_classes(job, capsys, monkeypatch):
    """One rank of each stands for all, in text and in the trace."""
    monkeypatch.setattr(simulate, "DRAWN", 100)
    options = ["--set", "modules.language.grid.dp=4", "--set", "batch.global_size=32", "--trace", "a.json"]
    assert 0 == main(["simulate", str(job), *options])
    printed = capsys.readouterr().out
    assert "\n9 ranks in 3 classes do " in printed
    assert all(f"rank {ranks} " in printed for ranks in ("0", "1-4", "5-8"))
    records = json.loads((job.parent / "a.json").read_text())["traceEvents"]
    assert {0, 1, 5} == {record["pid"] for record in records}


def test_two_jobs_are_drawn_on_one_scale(job, capsys):
    """One above the other, each under its name; the slower one is as wide as the page."""
    command = ["simulate", str(job), "--compare", str(job), "--set", "modules.language.grid.pp=1"]
    assert 0 == main([*command, "--svg", "a.svg", "--json"])
    steps = [found["step_time"] for found in json.loads(capsys.readouterr().out)["jobs"]]
    picture = ET.parse(job.parent / "a.svg").getroot()
    words = " ".join(found.text for found in picture.iter("{http://www.w3.org/2000/svg}text"))
    for which in ("first", "second"):
        assert f"job.toml ({which}), 1f1b: step " in words
    assert len(set(steps)) == 2
    dashed = [
        float(found.get("d").split()[0].removeprefix("M"))
        for found in picture.iter("{http://www.w3.org/2000/svg}path")
        if "4 3" == found.get("stroke-dasharray")
    ]
    labels = [
        float(found.get("x"))
        for found in picture.iter("{http://www.w3.org/2000/svg}text")
        if "0" == found.text and "10" == found.get("font-size")
    ]
    assert (dashed[0] - labels[0]) / (dashed[1] - labels[0]) == pytest.approx(steps[0] / steps[1], rel=1e-3)


def test_an_accelerator_prices_a_job(job, capsys):
    """FLOPs and bytes over a data sheet: the origin is told, and twice the efficiency is not slower."""

    def told(efficiency):
        assert 0 == main(["simulate", str(job), "--gpu", "h100", "--efficiency", str(efficiency), "--json"])
        return json.loads(capsys.readouterr().out)

    half, whole = told(0.4), told(0.8)
    assert half["costs"].startswith("assumed: FLOPs at 40% of the")
    assert 0 < whole["step_time"] <= half["step_time"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--gpu", "h1000"], "Did you mean 'h100'?"),
        (["--gpu", "h100", "--efficiency", "0"], "part of its peak"),
        (["--gpu", "h100", "--costs", "costs.toml"], "estimates costs, and --costs gives them"),
    ],
)
def test_what_no_accelerator_can_price(job, capsys, options, words):
    """Unknown names, impossible efficiencies and two sources of costs are refused."""
    assert 2 == main(["simulate", str(job), *options])
    assert words in capsys.readouterr().err


def test_many_classes_are_told_beforehand(job, monkeypatch, capsys):
    """Beside the answer it says how many ranks have to be walked, where they are many."""
    monkeypatch.setattr(waiting, "LINE_EVERY_S", math.inf)
    assert main(["simulate", str(job)]) == 0
    assert "" == capsys.readouterr().err
    monkeypatch.setattr(timing, "MANY", 2)
    assert main(["simulate", str(job)]) == 0
    assert "Timing 3 ranks in 3 classes" in capsys.readouterr().err
