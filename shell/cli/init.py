"""Init: the command `init`: the job file of a published checkpoint, with what there is to decide, commented.

Sizes of the models come from the checkpoint each time the job is opened, so the file does not repeat them. Grids are
one rank for each module, or the fastest layout that a search finds. The file is written only if it is legal.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.data.record import LANGUAGE
from mimogrid.core.job.schedules import AUTO
from mimogrid.core.job.spec import GpuSpec
from mimogrid.core.models.divisible import divisible
from mimogrid.core.models.mapping import Shape
from mimogrid.core.models.network import THEIRS, PublishedModule
from mimogrid.core.plan.layouts import Question
from mimogrid.core.pricing.machine import Machine, machine_of
from mimogrid.shell.cli.arguments import InitArgs
from mimogrid.shell.cli.output import print_json, write
from mimogrid.shell.cli.templates import SCHEMA, write_schema, write_template
from mimogrid.shell.job import jobfile
from mimogrid.shell.job.jobs import Job, open_job
from mimogrid.shell.job.planning import searched
from mimogrid.shell.job.published import Published, published, resolved
from mimogrid.shell.job.schema import header


PRECISIONS = {"F64": "fp64", "F32": "fp32", "BF16": "bf16", "F16": "fp16"}
SEQUENCE_MOST = 4096
"""Positions of a sample of a model that takes more."""
TP_MOST = 8
"""For so many tp ranks a vocabulary is padded while layouts are searched."""
LAYOUT = ("grid", "chunks", "split", "microbatches", "recompute")
"""What a layout says of a module."""


def run(args: InitArgs) -> int:
    """Write the job file of a checkpoint, or a template."""
    if args.template is not None:
        return _template(args, args.template)
    folder, machine = _checked(args)
    found = published(resolved(folder, "FOLDER"))
    if all(module.model != "gpt" for module in found.model.modules.values()):
        message = "has no language model, and so no loss to train with."
        remedy = "Name it in a job that has one: [modules.NAME] weights = FOLDER, feeds = [...]."
        raise PlanError([Problem(str(folder), message, remedy)])
    draft = Draft(found=found, weights=_named(folder, args.out), precision=_precision(found))
    if machine is not None:
        draft = _planned(draft, machine, args)
    job = _opened(draft, args.out)
    write(args.out, [header(SCHEMA), draft.text()])
    write_schema(args.out)
    ranks = job.topology.world_size
    if args.json:
        print_json({"out": str(args.out), "world_size": ranks, "modules": list(job.topology.modules)})
    else:
        print(f"{args.out}: {', '.join(job.topology.modules)}, on {ranks} rank{'s' * (ranks > 1)}.")
        print(f"Fill in [data] and [batch], then: mimogrid check {args.out}")
    return 0


def _template(args: InitArgs, name: str) -> int:
    """Write a template, and say what there is now. Raises PlanError for what does not go with it."""
    given = {"FOLDER": args.folder, "--gpus": args.gpus, "--gpu": args.gpu}
    if too_much := [flag for flag, value in given.items() if value is not None]:
        remedy = "Leave out one of the two: a template is a job of its own."
        raise PlanError(Problem(flag, "does not go with --template.", remedy) for flag in too_much)
    written = write_template(name, args.out, force=args.force)
    if args.json:
        print_json({"out": str(args.out), "files": [str(path) for path in written]})
    else:
        print(f"{', '.join(map(str, written))}: written. Then: mimogrid check {args.out}")
    return 0


def _checked(args: InitArgs) -> tuple[Path, Machine | None]:
    """Return the folder of the checkpoint, and the machine to plan for. Raises PlanError with all that is wrong."""
    problems: list[Problem] = []
    if args.folder is None:
        message = "there is none: a folder with config.json and weights in safetensors."
        problems.append(
            Problem(
                "FOLDER", message, "Write mimogrid init FOLDER; or begin with a job: init --template text."
            )
        )
    if args.out.exists() and not args.force:
        remedy = "Name another file: --out. Or write over it: --force."
        problems.append(Problem(str(args.out), "is there already.", remedy))
    if not args.out.parent.is_dir():
        problems.append(
            Problem(
                str(args.out), "cannot be written: no such folder.", "Name a file in a folder that exists."
            )
        )
    if (args.gpus is None) != (args.gpu is None):
        problems.append(
            Problem("--gpus", "and --gpu need each other.", "Write --gpus 8 --gpu h100, for instance.")
        )
    elif args.gpus is not None and args.gpus < 1:
        problems.append(Problem("--gpus", f"is {args.gpus}.", "Use 1 or more."))
    if problems or args.folder is None:
        raise PlanError(problems)
    return args.folder, None if args.gpu is None else machine_of(args.gpu, "bf16")


def _named(folder: Path, out: Path) -> str:
    """Return a checkpoint's folder as a job file names it: from its own folder, or as the whole path that was given."""
    if folder.is_absolute():
        return str(folder)
    return os.path.relpath(resolved(folder, "FOLDER"), resolved(out, "--out").parent)


def _precision(found: Published) -> str:
    """Return the precision of most weights."""
    sizes: Counter[str] = Counter()
    for tensor in found.tensors.values():
        sizes[tensor.dtype] += math.prod(tensor.shape)
    return PRECISIONS.get(max(sizes, key=lambda dtype: sizes[dtype]), "fp32")


def _opened(draft: "Draft", out: Path) -> Job:
    """Return the job of a draft, which must be legal where it is to lie. Raises PlanError."""
    partial = out.with_name(f"{out.name}.partial")
    try:
        write(partial, [draft.text()])
        return open_job(partial)
    finally:
        partial.unlink(missing_ok=True)


def _planned(draft: "Draft", machine: Machine, args: InitArgs) -> "Draft":
    """Return the draft with the fastest layout on so many GPUs. Raises PlanError where nothing fits."""
    assert args.gpus is not None
    precision = draft.precision if draft.precision in machine.accelerator.flops else machine.precision
    draft = attrs.evolve(draft, precision=precision, batch={"global_size": 8 * args.gpus, "microbatches": 8})
    job = _opened(attrs.evolve(draft, tp_most=TP_MOST), args.out)
    spec = attrs.evolve(job.spec, gpu=GpuSpec(name=args.gpu))
    facts, samples = job.topology.source, job.step(0).samples
    found = searched(Question(spec=spec, facts=facts, samples=samples, gpus=args.gpus))
    # The file has no costs, by which `auto` would find its order.
    best = next((layout for layout in found.fitting if layout.spec.schedule.name != AUTO), None)
    if best is None:
        message = f"no layout fits on {args.gpus} x {args.gpu}; the closest: {found.nearest_fit}."
        raise PlanError([Problem("--gpus", message, "Use more GPUs, or such with more memory.")])
    tables: dict[str, Any] = jobfile.CONVERTER.unstructure(best.spec)
    return attrs.evolve(
        draft,
        layouts={
            name: {key: table[key] for key in LAYOUT if key in table}
            for name, table in tables["modules"].items()
        },
        batch=tables["batch"],
        schedule=best.spec.schedule.name,
        gpu=args.gpu or "",
        sharded=best.spec.optimizer.sharded,
        planned=f"The fastest layout on {args.gpus} x {args.gpu} by estimate, with the samples of [data].",
    )


# -- the text ----------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True, eq=False)
class Draft:
    """A job of a checkpoint.

    Attributes:
        found: the checkpoint.
        weights: its folder, as the file names it.
        precision: of the job.
        layouts: by module, the grid and what belongs to it; no entry: one rank.
        batch: the table.
        schedule: its name; empty: the default.
        planned: where the layout is from.
        gpu: the kind of GPU that it is planned for; empty: none.
        sharded: whether dp ranks share the update.
        tp_most: the vocabulary is padded for at least so many tp ranks.
    """

    found: Published
    weights: str
    precision: str
    layouts: Mapping[str, Mapping[str, Any]] = attrs.field(factory=dict[str, Mapping[str, Any]])
    batch: Mapping[str, Any] = attrs.field(factory=lambda: {"global_size": 8, "microbatches": 1})
    schedule: str = ""
    planned: str = ""
    gpu: str = ""
    sharded: bool = False
    tp_most: int = 1

    def text(self) -> str:
        """Return the job file."""
        modules = self.found.model.modules
        parts = [
            self._head(),
            *(self._module(name, module) for name, module in modules.items()),
            self._tail(),
        ]
        return "\n".join(line for part in parts for line in (*part, ""))

    def _head(self) -> Iterator[str]:
        model, config = self.found.model, self.found.config
        values = sum(map(self.found.values, model.modules))
        yield f"# {self.found.folder.name}: {config['architectures'][0]}, {values:,} parameters. By `mimogrid init`."
        yield "#   mimogrid check FILE                 is it legal, and which ranks does each module use?"
        yield "#   mimogrid train FILE                 then: mimogrid export RUN --to hf FOLDER"
        yield "#   mimogrid parity FILE --reference transformers"
        yield f"weights = {_value(self.weights)}"
        yield f"precision = {_value(self.precision)}"

    def _module(self, name: str, module: PublishedModule) -> Iterator[str]:
        table = module.table()
        laid = divisible({"grid": {"tp": 1, "dp": 1, "pp": 1}, **self.layouts.get(name, {})}, module.options)
        if self.tp_most > 1:
            laid |= {"options": divisible({"grid": {"tp": self.tp_most}}, module.options).get("options", {})}
        yield f"[modules.{name}]"
        yield f"# {_sizes(module)}"
        yield "# The checkpoint says these and all other options; what `options` says here goes first."
        if module.model == THEIRS:
            yield "# No family here has it: transformers runs it whole, on dp ranks."
            table = {"model": f"hf:{self.weights}#vision_tower", "feeds": table["feeds"]}
        yield f"model = {_value(table['model'])}"
        yield from (
            f"{key} = {_value(table[key])}" for key in ("feeds", "projector", "frozen") if key in table
        )
        if self.planned:
            yield f"# {self.planned}"
        yield from (f"{key} = {_value(value)}" for key, value in laid.items() if key != "options")
        if options := laid.get("options"):
            yield f"# The vocabulary of {module.options['vocab']} is padded for tp: never predicted, never saved."
            yield f"options = {_value(options)}"
        if "frozen" not in table:
            yield '# frozen = true                      # or patterns of what does not train: frozen = ["layers.0.*"]'
        if "recompute" not in laid:
            yield '# recompute = "full"                 # less memory, more time'

    def _tail(self) -> Iterator[str]:
        yield "[data]"
        yield "# Random samples, so that the file runs as it is. Yours: an index of conversations, docs/data.md:"
        yield '# source = "conversations", options = { index = "FOLDER" }; or a function, docs/own-modules.md.'
        yield 'source = "synthetic"'
        yield f"options = {_value(self._data())}"
        yield ""
        yield "[batch]"
        yield f"global_size = {self.batch['global_size']}".ljust(37) + "# samples of a step"
        count = self.batch.get("microbatches", 1)
        yield f"microbatches = {count}".ljust(37) + "# parts that go through the pipeline one after the other"
        if self.schedule:
            yield from ("", "[schedule]", f"name = {_value(self.schedule)}")
        if self.gpu:
            yield from ("", "[gpu]", f"name = {_value(self.gpu)}")
        yield ""
        yield "[optimizer]"
        yield "lr = 1e-5"
        if self.sharded:
            yield "sharded = true".ljust(37) + "# each dp rank updates its part: less memory"
        yield "# warmup_steps = 100"
        yield '# decay = "cosine"'
        yield ""
        yield "[train]"
        yield "steps = 10"
        yield "checkpoint_every = 0".ljust(37) + "# 0: only at the end"

    def _data(self) -> dict[str, Any]:
        """Return options of random samples that fit the model."""
        text: Mapping[str, Any] = self.found.config.get("text_config") or self.found.config
        positions = text.get("max_position_embeddings")
        sequence = min(positions if type(positions) is int else SEQUENCE_MOST, SEQUENCE_MOST)
        towers = {name: module for name, module in self.found.model.modules.items() if name != LANGUAGE}
        grids = {name: _segment(module, rows_most=sequence // 2) for name, module in towers.items()}
        left = max(sequence - sum(module.rows_out(grids[name]) for name, module in towers.items()), 1)
        options: dict[str, Any] = {"sequence": sequence, "text": [-(-left // 2), left]}
        if towers:
            options["grids"] = {name: [list(grid)] for name, grid in grids.items()}
            options["vocab"] = min(
                placeholder.token for placeholder in self.found.model.placeholders.values()
            )
            options["segments"] = {name: [1, 1] for name in towers}
            if widths := {n: m.options["features"] for n, m in towers.items() if m.model == THEIRS}:
                options["features"] = widths
        return options


def _segment(module: PublishedModule, *, rows_most: int) -> Shape:
    """Return the grid of the largest segment of some that makes so many rows; of a module that takes one size, that."""
    if module.grid is not None:
        return module.grid
    merge, frames = module.option("merge"), 2 * module.option("position_count")
    grids: list[Shape] = [(1, merge * side, merge * side) for side in (32, 16, 8, 4, 2, 1)]
    if len(module.patch) == 1:
        grids = [module.grid_of(max(frames >> halvings, 1)) for halvings in range(8)]
    return next((grid for grid in grids if module.rows_out(grid) <= rows_most), grids[-1])


def _sizes(module: PublishedModule) -> str:
    """Say how large a module is."""
    options = module.options
    kv_heads = options.get("kv_heads", options["heads"])
    heads = f"{options['heads']} heads" + (
        f" ({kv_heads} of keys and values)" * (kv_heads != options["heads"])
    )
    parts = [f"{options['layers']} layers of width {options['hidden']} with {heads}"]
    if experts := module.option("experts"):
        parts.append(f"{experts} experts, of which {module.option('top_k')} are used")
    if "vocab" in options:
        parts.append(f"a vocabulary of {options['vocab']}" + ", tied" * module.option("tied_embeddings"))
    return ", ".join(parts) + "."


def _value(value: Any) -> str:
    """Write a value of TOML on one line.

    >>> _value({"kind": "mlp", "ffn": 8, "bias": True, "layers": [0, 2]})
    '{ kind = "mlp", ffn = 8, bias = true, layers = [0, 2] }'
    """
    if isinstance(value, Mapping):
        inside = ", ".join(f"{key} = {_value(item)}" for key, item in value.items())
        return f"{{ {inside} }}" if inside else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    return json.dumps(value)
