"""Alone: a job on one rank: step time, MFU, memory and own cost; and beside it `MimoModel`.

`MimoModel` runs the forwards and backwards of a step and takes its gradient norm, on the same networks, weights and
samples; so does the job, which stops before the update. Losses and norms are compared before anything is timed.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from bench import WARM_UP, Bench, compared, open_bench, peak_bytes
from mimo import as_megatron_is_run, batches, clear, loss_of, model_of, squared_norm
from mimogrid.core.pricing.flops import model_flops
from mimogrid.shell.device.place import RankPlace
from mimogrid.shell.device.streams import Streams
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.runtime.execute import RankContext, execute
from mimogrid.shell.runtime.tensor_slices import weights_of
from workload import Options


PRODUCT = {True: 8192, False: 512}
"""The size of the matrices whose product shows what the device reaches, on a GPU and on a CPU."""


def in_world(place: RankPlace, job: Job, options: Options) -> dict[str, Any]:
    """Measure a job on its one rank."""
    with open_bench(place, job, options) as bench:
        beside = beside_mimo(bench, options.pairs)
        peak_bytes(bench.device)
        return step_of(bench, options.steps) | {"mimo_model": beside}


def step_of(bench: Bench, steps: int) -> dict[str, Any]:
    """Measure steps with their updates."""
    for _ in range(WARM_UP):
        bench.train()
    times = [bench.seconds(bench.train) for _ in range(steps)]
    step_s, most = statistics.median(times), peak_bytes(bench.device)
    peak = peak_flops_per_s(bench, size=PRODUCT[bench.device.is_asynchronous])
    flops = sum(model_flops(bench.step).values())
    tokens = bench.step.topology.sequence * len(bench.step.samples)
    return {
        "layers": {
            str(stage): runner.network.layers_by.engine for stage, runner in bench.runtime.stages.items()
        },
        "parameters": sum(w.numel() for of in weights_of(bench.runtime).values() for w in of.values()),
        "step_s": step_s,
        "step_s_spread": [min(times), max(times)],
        "tokens_per_s": tokens / step_s,
        "tflop_per_s": flops / step_s / 1e12,
        "peak_tflop_per_s": peak / 1e12,
        "mfu": flops / step_s / peak,
        "peak_bytes": most,
        **own_cost(bench),
    }


def peak_flops_per_s(bench: Bench, *, size: int) -> float:
    """Return what a large product of matrices reaches, in bf16 on a GPU and in fp32 on a CPU."""
    device = bench.device
    dtype = torch.bfloat16 if device.is_asynchronous else torch.float32
    left, right = (torch.randn(size, size, dtype=dtype, device=device.torch) for _ in range(2))

    def multiply() -> None:
        for _ in range(10):
            left @ right

    multiply()
    return 10 * 2 * size**3 / min(bench.seconds(multiply) for _ in range(5))


class Idle:
    """A stage, a transport, buffers and the end of a step that do nothing."""

    dtype = torch.float32

    def __init__(self, streams: Streams) -> None:
        self.streams = streams

    @property
    def buffers(self) -> defaultdict[int, "Idle"]:
        """Buckets that do nothing."""
        return defaultdict(lambda: self)

    def __getattr__(self, name: str) -> Callable[..., tuple[()]]:
        return lambda *_: ()


def own_cost(bench: Bench) -> dict[str, Any]:
    """Return what the executor itself takes for an action, in microseconds of the host; and with its work."""
    actions, idle = (
        bench.runtime.job.program_of(bench.step).of(bench.runtime.rank),
        Idle(bench.device.streams),
    )
    stages: Any = dict.fromkeys(bench.runtime.stages, idle)
    context = RankContext(stages, stages, idle, bench.runtime.heartbeat, releases={}, end=idle)  # type: ignore[arg-type]
    times = []
    for _ in range(50):
        took = bench.seconds(lambda: execute(actions, context))
        times.append(took / len(actions))
    asked = [timed.end.asked_ns - timed.begin.asked_ns for timed in bench.train().timeline]
    return {
        "actions": len(actions),
        "own_cost_us_per_action": 1e6 * statistics.median(times),
        "host_us_per_action_with_its_work": statistics.median(asked) / 1e3,
    }


# -- megatron-core's MimoModel -----------------------------------------------------------------------------


def beside_mimo(bench: Bench, pairs: int) -> dict[str, Any]:
    """Compare with MimoModel; `failed` says why not, where it does not run."""
    with as_megatron_is_run(bench):
        try:
            theirs = step_of_mimo(bench)
            theirs()
        except Exception as error:  # What is our own is measured all the same.
            return {"failed": f"{type(error).__name__}: {error}"}
        return compared(bench, theirs, pairs)


def step_of_mimo(bench: Bench) -> Callable[[], tuple[float, float]]:
    """Return what runs a step of MimoModel on this rank, and gives its loss and gradient norm."""
    (language,) = (r.network for s, r in bench.runtime.stages.items() if s.module == "language")
    model = model_of(bench, language.config)

    def run() -> tuple[float, float]:
        clear(bench)
        total = torch.zeros((), device=bench.device.torch)
        for batch in batches(bench):
            loss = loss_of(bench, *model(**batch))
            loss.backward()
            total += loss.detach()
        return float(total), squared_norm(bench) ** 0.5

    return run
