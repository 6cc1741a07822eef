"""Ray: a job trained by Ray Train, with a worker for each rank.

    from mimogrid.adapters.ray import RayJob

    result = RayJob("job.toml").run(ScalingConfig(num_workers=4), RunConfig(name="first"))

Ray starts the workers, restarts them after a failure (`FailureConfig`), and keeps the checkpoints. A restarted job goes
on from the newest one as if it had never stopped, and under another layout if Ray has fewer or more workers now
(`layouts` in the job file). docs/ray.md shows it, and how another program embeds a job in workers of its own.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import ray
import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from safetensors.torch import load_file

from mimogrid.adapters.torch_module import FACTS, Embedded
from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.job.changes import refused
from mimogrid.core.topology.nodes import cuts_of, ranks_of_nodes
from mimogrid.core.topology.topology import Topology
from mimogrid.shell.checkpoint.files import write_file
from mimogrid.shell.job import jobfile
from mimogrid.shell.job.jobs import Job, open_job
from mimogrid.shell.runtime.agreement import Outcome


TENSORS, REST = "state.safetensors", "state.json"
"""The files of a checkpoint: full tensors by layout-independent name, and the rest of the state with the job."""
NODE = "ray.io/node-id"
"""The label that Ray gives each node."""


def _absolute(path: Path | str) -> Path:
    return Path(path).resolve()


@attrs.frozen
class RayJob:
    """A job file, which all nodes see under one path, with overrides; it reports after so many steps.

    Ray waits for all workers at each report. Checkpoints are reported as `train.checkpoint_every` says, and at the end.
    """

    job: Path = attrs.field(converter=_absolute)
    overrides: Sequence[str] = ()
    report_every: int = 1

    def run(self, scaling: ScalingConfig, run: RunConfig | None = None) -> ray.train.Result:
        """Train the job; return Ray's result, whose metrics are those of the last step.

        Raises PlanError for a wrong job, and for too few workers, before anything starts. Otherwise it raises what Ray
        raises (`TrainingFailedError`).
        """
        job = open_job(self.job, self.overrides, ranks=scaling.max_workers)
        if problem := _too_few(job, scaling.max_workers):
            raise PlanError([problem])
        if not ray.is_initialized():
            ray.init()
        settings = {"job": str(self.job), "overrides": [*self.overrides], "report_every": self.report_every}
        trainer = TorchTrainer(
            train,
            train_loop_config=settings,
            torch_config=TorchConfig(timeout_s=round(job.spec.train.timeout_s)),
            scaling_config=placed(job.topology, scaling, ray.nodes()),
            run_config=run,
        )
        return trainer.fit()


def train(settings: Mapping[str, Any]) -> None:
    """Train a job on a worker, from the checkpoint that Ray gives or from the start."""
    context = ray.train.get_context()
    job = open_job(settings["job"], settings["overrides"], ranks=context.get_world_size())
    limits = job.spec.train
    torch.set_num_threads(limits.threads)
    with Embedded(job, device=ray.train.torch.get_device()) as embedded:
        restore(embedded, ray.train.get_checkpoint())
        while embedded.index < limits.steps:
            outcome = embedded.step()
            done = embedded.index
            every = limits.checkpoint_every
            is_saved = done >= limits.steps or bool(every and done % every == 0)
            if is_saved or done % settings["report_every"] == 0:
                report(embedded, outcome, with_state=is_saved)


def report(embedded: Embedded, outcome: Outcome | None, *, with_state: bool = True) -> None:
    """Report the last step to Ray, with a checkpoint from the first rank of the job; every worker calls it."""
    metrics = {} if outcome is None else _metrics(embedded.index, outcome)
    state = embedded.state_dict() if with_state else {}
    if not state:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder), state, embedded.job)
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder))


def restore(embedded: Embedded, checkpoint: Checkpoint | None) -> None:
    """Load a checkpoint that `report` has written, under any layout; every worker calls it.

    Raises PlanError if it is one of another job.
    """
    if checkpoint is None:
        return
    with checkpoint.as_directory() as folder:
        rest = json.loads(Path(folder, REST).read_text(encoding="utf-8"))
        before = jobfile.recorded(rest["job"], Path(folder, REST))
        if differing := list(refused(before, embedded.job.spec, accepted=())):
            remedy = "Name another run (RunConfig.name), or train the job that began this one."
            raise PlanError(
                Problem(each.key, f"is {each.after!r}; the checkpoint has {each.before!r}.", remedy)
                for each in differing
            )
        role = embedded.role
        is_first = role is not None and role.rank == embedded.job.topology.ranks[0]
        tensors = load_file(Path(folder, TENSORS)) if is_first else {}
        embedded.load_state_dict({**tensors, FACTS: rest[FACTS]})


def placed(topology: Topology, scaling: ScalingConfig, nodes: Sequence[Mapping[str, Any]]) -> ScalingConfig:
    """Return a scaling under which no tp group is on two nodes; that of the user, where it says where workers go.

    `nodes` are Ray's. Alike nodes that end between two tp groups need nothing: Ray fills one after the other. Otherwise
    workers get the label of a node, as many as it can take. Raises PlanError if the nodes have too few places.
    """
    each = scaling._resources_per_worker_not_none  # with its defaults
    alive = sorted(
        ((_places(node["Resources"], each), node["NodeID"]) for node in nodes if node["Alive"]), reverse=True
    )
    places = [count for count, _ in alive]
    ranks, cuts = topology.world_size, cuts_of(topology)
    is_free = len(set(places)) == 1 and all(cut in cuts for cut in range(0, ranks, max(places[0], 1)))
    is_said = scaling.label_selector is not None or scaling.elasticity_enabled
    if (
        is_said or is_free or scaling.max_workers != ranks or sum(places) < ranks
    ):  # Ray may be about to add nodes
        return scaling
    taken = ranks_of_nodes(topology, places)
    if taken is None:
        message = f"the nodes have {places} places, and a tp group would be on two of them."
        raise PlanError([Problem("ScalingConfig", message, "Use smaller tp, or larger nodes.")])
    labels = [{NODE: node} for count, (_, node) in zip(taken, alive, strict=True) for _ in range(count)]
    scaling.label_selector = labels
    return scaling


def _places(resources: Mapping[str, float], each: Mapping[str, float]) -> int:
    """Return how many workers a node can take."""
    return min(int(resources.get(name, 0.0) // count) for name, count in each.items() if count)


def _too_few(job: Job, workers: int) -> Problem | None:
    needed = job.topology.world_size
    if workers >= needed:
        return None
    remedy = f"Use num_workers={needed} or more, or make the grids smaller."
    return Problem("ScalingConfig.num_workers", f"is {workers}, and the job needs {needed} ranks.", remedy)


def _metrics(done: int, outcome: Outcome) -> dict[str, Any]:
    return {
        "steps": done,
        "loss": outcome.loss,
        **{f"loss/{name}": loss for name, loss in outcome.losses.items()},
        "gradient_norm": outcome.gradient_norm,
        "learning_rate": outcome.learning_rate,
        "taken": outcome.taken,
    }


def _write(folder: Path, state: Mapping[str, Any], job: Job) -> None:
    """Write a state into an empty folder."""
    write_file(folder / TENSORS, {name: tensor for name, tensor in state.items() if name != FACTS})
    rest = {FACTS: state[FACTS], "job": jobfile.dump(job.spec)}
    (folder / REST).write_text(json.dumps(rest), encoding="utf-8")
