"""Arguments: one frozen value per command, and the parser that makes it.

    >>> parse(["show", "job.toml", "--set", "train.steps=20"])
    ShowArgs(json=False, job=PosixPath('job.toml'), overrides=('train.steps=20',), no_code=False, rank=None)

A field is an argument. Its name is the flag (`max_shard_gb` is ``--max-shard-gb``), its metadata goes to argparse. The
docstring of a class is the help of its command.
"""

# ruff: noqa: RUF009 -- the functions in the class bodies return fields

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import attrs

from mimogrid import __version__
from mimogrid.core.base.errors import nearest
from mimogrid.core.pricing.machine import EFFICIENCY


def _positional(metavar: str, text: str, *, required: bool = True) -> Any:
    """Return a field that is an argument without a flag; None stands for one that may be left out."""
    metadata = {"flags": (), "type": Path, "metavar": metavar, "help": text}
    if required:
        return attrs.field(metadata=metadata)
    return attrs.field(default=None, metadata={**metadata, "nargs": "?", "default": None})


def _option(metavar: str | None, text: str, kind: Any = str, default: Any = None, **more: Any) -> Any:
    """Return a field that is an option with a value; with `required` it has no default."""
    metadata = {"type": kind, "metavar": metavar, "help": text, **more}
    return attrs.field(default=attrs.NOTHING if "required" in more else default, metadata=metadata)


def _switch(text: str) -> Any:
    """Return a field that is an option without a value."""
    return attrs.field(default=False, metadata={"action": "store_true", "help": text})


def _repeated(metavar: str, text: str, kind: Any = str, **more: Any) -> Any:
    """Return a field that is an option with a value, as often as wanted."""
    metadata = {"type": kind, "metavar": metavar, "action": "append", "help": f"{text}; repeatable", **more}
    return attrs.field(default=(), converter=tuple, metadata=metadata)


def _overrides() -> Any:
    text = "override a key of the job file, such as train.steps=20"
    return _repeated("KEY=VALUE", text, flags=("--set",))


def _changed() -> Any:
    return _repeated("KEY", "allow this key of the job to differ from the run's")


def _sizes(text: str) -> tuple[int, ...]:
    """Read numbers with commas between them."""
    try:
        return tuple(int(size) for size in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no list of numbers, such as 1,2,4") from None


# -- the commands ------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Args:
    """What every command takes."""

    json: bool = _switch("print one JSON value and nothing else")


@attrs.frozen(kw_only=True)
class JobArgs(Args):
    """What every command on a job takes."""

    job: Path = _positional("JOB", "the job file")
    overrides: tuple[str, ...] = _overrides()


def _no_code() -> Any:
    return _switch("run no code that the job names; what only that code knows is then not known")


@attrs.frozen(kw_only=True)
class PlanningArgs(JobArgs):
    """What every command takes that only looks at a job."""

    no_code: bool = _no_code()


@attrs.frozen(kw_only=True)
class LaunchArgs(JobArgs):
    """What every command takes that starts ranks."""

    force: bool = _switch("start even if this machine has too few cores, too little memory or disk for it")


@attrs.frozen(kw_only=True)
class AssumingArgs(PlanningArgs):
    """What every command takes that estimates times or memory on GPUs: what replaces `[gpu]` of the job."""

    gpu: str | None = _option(
        "NAME", "estimate for this kind of GPU, such as h100; default: gpu.name of the job"
    )
    memory_gb: float | None = _option("X", "the memory of each GPU in GB; default: that of its kind", float)
    efficiency: float | None = _option(
        "E", f"the fraction of its peak FLOP/s that a GPU reaches; default {EFFICIENCY}", float
    )
    precision: str | None = _option("P", "use this precision instead of the job's")

    @property
    def assumed(self) -> tuple[str, ...]:
        """The options as overrides of a job."""
        options = {
            "gpu.name": self.gpu,
            "gpu.memory_gb": self.memory_gb,
            "gpu.efficiency": self.efficiency,
            "precision": self.precision,
        }
        return tuple(f"{key}={json.dumps(value)}" for key, value in options.items() if value is not None)


@attrs.frozen(kw_only=True)
class RunArgs(Args):
    """What every command on the checkpoints of a run takes."""

    folder: Path = _positional("RUN", "the folder of a run or of a checkpoint")


TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "text": ("templates/text.toml",),
    "vision-language": ("templates/vision-language.toml",),
    "omni": ("templates/omni.toml",),
    "own": ("own/job.toml", "own/ears.py", "own/network.py", "own/pulses.py"),
}
"""By name the examples that a template consists of: the job file, and the files beside it."""


@attrs.frozen(kw_only=True)
class InitArgs(Args):
    """Write the job file of a published checkpoint, or one to begin with. Needs no torch."""

    folder: Path | None = _positional("FOLDER", "the folder of the checkpoint", required=False)
    template: str | None = _option(
        None, "write this commented job instead of one for a checkpoint", choices=tuple(TEMPLATES)
    )
    out: Path = _option("FILE", "the job file to write; default job.toml", Path, Path("job.toml"))
    gpus: int | None = _option("N", "lay the modules out on this number of GPUs, as `plan` does", int)
    gpu: str | None = _option("NAME", "the kind of GPU, such as h100 or a100")
    force: bool = _switch("write over a file that is there")


@attrs.frozen(kw_only=True)
class CheckArgs(AssumingArgs):
    """Check a job and show its layout. Needs no torch."""


@attrs.frozen(kw_only=True)
class RolesArgs(PlanningArgs):
    """Show the role of each rank, as a table and a map."""

    rank: int | None = _option("R", "show this rank only", int)
    svg: Path | None = _option("FILE", "draw the map of the ranks into this file", Path)


@attrs.frozen(kw_only=True)
class ShowArgs(PlanningArgs):
    """Print every action of each rank in a step."""

    rank: int | None = _option("R", "show this rank only", int)


@attrs.frozen(kw_only=True)
class VerifyArgs(PlanningArgs):
    """Prove that a program is complete, in order and free of deadlock. Needs no torch."""

    program: Path | None = _option(
        "FILE", "verify the program in this file, as `show` prints it, instead of the job's own", Path
    )
    strict: bool = _switch("the program must also run with one serial queue per pair of ranks")


@attrs.frozen(kw_only=True)
class SimulateArgs(AssumingArgs):
    """Time a step without running it: idle time and its causes, memory, pictures. Needs no torch."""

    svg: Path | None = _option("FILE", "draw the timeline into this file", Path)
    html: Path | None = _option("FILE", "write an interactive page into this file", Path)
    trace: Path | None = _option("FILE", "write a trace for Perfetto", Path)
    compare: Path | None = _option(
        "FILE", "simulate this job, too, and compare; --set applies to JOB only", Path
    )
    costs: tuple[Path, ...] = _repeated(
        "FILE", "a costs file: seconds of stages and edges; the second one is for the job of --compare", Path
    )
    schedule: str | None = _option(
        "NAME", "use this schedule instead of the job's; `all` compares all of them"
    )
    ragged: bool = _switch("time each dp rank by its own samples of the step")
    jitter: float = _option(
        "SIGMA", "vary the time of every compute action: the standard deviation of its logarithm", float, 0.0
    )
    seed: int = _option("N", "the seed of the jitter", int, 0)
    step: int = _option("K", "simulate the samples of this step, counted from 0", int, 0)
    draws: int = _option("N", "simulate this many seeds, and with --ragged as many steps", int, 1)


@attrs.frozen(kw_only=True)
class PlanArgs(AssumingArgs):
    """Find the fastest layout on a number of GPUs, and say why the others are slower."""

    gpus: int = _option("N", "the number of GPUs", int, required=True)
    pins: tuple[str, ...] = _repeated(
        "PIN",
        "a choice that every layout has: MODULE.AXIS=VALUE, such as language.tp=8 or *.cp=1, "
        "microbatches=N or schedule=NAME",
        flags=("--pin",),
    )
    costs: Path | None = _option("FILE", "measured times of the job's modules, as `probe` writes them", Path)
    time_limit: float | None = _option("S", "end after about S seconds with the best layout so far", float)
    out: Path | None = _option("FILE", "write the fastest layout as a job file", Path)
    html: Path | None = _option("FILE", "write an interactive page of the layouts into this file", Path)


@attrs.frozen(kw_only=True)
class ProbeArgs(LaunchArgs):
    """Measure the costs of a job on this machine, as a costs file for `simulate`."""

    out: Path | None = _option("FILE", "write the costs file here instead of printing it", Path)
    repeat: int = _option("N", "the number of steps to measure; default 3", int, 3)
    microbatch_sizes: tuple[int, ...] = _option(
        "N,N,...", "measure microbatches of these numbers of samples, too", _sizes, ()
    )


@attrs.frozen(kw_only=True)
class TrainArgs(LaunchArgs):
    """Train a job, on this machine or under torchrun."""

    resume: Path | None = _option("RUN", "continue the run in this folder", Path)
    changed: tuple[str, ...] = _changed()
    transport: str | None = _option(
        None,
        "send data through host memory, or give each local rank its own GPU and use NCCL",
        choices=("host", "nccl"),
    )
    preflight: bool = _switch("only say whether this machine can run it")


@attrs.frozen(kw_only=True)
class ParityArgs(LaunchArgs):
    """Compare the gradients of a job with those of the same model on one process."""

    steps: int = _option("K", "the number of steps to compare; default 1", int, 1)
    reference: str | None = _option(
        None,
        "compare with the model of transformers that has the job's weights, by the names of its tensors",
        choices=("transformers",),
    )


@attrs.frozen(kw_only=True)
class InspectArgs(RunArgs):
    """Show what checkpoints hold, whether they are whole and which layouts fit. Needs no torch."""

    verify: bool = _switch("say meanwhile, on standard error, how much of the files has been checked")
    job: Path | None = _option("JOB", "say whether this job can continue from there", Path)
    overrides: tuple[str, ...] = _overrides()
    no_code: bool = _no_code()
    changed: tuple[str, ...] = _changed()


@attrs.frozen(kw_only=True)
class ExportArgs(RunArgs):
    """Write the weights of a run as safetensors, as torch's distributed checkpoint, or as transformers loads them."""

    target: Path | None = _positional("FOLDER", "the same as --out", required=False)
    to: str = _option(None, "the format", required=True, choices=("safetensors", "dcp", "hf", "peft"))
    out: Path | None = _option("FOLDER", "write into this folder, which must be new or empty", Path)
    source: Path | None = _option(
        "FOLDER",
        "for hf and peft: the checkpoint that the run started from, if it has moved",
        Path,
        flags=("--from",),
    )
    ema: bool = _switch("write the running means of the weights, which the job keeps with optimizer.ema")
    max_shard_gb: float = _option(
        "X", "split modules larger than this many GB into several files; default 5", float, 5.0
    )


@attrs.frozen(kw_only=True)
class WatchArgs(Args):
    """Show what a run does now: each rank, step time, loss, idle time, memory. Needs no torch; Ctrl-C leaves."""

    folder: Path = _positional("RUN", "the folder of a run")
    once: bool = _switch("show it once, and leave")


@attrs.frozen(kw_only=True)
class EnvArgs(Args):
    """Show versions, devices, backends and limits of this machine, and how to get what is missing."""


@attrs.frozen(kw_only=True)
class SchemaArgs(Args):
    """Print the JSON Schema of the job file, by which editors complete and check it."""

    out: Path | None = _option("FILE", "write it into this file instead", Path)


@attrs.frozen(kw_only=True)
class CompletionArgs(Args):
    """Print the completion of this command line for a shell."""

    shell: str = attrs.field(
        metadata={
            "flags": (),
            "metavar": "SHELL",
            "choices": ("bash", "fish", "zsh"),
            "help": "bash, fish or zsh",
        }
    )


@attrs.frozen(kw_only=True)
class DataIndexArgs(Args):
    """Read a store of conversations once, and write what the processor makes of it as an index."""

    store: Path = _positional("STORE", "JSON, a tar, Parquet or Arrow of conversations, or a folder of these")
    processor: Path = _option("FOLDER", "the checkpoint whose processor reads it", Path, required=True)
    media: Path | None = _option(
        "FOLDER", "the folder of the images and sounds; default: that of the store", Path
    )
    columns: str = _option("ROLE=COLUMN,...", "columns of tables with other names than the roles", str, "")
    out: Path | None = _option("INDEX", "write into this folder; default: the store's name with .index", Path)
    max_tokens: int = _option("N", "leave out samples of more positions, placeholders included", int, 0)
    workers: int = _option("N", "the number of processes; default: one for each core", int, 0)


@attrs.frozen(kw_only=True)
class ReportArgs(Args):
    """Write an interactive page of a run: its curves, and its last step, planned and measured. Needs no torch."""

    folder: Path = _positional("RUN", "the folder of a run")
    out: Path | None = _option(
        "FILE", "the file to write; default report.html in the folder of the run", Path
    )


@attrs.frozen(kw_only=True)
class IndexArgs(Args):
    """What every command on an index takes."""

    index: Path = _positional("INDEX", "the folder of the index")


@attrs.frozen(kw_only=True)
class DataShowArgs(IndexArgs):
    """Show what a sample of an index becomes: its text, its placeholders, and what counts in the loss."""

    id: str | None = _option("ID", "the id of the sample in the store; default: that of the first")
    picture: Path | None = _option(
        "FILE", "write its images and waveforms, side by side, into this file", Path
    )


@attrs.frozen(kw_only=True)
class DataStatsArgs(IndexArgs):
    """Show how long the samples of an index are, how many images they have, and what they cost. Needs no torch."""

    job: Path | None = _option(
        "FILE", "count the operations of this job; default: of the whole checkpoint that read the store", Path
    )
    svg: Path | None = _option("FILE", "draw the histograms into this file", Path)


COMMANDS: Mapping[str, type[Args]] = {
    "init": InitArgs,
    "check": CheckArgs,
    "roles": RolesArgs,
    "show": ShowArgs,
    "verify": VerifyArgs,
    "simulate": SimulateArgs,
    "plan": PlanArgs,
    "probe": ProbeArgs,
    "train": TrainArgs,
    "parity": ParityArgs,
    "inspect": InspectArgs,
    "export": ExportArgs,
    "data index": DataIndexArgs,
    "data show": DataShowArgs,
    "data stats": DataStatsArgs,
    "watch": WatchArgs,
    "report": ReportArgs,
    "env": EnvArgs,
    "schema": SchemaArgs,
    "completion": CompletionArgs,
}

EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "init": (
        "init --template vision-language",
        "init checkpoints/qwen2 --gpus 8 --gpu h100 --out job.toml",
    ),
    "check": ("check job.toml", "check job.toml --set modules.language.grid.tp=4"),
    "roles": ("roles job.toml", "roles job.toml --rank 3", "roles job.toml --svg ranks.svg"),
    "show": ("show job.toml --rank 3 --set batch.microbatches=2",),
    "verify": ("verify job.toml --strict", "verify job.toml --program edited.txt"),
    "simulate": (
        "simulate job.toml --gpu h100 --html step.html",
        "simulate job.toml --costs costs.toml --schedule all",
    ),
    "plan": (
        "plan job.toml --gpus 64 --gpu h100 --out planned.toml",
        "plan job.toml --gpus 64 --gpu h100 --html layouts.html",
        "plan job.toml --gpus 64 --gpu h100 --pin language.tp=8 --pin schedule=1f1b",
    ),
    "probe": ("probe job.toml --out costs.toml",),
    "train": (
        "train job.toml --set train.steps=20",
        "train job.toml --preflight",
        "train job.toml --resume runs/job-1",
        "train job.toml --set train.run_dir=runs/mine",
    ),
    "parity": (
        "parity job.toml --set precision=fp64",
        "parity job.toml --reference transformers",
    ),
    "inspect": ("inspect runs/job-1", "inspect runs/job-1 --job larger.toml"),
    "export": ("export runs/job-1 --to safetensors --out weights", "export runs/job-1 --to hf published"),
    "data index": ("data index llava.json --processor checkpoints/llava --media pictures",),
    "data show": ("data show llava.json.index", "data show llava.json.index --id 000042 --picture 42.png"),
    "data stats": ("data stats llava.json.index --svg lengths.svg",),
    "watch": ("watch runs/job-1", "watch runs/job-1 --once --json"),
    "report": ("report runs/job-1", "report runs/job-1 --out run.html"),
    "env": ("env", "env --json"),
    "schema": ("schema --out job.schema.json",),
    "completion": ("completion bash > ~/.local/share/bash-completion/completions/mimogrid",),
}
"""By command what `--help` shows; a shell's redirection is not part of a command."""


DATA = "data"
"""The first word of the commands on data, which have two."""


# -- parsing -----------------------------------------------------------------------------------------------


def parse(words: Sequence[str]) -> Args:
    """Return the arguments of a command. Raises SystemExit for --help, and with code 2 for what is wrong."""
    if words and words[0] == DATA:
        words = [" ".join(words[:2]), *words[2:]]
    if words and words[0] not in COMMANDS and not words[0].startswith("-"):
        _Parser(prog="mimogrid").error(f"'{words[0]}' is no command. {nearest(words[0], tuple(COMMANDS))}")
    whole = parser()
    given, late = whole.parse_known_args(words)
    found = vars(given)
    of = COMMANDS[found.pop("command")]
    # argparse of Python 3.11 takes no optional argument behind an option: `export RUN --to hf FOLDER`.
    optional = [f.name for f in attrs.fields(of) if f.metadata.get("nargs") == "?" and found[f.name] is None]
    if len(late) == len(optional) == 1 and not late[0].startswith("-"):
        return of(**{**found, optional[0]: Path(late[0])})
    if late:
        command = next(name for name, cls in COMMANDS.items() if cls is of)
        _Parser(prog=f"mimogrid {command}").error(_unrecognized(late, command))
    return of(**found)


def _unrecognized(late: Sequence[str], command: str) -> str:
    """Return that a command does not take some words, and what the first of them is elsewhere."""
    word = late[0].partition("=")[0]
    flags = {name: [flag for f in attrs.fields(of) for flag in _flags(f)] for name, of in COMMANDS.items()}
    text = f"unrecognized arguments: {' '.join(late)}."
    if not word.startswith("--"):
        return text
    others = [name for name in flags if word in flags[name]]
    return (
        f"{text} {word} is of {', '.join(others)}." if others else f"{text} {nearest(word, flags[command])}"
    )


def _flags(field: "attrs.Attribute[Any]") -> tuple[str, ...]:
    """Return how an option is written; nothing for an argument that has no name."""
    return tuple(field.metadata.get("flags", (f"--{field.name.replace('_', '-')}",)))


def overview() -> str:
    """Return what `mimogrid` alone prints: every command and what it does."""
    commands = (f"    mimogrid {f'{name} {_noun(of)}':<18}{of.__doc__}\n" for name, of in COMMANDS.items())
    return (
        "mimogrid trains multimodal models in which every module has its own grid of ranks.\n\n"
        f"{''.join(commands)}\n"
        "JOB is a TOML file; start with `mimogrid init --template vision-language`, or with a checkpoint's folder.\n"
        "--set train.steps=20 overrides a key. `mimogrid COMMAND --help` lists the options, with examples.\n"
    )


def _noun(of: type[Args]) -> str:
    """Return what a command acts on, as its help names it."""
    nouns = (f.metadata.get("metavar", f.name) for f in attrs.fields(of) if f.metadata.get("flags") == ())
    return next(nouns, "")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    whole = _Parser(prog="mimogrid", description="Run `mimogrid` alone for an overview.")
    whole.add_argument("--version", action="version", version=f"mimogrid {__version__}")
    commands = whole.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for name, of in COMMANDS.items():
        # Values that are not given have no place in what argparse returns: the fields say the defaults.
        added = commands.add_parser(
            name,
            help=of.__doc__,
            description=of.__doc__,
            epilog="\n".join(["examples:", *(f"  mimogrid {example}" for example in EXAMPLES[name])]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            argument_default=argparse.SUPPRESS,
        )
        for field in sorted(attrs.fields(of), key=lambda field: field.metadata.get("flags") != ()):
            how = dict(field.metadata)
            how.pop("flags", None)
            flags = _flags(field)
            added.add_argument(*(flags or (field.name,)), **({"dest": field.name} if flags else {}), **how)
    return whole


class _Parser(argparse.ArgumentParser):
    """Says in our words what is wrong with a command."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n    See {self.prog} --help.\n")
