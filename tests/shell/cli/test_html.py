"""The interactive pages: whole in themselves, safe whatever names they show, and of runs in any state."""

import json
import re
from pathlib import Path

import pytest

from mimogrid.shell.cli.html import page
from mimogrid.shell.cli.main import main
from mimogrid.shell.job import jobfile


EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
FIRST = EXAMPLES / "first" / "job.toml"


def data_of(text):
    """The data of a page, as a browser reads them."""
    found = re.findall(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)
    assert 1 == len(found)
    return json.loads(found[0])


def test_no_text_can_leave_the_data():
    """A name that looks like markup, or like a place of the template, is shown as it is."""
    for name in ("</script><script>alert(1)</script>", "<!-- <script>", "/*PROGRAM*/", "/*DATA*/", "\u2028"):
        text = page(name, {"facts": [["name", name]]})
        assert [["name", name]] == data_of(text)["facts"]
        assert 2 == text.count("<script") == text.count("</script>")


def test_a_page_needs_no_network(tmp_path, capsys):
    """Nothing is loaded from anywhere; the policy in the page would forbid it, too."""
    out = tmp_path / "step.html"
    assert 0 == main(["simulate", str(FIRST), "--html", str(out)])
    text = out.read_text(encoding="utf-8")
    addresses = set(re.findall(r"https?://[^\"'\s)\\\\]+", text)) - {"http://www.w3.org/2000/svg"}
    assert set() == addresses
    assert "default-src 'none'" in text
    assert not re.search(r"<(link|img|iframe)|\bsrc=|@import|url\(\s*[\"']?http", text)


def test_two_jobs_are_two_timelines(tmp_path, capsys):
    """The title of the second says what differs."""
    other = tmp_path / "other.toml"
    other.write_text(FIRST.read_text().replace("microbatches = 4", "microbatches = 8"))
    out = tmp_path / "two.html"
    assert 0 == main(["simulate", str(FIRST), "--compare", str(other), "--html", str(out)])
    first, second = data_of(out.read_text(encoding="utf-8"))["timelines"]
    assert "batch.microbatches" not in first["title"]
    assert "batch.microbatches" in second["title"]
    assert 2 == main(["simulate", str(FIRST), "--schedule", "all", "--html", str(out)])
    assert "--svg, --html, --trace" in capsys.readouterr().err


def test_a_plan_has_its_layouts_as_numbers_and_as_texts(tmp_path, capsys):
    """What the table sorts by is what `--json` says."""
    out = tmp_path / "plan.html"
    job = EXAMPLES / "plans" / "clip_llama7b_8.toml"
    small = ["--set", "batch.global_size=16", "--set", "batch.microbatches=4"]
    assert 0 == main(["plan", str(job), "--gpus", "4", "--gpu", "h100", "--html", str(out), "--json", *small])
    layouts = json.loads(capsys.readouterr().out)["layouts"]
    rows = data_of(out.read_text(encoding="utf-8"))["candidates"]["rows"]
    assert [layout["step_time"] for layout in layouts] == [row["values"][0] for row in rows]
    assert [layout["layout"] for layout in layouts] == [row["cells"][-1] for row in rows]
    assert 1 == sum(row["best"] for row in rows)


@pytest.fixture
def run(tmp_path):
    """The folder of a run that has not finished; the last line is being written."""
    record = {"job": jobfile.dump(jobfile.load(FIRST, []))}
    (tmp_path / "run.json").write_text(json.dumps(record))
    lines = [
        json.dumps({"step": step, "loss": 1 / (step + 1), "losses": {"a": 1.0, "b": 2.0}})
        for step in range(9)
    ]
    skipped = json.dumps({"step": 9, "taken": False, "skipped": "listed"})
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, skipped, '{"step": 10, "lo']))
    return tmp_path


def test_a_run_that_goes_on_has_its_curves(run, capsys):
    """And those of its modules; a step that was passed over is none of its points."""
    assert 0 == main(["report", str(run)])
    data = data_of((run / "report.html").read_text(encoding="utf-8"))
    assert ["state", "not finished"] in data["facts"]
    (loss,) = data["charts"]
    assert ["loss", "a", "b"] == [curve["name"] for curve in loss["curves"]]
    assert [1 / (step + 1) for step in range(9)] == loss["curves"][0]["y"]


def test_no_run_no_report(tmp_path, capsys):
    """A folder without a run is the user's mistake."""
    assert 2 == main(["report", str(tmp_path)])
    assert "holds no run" in capsys.readouterr().err
