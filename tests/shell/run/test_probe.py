"""The command `probe`: what it measures, by order and not by seconds, and what it leaves."""

import json
from pathlib import Path

import pytest

import jobs
from mimogrid.core.pricing.unknown_names import unknown_names
from mimogrid.core.schedule.actions import (
    Compute,
    Norm,
    Recv,
    Send,
    Tie,
    Update,
    Wait,
    WaitReduce,
    matching_op,
)
from mimogrid.shell.cli import start
from mimogrid.shell.cli.main import main
from mimogrid.shell.job import costfile
from mimogrid.shell.job.jobs import open_job
from mimogrid.shell.run.probe import clock
from mimogrid.shell.run.probe.results import in_text
from mimogrid.shell.run.probe.turns import turns_of


ROOT = Path(__file__).parents[3]
TIMED = ROOT / "benchmarks" / "predict" / "timed-4.toml"
SLEEPS = (
    "modules.eyes.options={width=16,forward_ms=10,backward_ms=40}",
    "modules.inner.options={width=16,forward_ms=20,backward_ms=20}",
    "modules.outer.options={width=16,forward_ms=40,backward_ms=10}",
    "batch.microbatches=2",
)
REAL = """
[modules.vision]
model = "vit"
feeds = ["language"]
frozen = true
options = { layers = 1, hidden = 16, heads = 2 }

[modules.language]
model = "gpt"
grid = { tp = 2, dp = 2, offset = 0 }
options = { layers = 1, hidden = 16, heads = 2, vocab = 16 }

[data]
source = "synthetic"

[batch]
global_size = 4
microbatches = 2
"""
LARGE = """
[modules.language]
model = "gpt"
options = { layers = 1, hidden = 256, heads = 2, vocab = 16 }

[data]
source = "synthetic"

[batch]
global_size = 2
"""


@pytest.fixture
def probed(pool):
    """Probe a job in a world of the pool."""

    def probe(job, repeat=1):
        said = pool.run("mimogrid.shell.run.probe.measure:in_world", job.topology.world_size, job, repeat)
        (found,) = [one for one in said if one is not None]
        return found

    return probe


@pytest.fixture
def real(tmp_path):
    """The path of a job with tensor and dp ranks, and a frozen module beside them."""
    (tmp_path / "job.toml").write_text(REAL)
    return tmp_path / "job.toml"


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        ("v vit dp2 > l; l gpt pp2 tp2", "1f1b"),
        ("v vit dp2 > l; l gpt pp3 tied", "zb-h1"),
        ("v vit > l; a vit frozen > l; l gpt pp2 chunks2 dp2 @0", "interleaved"),
        ("v vit m8 > l; l gpt pp2 m4", "gpipe"),
    ],
)
def test_one_action_computes_in_a_turn_and_none_waits_for_a_later_one(text, schedule):
    """Turns cut a program without changing it; whatever is waited for has been posted by then at both ends."""
    program = jobs.program_of(text, schedule=schedule)
    turn_of: dict[tuple[int, object], int] = {}
    owners: dict[int, set[object]] = {}
    for rank, counts in turns_of(program).items():
        actions = program.of(rank)
        assert (Update(),) == actions[sum(counts) :]
        begins = [sum(counts[:turn]) for turn in range(len(counts))]
        for turn, (begin, count) in enumerate(zip(begins, counts, strict=True)):
            for action in actions[begin : begin + count]:
                turn_of[rank, action] = turn
                if isinstance(action, Compute | Tie | Norm):
                    name = "tie" if isinstance(action, Tie) else action
                    owners.setdefault(turn, set()).add((program.joint(rank, action), name))
    assert set(range(1, 1 + len(owners))) == set(owners)
    assert all(1 == len(found) for found in owners.values())
    for (rank, action), turn in turn_of.items():
        if isinstance(action, Wait):
            assert turn_of[rank, action.transfer] <= turn
            for peer in program.peers_of(rank, action.transfer):
                assert turn_of[peer, matching_op(action.transfer)] <= turn
        if isinstance(action, WaitReduce):
            assert all(turn_of[peer, action.posted] <= turn for peer in program.joint(rank, action))
        assert isinstance(action, Wait | Send | Recv) or turn


def test_a_stage_that_takes_twice_as_long_is_found_to(probed):
    """Sleeping stages come out in their order, forward and backward, and need no core."""
    job = open_job(TIMED, SLEEPS)
    costs = probed(job).costs
    assert [] == list(unknown_names(costs, job.topology))
    eyes, inner, outer = (costs.stages[f"{name}.0"] for name in ("eyes", "inner", "outer"))
    assert outer.forward > 1.5 * inner.forward > 2.25 * eyes.forward > 0
    assert eyes.whole_backward > 1.5 * inner.whole_backward > 2.25 * outer.whole_backward > 0
    assert {"eyes -> inner", "inner -> outer", "outer -> judge"} == set(costs.edges)
    assert all(edge.latency > 0 for edge in costs.edges.values())
    assert costs.cores is None


def test_a_costs_file_holds_what_was_measured(probed, real, tmp_path):
    """It reads back as the same costs, fits the job, and says where it is from."""
    job = open_job(real)
    found = probed(job)
    (tmp_path / "costs.toml").write_text(in_text(found, job))
    read = costfile.read(tmp_path / "costs.toml", job.topology)
    assert found.costs == read
    assert read.origin.startswith("probed on ")
    trained, frozen = read.stages["language.0"], read.stages["vision.0"]
    assert 0 < min(trained.forward, trained.input_gradient, trained.weight_gradient)
    assert {"language.0"} == set(found.split)
    assert 0 < frozen.forward
    assert 0 == frozen.whole_backward == frozen.reduce


def test_memory_is_what_the_job_takes_and_not_one_before_it(probed, tmp_path):
    """In processes that have run a larger job, a smaller one grows by its own weights, gradients and moments."""
    (tmp_path / "job.toml").write_text(LARGE)
    large, small = (
        probed(open_job(tmp_path / "job.toml", [f"modules.language.options.ffn={ffn}"])).memory[0]
        for ffn in (1 << 13, 1 << 11)
    )
    assert large.planned > 3 * small.planned
    assert small.planned < small.peak < large.planned < large.peak


def test_a_wait_for_a_core_is_not_counted_however_it_falls(monkeypatch):
    """Also one that comes between the two readings: what lasted 1 s has lasted 1 s."""
    seconds, waited, losing = 0.0, 0.0, {1, 4, 5}
    readings = 0

    def waits():
        nonlocal readings, seconds, waited
        readings += 1
        if readings in losing:
            seconds, waited = seconds + 7, waited + 7
        return waited

    monkeypatch.setattr(clock, "_core_wait_s", waits)
    monkeypatch.setattr(clock.time, "perf_counter", lambda: seconds)
    begin = clock._running_s()
    seconds += 1
    assert 1 == clock._running_s() - begin
    assert 7 * len(losing) == waited


def test_every_size_of_microbatch_that_is_asked_for_is_measured(pool, real, capsys, monkeypatch, tmp_path):
    """`--json` has them all in order of their samples; the file has the job's own, and names its origin."""

    def first(job, function, *arguments, speaks):
        said = pool.run(function, job.topology.world_size, job, *arguments)
        return next(one for one in said if one is not None)

    monkeypatch.setattr(start, "_in_fresh_world", first)
    out = tmp_path / "costs.toml"
    command = ["probe", str(real), "--repeat", "1", "--microbatch-sizes", "4", "--json", "--out", str(out)]
    assert 0 == main(command)
    told = json.loads(capsys.readouterr().out)
    assert [2, 4] == [each["samples"] for each in told["stages"]["language.0"]]
    assert (
        told["stages"]["language.0"][0]["forward"]
        == costfile.load(out, "")["stages"]["language.0"]["forward"]
    )
    assert 0 == main(["simulate", str(real), "--costs", str(out), "--json"])
    assert told["origin"] + f", from {out}" == json.loads(capsys.readouterr().out)["costs"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--out", "nowhere/costs.toml"], "no such folder"),
        (["--repeat", "0"], "Use 1 or more"),
        (["--microbatch-sizes", "0"], "from 1 on"),
        (["--microbatch-sizes", "many"], "no list of numbers"),
        (["--set", "modules.language.grid.qp=2"], "qp"),
        (["--microbatch-sizes", "1"], "global_size"),
    ],
)
def test_what_cannot_be_measured_is_told_before_anything_starts(options, words, real, capsys, monkeypatch):
    """Exit code 2, and what is wrong."""
    monkeypatch.setattr(start, "Pool", None)
    assert 2 == main(["probe", str(real), *options])
    assert words in capsys.readouterr().err


def test_sizes_need_a_world_each(real, capsys, monkeypatch):
    """Torchrun's world is only one."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert 2 == main(["probe", str(real), "--microbatch-sizes", "4"])
    assert "--microbatch-sizes" in capsys.readouterr().err
