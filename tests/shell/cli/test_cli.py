"""The command line: what is printed for people, what for programs, and the exit codes."""

import json
import pickle
import subprocess
import sys

import pytest

from mimogrid.core.models.segments import Emission
from mimogrid.shell.cli.main import main
from mimogrid.shell.job.jobs import open_job


JOB = """
[modules.vision]
model = "vit"
feeds = ["language"]
grid = { dp = 2 }
options = { layers = 2, hidden = 64, heads = 4 }

[modules.language]
model = "gpt"
grid = { tp = 2, pp = 2 }
options = { layers = 4, hidden = 32, heads = 4, vocab = 64 }

[data]
source = "synthetic"
options = { sequence = 32, rows = { vision = [4, 4] } }

[batch]
global_size = 8
microbatches = 4
"""

OWN = """
import mark_that_it_ran

def build(options):
    import torch

def describe(options):
    return {"width": options["wide"]}

def source(seed, graph, rows=3, sequence=None):
    return Numbers(seed, graph, rows)

class Numbers:
    def __init__(self, seed, graph, rows):
        self.rows = dict.fromkeys(graph.sources, rows)

    def describe(self, sample_id):
        from mimogrid.core.base.samples import Sample
        return Sample(id=sample_id, length=2, rows=self.rows)

    def load(self, sample_id, module):
        return {}
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    """The path of a job file in an empty current folder; what a job makes importable is undone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "job.toml"
    path.write_text(JOB)
    return path


@pytest.fixture
def without_torch(monkeypatch):
    """As if torch had not been loaded by another test."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "torch"]:
        monkeypatch.delitem(sys.modules, name)


def printed(capsys, *arguments):
    """What a command that succeeds prints, read as JSON."""
    assert 0 == main([*map(str, arguments), "--json"])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_without_arguments_there_is_an_overview(capsys, arguments):
    """Nothing to do is no error: every command is named with what it is for."""
    assert 0 == main(arguments)
    overview = capsys.readouterr().out
    for command in ("check", "roles", "show", "verify", "train", "parity"):
        assert f"mimogrid {command} JOB" in overview


@pytest.mark.parametrize("arguments", [["chekc", "job.toml"], ["check"], ["roles", "j", "--rank", "x"]])
def test_a_wrong_command_exits_with_2(capsys, arguments):
    """What is wrong with the command goes to standard error."""
    assert 2 == main(arguments)
    captured = capsys.readouterr()
    assert "" == captured.out
    assert captured.err.startswith("mimogrid")


def test_check_counts_what_crosses_the_edges(job, capsys):
    """8 samples of 4 rows, 32 values of 4 bytes each, forward and backward; every row crosses once.

    Each of the two dp ranks of vision has one sample per microbatch. Its rows go to the two tp ranks of the one
    dp rank of language, which hold half of the microbatch each: one message per dp rank and microbatch. Leaders
    would hand the rows on to both tp ranks forward, and to one rank backward.
    """
    one_way = 8 * 4 * 32 * 4
    edge = {
        "source": "vision",
        "target": "language",
        "messages": 2 * 4 * 2,
        "bytes": 2 * one_way,
        "bytes_gathered": one_way,
        "bytes_leader_broadcast": 3 * one_way,
    }
    found = printed(capsys, "check", job)
    assert {"ok": True, "problems": [], "edges": [edge]} == {
        key: found[key] for key in ("ok", "problems", "edges")
    }


def test_a_frozen_source_gets_nothing_back(job, capsys):
    """Without a backward, rows cross in one direction."""
    [edge] = printed(capsys, "check", job, "--set", "modules.vision.frozen=true")["edges"]
    assert (2 * 4, 8 * 4 * 32 * 4) == (edge["messages"], edge["bytes"])


def test_modules_on_the_same_ranks_send_nothing(job, capsys):
    """What stays on its rank is no message."""
    overrides = ["--set", "modules.vision.grid={}", "--set", "modules.language.grid={offset = 0}"]
    [edge] = printed(capsys, "check", job, *overrides)["edges"]
    assert (0, 0) == (edge["messages"], edge["bytes"])


LIMITED = ["--set", "batch.microbatches=1", "--set", "batch.tokens_per_microbatch=64"]


def test_check_says_how_many_microbatches_a_limit_of_tokens_makes(job, capsys):
    """Two lanes of 32 tokens, 8 samples of at most 32: 4 microbatches at most, and fewer for shorter samples."""
    assert 0 == main(["check", str(job), *LIMITED])
    assert (
        "2 in step 0, 4 at most, of 64 tokens or fewer for each dp rank of language"
        in capsys.readouterr().out
    )
    assert {"first": 2, "most": 4} == printed(capsys, "check", job, *LIMITED)["microbatches"]


def test_what_needs_a_number_of_microbatches_says_so(job, capsys):
    """Probing keeps one, and names the key that leaves none."""
    assert 2 == main(["probe", str(job), *LIMITED])
    assert "batch.tokens_per_microbatch" in capsys.readouterr().err


def test_check_shows_the_layout(job, capsys):
    """People see modules, grids, stages, what trains, edges and idle ranks."""
    overrides = ["world_size=9", 'modules.vision.trainable=["projector.*"]', "modules.language.split=[1,3]"]
    assert 0 == main(["check", str(job), *(f"--set={o}" for o in overrides)])
    shown = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in reversed(shown.splitlines())}
    assert ["vision", "vit", "0-1", "dp=2", "2"] == rows["vision"][:5]
    assert ["language", "gpt", "2-5", "tp=2", "pp=2", "1", "+", "3"] == rows["language"][:8]
    assert rows["vision"][-1].endswith("%")
    assert "vision -> language  32     linear" in shown
    assert "9 ranks, non_colocated" in shown
    assert "3 idle (6-8)" in shown


def test_roles_say_who_does_what(job, capsys):
    """Every rank has its stages with the position on every axis; a rank in no grid has none."""
    told = printed(capsys, "roles", job, "--set", "world_size=7")
    assert 7 == told["world_size"]
    assert list(range(7)) == [role["rank"] for role in told["ranks"]]
    position = {"tp": 1, "cp": 0, "dp": 0, "pp": 1}
    stage = {"module": "language", "pp": 1, "first": False, "last": True, "position": position}
    assert {"rank": 5, "layout": "non_colocated", "stages": [stage]} == told["ranks"][5]
    assert [] == told["ranks"][6]["stages"]


def test_roles_of_one_rank(job, capsys):
    """`--rank` picks one; a rank outside the world is an error with the legal ones."""
    assert [3] == [role["rank"] for role in printed(capsys, "roles", job, "--rank", 3)["ranks"]]
    assert 2 == main(["roles", str(job), "--rank", "6"])
    assert "--rank: rank 6 is not in the world of 6 ranks.\n    Use 0 to 5." in capsys.readouterr().err


def test_roles_draw_a_map_of_the_ranks(job, capsys):
    """A row per module, a column per rank, the stage in the cell; idle ranks are said to idle."""
    assert 0 == main(["roles", str(job), "--set", "world_size=7"])
    shown = capsys.readouterr().out
    assert "idle: in no grid" in shown
    assert "rank     |  0  1  2  3  4  5  6" in shown
    assert "vision   |  0  0  ·  ·  ·  ·  ·" in shown
    assert "language |  ·  ·  0  0  1  1  ·" in shown


def test_a_wide_world_is_drawn_in_runs_of_like_ranks(job, capsys):
    """More ranks than fit beside each other share columns; nothing is wider than a terminal."""
    overrides = ["batch.global_size=400", "modules.language.grid.dp=100", "modules.vision.grid.dp=100"]
    assert 0 == main(["roles", str(job), *(f"--set={o}" for o in overrides)])
    shown = capsys.readouterr().out
    assert "rank     | 0-99 100-299 300-499" in shown
    assert max(map(len, shown.splitlines())) < 100
    assert "more ranks: use --rank R or --json" in shown


def test_show_prints_the_program(job, capsys):
    """The programs are in the notation; a rank in no grid has an empty one."""
    told = printed(capsys, "show", job, "--set", "world_size=7")["programs"]
    assert {str(rank) for rank in range(7)} == set(told)
    assert "vision.0 SEND_F0 -> language.0" in told["0"]
    assert [] == told["6"]
    assert 0 == main(["show", str(job), "--rank", "0"])
    shown = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert ["rank 0    # vision.0", *told["0"]] == shown


def test_verify_says_what_it_has_proved(job, capsys, tmp_path):
    """Of the job's own program, and of one as `show` prints it, idle ranks included; there are its numbers, too."""
    told = printed(capsys, "verify", job, "--set", "world_size=7")
    assert (True, False, []) == (told["ok"], told["strict"], told["problems"])
    shown = printed(capsys, "show", job, "--set", "world_size=7")["programs"]
    actions = [action for own in shown.values() for action in own]
    assert (6, len(actions)) == (told["ranks"], told["actions"])
    assert {"vision.0": 3, "language.0": 2, "language.1": 1} == told["peak_in_flight"] == told["credits"]
    main(["show", str(job), "--set", "world_size=7"])
    written = tmp_path / "program.txt"
    written.write_text(capsys.readouterr().out)
    assert told == printed(capsys, "verify", job, "--program", written)
    assert 0 == main(["verify", str(job)])
    out = capsys.readouterr().out
    assert (
        f"6 ranks, {len(actions)} actions, {told['messages']} messages, {told['joint']} joint actions" in out
    )
    assert "language.0 2/2" in out
    assert "one serial queue per pair of ranks: no" in out


def test_verify_rejects_what_is_wrong(job, capsys, tmp_path):
    """Every fault is a problem of the file it is in; with --strict the strict walk must pass, too."""
    main(["show", str(job)])
    lines = capsys.readouterr().out.splitlines()
    lines.remove("    vision.0 F0")
    path = tmp_path / "program.txt"
    path.write_text("\n".join(lines))
    assert 2 == main(["verify", str(job), "--program", str(path), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert (False, False) == (told["ok"], told["strict"])
    assert [(str(path), "rank 0: 'vision.0 F0' is missing.")] == [
        (problem["where"], problem["message"]) for problem in told["problems"]
    ]
    assert 2 == main(["verify", str(job), "--strict"])
    assert "deadlock with one queue per pair of ranks: rank " in capsys.readouterr().err
    one = [
        "--set=modules.language.grid.pp=1",
        "--set=modules.language.grid.tp=1",
        "--set=modules.vision.frozen=true",
    ]
    assert 0 == main(["verify", str(job), "--strict", *one])
    assert "one serial queue per pair of ranks: yes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"rank 0\n\n    vision.0 G0  # no such thing\n", "line 3: 'vision.0 G0' is no action"),
        (b"vision.0 F0", "line 1: 'vision.0 F0' stands before any 'rank R'"),
        (b"rank 1\nrank 1\n", "line 2: rank 1 has a list already"),
        (b"rank 0\n  \xff", "is not a text file in UTF-8 (line 2)"),
        (None, "there is no such file"),
    ],
)
def test_a_program_that_cannot_be_read(job, capsys, tmp_path, content, message):
    """Is a problem that names the file, and the line where there is one."""
    path = tmp_path / "program.txt"
    if content is not None:
        path.write_bytes(content)
    assert 2 == main(["verify", str(job), "--program", str(path)])
    assert capsys.readouterr().err.startswith(f"{path}: ")
    main(["verify", str(job), "--program", str(path), "--json"])
    assert message in json.loads(capsys.readouterr().out)["problems"][0]["message"]


def test_problems_come_as_json(job, capsys):
    """With `--json`, problems go to standard output as values, and the exit code is 2."""
    assert 2 == main(["check", str(job), "--json", "--set", "train.stesp=3"])
    captured = capsys.readouterr()
    problem = {
        "where": "train.stesp",
        "message": "'stesp' is not a known key here. (Given by --set train.stesp=3.)",
        "remedy": "Did you mean 'steps'?",
    }
    assert {"ok": False, "problems": [problem]} == json.loads(captured.out)
    assert "" == captured.err


def test_problems_are_listed_for_people(job, capsys):
    """The place and the fact on one line, the remedy indented below."""
    assert 2 == main(["check", str(job), "--set", "batch.microbatches=3"])
    lines = [
        "batch.microbatches: 8 samples of a step do not divide into 3 microbatches. "
        "(Given by --set batch.microbatches=3.)",
        "    Legal counts for 8 samples: 1, 2, 4, 8.",
    ]
    assert lines == capsys.readouterr().err.splitlines()


def test_misspelt_keys_do_not_hide_problems_of_the_plan(job, capsys):
    """A misspelt key, a wrong tp and a wrong width of the data are reported in one run."""
    overrides = ["modules.language.grid.ppp=2", "modules.vision.grid.tp=3", "data.options.rows.langage=[1,2]"]
    assert 2 == main(["check", str(job), "--json", *(f"--set={o}" for o in overrides)])
    found = [problem["where"] for problem in json.loads(capsys.readouterr().out)["problems"]]
    assert "modules.language.grid.ppp" == found[0]
    assert {"modules.vision.grid.tp", "data.options.rows.langage"} <= set(found)


def test_a_wrong_source_is_one_problem(job, capsys):
    """Without a source nothing is said of what it does not give."""
    assert 2 == main(["check", str(job), "--json", "--set", "data.source=digit"])
    found = json.loads(capsys.readouterr().out)["problems"]
    assert ["data.source"] == [problem["where"] for problem in found]


@pytest.mark.parametrize("command", ["check", "roles", "show"])
def test_planning_commands_import_neither_torch_nor_what_prints(job, command):
    """These run without torch, and for programs without the libraries that draw tables."""
    code = (
        "import sys; from mimogrid.shell.cli.main import main; code = main(sys.argv[1:])\n"
        "loaded = {'torch', 'rich', 'tomlkit', 'numpy'} & set(sys.modules)\n"
        "raise SystemExit(str(loaded) if loaded else code)"
    )
    arguments = [sys.executable, "-c", code, command, str(job), "--json"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert (0, "") == (done.returncode, done.stderr)


# -- modules and sources of the user's own -----------------------------------------------------------------


@pytest.fixture
def own(job):
    """A job with a module and a source of the user's own, in a package that must not run to be found."""
    (job.parent / "zoo").mkdir()
    (job.parent / "zoo" / "__init__.py").write_text("raise RuntimeError('the package ran')")
    (job.parent / "zoo" / "eyes.py").write_text(OWN.replace("import mark_that_it_ran", ""))
    text = JOB.replace('"vit"', '"zoo.eyes:build"').replace("layers = 2, hidden = 64, heads = 4", "wide = 48")
    text = text.replace('"synthetic"', '"zoo.eyes:source"').replace(", rows = { vision = [4, 4] }", "")
    job.write_text(text.replace("{ sequence = 32 }", "{ rows = 5 }"))
    return job


@pytest.mark.usefixtures("without_torch")
def test_what_is_the_users_own_is_found_and_asked_without_its_package(own, capsys):
    """`describe(options)` tells the output width, so the edge has a projector; the source tells its rows."""
    (own.parent / "zoo" / "eyes.py").write_text(
        OWN.replace("import mark_that_it_ran", "").replace(
            "    def describe(self",
            "    def facts(self):\n        from mimogrid.core.job.spec import SourceFacts\n"
            "        return SourceFacts(sequence=16)\n\n    def describe(self",
        )
    )
    [edge] = printed(capsys, "check", own)["edges"]
    assert 2 * 8 * 5 * 32 * 4 == edge["bytes"]
    assert 0 == main(["check", str(own)])
    assert "vision -> language  32     linear" in capsys.readouterr().out


@pytest.mark.usefixtures("without_torch")
def test_how_many_rows_an_own_module_emits_is_asked_too(own, capsys, monkeypatch):
    """`describe(options)` may give `rows_out`; a table that says nothing is refused, and so is another one."""
    # Files of one size that are written within a second look alike to Python's cache of bytecode.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    eyes = own.parent / "zoo" / "eyes.py"
    text = eyes.read_text().replace('return {"width"', 'return {"rows_out": {"count": 2}, "width"')
    eyes.write_text(text)
    job = open_job(own.name, ["data.options.sequence=16"])
    assert job.spec.modules["vision"].rows_out == Emission(count=2)
    assert {"vision": 2, "language": 4} == job.step(0).rows_out[0]
    assert 2 == main(["check", str(own), "--set", "modules.vision.rows_out={pool=3}"])
    assert "modules.vision.rows_out: differs from what 'zoo.eyes:build' describes" in capsys.readouterr().err
    eyes.write_text(text.replace('"count": 2', '"cuont": 2'))
    assert 2 == main(["check", str(own)])
    assert "gives rows_out.cuont, which 'cuont' is not a known key" in capsys.readouterr().err


@pytest.mark.usefixtures("without_torch")
def test_a_job_travels_as_the_name_of_its_file(own, monkeypatch):
    """Another process opens it again, from any folder, with the same overrides and the user's own source."""
    job = open_job(own.name, ["data.options.sequence=16", "data.options.rows=7"])
    travelling = pickle.dumps(job)
    monkeypatch.chdir("/")
    again = pickle.loads(travelling)
    assert job.spec == again.spec
    assert job.step(2).samples == again.step(2).samples


@pytest.mark.usefixtures("without_torch")
def test_a_source_without_a_sequence_is_asked_for_one(own, capsys):
    """A language model needs to know how long its sequences are."""
    assert 2 == main(["check", str(own)])
    assert "data.options: 'zoo.eyes:source' does not say how long" in capsys.readouterr().err


@pytest.mark.usefixtures("without_torch")
@pytest.mark.parametrize("line", ["import torch", "from torch import nn", "import behind"])
def test_a_file_with_torch_is_found_but_not_run(own, capsys, line):
    """Where torch stands at the top level, or behind it, the width is unknown: a note, and no torch."""
    (own.parent / "behind.py").write_text("import torch")
    (own.parent / "zoo" / "eyes.py").write_text(OWN.replace("import mark_that_it_ran", line))
    assert 0 == main(["check", str(own), "--json", "--set", "data.options.sequence=16"])
    captured = capsys.readouterr()
    assert [] == json.loads(captured.out)["edges"]
    assert "note: modules.vision: " in captured.err
    assert "note: data.source: " in captured.err
    assert "torch" not in sys.modules


@pytest.mark.usefixtures("without_torch")
def test_a_file_that_fails_is_a_problem(own, capsys):
    """What describe or the source raises is said with the file."""
    (own.parent / "zoo" / "eyes.py").write_text(
        OWN.replace("import mark_that_it_ran", "").replace('options["wide"]', 'options["width"]')
    )
    assert 2 == main(["check", str(own), "--set", "data.options.colour=3"])
    said = capsys.readouterr().err
    assert "modules.vision.model: describe of 'zoo.eyes:build' raised KeyError: 'width'." in said
    assert "data.source: 'zoo.eyes:source' raised TypeError" in said
    assert str(own.parent / "zoo" / "eyes.py") in said
