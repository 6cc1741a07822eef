"""The documents: what they print is what the commands print, what they name is there."""

import math
import re
import runpy
import shlex
import sys
from pathlib import Path

import attrs
import pytest

from mimogrid.core.job.lora import Lora
from mimogrid.core.job.models import BUILT_IN
from mimogrid.core.job.projectors import Projector
from mimogrid.core.job.spec import (
    BatchSpec,
    DataSpec,
    GpuSpec,
    GridSpec,
    GroupSpec,
    JobSpec,
    LayoutSpec,
    LossScaleSpec,
    MixSpec,
    ModuleSpec,
    OptimizerSpec,
    ScheduleSpec,
    SkipSpec,
    TaskSpec,
    TrackSpec,
    TrainSpec,
    ValidationSpec,
)
from mimogrid.shell.cli.main import main
from mimogrid.shell.job import costfile
from mimogrid.shell.job.jobs import open_job
from mimogrid.shell.job.sources import conversations
from mimogrid.shell.job.sources.synthetic import Options
from mimogrid.shell.world import waiting


ROOT = Path(__file__).parents[3]
SITE = ROOT / "docs/site"
"""Pages that exist only in the built site, whose links `make site` follows."""
PAGES = sorted(
    page for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")] if SITE not in page.parents
)
TABLES = (
    JobSpec,
    ModuleSpec,
    Lora,
    GridSpec,
    Projector,
    DataSpec,
    MixSpec,
    BatchSpec,
    ScheduleSpec,
    GpuSpec,
    OptimizerSpec,
    GroupSpec,
    LayoutSpec,
    LossScaleSpec,
    SkipSpec,
    TrainSpec,
    TaskSpec,
    TrackSpec,
    ValidationSpec,
    Options,
    conversations.Options,
)
named = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    """Documents speak from the root; what their jobs make importable is undone."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))


def blocks(page, language):
    """The code blocks of a page in a language."""
    return re.findall(
        rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


@named
def test_commands_print_what_the_page_says(page, monkeypatch, capsys):
    """Blocks of the language `console` hold a command and all that it prints, but how long it took."""
    monkeypatch.setattr(waiting, "LINE_EVERY_S", math.inf)
    for block in blocks(page, "console"):
        command, expected = block.removeprefix("$ mimogrid ").split("\n", 1)
        main(shlex.split(command))
        printed = capsys.readouterr()
        lines = (printed.out + printed.err).splitlines()
        assert expected == "".join(f"{line.rstrip()}\n" for line in lines)


def commands_that_draw():
    """The commands in blocks of the language `sh` that write a picture of the documents."""
    lines = [line for page in PAGES for block in blocks(page, "sh") for line in block.splitlines()]
    return [line for line in lines if "--svg docs/pictures/" in line]


@pytest.mark.parametrize("command", commands_that_draw())
def test_pictures_are_what_the_commands_draw(command, tmp_path):
    """To the last byte: whoever changes how things are drawn draws these anew."""
    *given, picture = shlex.split(command)[1:]
    assert 0 == main([*given, str(tmp_path / "drawn.svg")])
    assert (ROOT / picture).read_text(encoding="utf-8") == (tmp_path / "drawn.svg").read_text(
        encoding="utf-8"
    )


def test_all_pictures_are_shown():
    """No file is left from what a page once said."""
    said = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert not [path.name for path in (ROOT / "docs/pictures").iterdir() if path.name not in said]


@named
def test_jobs_and_costs_of_a_page_are_legal(page, tmp_path, capsys):
    """Every job in a page can be checked; a costs file is read with the job before it that it fits."""
    job = ROOT / "examples/first/job.toml"
    for i, block in enumerate(blocks(page, "toml")):
        path = tmp_path / f"{i}.toml"
        path.write_text(block)
        if "[modules." in block:
            folder = ROOT / "examples/own" if "ears" in block else tmp_path
            sys.path.insert(0, str(folder))
            assert 0 == main(["check", str(path)]), capsys.readouterr().err
        else:
            costfile.read(path, open_job(job).topology)


@named
def test_links_lead_somewhere(page):
    """To files of the repository, that is."""
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_every_page_is_linked():
    """Whoever starts at the README finds every page, every decision among them."""
    found, ahead = set(), [ROOT / "README.md"]
    while ahead:
        page = ahead.pop()
        found.add(page)
        links = re.findall(r"\]\(([^)#]+\.md)[^)]*\)", page.read_text(encoding="utf-8"))
        ahead += {(page.parent / link).resolve() for link in links if "://" not in link} - found
    assert not set(PAGES) - found


def test_decisions_are_numbered():
    """From 1 on, without a gap, in the name of the page and in its title."""
    pages = sorted((ROOT / "docs/decisions").glob("0*.md"))
    assert [*range(1, len(pages) + 1)] == [int(page.name[:4]) for page in pages]
    for page in pages:
        assert page.read_text(encoding="utf-8").startswith(f"# {int(page.name[:4])}. "), page.name


def test_files_shown_are_the_files():
    """What a page shows of an example is what runs."""
    shown = [*blocks(ROOT / "docs/own-modules.md", "python"), *blocks(ROOT / "docs/own-modules.md", "toml")]
    files = ("ears.py", "network.py", "pulses.py", "job.toml")
    assert [(ROOT / "examples/own" / name).read_text() for name in files] == shown
    assert blocks(ROOT / "README.md", "toml") == [(ROOT / "examples/first/job.toml").read_text()]


def test_every_key_of_a_job_is_explained():
    """With its default, where that is a plain one."""
    rows = {}
    for line in (ROOT / "docs/job-file.md").read_text(encoding="utf-8").splitlines():
        if found := re.match(r"\| `(\w+)` \| ([^|]*) \|", line):
            rows.setdefault(found[1], set()).add(found[2].strip())
    for table in (*TABLES, *BUILT_IN.values()):
        for field in attrs.fields(table):
            if attrs.has(field.type) or (table is JobSpec and field.name in {"modules", "data", "batch"}):
                continue
            assert field.name in rows, f"{table.__name__}.{field.name}"
            if type(field.default) in {int, float, bool} and table is not Options:
                shown = str(field.default).lower()
                assert any(f"`{shown}`" == default for default in rows[field.name]), field.name


def test_every_package_is_on_the_map():
    """ARCHITECTURE.md names every package of the core and the shell, and nothing that is gone."""
    page = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    there = {
        f"{path.parent.name}/{path.name}"
        for top in ("core", "shell")
        for path in (ROOT / top).iterdir()
        if path.is_dir()
    }
    assert {name for name in there if not name.endswith("__pycache__")} == set(
        re.findall(r"^\| `((?:core|shell)/\w+)` \|", page, re.MULTILINE)
    )


def test_the_flow_is_drawn():
    """The picture of the flow is what its script draws, from packages that are there."""
    script = runpy.run_path(str(ROOT / "docs/flow.py"))
    assert script["picture"]() == script["PICTURE"].read_text(encoding="utf-8")
    packages = [
        package for package, *_ in script["BOXES"].values() if package.startswith(("core/", "shell/"))
    ]
    assert not [package for package in packages if not (ROOT / package / "__init__.py").is_file()]


@named
def test_tests_that_are_named_are_there(page):
    """A law that cites a test is only as good as that test."""
    for name in re.findall(r"`(tests/[\w/]+\.py)`", page.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), name
