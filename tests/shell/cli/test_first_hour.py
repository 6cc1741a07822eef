"""What a new user meets first: help, words for what is missing, the environment, the schema, completion."""

import importlib.util
import json
import re
import runpy
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import attrs
import jsonschema
import pytest

import mimogrid
from mimogrid.core.job.models import BUILT_IN
from mimogrid.core.job.spec import JobSpec
from mimogrid.shell.cli import start
from mimogrid.shell.cli.arguments import COMMANDS, EXAMPLES, parse, parser
from mimogrid.shell.cli.main import main
from mimogrid.shell.job.jobfile import load
from mimogrid.shell.job.schema import job_schema


ROOT = Path(__file__).parents[3]
JOBS = sorted((ROOT / "examples").glob("*/*.toml"))
FIRST = ROOT / "examples/first/job.toml"


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let Python find no package of some names."""

    def hide(*names: str) -> None:
        found = importlib.util.find_spec

        def find(name: str, package: str | None = None) -> Any:
            return None if name.partition(".")[0] in names else found(name, package)

        monkeypatch.setattr(importlib.util, "find_spec", find)

    return hide


# -- commands ----------------------------------------------------------------------------------------------


def test_the_version_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    """The package and the command say the same."""
    assert 0 == main(["--version"])
    assert f"mimogrid {mimogrid.__version__}\n" == capsys.readouterr().out


def test_help_is_a_word_or_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    """`mimogrid help train` is `mimogrid train --help`."""
    assert 0 == main(["help", "train"])
    asked = capsys.readouterr().out
    assert 0 == main(["train", "--help"])
    assert asked == capsys.readouterr().out


def test_every_command_has_examples_that_parse(capsys: pytest.CaptureFixture[str]) -> None:
    """`--help` shows them, and each is a command of its own."""
    assert COMMANDS.keys() == EXAMPLES.keys()
    for name, examples in EXAMPLES.items():
        assert 0 == main([name, "--help"])
        shown = capsys.readouterr().out
        for example in examples:
            assert f"  mimogrid {example}\n" in shown
            assert isinstance(parse(example.partition(" > ")[0].split()), COMMANDS[name])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["check", "job.toml", "--gpus", "8"],
            "mimogrid check: unrecognized arguments: --gpus 8. --gpus is of init, plan.",
        ),
        (["train", "job.toml", "--preflite"], "--preflite. Did you mean '--preflight'?"),
        (["check", "a.toml", "b.toml"], "unrecognized arguments: b.toml.\n"),
    ],
)
def test_an_option_of_another_command_is_known(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Or the nearest one of this command is named."""
    assert 2 == main(words)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "parity", "probe"])
def test_what_an_extra_has_is_asked_for_by_its_name(
    command: str, without: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before any process starts: in a process that lacks a package, its import would fail with a traceback."""
    without("tensorboard", "sklearn")
    monkeypatch.setattr(start, "Pool", None)
    assert 2 == main([command, str(FIRST)])
    said = capsys.readouterr().err
    assert f"{command}: needs tensorboard, scikit-learn, which are not installed." in said
    assert "pip install 'mimogrid[train]'" in said


def test_a_job_that_is_not_there_is_not_any_other_toml_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only job files beside it are named, and where there is none, the way to one."""
    monkeypatch.chdir(tmp_path)
    Path("pyproject.toml").write_text("[project]\n")
    assert 2 == main(["check", "mine.toml"])
    said = capsys.readouterr().err
    assert "pyproject" not in said
    assert "mimogrid init" in said
    Path("large.toml").write_text(FIRST.read_text())
    assert 2 == main(["check", "mine.toml"])
    assert "Did you mean 'large.toml'?" in capsys.readouterr().err


@pytest.mark.parametrize("example", ["own_module.py", "megatron_mimo.py", "megatron_pretrain.py"])
def test_an_example_without_a_launcher_says_how_to_start_it(
    example: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not that a variable is not set."""
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit, match=f"torchrun --nproc-per-node 4 examples/{example}"):
        runpy.run_path(str(ROOT / "examples" / example), run_name="__main__")


# -- env ---------------------------------------------------------------------------------------------------


def test_the_environment_is_what_a_bug_report_needs(
    without: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Versions, machine, backends, variables without secrets; what is missing comes with its remedy."""
    monkeypatch.setenv("NCCL_TOKEN", "very-secret")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    without("matplotlib", "transformers")
    assert 0 == main(["env", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert mimogrid.__version__ == told["mimogrid"]["version"]
    assert told["packages"]["torch"]
    assert told["torch"]["gloo"]
    assert told["machine"]["cores"] >= 1
    assert {"NCCL_DEBUG": "INFO", "NCCL_TOKEN": "$NCCL_TOKEN"}.items() <= told["variables"].items()
    assert [f"pip install 'mimogrid[{extra}]'" for extra in ("train", "hf", "data")] == [
        problem["remedy"] for problem in told["problems"]
    ]
    assert 0 == main(["env"])
    shown = capsys.readouterr().out
    assert "very-secret" not in shown
    assert "needs matplotlib, which is not installed" in shown


@pytest.mark.parametrize("name", ["torch"])
def test_the_environment_is_shown_without_torch(
    name: str, without: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Then torch itself is what is missing."""
    without(name)
    assert 0 == main(["env", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert {} == told["torch"]
    assert "needs torch" in told["problems"][0]["message"]


# -- schema ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def schema() -> Any:
    """The schema, which is one."""
    found = job_schema()
    jsonschema.Draft7Validator.check_schema(found)
    return jsonschema.Draft7Validator(found)


@pytest.mark.parametrize("path", JOBS, ids=lambda path: str(path.relative_to(ROOT)))
def test_jobs_that_are_shipped_fit_the_schema(schema: Any, path: Path) -> None:
    """An editor marks nothing in them."""
    assert [] == [error.message for error in schema.iter_errors(tomllib.loads(path.read_text()))]


@pytest.mark.parametrize(
    ("written", "place"),
    [
        ("[modules.language]\nmodle = 1", "modules.language"),
        ("[train]\nstesp = 3", "train"),
        ("[train]\nsteps = 'many'", "train.steps"),
        ("[schedule]\nname = '1f2b'", "schedule.name"),
        ("[modules.language.options]\nlayer = 3", "modules.language.options"),
        ("[modules.language]\nmodel = 'gpt'\noptions = { norm = 'batch' }", "modules.language.options.norm"),
        ("[optimizer]\nbetas = [0.9]", "optimizer.betas"),
    ],
)
def test_what_check_refuses_of_keys_and_types_an_editor_marks(schema: Any, written: str, place: str) -> None:
    """At the same place."""
    table = tomllib.loads(FIRST.read_text())
    for name, value in tomllib.loads(written).items():
        for key, inner in value.items():
            target = table.setdefault(name, {})
            target[key] = {**target[key], **inner} if isinstance(inner, dict) and key in target else inner
    assert {place} <= {".".join(map(str, error.path)) for error in schema.iter_errors(table)}


def test_every_key_is_explained_and_has_its_default() -> None:
    """As docs/job-file.md does; a key of a table that is written as one has those of its own keys."""
    whole = job_schema()["properties"]
    module = whole["modules"]["additionalProperties"]
    options = [of["then"]["properties"]["options"]["properties"] for of in module["allOf"]]
    names = ("batch", "data", "optimizer", "schedule", "track", "train", "validation")
    tables = [whole[name] for name in names]
    keys = [module["properties"], *options, *(table["properties"] for table in tables)]
    for key, value in [item for table in keys for item in table.items()]:
        assert value.get("description"), key
        assert "](" not in value["description"]
    assert load(FIRST).train.steps == whole["train"]["properties"]["steps"]["default"]
    assert {*attrs.fields_dict(JobSpec)} == {*whole}
    assert [*BUILT_IN] == [of["if"]["properties"]["model"]["const"] for of in module["allOf"]]


def test_the_schema_is_written_for_editors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the line that a job file needs for it."""
    path = tmp_path / "job.schema.json"
    assert 0 == main(["schema", "--out", str(path)])
    assert "#:schema job.schema.json\n" in capsys.readouterr().err
    assert job_schema() == json.loads(path.read_text())


# -- completion --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "fish", "zsh"])
def test_every_command_and_flag_is_completed(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    """By a script for the shell that needs no Python when it completes."""
    assert 0 == main(["completion", shell])
    script = capsys.readouterr().out
    flags = {flag for flag in re.findall(r"--[a-z-]+", parser().format_help()) if flag != "--help"}
    assert all(word.lstrip("-") in script for word in (*COMMANDS, *flags, "--memory-gb", "--resume"))


def test_bash_completes_commands(capsys: pytest.CaptureFixture[str]) -> None:
    """As a user who types two letters and a tab."""
    main(["completion", "bash"])
    typed = 'COMP_WORDS=(mimogrid si); COMP_CWORD=1; _shtab_mimogrid mimogrid si; echo "${COMPREPLY[*]}"'
    script = capsys.readouterr().out + "\n" + typed
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert "simulate" == done.stdout.strip()
