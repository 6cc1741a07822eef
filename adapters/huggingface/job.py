"""Jobs of published checkpoints: the tables of a job file from a folder and grids, and the open job."""

import contextlib
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import tomlkit
import torch

from mimogrid.adapters.torch_module import Embedded, Example
from mimogrid.core.base.errors import PlanError, Problem, nearest
from mimogrid.core.data.record import LANGUAGE
from mimogrid.core.models.divisible import divisible
from mimogrid.shell.data.batches import Encoded, examples_of
from mimogrid.shell.job.jobs import Job as OpenedJob
from mimogrid.shell.job.jobs import open_job
from mimogrid.shell.job.published import Published, published
from mimogrid.shell.modules.peft import Adapters, adapter_tensors, adapters_of, merged, write_adapter
from mimogrid.shell.modules.published import published_tensors, write_published
from mimogrid.shell.runtime.agreement import Outcome
from mimogrid.shell.runtime.tensor_slices import full_tensors, gradients_of


SUPPORTED = (
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "LlavaForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen2AudioForConditionalGeneration",
)

Table = Mapping[str, Any]


@attrs.frozen(eq=False)
class Job:
    """A job that starts from a published checkpoint: the tables of its job file, but for the size of a batch."""

    checkpoint: Published
    tables: Mapping[str, Any]

    @classmethod
    def from_pretrained(
        cls, folder: Path | str, *, grids: Mapping[str, Table], precision: str = "fp32", **tables: Any
    ) -> "Job":
        """Return the job of a checkpoint folder.

        Args:
            folder: The checkpoint: config.json and safetensors.
            grids: By module (`vision`, `audio`, `language`) what a job file's grid takes.
            precision: The precision of the job.
            tables: Other tables of a job file, such as ``optimizer={"lr": 1e-5}``, ``batch={"microbatches": 4}``
                or ``modules={"language": {"recompute": "full"}}``.

        Layers that do not divide over the stages are split as evenly as can be, and a vocabulary that tp does not
        divide is padded; `check` says so. Raises PlanError with everything that is wrong.
        """
        checkpoint = published(Path(folder).resolve())
        _check_supported(checkpoint, grids)
        more = dict(tables.pop("modules", {}))
        modules = {
            name: divisible(
                {"weights": str(checkpoint.folder), **more.pop(name, {}), "grid": dict(grids[name])},
                module.options,
            )
            for name, module in checkpoint.model.modules.items()
        }
        job = cls(checkpoint, {"precision": precision, **tables, "modules": {**modules, **more}})
        job.sized(_least_samples(job.tables), 1)  # It raises what is wrong before anything starts.
        return job

    def sized(self, samples: int, sequence: int) -> OpenedJob:
        """Return the job of a batch of so many samples of at most so many tokens. Raises PlanError."""
        tables = {
            **self.tables,
            "data": {"source": "mimogrid.shell.job.host:samples", "options": {"sequence": sequence}},
            "batch": {**self.tables.get("batch", {}), "global_size": samples},
        }
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "job.toml")
            path.write_text(tomlkit.dumps(tables), encoding="utf-8")
            return open_job(path)

    def check(self) -> str:
        """Return what the job is, in lines: its modules, their ranks, and what was split or padded."""
        topology = self.sized(_least_samples(self.tables), 1).topology
        lines = [f"{self.checkpoint.config['architectures'][0]}"]
        for name in self.checkpoint.model.modules:
            module = topology.modules[name]
            axes = " ".join(f"{axis.name}={axis.size}" for axis in module.grid.axes)
            values = self.checkpoint.values(name)
            layers = " | ".join(str(len(info.layers)) for info in module.stages)
            lines.append(f"{name}: {values:,} parameters, on {axes}; layers: {layers}")
        if padding := self.tables["modules"][LANGUAGE].get("options", {}).get("vocab_padding"):
            lines.append(f"vocabulary: padded by {padding} for tp; these are never predicted and never saved")
        return "\n".join(lines)

    def open(self) -> "Running":
        """Return the job in the world of this process; every rank opens it."""
        return Running(self)


class Running:
    """An open job. Every rank calls its methods, in the same order."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._closing = contextlib.ExitStack()
        self._embedded: Embedded | None = None
        self._size = self._sequence = 0
        self._unclipped = 1.0

    def step(self, batch: Mapping[str, torch.Tensor]) -> Outcome | None:
        """Train one step; return its loss and more (`Outcome`), None on an idle rank.

        `batch` is what the model's processor makes (`shell.data.batches`), with `labels`: the whole batch, on every
        rank. Raises PlanError if it is anything else.
        """
        samples = examples_of(self._job.checkpoint.model, batch)
        return self.step_on(samples, longest=batch["input_ids"].shape[1])

    def step_on(self, samples: Sequence[Encoded], *, longest: int) -> Outcome | None:
        """Train one step on samples that are encoded, of at most so many positions."""
        embedded = self._opened(len(samples), longest)
        outcome = embedded.step([Example(each.sample, each.tensors) for each in samples])
        clip = embedded.job.spec.optimizer.clip_norm
        clips = outcome is not None and outcome.taken and clip and outcome.gradient_norm > clip
        self._unclipped = outcome.gradient_norm / clip if clips and outcome else 1.0
        return outcome

    def losses_of(self, samples: Sequence[Encoded], *, longest: int) -> Mapping[str, float] | None:
        """Return the loss of each module on samples, without training; None on an idle rank."""
        embedded = self._opened(len(samples), longest)
        return embedded.evaluate([Example(each.sample, each.tensors) for each in samples])

    def state_dict(self) -> dict[str, Any]:
        """Return weights, optimizer states and the number of the next step; see `Embedded.state_dict`."""
        return self._opened().state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned; all ranks call it."""
        self._opened().load_state_dict(state)

    def gradients(self) -> dict[str, torch.Tensor] | None:
        """Return the full gradients of the last step by Hugging Face name, as they were before clipping.

        Only the first rank gets them; the others get None. A frozen parameter has none. Those of LoRA
        have the names that peft gives them.
        """
        embedded = self._opened()
        if embedded.runtime is None:
            return None
        full = full_tensors(embedded.runtime, gradients_of(embedded.runtime))
        if embedded.runtime.group.rank() != 0:
            return None
        found = self._published(full)
        adapters = self._adapters(full)
        found |= {
            name: read() for name, read in adapter_tensors(adapters, lambda name, a, b: full[name][a:b])
        }
        return {name: tensor * self._unclipped for name, tensor in found.items()}

    def save_pretrained(self, folder: Path | str, *, merge: bool = True) -> None:
        """Write the checkpoint with the weights of now: config, weights in their dtypes, and all other files.

        LoRA is merged into the weights. With ``merge=False`` only the adapter is written, as peft writes it. Raises
        PlanError on the first rank if the folder is not empty.
        """
        embedded = self._opened()
        state = embedded.state_dict()
        if embedded.runtime is None or embedded.runtime.group.rank() != 0:
            return
        weights = self._published(state)
        adapters = self._adapters(state)

        def rows(name: str, start: int, stop: int) -> torch.Tensor:
            found: torch.Tensor = state[name][start:stop]
            return found

        def merged_of(name: str) -> torch.Tensor | None:
            weight = weights.get(name)
            return None if weight is None else merged(weight, adapters.pairs.get(name), rows)

        if merge:
            write_published(Path(folder), self._job.checkpoint, merged_of)
        else:
            Path(folder).mkdir(parents=True, exist_ok=True)
            write_adapter(Path(folder), adapters, rows, weights.get)

    def _adapters(self, full: Mapping[str, torch.Tensor]) -> Adapters:
        return adapters_of(self._job.checkpoint, self._opened().job.spec.modules, full)

    def _published(self, full: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for module in self._job.checkpoint.model.modules:
            prefix = f"{module}."
            ours = {name.removeprefix(prefix): t for name, t in full.items() if name.startswith(prefix)}
            found |= published_tensors(self._job.checkpoint, module, ours)
        return found

    def _opened(self, size: int = 0, sequence: int = 0) -> Embedded:
        """Return the job open for a size of batches; a larger sequence or another size opens it again."""
        size = size or self._size or _least_samples(self._job.tables)
        sequence = max(self._sequence, sequence, 1)
        if self._embedded is not None and (size, sequence) == (self._size, self._sequence):
            return self._embedded
        state = self._embedded.state_dict() if self._embedded is not None else None
        self._closing.close()
        self._embedded = self._closing.enter_context(Embedded(self._job.sized(size, sequence)))
        if state is not None:
            self._embedded.load_state_dict(state)
        self._size, self._sequence = size, sequence
        return self._embedded

    def close(self) -> None:
        """Destroy the process groups of the job, and no others. May be called twice."""
        self._closing.close()

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# -- jobs --------------------------------------------------------------------------------------------------


def _check_supported(checkpoint: Published, grids: Mapping[str, Table]) -> None:
    problems: list[Problem] = []
    architecture = str((checkpoint.config.get("architectures") or ["none"])[0])
    if architecture not in SUPPORTED:
        message = f"has the architecture {architecture}, which cannot be trained here."
        problems.append(Problem(str(checkpoint.folder), message, f"Trained are: {', '.join(SUPPORTED)}."))
    for name in grids:
        if name not in checkpoint.model.modules:
            remedy = nearest(name, tuple(checkpoint.model.modules))
            problems.append(Problem(f"grids.{name}", "the checkpoint has no such module.", remedy))
    for name in checkpoint.model.modules:
        if name not in grids:
            message = f"there is no grid for the module '{name}'."
            problems.append(Problem("grids", message, f"Write {name}=dict(tp=1, pp=1), for instance."))
    if problems:
        raise PlanError(problems)


def _least_samples(tables: Mapping[str, Any]) -> int:
    """Return the size of the smallest batch of a job: a sample for each dp rank of each module in each microbatch."""
    everywhere = tables.get("batch", {}).get("microbatches", 1)
    modules = tables["modules"].values()
    counts = [module.get("microbatches", everywhere) for module in modules]
    dp_sizes = [module["grid"].get("dp", 1) for module in modules if "grid" in module]
    return math.lcm(*counts) * int(max(dp_sizes))
