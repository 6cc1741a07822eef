"""What a run says of its speed: the steady state, in lines, curves and for people."""

import io
import json
import time
from pathlib import Path
from typing import Any

import attrs
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mimogrid.core.faults.stragglers import StepTimes
from mimogrid.core.pricing.flops import model_flops
from mimogrid.shell.job.jobs import Job, open_job
from mimogrid.shell.run import metrics
from mimogrid.shell.run.metrics import RECENT, Meter, Progress, Tally, open_metrics
from mimogrid.shell.runtime.agreement import Outcome


FIRST = Path(__file__).resolve().parents[3] / "examples" / "first" / "job.toml"


class Clock:
    """A clock that goes on when it is told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        """The time."""
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the meter."""
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


@pytest.fixture(scope="module")
def job() -> Job:
    """A job of four ranks, and a fifth that idles."""
    return open_job(FIRST, ["world_size=5"])


def outcome(loss: float = 1.0, busy_s: float = 0.0, load_s: float = 0.0) -> Outcome:
    """The outcome of a step; in the step before, each of four ranks was busy, and loaded, for so long."""
    times = tuple(StepTimes(rank, "stage", busy_s, load_s) for rank in range(4))
    losses = {"language": loss, "generator": 2 * loss}
    return Outcome(loss, losses, 1.0, 1e-3, 1.0, "", False, True, times, (10, 40, 20, 30))


def measured(job: Job, clock: Clock, seconds: list[float], peak: float | None = None) -> Meter:
    """A meter after steps of these seconds, in which ranks computed for half of the time."""
    meter, before = Meter(active=4, allocated=5, peak=peak), 0.0
    for index, step_s in enumerate(seconds):
        clock.now_s += step_s
        meter.add(job.step(index), outcome(busy_s=before / 2))
        before = step_s
    return meter


def test_what_is_shown_is_the_last_steps_without_the_start(job: Job, clock: Clock) -> None:
    """A start of a minute is forgotten after the second step, and a slow step after ten."""
    first = measured(job, clock, [60.0]).recent
    assert first is not None
    assert (60.0, None) == (first.step_s, first.waiting)
    found = measured(job, clock, [60.0, 9.0, *[2.0] * RECENT]).recent
    assert found is not None
    tokens = sum(job.step(index).tokens for index in range(2, 2 + RECENT))
    assert pytest.approx(2.0) == found.step_s
    assert pytest.approx(16 / 2.0) == found.samples_per_s
    assert pytest.approx(tokens / RECENT / 2.0) == found.tokens_per_s
    assert pytest.approx(found.tokens_per_s / 5) == found.tokens_per_s_per_gpu
    assert pytest.approx(found.tokens_per_s / 4) == found.tokens_per_s_per_active_gpu
    assert pytest.approx(0.5) == found.waiting
    assert found.mfu is None


def test_the_report_is_of_all_steps_but_the_first(job: Job, clock: Clock) -> None:
    """So that a run of twice as many steps reports the same."""
    whole = measured(job, clock, [60.0, 9.0, *[2.0] * 20]).whole
    assert whole is not None
    assert pytest.approx(49 / 21) == whole.step_s


def test_loading_is_waiting(job: Job, clock: Clock) -> None:
    """What forwards wait for data is no computing; it is told by itself, for all ranks and for each."""
    meter = Meter(active=4, allocated=5, peak=None)
    for index in range(4):
        clock.now_s += 2.0
        meter.add(job.step(index), outcome(busy_s=1.5, load_s=0.5))
    found = meter.whole
    assert found is not None
    assert (pytest.approx(0.5), pytest.approx(0.25)) == (found.waiting, found.waiting_for_data)
    assert dict.fromkeys(range(4), pytest.approx(0.25)) == meter.waiting_for_data


def test_encoders_have_their_share_of_flops(job: Job, clock: Clock) -> None:
    """Encoders are what makes rows and is no language model: of this job, vision."""
    meter = measured(job, clock, [60.0, 2.0])
    flops = model_flops(job.step(1))
    assert meter.recent is not None
    assert pytest.approx(flops["vision"] / sum(flops.values())) == meter.recent.encoder_share


def test_mfu_is_of_the_samples_that_there_were(job: Job, clock: Clock) -> None:
    """Model FLOPs of the step, over the peak of every allocated device."""
    found = measured(job, clock, [60.0, 2.0], peak=1e9).recent
    assert found is not None
    assert pytest.approx(sum(model_flops(job.step(1)).values()) / 2.0 / 5 / 1e9) == found.mfu


def test_lines_curves_and_progress_say_the_same(
    job: Job, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """metrics.jsonl, TensorBoard and the console: speed, waiting, memory and the loss of each module; one count."""
    console = io.StringIO()
    monkeypatch.setattr(metrics.sys, "stderr", console)
    tally = Tally(meter=Meter(active=4, allocated=5, peak=1e9))
    spec = attrs.evolve(job.spec, train=attrs.evolve(job.spec.train, steps=3))
    with open_metrics(tmp_path, 0, spec, pytest.fail) as writer:
        for index in range(3):
            clock.now_s += 2.0
            result = outcome(0.5, busy_s=1.5)
            tally.add(index, job.step(index), result)
            writer.write(index, result, tally)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [0, 1, 2] == [line["step"] for line in lines]
    wanted = {"step_s": 2.0, "samples_per_s": 8.0, "waiting": 0.25, "peak_bytes": 40}
    assert wanted.items() <= lines[2].items()
    shown = console.getvalue().splitlines()
    assert ["1/3", "3/3"] == [line.split()[0] for line in shown]
    for words in ("loss 0.5000", "language 0.5000", "2.00 s a step", "waiting 25 %", "MFU", "0 s left"):
        assert words in shown[-1]
    curves: Any = EventAccumulator(str(tmp_path / "tensorboard"))
    curves.Reload()
    names = {"loss", "loss/language", "loss/generator", "step_s", "tokens_per_s_per_gpu", "mfu", "peak_bytes"}
    assert names <= set(curves.Tags()["scalars"])


def test_the_time_that_is_left_is_that_of_steps_as_they_are_now(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not as they were at the start."""
    monkeypatch.setattr(metrics, "PROGRESS_EVERY_S", -1.0)
    with Progress(0, 100) as progress:
        progress.show(50, {"loss": 1.0, "losses": {}, "step_s": 3.0})
    assert "150 s left" in capsys.readouterr().err


def test_a_narrow_terminal_shows_the_count_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit is the end of the metrics, not the steps that are done."""
    screen = io.StringIO()
    screen.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(metrics.sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    facts = {
        "loss": 1.0,
        "losses": {},
        "step_s": 0.1,
        "samples_per_s": 123456.0,
        "tokens_per_s": 1e9,
        "waiting": 0.5,
    }
    with Progress(0, 1000) as progress:
        progress.show(50, facts | {"peak_bytes": 5e8})
    assert "50/1000" in screen.getvalue()
    assert "loss 1.0000" in screen.getvalue()
