"""Search layouts: CPU seconds and memory of `mimogrid plan` on drawn jobs, on one core.

    python benchmarks/plan_search.py [--count 200] [--seed 0] [--first 0] [--out FILE]

Jobs have one to six modules of 12 to 128 layers and hidden sizes of 512 to 16,384, on 8 to 16,384 GPUs, with any batch
and equal or ragged samples; the job that once took 401 s comes first. A job follows from the seed and its number
alone. Each is searched in a process of its own. The search ends by its proof or by its budgets, never by a clock, so
that its result is the same on every machine; this says what the budgets come to on yours.
"""

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from printed import printer

from mimogrid.core.base.errors import PlanError
from mimogrid.core.plan.layouts import Question, shown
from mimogrid.shell.job.jobs import open_job
from mimogrid.shell.job.planning import searched


LONG = """precision = "bf16"
[modules.vision]
model = "vit"
feeds = ["language"]
options = { layers = 48, hidden = 3200, heads = 25, features = 588 }
[modules.language]
model = "gpt"
options = { layers = 80, hidden = 8192, heads = 64, kv_heads = 8, vocab = 128256 }
[data]
source = "synthetic"
options = { sequence = 4096, rows = { vision = [256, 3328] }, text = [64, 512] }
[batch]
global_size = 1024
microbatches = 8
[gpu]
name = "h200"
"""
GPUS = [8 * each for each in (1, 2, 3, 4, 6, 8, 16, 24, 32, 64, 128, 146, 256, 512, 1024, 2048)]
RAGGED, FROZEN, SPARSE, NARROW = 0.5, 0.3, 0.15, 1024
"""How often samples are ragged, encoders are frozen and the language model has experts; widths with eight heads."""
HIDDEN = (512, 768, 1024, 1280, 1792, 2048, 3200, 4096, 5120, 6144, 8192, 12288, 16384)


def drawn(seed: int, number: int) -> tuple[str, int]:
    """Draw a job as text, and a number of GPUs."""
    if number == 0:
        return LONG, 1024
    draw = random.Random(f"{seed} {number}")
    gpus = draw.choice(GPUS)
    names = ["vision", "audio", "depth", "video", "touch"][: draw.randint(0, 5)]
    ragged = draw.random() < RAGGED
    text = 'precision = "bf16"\n'
    for name in names:
        frozen = "frozen = true\n" if draw.random() < FROZEN else ""
        text += f'[modules.{name}]\nmodel = "vit"\nfeeds = ["language"]\n{frozen}'
        text += f"options = {{ {_sizes(draw, HIDDEN[:8])}, features = 588 }}\n"
    experts = ", experts = 8" if draw.random() < SPARSE else ""
    text += f'[modules.language]\nmodel = "gpt"\noptions = {{ {_sizes(draw, HIDDEN[3:])}{experts}, vocab = 128256 }}\n'
    most = {name: draw.choice((64, 256, 576, 1024)) for name in names}
    rows = ", ".join(f"{name} = [{size // 8 if ragged else size}, {size}]" for name, size in most.items())
    text += f'[data]\nsource = "synthetic"\noptions = {{ sequence = 8192, rows = {{ {rows} }}, text = [64, 2048] }}\n'
    size = draw.choice((64, 96, 100, 256, 360, 512, 1000, 1024, 1920, 2048, 4096))
    text += (
        f'[batch]\nglobal_size = {size}\n[gpu]\nname = "{draw.choice(("a100", "h100", "h200", "b200"))}"\n'
    )
    return text, gpus


def _sizes(draw: random.Random, widths: tuple[int, ...]) -> str:
    hidden = draw.choice(widths)
    return f"layers = {draw.randint(12, 128)}, hidden = {hidden}, heads = {hidden // 128 if hidden > NARROW else 8}"


def main() -> None:
    """Print a row for each job, then the distribution; write all, if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first job")
    parser.add_argument("--out", type=Path, help="write all there, too")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(result_of(args.seed, args.one)))
        return
    say = printer(args.out)
    say(
        f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}; "
        f"Python {platform.python_version()}, attrs {version('attrs')}; seed {args.seed}"
    )
    say(
        f"{'job':>4}{'modules':>8}{'GPUs':>7}{'samples':>8}{'CPU s':>8}{'MiB':>6}{'examined':>10}{'gap':>7}  step"
    )
    seconds: list[float] = []
    mebibytes: list[float] = []
    for number in range(args.first, args.first + args.count):
        command = [sys.executable, __file__, "--seed", str(args.seed), "--one", str(number)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout)
        seconds.append(found["seconds"])
        mebibytes.append(found["MiB"])
        say(
            f"{number:>4}{found['modules']:>8}{found['gpus']:>7}{found['samples']:>8}{found['seconds']:>8.1f}"
            f"{found['MiB']:>6.0f}{found['looked_at']:>10,}{found['gap']:>7.1%}  {found['result']}"
        )
    ranked = sorted(seconds)
    say(
        f"{len(ranked)} jobs: median {ranked[len(ranked) // 2]:.1f} s, 95 % within "
        f"{ranked[min(int(0.95 * len(ranked)), len(ranked) - 1)]:.1f} s, at most {ranked[-1]:.1f} s of CPU, "
        f"{max(mebibytes):.0f} MiB"
    )


def result_of(seed: int, number: int) -> dict[str, object]:
    """Search the layouts of a job; return what it took."""
    text, gpus = drawn(seed, number)
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(text)
        file.flush()
        begin = time.process_time()
        job = open_job(file.name)
        samples = job.step(0).samples
        try:
            found = searched(Question(spec=job.spec, facts=job.topology.source, samples=samples, gpus=gpus))
        except PlanError as error:
            raise SystemExit(f"{error}\n{text}") from None
        seconds = time.process_time() - begin
    best = found.best
    result = f"{best.step_s:.4g} s  {shown(best.spec)}" if best else f"nothing fits: {found.nearest_fit}"
    return {
        "modules": len(job.spec.modules),
        "gpus": gpus,
        "samples": len(samples),
        "seconds": seconds,
        "MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "looked_at": found.looked_at,
        "gap": found.gap,
        "result": result,
    }


if __name__ == "__main__":
    main()
