"""Inspection: what is in a checkpoint, whether it is whole, and which layouts fit it. Needs no torch.

A checkpoint holds full tensors under layout-independent names, so every legal layout of the same model fits. What does
not fit is another model: a parameter that is missing or has another shape, or a state that the job's optimizer needs
and the checkpoint lacks.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import attrs

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.base.units import in_bytes
from mimogrid.core.job.changes import refused
from mimogrid.core.job.spec import GridSpec, JobSpec, ModuleSpec
from mimogrid.core.job.validation.problems import problems_of
from mimogrid.core.update.contents import (
    OPTIMIZER,
    custom_modules,
    lacking,
    parameter_of,
    table_of,
    untrained,
    written_as,
)
from mimogrid.shell.checkpoint.index import described, read_index
from mimogrid.shell.checkpoint.manifest import (
    MANIFEST,
    damage,
    located,
    read_manifest,
    reading,
    remedy_for,
    topology_of,
)
from mimogrid.shell.cli.arguments import InspectArgs
from mimogrid.shell.cli.output import print_json
from mimogrid.shell.job import jobfile
from mimogrid.shell.job.jobs import Job


SHOWN = 8
"""How many problems are printed for people; `--json` has all."""


def run(job: Job | None, args: InspectArgs) -> int:
    """Inspect a run or a checkpoint; with a job, say whether it fits. Returns 2 where something is wrong."""
    with _kept(args.folder) as found_there:
        return _inspected(job, args, found_there)


@contextlib.contextmanager
def _kept(folder: Path) -> Iterator[list[Path]]:
    """Return the checkpoints of a folder. No run removes one of them while this is open."""
    found = located(folder)
    with contextlib.ExitStack() as kept:
        for checkpoint in found:
            with contextlib.suppress(PlanError):  # `damage` says what is wrong
                kept.enter_context(reading(checkpoint))
        yield [c for c in found if c.exists()] or found  # a run may have just removed the others


def _inspected(job: Job | None, args: InspectArgs, found_there: list[Path]) -> int:
    with VerifyProgress(found_there) if args.verify else contextlib.nullcontext() as progress:
        on_read = progress.read if progress else lambda _: None
        faults = {checkpoint: tuple(damage(checkpoint, on_read)) for checkpoint in found_there}
    whole = next((checkpoint for checkpoint in reversed(faults) if not faults[checkpoint]), None)
    problems = [
        Problem(str(checkpoint), f"{checkpoint.name}: {fault}", remedy_for(faults))
        for checkpoint, found in faults.items()
        for fault in found
    ]
    if job is not None and whole is not None:
        problems += _job_problems(job, whole, args.changed)
    contents = contents_of(whole) if whole else None
    if args.json:
        checkpoints = [{"name": c.name, "whole": not found, "faults": found} for c, found in faults.items()]
        values = [attrs.asdict(problem) for problem in problems]
        print_json({"ok": not problems, "checkpoints": checkpoints, "contents": contents, "problems": values})
        return 2 if problems else 0
    for checkpoint, found in faults.items():
        print(f"{checkpoint.name}  {'damaged' if found else 'whole'}")
    if contents is not None and whole is not None:
        print("\n".join(("", *_in_words(whole, contents))))
    if problems:
        raise PlanError([*problems[:SHOWN], *_rest(problems)])
    if job is not None and whole is not None:
        print(f"\n{args.job} fits: it can continue from {whole.name}.")
    return 0


def _job_problems(job: Job, checkpoint: Path, changed: tuple[str, ...]) -> Iterator[Problem]:
    """Yield why a job cannot continue from a whole checkpoint; keys that are `changed` may differ."""
    facts, found = read_manifest(checkpoint), described(read_index(checkpoint))
    before = jobfile.recorded(facts["job"], checkpoint / MANIFEST)
    custom = custom_modules(topology_of(before, found), found)
    table = table_of(job.topology, found, custom, steps_taken=facts["steps_taken"])
    fresh = untrained([name for name in table if parameter_of(name) == name], found)
    wanted = {name: of for name, of in table.items() if parameter_of(name) not in fresh or name in found}
    for mismatch in lacking(wanted, found):
        yield Problem(str(checkpoint), mismatch, _REMEDY)
    for change in refused(before, job.spec, accepted=changed):
        message = f"is {change.after!r}; {checkpoint.name} has {change.before!r}."
        yield Problem(change.key, message, f"If this is intended: --changed {change.key}.")


_REMEDY = "Use the model and the optimizer that wrote it, under any layout."


def _rest(problems: list[Problem]) -> Iterator[Problem]:
    if len(problems) > SHOWN:
        yield Problem("and", f"{len(problems) - SHOWN} more like these.", "See them all with --json.")


class VerifyProgress:
    """Tells on standard error how much of some checkpoints has been read: at most once a second, and at the end."""

    def __init__(self, checkpoints: Sequence[Path]) -> None:
        files = (path for checkpoint in checkpoints for path in checkpoint.glob("*") if path.is_file())
        self._total = sum(path.stat().st_size for path in files if path.name != MANIFEST)
        self._read, self._begin = 0, time.monotonic()
        self._told = self._begin

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._tell()

    def read(self, count: int) -> None:
        """Count bytes that were read."""
        self._read += count
        if time.monotonic() - self._told >= 1.0:
            self._tell()

    def _tell(self) -> None:
        self._told = time.monotonic()
        seconds = self._told - self._begin
        print(f"read {in_bytes(self._read)} of {in_bytes(self._total)} in {seconds:.0f} s", file=sys.stderr)


# -- what is in it -----------------------------------------------------------------------------------------


def contents_of(checkpoint: Path) -> dict[str, Any]:
    """Return what is in a whole checkpoint."""
    facts, index = read_manifest(checkpoint), read_index(checkpoint)
    modules: dict[str, dict[str, Any]] = {}
    for name, stored in index.items():
        if not name.startswith(OPTIMIZER):
            module = modules.setdefault(name.partition(".")[0], {"parameters": 0, "bytes": 0, "dtypes": []})
            module["parameters"] += 1
            module["bytes"] += stored.bytes
            module["dtypes"] = sorted({*module["dtypes"], stored.dtype})
    spec = jobfile.recorded(facts["job"], checkpoint / MANIFEST)
    fits, written = layouts_of(spec), written_as(topology_of(spec, described(index)), facts["step"])
    for name, module in modules.items():
        module["written_by"] = written["layout"].get(name)
        module["fits"] = fits.get(name)
    states = {name.split(".")[1] for name in index if name.startswith(OPTIMIZER)}
    return {
        "name": checkpoint.name,
        "step": facts["step"],
        "steps_taken": facts["steps_taken"],
        **{key: written[key] for key in ("precision", "schedule", "data", "random")},
        "versions": facts.get("versions", {}),
        "created": facts.get("created"),
        "files": len(facts["files"]),
        "bytes": sum(file["bytes"] for file in facts["files"].values()),
        "optimizer_states": sorted(states),
        "modules": modules,
    }


def _in_words(checkpoint: Path, contents: Mapping[str, Any]) -> Iterator[str]:
    versions = ", ".join(f"{name} {version}" for name, version in contents["versions"].items())
    data = contents["data"]
    yield f"{checkpoint}"
    yield f"  step        {contents['step']}, after {contents['steps_taken']} updates"
    yield f"  size        {in_bytes(contents['bytes'])} in {contents['files']} files"
    yield f"  written by  {versions}; precision {contents['precision']}, schedule {contents['schedule']}"
    yield f"  data        '{data['source']}' from sample {data['next_sample']}, seed {contents['random']['seed']}"
    yield f"  optimizer   {', '.join(contents['optimizer_states']) or 'no states'}"
    for name, module in contents["modules"].items():
        dtypes = ", ".join(module["dtypes"])
        yield f"  {name}: {module['parameters']} parameters, {in_bytes(module['bytes'])}, {dtypes}"
        grid = " ".join(f"{axis}={size}" for axis, size in (module["written_by"] or {}).items())
        yield f"      written as  {grid}"
        if module["fits"]:
            axes = (f"{axis} in {', '.join(map(str, sizes))}" for axis, sizes in module["fits"].items())
            yield f"      fits        {'; '.join(axes)}; any dp, and cp as the sequence allows"


# -- which layouts fit -------------------------------------------------------------------------------------


def layouts_of(spec: JobSpec) -> dict[str, dict[str, list[int]]]:
    """Return, for each built-in module, the sizes of tp, pp and ep that are legal, each with the others at 1.

    Where the layers do not divide by pp, `split` can still make it legal.
    """
    return {
        name: {
            axis: [size for size in range(1, most + 1) if fits(size)]
            for axis, most, fits in _axes(spec, name, module)
        }
        for name, module in spec.modules.items()
        if ":" not in module.model
    }


def _axes(spec: JobSpec, name: str, module: ModuleSpec) -> Iterator[tuple[str, int, Callable[[int], bool]]]:
    """Yield the axes to try: the name, the largest size, and whether a size is legal."""
    options: Any = module.options

    def problems(tp: int = 1, pp: int = 1, ep: int = 1) -> set[Problem]:
        grid = GridSpec(tp=tp, pp=pp, ep=ep, dp=ep)
        alone = attrs.evolve(module, grid=grid, chunks=1, split=None)
        of_plan = problems_of(attrs.evolve(spec, modules={**spec.modules, name: alone}), None)
        return {problem for problem in of_plan if problem.where.startswith(f"modules.{name}.")}

    usual = problems()
    yield "tp", options.heads, lambda size: problems(tp=size) <= usual
    yield "pp", options.layers, lambda size: problems(pp=size) <= usual
    if options.experts:
        yield "ep", options.experts, lambda size: problems(ep=size) <= usual
