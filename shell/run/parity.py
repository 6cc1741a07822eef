"""Parity: a job's layout against the same model on one process, gradient by gradient.

The reference is plain: one process, the whole batch at once, modules called one after the other in graph order, one
backward. It shares the networks and the loading of samples with the layout, and nothing else: no routes, no program, no
transport, no reduction.

In half precision both are compared with the reference in fp32 (see `_compared_with_one_process`).

The difference of a gradient is its largest difference of a value, divided by the larger of two scales: the largest
value of this gradient, and the root mean square of all gradients of its module. The second is for gradients that are
zero but for rounding, such as that of a key's bias where nothing turns: a softmax does not change with it.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping

import attrs
import torch

from mimogrid.core.job.models import unpadded
from mimogrid.core.job.precision import HALF
from mimogrid.core.job.spec import GridSpec, JobSpec
from mimogrid.core.step.seeds import draw_key
from mimogrid.core.step.step import Step, aux_name, step_of
from mimogrid.core.topology.parse import parse
from mimogrid.core.topology.topology import Topology
from mimogrid.core.update.reductions import loss_scale
from mimogrid.shell.device.device import DTYPES, Device
from mimogrid.shell.device.place import RankPlace
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.modules.construction import build_stage, round_weights
from mimogrid.shell.modules.interface import StageModule, named_weights
from mimogrid.shell.runtime.agreement import Outcome
from mimogrid.shell.runtime.data import Loader
from mimogrid.shell.runtime.rank import RankRuntime
from mimogrid.shell.runtime.session import Session, open_session
from mimogrid.shell.runtime.tensor_slices import Tensors, full_tensors, gradients_of
from mimogrid.shell.runtime.train_step import train_step
from mimogrid.shell.world.groups import ModuleGroups
from mimogrid.shell.world.waiting import waiting


TOLERANCE = {"fp64": 1e-9, "fp32": 1e-5}
"""How far a layout may be from one process in the same precision."""
TIMES = 3.0
"""How many times the rounding error of one process in half precision a layout may be away from fp32."""

SHOWN = 8
"""How many of the worst parameters are shown."""
NAME_LEAST = 44
"""How wide the column of their names is at least."""

Gradients = Tensors
"""Full gradients by ``module.parameter``."""


@attrs.frozen
class Difference:
    """How a parameter's gradient differs from the reference.

    Attributes:
        parameter: ``module.parameter``.
        difference: the largest difference of a value, relative to the larger of `reference` and the root mean square
            of the module's gradients.
        magnitude: the largest value of the layout's gradient.
        reference: the largest value of the reference's.
    """

    parameter: str
    difference: float
    magnitude: float
    reference: float


@attrs.frozen
class ParityReport:
    """The relative differences of the loss and of the gradients, and the tolerance.

    Attributes:
        loss: the difference of the losses.
        gradients: the largest difference of a gradient.
        worst: every parameter, the largest difference first.
        precision: that of the job.
        limit: how large a difference may be.
    """

    loss: float
    gradients: float
    worst: tuple[Difference, ...]
    precision: str
    limit: float

    @property
    def passed(self) -> bool:
        """Whether nothing differs by more than the tolerance."""
        return max(self.loss, self.gradients) <= self.limit

    def as_json(self) -> dict[str, object]:
        """Return the report with the worst parameters, for a script."""
        whole = {"passed": self.passed, **attrs.asdict(self)}
        return whole | {"worst": whole["worst"][:SHOWN]}

    def __str__(self) -> str:
        """Return the report with the worst parameters, for people."""
        reference = "relative to fp32; " if self.precision in HALF else ""
        shown = self.worst[:SHOWN]
        width = max([NAME_LEAST, *(len(d.parameter) for d in shown)])
        lines = [
            f"{'passed' if self.passed else 'FAILED'}: loss differs by {self.loss:.2e}, gradients by at "
            f"most {self.gradients:.2e} ({reference}{self.precision} tolerance: {self.limit:.2g})",
            "a gradient is compared by its largest value, or by the rms of its module's gradients if that is larger",
            f"{'worst parameters':{width}} {'difference':>10} {'largest':>10} {'reference':>10}",
        ]
        lines += [
            f"{d.parameter:{width}} {d.difference:10.2e} {d.magnitude:10.2e} {d.reference:10.2e}"
            for d in shown
        ]
        return "\n".join(lines)


def on_one_process(
    job: Job,
    step: Step,
    groups: ModuleGroups,
    device: Device,
    *,
    precision: str | None = None,
    microbatches: int = 1,
    scale: float = 1.0,
    index: int = 0,
) -> tuple[float, Gradients]:
    """Return loss and gradients of a step's samples on one process; `groups` hold this rank alone.

    `index` is the number of the step. None as precision is that of the job. `scale` multiplies losses during their
    backward; gradients are unscaled again.
    """
    spec = _undivided(job.spec, microbatches, precision or job.spec.precision)
    topology = parse(spec, job.topology.source)
    whole = step_of(topology, step.samples)
    dtype = DTYPES[spec.precision]
    assert job.source is not None
    loader = Loader(job.source, device=device.torch, dtype=dtype)
    networks = _networks(topology, groups, device, dtype)
    for name, network in networks.items():
        network.loss_scale = scale
        network.draw_key = draw_key(spec.seed, name, step=index)
    total = 0.0
    for microbatch in range(microbatches):
        loss = _loss(whole, microbatch, networks, loader)
        total += float(loss.detach())
        if loss.requires_grad:
            loss.backward(torch.full_like(loss, scale))
    return total, {
        f"{name}.{weight}": parameter.grad / scale
        for name, network in networks.items()
        for weight, parameter in named_weights(network).items()
        if parameter.grad is not None
    }


def _networks(
    topology: Topology, groups: ModuleGroups, device: Device, dtype: torch.dtype
) -> dict[str, StageModule]:
    """Build every module as one stage, with gradients as exact as those that training sums."""
    networks = {
        name: build_stage(topology, module.stages[0], groups, device=device.torch, dtype=dtype)
        for name, module in topology.modules.items()
    }
    for network in networks.values():
        round_weights(network, topology)
        for weight in named_weights(network).values():
            weight.grad_dtype = torch.promote_types(dtype, torch.float32)
    return networks


def _loss(whole: Step, microbatch: int, networks: Mapping[str, StageModule], loader: Loader) -> torch.Tensor:
    """Return the loss of a microbatch, module after module."""
    topology = whole.topology
    exact = torch.promote_types(loader.dtype, torch.float32)
    loss = torch.zeros((), dtype=exact, device=loader.device)
    rows: dict[tuple[str, str], torch.Tensor] = {}
    for name in topology.graph.order:
        module, share = topology.modules[name], whole.share(name, 0, microbatch)
        if share.is_empty:
            rows |= {(name, edge.target): _no_rows(edge.width, loader) for edge in module.outputs}
            continue
        entire = networks[name].reads_entire
        inputs = loader.inputs(module, share, entire=entire) | loader.targets(module, share)
        inputs |= {edge.source: rows[edge.source, name] for edge in module.inputs}
        outputs = networks[name](inputs, share)
        rows |= {(name, edge.target): outputs[edge.target] for edge in module.outputs}
        if module.model.has_loss:
            loss = loss + loss_scale(topology, name, whole.units[name]) * outputs["loss"]
        if module.aux_loss:
            loss = loss + module.aux_loss / whole.units[aux_name(name)] * outputs[aux_name(name)]
    return loss


def compare(
    losses: tuple[float, float],
    ours: Gradients,
    reference: Gradients,
    *,
    precision: str,
    limit: float | None = None,
    module: Callable[[str], str] | None = None,
) -> ParityReport:
    """Compare (our, the reference's) loss, and gradients; None as limit is the precision's tolerance.

    `module` returns the module of a name; by default it is a ``module.parameter``.
    """
    module = module or module_of
    floors = _floors(reference, module)
    names = sorted({*ours, *reference})
    worst = sorted(
        (_difference(name, ours.get(name), reference.get(name), floors[module(name)]) for name in names),
        key=lambda d: (-d.difference, d.parameter),
    )
    loss = relative(losses[0], losses[1])
    gradients = worst[0].difference if worst else 0.0
    tolerance = TOLERANCE[precision] if limit is None else limit
    return ParityReport(loss, gradients, tuple(worst), precision, tolerance)


def relative(ours: float, reference: float) -> float:
    """Return how far a loss is from the reference's."""
    return abs(ours - reference) / max(abs(reference), 1e-30) if ours != reference else 0.0


def _difference(
    name: str, ours: torch.Tensor | None, reference: torch.Tensor | None, floor: float
) -> Difference:
    """Compare a gradient, by its own scale or the `floor`."""
    magnitude, expected = _magnitude(ours), _magnitude(reference)
    if ours is None or reference is None:
        difference = math.inf if magnitude or expected else 0.0
        return Difference(name, difference, magnitude, expected)
    apart = float((ours.double() - reference.double()).abs().max())
    scale = max(expected, floor)
    difference = apart / scale if scale else (math.inf if apart else 0.0)
    return Difference(name, math.inf if math.isnan(apart) else difference, magnitude, expected)


def module_of(name: str) -> str:
    """Return the module of a ``module.parameter``."""
    return name.split(".", 1)[0]


def _magnitude(tensor: torch.Tensor | None) -> float:
    return 0.0 if tensor is None or tensor.numel() == 0 else float(tensor.abs().max())


def _floors(gradients: Gradients, module: Callable[[str], str]) -> Mapping[str, float]:
    """Return the root mean square of each module's gradients; that of all for a module without any."""
    squares, counts = defaultdict[str, float](float), defaultdict[str, int](int)
    for name, gradient in gradients.items():
        squares[module(name)] += float(gradient.double().square().sum())
        counts[module(name)] += gradient.numel()
    rms = {name: math.sqrt(square / max(counts[name], 1)) for name, square in squares.items()}
    overall = math.sqrt(sum(squares.values()) / max(sum(counts.values()), 1))
    return defaultdict(lambda: overall, {name: found for name, found in rms.items() if found})


def _undivided(spec: JobSpec, microbatches: int, precision: str) -> JobSpec:
    """Return the same model on one rank: every grid of size 1, no padding, no fp8 if the precision is another."""
    modules = {
        name: attrs.evolve(
            module,
            options=unpadded(module.options),
            grid=GridSpec(offset=0),
            split=None,
            microbatches=None,
            chunks=1,
            fp8=module.fp8 if precision == spec.precision else "none",
        )
        for name, module in spec.modules.items()
    }
    batch = attrs.evolve(spec.batch, microbatches=microbatches, tokens_per_microbatch=0)
    return attrs.evolve(spec, modules=modules, batch=batch, world_size=None, precision=precision)


def _no_rows(width: int, loader: Loader) -> torch.Tensor:
    return torch.empty(0, width, dtype=loader.dtype, device=loader.device)


def in_world(
    place: RankPlace, job: Job, steps: int, transport: str | None = None, speaks: bool = False
) -> ParityReport | None:
    """Compare steps of a job, on every rank of its world; the first rank of the job returns the worst report.

    If it `speaks`, that rank says what it is at.
    """
    with open_session(place, job, transport=transport, speaks=speaks) as session:
        if session.runtime is None:
            return None
        is_first = place.rank == job.topology.ranks[0]
        reports = []
        with waiting(None, silent=not (speaks and is_first), in_place=False) as shown:
            for index in range(steps):
                step, of = job.step(index), f"step {index + 1} of {steps}"
                shown.say(f"{of} on {len(job.topology.ranks)} ranks")
                outcome = run_without_overflow(session.runtime, index, step)
                ours = full_gradients(session.runtime)
                if is_first:
                    shown.say(f"{of} on one process")
                    reports.append(
                        _compared_with_one_process(session, job, step, index, (outcome.loss, ours))
                    )
        return max(reports, key=lambda report: max(report.gradients, report.loss)) if reports else None


def run_without_overflow(runtime: RankRuntime, index: int, step: Step) -> Outcome:
    """Run a step without updating; in fp16 lower the loss scale until nothing overflows, as training would."""
    while True:
        outcome = train_step(runtime, index, step, step, update=False)
        lower = max(runtime.skip_state.scale / 2, 1.0)
        if outcome.taken or lower == runtime.skip_state.scale:
            return outcome
        runtime.skip_state = attrs.evolve(runtime.skip_state, scale=lower)


def _compared_with_one_process(
    session: Session, job: Job, step: Step, index: int, ours: tuple[float, Gradients]
) -> ParityReport:
    """Compare with one process in the same precision.

    In half precision, sums in another order differ by as much as rounding does. So there both are compared with fp32:
    the layout must not be more than `TIMES` as far from it as the one process is, with the same microbatches and loss
    scale.
    """
    (loss, gradients), precision = ours, job.spec.precision
    alone, device = session.groups.alone(), session.device
    if precision not in HALF:
        reference = on_one_process(job, step, alone, device, index=index)
        return compare((loss, reference[0]), gradients, reference[1], precision=precision)
    assert session.runtime
    count, scale = step.topology.spec.batch.microbatches, session.runtime.skip_state.scale
    exact = on_one_process(job, step, alone, device, precision="fp32", index=index)
    rounded = on_one_process(job, step, alone, device, microbatches=count, scale=scale, index=index)
    by_rounding = compare((rounded[0], exact[0]), rounded[1], exact[1], precision=precision, limit=math.inf)
    limit = TIMES * max(by_rounding.loss, by_rounding.gradients)
    return compare((loss, exact[0]), gradients, exact[1], precision=precision, limit=limit)


def full_gradients(runtime: RankRuntime) -> Gradients:
    """Return every full gradient of the job on its first rank, and nothing on others."""
    return full_tensors(runtime, gradients_of(runtime))
