"""Templates: each is written with its schema, is legal where it lies, and is not written over."""

import json
import sys
import tomllib
from pathlib import Path

import jsonschema
import pytest

from mimogrid.core.base.errors import PlanError
from mimogrid.shell.cli.arguments import TEMPLATES
from mimogrid.shell.cli.main import main
from mimogrid.shell.cli.templates import SCHEMA, write_template


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder; what a job makes importable is undone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("ears", "network", "pulses"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_is_legal_where_it_is_written(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With comments, and a schema that its first line names."""
    written = write_template(name, tmp_path / "mine.toml", force=False)
    assert set(written) == set(tmp_path.iterdir())
    text = (tmp_path / "mine.toml").read_text()
    assert f"#:schema {SCHEMA}" == text.splitlines()[0]
    jsonschema.Draft7Validator(json.loads((tmp_path / SCHEMA).read_text())).validate(tomllib.loads(text))
    assert 0 == main(["check", "mine.toml"]), capsys.readouterr().err


def test_nothing_is_written_over_unless_that_is_meant(tmp_path: Path) -> None:
    """All files that are there are named at once; the schema is derived, and may be written again."""
    write_template("own", tmp_path / "job.toml", force=False)
    (tmp_path / "ears.py").write_text("mine")
    with pytest.raises(PlanError) as refused:
        write_template("own", tmp_path / "job.toml", force=False)
    assert ["job.toml", "ears.py", "network.py", "pulses.py"] == [
        Path(problem.where).name for problem in refused.value.problems
    ]
    assert "mine" == (tmp_path / "ears.py").read_text()
    write_template("own", tmp_path / "job.toml", force=True)
    assert "mine" != (tmp_path / "ears.py").read_text()


def test_init_writes_a_template_and_says_what_is_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint, or GPUs to plan for, do not go with it; a misspelt one is told what there is."""
    assert 0 == main(["init", "--template", "text"])
    assert "mimogrid check job.toml" in capsys.readouterr().out
    assert (tmp_path / "job.toml").exists()
    assert 2 == main(["init", "--template", "text"])
    assert "job.toml: is there already." in capsys.readouterr().err
    assert 2 == main(["init", "checkpoint", "--template", "text", "--gpus", "8", "--force"])
    said = capsys.readouterr().err
    assert "FOLDER: does not go with --template." in said
    assert "--gpus: does not go with --template." in said
    assert 2 == main(["init", "--template", "txt"])
    assert "vision-language" in capsys.readouterr().err
    assert 2 == main(["init"])
    assert "init --template text" in capsys.readouterr().err
