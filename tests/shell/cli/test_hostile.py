"""Any bytes in, words out: what is printed is harmless and plain where it must be; too much is refused at once."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mimogrid.core.job.graph import ModuleGraph, find_cycle
from mimogrid.shell.cli.main import main
from mimogrid.shell.job.builders import PlanWarning
from mimogrid.shell.job.jobs import open_job
from mimogrid.shell.run import folders, log
from scale import SCALE, one_of_each


ROOT = Path(__file__).parents[3]
FIRST = ROOT / "examples" / "first" / "job.toml"
TITLE = "\x1b]0;owned\x07\x1b[2J\u202egnp"


def refused(capsys, *words):
    """The problems of a command that is refused."""
    assert 2 == main([*map(str, words), "--json"])
    return json.loads(capsys.readouterr().out)["problems"]


def chain(count):
    """A job of so many modules, each of which feeds the next."""
    options = "options = { layers = 1, hidden = 8, heads = 2 }"
    modules = [
        f'[modules.m{i}]\nmodel = "block"\nfeeds = ["m{i + 1}"]\n{options}\n' for i in range(count - 1)
    ]
    last = f'[modules.m{count - 1}]\nmodel = "regressor"\n{options[:-1]}, outputs = 4 }}\n'
    return "".join((*modules, last, '[data]\nsource = "synthetic"\n[batch]\nglobal_size = 4\n'))


@pytest.mark.parametrize(
    ("override", "where", "fact"),
    [
        ("batch.global_size=10_000_000", "batch.global_size", "10,000,000"),
        ("batch.microbatches=10_000_000", "batch.microbatches", "10,000,000"),
        ("modules.vision.grid.dp=1_000_000", "modules.vision.grid", "1,000,000 ranks"),
        ("modules.vision.grid.offset=99_999", "modules", "100,003 ranks"),
        (
            "modules.language.options.layers=10_000 --set modules.language.options.experts=1000",
            "modules",
            "10,000,002",
        ),
        (
            "modules.language.options.layers=10_000 --set modules.language.grid.pp=10_000",
            "modules",
            "layers times",
        ),
        ("modules.language.options.experts=" + "9" * 19, "--set", "more than 64 bits"),
        ("seed=" + "9" * 5000, "--set", "more than 64 bits"),
        ("seed=" + "[" * 5000, "--set", "nested more than 32 deep"),
        ("data.options=" + "{a=" * 40 + "1" + "}" * 40, "--set", "nested more than 32 deep"),
        ("a." * 5000 + "b=1", "--set", "more than 32 parts"),
        ('train.run_dir="a\\u0000b"', "train.run_dir", "cannot be printed"),
        ("train.run_dir=" + "x" * 300, "train.run_dir", "a name of 300 bytes"),
        ("schedule.costs=/dev/zero", "/dev/zero", "is no regular file"),
        ('schedule.costs="a\\u0000b"', "", "null byte"),
    ],
)
def test_what_is_too_much_is_refused_at_once(capsys, override, where, fact):
    """With the number that is too large, or the reason."""
    found = refused(capsys, "check", FIRST, *(f"--set={each}" for each in override.split(" --set ")))
    assert any(where in each["where"] and fact in each["message"] for each in found), found
    assert all(len(each["where"]) < 300 for each in found)


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("a = " + "[" * 5000, "nested more than 32 deep"),
        ("a = " + "9" * 5000, "more than 64 bits"),
        ("a." * 5000 + "b = 1", "more than 32 parts"),
        (chain(1501), "there are 1,501"),
    ],
)
def test_a_file_that_is_too_much_is_refused_at_once(tmp_path, capsys, text, fact):
    """Neither the stack nor the digits of Python end."""
    (tmp_path / "job.toml").write_text(text)
    assert fact in refused(capsys, "check", tmp_path / "job.toml")[0]["message"]


def test_a_long_chain_of_modules_is_checked(tmp_path, capsys):
    """As long as a job may be; and walks of the graph need no stack."""
    (tmp_path / "job.toml").write_text(chain(200))
    assert 0 == main(["check", str(tmp_path / "job.toml"), "--json"])
    assert 199 == len(json.loads(capsys.readouterr().out)["edges"])
    names = [f"m{i}" for i in range(3000)]
    links = {name: ("block", (after,)) for name, after in itertools.pairwise(names)}
    graph = ModuleGraph.of({**dict(reversed(links.items())), names[-1]: ("regressor", ())})
    assert (tuple(names), ("m0",)) == (graph.order, graph.rows_into(names[-1]))
    assert 3001 == len(find_cycle({**{k: to for k, (_, to) in links.items()}, names[-1]: (names[0],)}))


def test_edges_that_join_to_too_many_paths_are_refused(tmp_path, capsys):
    """Two modules in every layer of twenty make a million of them."""
    options = "options = { layers = 1, hidden = 8, heads = 2 }"
    layers = [(f'"a{i}", "b{i}"', name) for i in range(1, 20) for name in (f"a{i - 1}", f"b{i - 1}")]
    text = "".join(f'[modules.{name}]\nmodel = "block"\nfeeds = [{to}]\n{options}\n' for to, name in layers)
    text += "".join(f'[modules.{x}19]\nmodel = "regressor"\n{options[:-1]}, outputs = 4 }}\n' for x in "ab")
    (tmp_path / "job.toml").write_text(text + '[data]\nsource = "synthetic"\n[batch]\nglobal_size = 4\n')
    (problem,) = refused(capsys, "check", tmp_path / "job.toml")
    assert "paths from one module to another" in problem["message"]


@pytest.mark.parametrize("jitter", ["1e308", "11", "nan", "-1"])
def test_a_jitter_beyond_all_times_is_refused(capsys, jitter):
    """Its factors would have no numbers."""
    (problem,) = refused(capsys, "simulate", FIRST, f"--jitter={jitter}")
    assert ("--jitter", "Use 0 to 10.") == (problem["where"], problem["remedy"])


def test_check_does_not_verify_what_takes_minutes(capsys):
    """The layout is shown, and that it was not verified is said."""
    words = ["--set=batch.global_size=160_000", "--set=modules.vision.grid.dp=40_000"]
    assert 0 == main(["check", str(FIRST), *words])
    captured = capsys.readouterr()
    assert "too much to verify in seconds" in captured.err
    assert "0-39999" in captured.out


def test_text_of_files_is_written_out_on_terminals_and_in_pictures(tmp_path, capsys):
    """Neither the origin of costs, nor a name, nor a path reaches a terminal raw."""
    costs = tmp_path / "costs.toml"
    costs.write_text(f"origin = {json.dumps(TITLE)}\n[edges]\nlatency = 1.0\n")
    folder = tmp_path / TITLE.replace("/", "")
    folder.mkdir()
    job = folder / "job.toml"
    job.write_bytes(FIRST.read_bytes())
    drawn = tmp_path / "a.svg"
    assert 0 == main(["simulate", str(job), "--costs", str(costs), "--svg", str(drawn)])
    said = capsys.readouterr().out
    assert r"\x1b]0;owned\x07\x1b[2J\u202egnp" in said
    for text in (said, drawn.read_text("utf-8")):
        assert not {"\x1b", "\x07", "\u202e"} & set(text)
    job.write_text(f"[modules.{json.dumps(TITLE)}]\nmodel = {json.dumps(TITLE)}\n")
    assert 2 == main(["check", str(job)])
    assert not {"\x1b", "\x07", "\u202e"} & set(capsys.readouterr().err)
    assert 2 == main([TITLE, str(job)])
    assert not {"\x1b", "\x07", "\u202e"} & set(capsys.readouterr().err)


def test_text_of_files_is_written_out_where_a_run_tells_of_itself(tmp_path, capsys):
    """In the log's lines on the terminal, in warnings of the plan, and where a run is finished already."""
    topology = open_job(FIRST).topology
    with log.open_log(tmp_path / "logs", topology.role(0), speaks=True) as logger:
        logger.warning(TITLE, folder=TITLE)
    assert not {"\x1b", "\x07", "\u202e"} & set(str(PlanWarning(TITLE)))
    named = tmp_path / "run"
    with folders.claimed(open_job(FIRST, [f"train.run_dir={named}"]), None):
        folders.write_json(named / folders.REPORT, {"steps": 100})
    hostile = named.rename(tmp_path / TITLE)
    assert 0 == main(["train", str(FIRST), "--resume", str(hostile)])
    said = capsys.readouterr().err
    assert 3 == said.count(r"\x1b]0;owned\x07\x1b[2J\u202egnp")
    assert not {"\x1b", "\x07", "\u202e"} & set(said)


@pytest.mark.parametrize(
    ("command", "encoding"), one_of_each(["check", "roles", "simulate"], ["ascii", "latin-1"])
)
def test_a_terminal_without_the_characters_gets_plain_ones(tmp_path, encoding, command):
    """Also where names have others."""
    job = tmp_path / "naïve—job.toml"
    job.write_text("# ─ · ▯\n" + FIRST.read_text("utf-8"), "utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "mimogrid", command, job],
        env={"PYTHONPATH": str(ROOT / "src"), "PYTHONIOENCODING": encoding, "LC_ALL": "C", "PYTHONUTF8": "0"},
        capture_output=True,
        check=False,
    )
    assert (0, b"") == (done.returncode, done.stderr)
    done.stdout.decode(encoding)


def test_ranks_read_utf_8_where_the_locale_has_only_ascii():
    """Torch reads files of its own in the encoding of the locale."""
    code = "import os; from mimogrid.shell.cli import main as m; m.main(['--version']); print(os.environ['PYTHONUTF8'])"
    plain = {"PYTHONPATH": str(ROOT / "src"), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    said = subprocess.run([sys.executable, "-c", code], env=plain, capture_output=True, check=True).stdout
    assert b"1" == said.split()[-1]


def test_a_misspelt_command_is_told_the_nearest(capsys):
    """And the version can be asked for."""
    assert 2 == main(["simualte", str(FIRST)])
    assert "'simualte' is no command. Did you mean 'simulate'?" in capsys.readouterr().err
    assert 0 == main(["--version"])
    assert capsys.readouterr().out.startswith("mimogrid")


def test_any_bytes_end_in_words():
    """Files and arguments that nobody would write; more a night; `nox -s fuzz` takes twenty minutes."""
    script = ROOT / "tests" / "long" / "fuzzing.py"
    seconds = os.environ.get("MIMOGRID_FUZZ_SECONDS", "120" if SCALE > 1 else "2")
    done = subprocess.run(
        [sys.executable, script, seconds],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert 0 == done.returncode, done.stdout[-20_000:] + done.stderr[-2000:]
