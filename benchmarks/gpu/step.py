"""A step of a CLIP encoder and a language model on one device: time, MFU, memory; and beside megatron-core's MimoModel.

    python benchmarks/gpu/step.py [--models 1b 7b] [--sequences 2048 4096] [--pairs 10] [--json FILE]
    python benchmarks/gpu/step.py --tiny --device cpu

Weights and samples are random. The step is that of a job: planned, run by the executor, agreed on and taken. Samples
are made once, and kept.

MimoModel gets the very networks of the job, so weights and layers are the same, and so is the memory of their
gradients. Both run the forwards and backwards of a step and its gradient norm, by turns, without an update; their
losses and norms are compared first.
"""

import argparse
import gc
import json
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from megatron.core import parallel_state

from mimogrid.core.flops import model_flops
from mimogrid.core.models import Gpt, Vit
from mimogrid.core.schedule.actions import Action
from mimogrid.core.schedule.lower import plan_step
from mimogrid.core.spec import (
    BatchSpec,
    DataSpec,
    GridSpec,
    JobSpec,
    ModuleSpec,
    OptimizerSpec,
    TrainSpec,
)
from mimogrid.core.steps import Step
from mimogrid.shell import jobfile
from mimogrid.shell.data import Loader, Loads
from mimogrid.shell.device import DTYPES
from mimogrid.shell.execute import execute
from mimogrid.shell.jobs import open_job
from mimogrid.shell.place import Place
from mimogrid.shell.session import Session, open_session


CLIP = Vit(layers=24, hidden=1024, heads=16, features=3 * 14 * 14)
"""ViT-L/14 at 336 pixels: 576 patches of an image."""
PATCHES = 576
# The sizes of TinyLlama and Llama 2. Their MLPs have three matrices, ours two, half again as wide.
LANGUAGE = {
    "1b": Gpt(layers=22, hidden=2048, heads=32, kv_heads=4, ffn=8448, vocab=32000),
    "7b": Gpt(layers=32, hidden=4096, heads=32, ffn=16512, vocab=32000),
}
OPTIMIZER = {"1b": "adamw", "7b": "sgd"}
"""AdamW's moments of 7 billion parameters would leave no room for activations."""
TINY = (
    Vit(layers=2, hidden=32, heads=4, features=12),
    Gpt(layers=2, hidden=32, heads=4, vocab=64),
)
WARM_UP = 3


class Kept:
    """A source that makes every sample once."""

    def __init__(self, source: Loads) -> None:
        self._source = source
        self._made: dict[tuple[int, str], Mapping[str, torch.Tensor]] = {}

    def load(self, sample_id: int, module: str) -> Mapping[str, torch.Tensor]:
        """Return what the source does."""
        key = sample_id, module
        if key not in self._made:
            self._made[key] = self._source.load(sample_id, module)
        return self._made[key]


def job_of(arguments: argparse.Namespace, model: str, sequence: int) -> JobSpec:
    """Return the job: both modules on one rank."""
    vision, language, patches = (*TINY, 4) if arguments.tiny else (CLIP, LANGUAGE[model], PATCHES)
    text = sequence - patches
    modules = {
        "vision": ModuleSpec(model="vit", options=vision, feeds=("language",), engine=arguments.engine),
        "language": ModuleSpec(
            model="gpt", options=language, grid=GridSpec(offset=0), engine=arguments.engine
        ),
    }
    options = {"sequence": sequence, "rows": {"vision": [patches, patches]}, "text": [text, text]}
    return JobSpec(
        modules=modules,
        data=DataSpec(source="synthetic", options=options),
        batch=BatchSpec(
            global_size=arguments.samples * arguments.microbatches, microbatches=arguments.microbatches
        ),
        optimizer=OptimizerSpec(name="adamw" if arguments.tiny else OPTIMIZER[model], betas=None),
        train=TrainSpec(steps=1_000_000, evaluate=False),
        precision=arguments.precision,
    )


# -- measuring ---------------------------------------------------------------------------------------------


def seconds(session: Session, body: Callable[[], object]) -> float:
    """Return how long a body takes, the device's part included."""
    session.device.finish()
    begin = time.perf_counter()
    body()
    session.device.finish()
    return time.perf_counter() - begin


def peak_flops_per_s(session: Session, *, size: int) -> float:
    """Return what a large product of matrices reaches."""
    dtype = torch.bfloat16 if session.device.is_asynchronous else torch.float32
    left, right = (torch.randn(size, size, dtype=dtype, device=session.device.torch) for _ in range(2))

    def multiply() -> None:
        for _ in range(10):
            left @ right

    multiply()
    return 10 * 2 * size**3 / min(seconds(session, multiply) for _ in range(5))


class Idle:
    """A stage, a transport and a finisher that do nothing."""

    dtype = torch.float32

    def __getattr__(self, name: str) -> Callable[..., tuple[()]]:
        return lambda *_: ()


def own_cost_us(session: Session, actions: tuple[Action, ...]) -> float:
    """Return what the executor itself takes for an action, in microseconds of the host."""
    idle: Any = Idle()
    stages: Any = {action.stage: idle for action in actions if hasattr(action, "stage")}
    stages |= {action.transfer.stage: idle for action in actions if hasattr(action, "transfer")}
    times = []
    for _ in range(50):
        begin = time.perf_counter()
        execute(actions, stages, idle, idle, session.crew.pulse)  # type: ignore[union-attr]
        times.append((time.perf_counter() - begin) / len(actions))
    return 1e6 * statistics.median(times)


def measure(arguments: argparse.Namespace, model: str, sequence: int) -> dict[str, Any]:
    """Measure one job."""
    spec = job_of(arguments, model, sequence)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "job.toml")
        path.write_text(jobfile.dump(spec), encoding="utf-8")
        job = open_job(path)
        place = Place(0, 1, str(Path(folder, "meeting")))
        with open_session(place, job, transport="nccl" if arguments.device == "cuda" else None) as session:
            crew = session.crew
            assert crew is not None
            assert job.source is not None
            step, source = job.step(0), Kept(job.source)
            if arguments.device == "cuda":
                torch.cuda.reset_peak_memory_stats()

            def train(*, update: bool = True) -> Any:
                return crew.run(0, step, step, update=update, source=source)

            beside = beside_mimo(session, step, source, arguments.pairs)
            for _ in range(WARM_UP):
                train()
            times = [seconds(session, train) for _ in range(arguments.steps)]
            step_s = statistics.median(times)
            peak = peak_flops_per_s(session, size=512 if arguments.tiny else 8192)
            flops = sum(model_flops(step).values())
            actions = plan_step(step).of(0)
            asked = [(t.end_ns - t.begin_ns) / 1e3 for t in train().timeline]
            return {
                "model": "tiny" if arguments.tiny else model,
                "sequence": sequence,
                "samples": len(step.samples),
                "microbatches": arguments.microbatches,
                "precision": arguments.precision,
                "layers": {
                    str(s): r.network.layers_by.engine for s, r in crew.stages.items() if r.network.layers_by
                },
                "parameters": sum(w.numel() for of in crew.weights().values() for w in of.values()),
                "step_s": step_s,
                "step_s_spread": [min(times), max(times)],
                "tokens_per_s": sequence * len(step.samples) / step_s,
                "tflop_per_s": flops / step_s / 1e12,
                "peak_tflop_per_s": peak / 1e12,
                "mfu": flops / step_s / peak,
                "peak_bytes": torch.cuda.max_memory_allocated() if arguments.device == "cuda" else None,
                "actions": len(actions),
                "own_cost_us_per_action": own_cost_us(session, actions),
                "host_us_per_action_with_its_work": statistics.median(asked),
                "mimo_model": beside,
            }


# -- megatron-core's MimoModel -----------------------------------------------------------------------------


def beside_mimo(session: Session, step: Step, source: Loads, pairs: int) -> dict[str, Any]:
    """Compare with MimoModel; `skipped` says why not, where that cannot be."""
    # Its loss asks a global of megatron's for the tp ranks.
    alone = session.groups.alone().tp
    with patch.object(parallel_state, "_TENSOR_MODEL_PARALLEL_GROUP", alone), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is experimental
        try:
            theirs = mimo_step(session, step, source)
        except Exception as error:  # One command measures and tells all: what is not there is told, too.
            return {"skipped": f"{type(error).__name__}: {error}"}
        return by_turns(session, step, source, theirs, pairs)


def by_turns(
    session: Session, step: Step, source: Loads, theirs: Callable[[], tuple[float, float]], pairs: int
) -> dict[str, Any]:
    """Compare losses and norms, then time both, first one and then the other going first."""
    crew = session.crew
    assert crew is not None

    def ours() -> tuple[float, float]:
        outcome = crew.run(0, step, step, update=False, source=source)
        return outcome.loss, outcome.gradient_norm

    for _ in range(WARM_UP):
        (our_loss, our_norm), (their_loss, their_norm) = ours(), theirs()
    ratios = []
    for pair in range(pairs):
        took = {body: seconds(session, body) for body in ((ours, theirs) if pair % 2 else (theirs, ours))}
        ratios.append(took[ours] / took[theirs])
    return {
        "loss": [our_loss, their_loss],
        "gradient_norm": [our_norm, their_norm],
        "ratio_median": statistics.median(ratios),
        "ratio_spread": [min(ratios), max(ratios)],
        "pairs": pairs,
    }


def mimo_step(session: Session, step: Step, source: Loads) -> Callable[[], tuple[float, float]]:
    """Return what runs a step of MimoModel on the networks of the job, and gives its loss and gradient norm."""
    from megatron.core.models.mimo.config import MimoModelConfig  # noqa: PLC0415 -- may be missing
    from megatron.core.models.mimo.model.base import MimoModel  # noqa: PLC0415
    from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules  # noqa: PLC0415
    from megatron.core.transformer.spec_utils import ModuleSpec as Specification  # noqa: PLC0415

    crew = session.crew
    assert crew is not None
    (vision,) = (r.network for s, r in crew.stages.items() if s.module == "vision")
    (language,) = (r.network for s, r in crew.stages.items() if s.module == "language")
    topology = step.topology
    placeholder = language.network.vocab_size  # no id of the text, and never embedded

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.given = vision

        def forward(self, rows: torch.Tensor, share: Any) -> torch.Tensor:
            """Return the rows for the language model, sample after sample."""
            return self.given({"rows": rows}, share)["language"]

    class Language(torch.nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            del config
            self.given = language.network

        @property
        def embedding(self) -> Any:
            """What MimoModel embeds text with."""
            return self.given.embedding

        def forward(self, **inputs: Any) -> torch.Tensor:
            """Return the loss of each position."""
            return self.given(**inputs)

    encoder = Specification(
        module=VisionModalitySubmodules, submodules={"encoders": {"clip": Specification(module=Encoder)}}
    )
    config = MimoModelConfig(
        language_model_spec=Specification(module=Language, params={"config": language.config}),
        modality_submodules_spec={"vision": encoder},
        special_token_ids={"vision": placeholder},
    )
    model = MimoModel(config)
    loader = Loader(source, device=session.device.torch, dtype=DTYPES[crew.job.spec.precision])
    modules = topology.modules

    def batch(microbatch: int) -> dict[str, Any]:
        shares = {name: step.share(name, 0, microbatch) for name in modules}
        rows = loader.inputs(modules["vision"], shares["vision"])["rows"]
        text = shares["language"]
        tokens = loader.inputs(modules["language"], text)["tokens"].view(len(text.lengths), -1)
        targets = loader.targets(modules["language"], text)
        ids = torch.where(tokens < 0, placeholder, tokens)
        return {
            "input_ids": ids,
            "position_ids": torch.arange(ids.shape[1], device=ids.device).expand_as(ids),
            "labels": targets["labels"].view_as(ids),
            "loss_mask": targets["loss_weights"].view_as(ids),
            "modality_inputs": {"vision": {"clip": {"rows": rows, "share": shares["vision"]}}},
        }

    def run() -> tuple[float, float]:
        for buffer in crew.buffers.values():
            buffer.clear()
        total = torch.zeros((), device=session.device.torch)
        for microbatch in range(topology.spec.batch.microbatches):
            losses, mask = model(**batch(microbatch))
            loss = (losses.float() * mask).sum() / step.units["language"]
            loss.backward()
            total += loss.detach()
        squares = (square for buffer in crew.buffers.values() for square in buffer.partials())
        return float(total), sum(squares) ** 0.5

    run()
    return run


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model of a few thousand parameters")
    parser.add_argument("--models", nargs="+", choices=sorted(LANGUAGE), default=["1b", "7b"])
    parser.add_argument("--sequences", nargs="+", type=int, default=[2048, 4096])
    parser.add_argument("--samples", type=int, default=2, help="of a microbatch")
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--engine", choices=["auto", "local", "transformer_engine"], default="auto")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no CUDA device; --tiny --device cpu shows that the rest works.")
    if arguments.tiny:
        arguments.models, arguments.sequences = ["1b"], [32]
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor()
    found: dict[str, Any] = {"device": name, "torch": torch.__version__, "jobs": []}
    for model in arguments.models:
        for sequence in arguments.sequences:
            try:
                found["jobs"].append(measure(arguments, model, sequence))
            except torch.cuda.OutOfMemoryError as error:
                found["jobs"].append({"model": model, "sequence": sequence, "failed": str(error)})
            gc.collect()  # before the next model needs the memory of this one
            if arguments.device == "cuda":
                torch.cuda.empty_cache()
            print(json.dumps(found["jobs"][-1], indent=2), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
