"""Published layouts beside planned ones: tokens per second and allocated GPU, in the same simulator.

    python benchmarks/plan_published.py [--only WORD] [--out FILE]

Of each publication the grids are taken as they stand, and what is trained, recomputed and held in a batch. Sizes that
it does not tell are those of a usual model of its kind, and texts are assumed. All layouts share the update among dp
ranks, also where a publication shares weights, too (ZeRO-3).
"""

import argparse
import tempfile
from pathlib import Path

import attrs
from printed import printer

from mimogrid.core.plan.layouts import Question, shown
from mimogrid.shell.job.jobs import Job, open_job
from mimogrid.shell.job.planning import searched


PLANS = Path(__file__).parents[1] / "examples/plans"
LLAVA = """precision = "bf16"
[modules.vision]
model = "vit"
feeds = ["language"]
trainable = ["projector.*"]
grid = {{ {grid}, offset = 0 }}
options = {{ layers = 24, hidden = 1024, heads = 16, features = 588 }}
[modules.language]
model = "gpt"
grid = {{ {grid}, offset = 0 }}
options = {{ layers = 32, hidden = 4096, heads = 32, kv_heads = {kv_heads}, ffn = {ffn}, vocab = 32000 }}
{more}
[data]
source = "synthetic"
options = {{ sequence = 2048, rows = {{ vision = [576, 576] }}, text = [64, 1024] }}
[batch]
global_size = {samples}
microbatches = {microbatches}
[optimizer]
sharded = true
"""
"""A CLIP tower that is not trained, a projector that is, and a language model of 7 billion parameters."""


@attrs.frozen
class Published:
    """A layout that somebody published: the job with it, by whom, and on how many GPUs of which kind."""

    name: str
    source: str
    gpus: int
    gpu: str
    job: Path | str


def _llava(grid: str, samples: int, microbatches: int, *, kv_heads: int, ffn: int, more: str) -> str:
    return LLAVA.format(
        grid=grid, samples=samples, microbatches=microbatches, kv_heads=kv_heads, ffn=ffn, more=more
    )


BRIDGE = "Megatron-Bridge, tutorial on MIMO"
PUBLISHED = (
    Published("Qwen3.5-VL-27B, 16 + 1 ranks", BRIDGE, 17, "h100", PLANS / "qwen27b_24.toml"),
    Published("the same, three nodes", BRIDGE, 24, "h100", PLANS / "qwen27b_24.toml"),
    Published(
        "72B, images and speech",
        "DistTrain, arXiv 2408.04275, which does not tell its grids",
        1172,
        "h100",
        PLANS / "omni72b_1172.toml",
    ),
    Published(
        "LLaVA-1.5-7B, fine-tuning",
        "LLaVA, scripts/v1_5/finetune.sh",
        8,
        "a100",
        _llava("dp = 8", 128, 1, kv_heads=32, ffn=16512, more='recompute = "full"'),
    ),
    Published(
        "LLaVA-1.5-7B, pretraining",
        "LLaVA, scripts/v1_5/pretrain.sh",
        4,
        "a100-40gb",
        _llava("dp = 4", 256, 4, kv_heads=32, ffn=16512, more='frozen = true\nrecompute = "full"'),
    ),
    Published(
        "CLIP and Mistral-7B",
        "Megatron-LM, examples/multimodal/pretrain_mistral_clip.sh",
        8,
        "h100",
        _llava(
            "tp = 4, dp = 2, sequence_parallel = true",
            256,
            128,
            kv_heads=8,
            ffn=21504,
            more="frozen = true",
        ),
    ),
)


def main() -> None:
    """Print a table in Markdown, a row for each publication."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="names that have this word")
    parser.add_argument("--out", type=Path, help="write all there, too")
    args = parser.parse_args()
    say = printer(args.out)
    say("| published | GPUs | tokens/s/GPU | MFU | planned | MFU | times | planned layout |")
    say("|---|---|---|---|---|---|---|---|")
    for each in PUBLISHED:
        if args.only in each.name:
            say(row(each))


def row(published: Published) -> str:
    """Return what a search finds beside a published layout."""
    job = opened(published.job)
    spec = attrs.evolve(
        job.spec,
        world_size=None,
        gpu=attrs.evolve(job.spec.gpu, name=published.gpu),
        optimizer=attrs.evolve(job.spec.optimizer, sharded=True),
    )
    samples = job.step(0).samples
    found = searched(Question(spec=spec, facts=job.topology.source, samples=samples, gpus=published.gpus))
    own, best = found.own, found.best
    assert best is not None
    runs = f"{own.tokens_per_s_per_gpu:,.0f} | {own.mfu:.1%}" if own.step_s else f"{own.reason} | -"
    times = f"{best.tokens_per_s_per_gpu / own.tokens_per_s_per_gpu:.2f}" if own.step_s else "-"
    return (
        f"| {published.name} ({published.source}) | {published.gpus:,} {published.gpu} | {runs} "
        f"| {best.tokens_per_s_per_gpu:,.0f} | {best.mfu:.1%} | {times} | {shown(best.spec)} |"
    )


def opened(job: Path | str) -> Job:
    """Open a job from its file, or from its text."""
    if isinstance(job, Path):
        return open_job(job)
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(job)
        file.flush()
        return open_job(file.name)


if __name__ == "__main__":
    main()
