"""Every combination of harm, phase and rank, and an interruption in every step: ``nox -s faults``.

    python tests/long/faults.py [--seconds 1200] [--only PATTERN] [--summary FILE] [--record FILE]

Each run is disturbed once and then resumed; it must end with the weights of a run that nothing happened to, to the
bit, and a report must name the rank, the moment and what became of it (`harm`). Then two other jobs are interrupted in
each of their steps, and in each moment of a save (`sweep`). With a record, what it holds is not run again.
"""

import argparse
import collections
import fnmatch
import json
import os
import platform
import shutil
import tempfile
import time
from pathlib import Path

import torch

import harm
import sweep
from mimogrid.shell.job import jobfile
from mimogrid.shell.job.jobs import open_job
from mimogrid.shell.world.launch import Pool


def main() -> int:
    """Run the cases in turn; print what came of each. Returns 1 if one was not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600.0, help="begin no case after this time")
    parser.add_argument("--only", default="*", help="a shell pattern on the fault's line")
    parser.add_argument("--summary", type=Path)
    parser.add_argument("--record", type=Path, help="a file of JSON lines")
    given = parser.parse_args()
    lines = given.record.read_text().splitlines() if given.record and given.record.exists() else []
    done = {entry["fault"]: entry for entry in map(json.loads, lines)}
    begun = time.monotonic()
    cases = [case for case in (*harm.cases(), *sweep.cases()) if fnmatch.fnmatchcase(str(case), given.only)]
    with Pool(4) as pool, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "job.toml").write_text(jobfile.dump(harm.job()))
        job = open_job(folder / "job.toml")
        wholes = {}
        for i, case in enumerate(cases):
            if str(case) in done or time.monotonic() - begun > given.seconds:
                continue
            run = folder / f"run-{i}"
            kind = getattr(case, "job", "")
            if kind not in wholes:
                wholes[kind] = folder / "whole"
                if kind:
                    wholes[kind] = sweep.uninterrupted(pool, kind, folder)
                else:
                    assert not harm.run(pool, job, wholes[kind]).report
            entry = (_swept if kind else _entry)(pool, job, run, wholes[kind], case)
            shutil.rmtree(run, ignore_errors=True)
            done[str(case)] = entry
            print(
                f"{entry['seconds']:5.1f} s  {case}: {entry['wrong'] or entry['line'] or 'went on'}",
                flush=True,
            )
            if given.record:
                with given.record.open("a") as file:
                    file.write(json.dumps(entry) + "\n")
    wrong = [entry for entry in done.values() if entry["wrong"]]
    print(f"{len(done)} of {len(cases)} combinations were run; {len(wrong)} were not as they must be")
    if given.summary:
        swept = [entry for entry in done.values() if entry["harm"] == "interrupted"]
        others = [entry for entry in done.values() if entry["harm"] != "interrupted"]
        planned = sum(isinstance(case, sweep.Case) for case in cases)
        text = _summary(others, len(cases) - planned) + _summary_of_sweep(swept, planned)
        given.summary.write_text(text)
    return bool(wrong)


def _swept(pool, job, folder, whole, case):
    """Run one case of the sweep; return what came of it."""
    begun, wrong = time.monotonic(), ""
    folder.mkdir()
    try:
        sweep.judge(pool, case, folder, whole)
    except AssertionError as error:
        wrong = str(error) or "AssertionError"
    return {
        "fault": str(case),
        "harm": "interrupted",
        "job": case.job,
        "beside": case.beside,
        "way": case.way,
        "what": case.harm,
        "seconds": time.monotonic() - begun,
        "line": "ended the same",
        "wrong": wrong,
    }


def _entry(pool, job, folder, whole, case):
    """Run one case; return what came of it."""
    try:
        ended, wrong = harm.judge(pool, job, folder, whole, case), ""
    except AssertionError as error:
        ended, wrong = harm.Ended("", 0.0, ""), str(error)
    return {
        "fault": str(case),
        "harm": "slow" if case.goes_on else case.fault.harm.value,
        "rank": case.fault.rank,
        "phase": case.phase,
        "seconds": ended.seconds,
        "line": ended.line,
        "wrong": wrong,
    }


HEAD = """# Runs that were disturbed

`nox -s faults` disturbs a small run (an encoder on two dp ranks, a language model on two pipeline stages, four ranks,
six steps, a checkpoint every two, a time limit of {limit:g} s) once, in every phase, on the first rank and on the last:
a rank raises (`fail`), is killed, is stopped with SIGSTOP, is late (sleeps for much longer than the limit), or is slow
(sleeps for {short:g} s). What must be true then:

- a slow rank delays the run and changes nothing;
- otherwise all ranks end, and the one report names the rank, the step, the moment and what became of the rank;
- the run that is resumed goes on from the newest checkpoint that was published, and ends with the weights and losses of
  a run that nothing happened to, to the bit.

"""


def _summary(entries, planned):
    """Return what came of it as a page in Markdown."""
    harms = ("fail", "kill", "stop", "delay", "slow")
    cells = collections.defaultdict(dict)
    for entry in entries:
        cells[entry["rank"], entry["phase"]][entry["harm"]] = (
            "**wrong**" if entry["wrong"] else f"{entry['seconds']:.1f} s"
        )
    right = sum(not entry["wrong"] for entry in entries)
    text = HEAD.format(limit=harm.LIMIT_S, short=harm.SHORT_S)
    text += f"The last run: {len(entries)} of {planned} combinations, {right} of them as they must be, on "
    text += f"{os.cpu_count()} cores, {platform.platform()}, Python {platform.python_version()}, torch "
    text += f"{torch.__version__}. Seconds until the disturbed run had ended, start-up included:\n\n"
    text += "| rank | phase | fail | kill | stop | late | slow |\n|---|---|---|---|---|---|---|\n"
    for (rank, phase), row in cells.items():
        text += f"| {rank} | {phase} | {' | '.join(row.get(name, '') for name in harms)} |\n"
    text += "\nSome of the reports, first lines:\n\n```text\n"
    lines = [entry["line"] for entry in entries if entry["line"] and entry["phase"] == "steady"]
    return text + "\n".join(lines) + "\n```\n"


SWEPT = """
# Runs that were interrupted in every step

Two jobs of {steps} steps with a checkpoint every {every}: the digits, and random samples with dropout whose epoch ends
in the middle of a step. In every step: one rank is killed at a drawn action of its program, or all are killed, or one
gets SIGTERM. Then a run that is killed again and again, one step further each time; and a save in which a rank is
killed, its disk is full, or no longer writable, where half of a shard, a shard, or the manifest is written, where the
checkpoint has just got its name, and where half of an old one is removed. Whatever was published is whole at any time,
and the run that goes on ends with the same losses, weights and last checkpoint, to the bit.

"""


def _summary_of_sweep(entries, planned):
    """Return what came of the sweep as a part of a page."""
    rows = collections.defaultdict(lambda: [0, 0])
    for entry in entries:
        what = {"kill": "", "full": ", disk full", "read-only": ", disk read-only"}[entry["what"]]
        saves = "beside training" if entry["beside"] else "waited for"
        row = rows[entry["job"], saves, entry["way"] + what]
        row[0] += 1
        row[1] += not entry["wrong"]
    right = sum(not entry["wrong"] for entry in entries)
    text = SWEPT.format(steps=sweep.STEPS, every=sweep.EVERY)
    text += f"The last run: {len(entries)} of {planned} interruptions, {right} of them as they must be.\n\n"
    text += "| job | saves | interrupted by, or where | cases | exact |\n|---|---|---|---|---|\n"
    for (job, saves, way), (count, exact) in rows.items():
        text += f"| {job} | {saves} | {way} | {count} | {exact} |\n"
    return text


if __name__ == "__main__":
    raise SystemExit(main())
