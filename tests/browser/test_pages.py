"""The interactive pages in a real browser, headless: they draw, answer keys, sort, and stay fast when large.

A script at the end of a page acts as a user would and notes what it finds; the browser prints the document after it.
"""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mimogrid.shell.cli.main import main


EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium is installed (Debian: apt-get install chromium)"
)
PRESS = (
    "const press = (key) => view.canvas.dispatchEvent(new KeyboardEvent('keydown', { key, bubbles: true }));"
)
LARGE = ("--set", "batch.global_size=4096", "--set", "batch.microbatches=128")


def seen(path, script):
    """What a script notes in `found` on a page, once it has been drawn."""
    acting = path.with_name("acting.html")
    noted = "document.body.dataset.found = JSON.stringify(found);"
    act = f"<script>{{ const found = {{}}, view = views[0]; view?.resize(); {PRESS} {script} {noted} }}</script>"
    acting.write_text(path.read_text(encoding="utf-8").replace("</body>", f"{act}</body>"), encoding="utf-8")
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--dump-dom")
    printed = subprocess.run(
        [BROWSER, *flags, acting.as_uri()], capture_output=True, text=True, check=True, timeout=300
    )
    (body,) = re.findall(r"<body([^>]*)>", printed.stdout)
    assert "data-error" not in body
    (found,) = re.findall(r'data-found="([^"]*)"', body)
    return json.loads(html.unescape(found))


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    """The page of a small step."""
    path = tmp_path_factory.mktemp("step") / "step.html"
    assert 0 == main(["simulate", str(EXAMPLES / "three/job.toml"), "--html", str(path)])
    return path


def test_a_timeline_is_drawn(step):
    """The canvas has the colours of both directions, and the map of the ranks is there."""
    count = """
    view.paint();
    const brush = view.canvas.getContext("2d"), { width, height } = view.canvas;
    const pixels = brush.getImageData(0, 0, width, height).data, colours = new Set();
    for (let i = 0; i < pixels.length; i += 4) colours.add(`${pixels[i]},${pixels[i + 1]},${pixels[i + 2]}`);
    found.forward = colours.has("173,199,231"); found.backward = colours.has("0,97,154");
    found.map = document.querySelectorAll(".map svg rect").length;
    """
    found = seen(step, count)
    assert {"forward": True, "backward": True} == {key: found[key] for key in ("forward", "backward")}
    assert found["map"] >= 7


def test_a_timeline_answers_keys(step):
    """Keys walk along actions, which are named; they zoom around the chosen one, and show the whole step again."""
    walk = """
    press("ArrowRight"); found.first = tip.textContent;
    press("ArrowRight"); found.second = tip.textContent;
    press("ArrowDown"); found.row = view.row;
    press("+"); found.zoomed = view.end - view.begin; press("0"); found.whole = view.end - view.begin;
    """
    found = seen(step, walk)
    assert found["first"].startswith("vision.0 F0: forward of microbatch 0\n0 s to 2 s")
    assert found["second"].startswith("vision.0 F1")
    assert 1 == found["row"]
    assert (600_000, 1_000_000) == (found["zoomed"], found["whole"])


def test_layouts_sort_and_are_chosen(tmp_path):
    """A click on a head sorts up, another down; a point of the chart chooses its row."""
    path = tmp_path / "plan.html"
    small = ("--set", "batch.global_size=16", "--set", "batch.microbatches=4")
    job = EXAMPLES / "plans/clip_llama7b_8.toml"
    assert 0 == main(["plan", str(job), "--gpus", "4", "--gpu", "h100", "--html", str(path), *small])
    click = """
    const column = () => [...document.querySelectorAll("tbody tr")].map((row) => row.cells[5].textContent);
    const head = document.querySelectorAll("th button")[5];
    head.click(); found.up = column(); head.click(); found.down = column();
    document.querySelector("circle.point").dispatchEvent(new MouseEvent("click"));
    found.chosen = document.querySelectorAll("tr.chosen").length;
    """
    found = seen(path, click)
    up = [float(cell) for cell in found["up"] if cell != "-"]
    assert sorted(up) == up
    assert up[::-1] == [float(cell) for cell in found["down"] if cell != "-"]
    assert 1 == found["chosen"]


def test_a_name_cannot_act(tmp_path):
    """Markup in the name of a job file is text."""
    job = tmp_path / "<img src=x onerror=alert(1)>.toml"
    job.write_text((EXAMPLES / "first/job.toml").read_text())
    path = tmp_path / "step.html"
    assert 0 == main(["simulate", str(job), "--html", str(path)])
    found = seen(
        path, "found.images = document.images.length; found.title = document.querySelector('h1').textContent;"
    )
    assert 0 == found["images"]
    assert "<img src=x" in found["title"]


def test_a_thousand_ranks_stay_fluid(tmp_path):
    """1,172 ranks with 128 microbatches: less than 3 MB. What a frame takes is printed."""
    path = tmp_path / "large.html"
    job = EXAMPLES / "plans/omni72b_1172.toml"
    assert 0 == main(["simulate", str(job), *LARGE, "--html", str(path)])
    assert path.stat().st_size < 3_000_000
    frame = """
    const begin = performance.now(); for (let i = 0; i < 20; i++) view.paint();
    found.frame_ms = (performance.now() - begin) / 20; found.rows = view.rows.length;
    """
    found = seen(path, frame)
    print(f"{found['rows']} rows, {found['frame_ms']:.1f} ms a frame, {path.stat().st_size:,} bytes")
    assert found["rows"] > 100
