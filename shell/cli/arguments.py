"""Arguments: one frozen value per command, and the parser that makes it.

    >>> parse(["check", "job.toml", "--set", "train.steps=20"])
    CheckArgs(json=False, job=PosixPath('job.toml'), overrides=('train.steps=20',), no_code=False)

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


@attrs.frozen(kw_only=True)
class InitArgs(Args):
    """Write the job file of a published checkpoint. Needs no torch."""

    folder: Path | None = _positional("FOLDER", "the folder of the checkpoint", required=False)
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
    costs: Path | None = _option("FILE", "measured times of the job's modules, as `probe` writes them", Path)
    time_limit: float | None = _option("S", "end after about S seconds with the best layout so far", float)
    out: Path | None = _option("FILE", "write the fastest layout as a job file", Path)


@attrs.frozen(kw_only=True)
class ProbeArgs(JobArgs):
    """Measure the costs of a job on this machine, as a costs file for `simulate`."""

    out: Path | None = _option("FILE", "write the costs file here instead of printing it", Path)
    repeat: int = _option("N", "the number of steps to measure; default 3", int, 3)
    microbatch_sizes: tuple[int, ...] = _option(
        "N,N,...", "measure microbatches of these numbers of samples, too", _sizes, ()
    )


@attrs.frozen(kw_only=True)
class TrainArgs(JobArgs):
    """Train a job, on this machine or under torchrun."""

    resume: Path | None = _option("RUN", "continue the run in this folder", Path)
    changed: tuple[str, ...] = _changed()
    transport: str | None = _option(
        None,
        "send data through host memory, or give each local rank its own GPU and use NCCL",
        choices=("host", "nccl"),
    )
    force: bool = _switch("start even if this machine has too few cores or too little memory for the ranks")


@attrs.frozen(kw_only=True)
class ParityArgs(JobArgs):
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
    to: str = _option(None, "the format", required=True, choices=("safetensors", "dcp", "hf"))
    out: Path | None = _option("FOLDER", "write into this folder, which must be new or empty", Path)
    source: Path | None = _option(
        "FOLDER", "for hf: the checkpoint that the run started from, if it has moved", Path, flags=("--from",)
    )
    max_shard_gb: float = _option(
        "X", "split modules larger than this many GB into several files; default 5", float, 5.0
    )


@attrs.frozen(kw_only=True)
class DataIndexArgs(Args):
    """Read a store of conversations once, and write what the processor makes of it as an index."""

    store: Path = _positional("STORE", "a JSON list or JSON lines of conversations")
    processor: Path = _option("FOLDER", "the checkpoint whose processor reads it", Path, required=True)
    images: Path | None = _option("FOLDER", "the folder of the images; default: that of the store", Path)
    out: Path | None = _option("INDEX", "write into this folder; default: the store's name with .index", Path)
    max_tokens: int = _option("N", "leave out samples of more positions, placeholders included", int, 0)
    workers: int = _option("N", "the number of processes; default: one for each core", int, 0)


@attrs.frozen(kw_only=True)
class IndexArgs(Args):
    """What every command on an index takes."""

    index: Path = _positional("INDEX", "the folder of the index")


@attrs.frozen(kw_only=True)
class DataShowArgs(IndexArgs):
    """Show what a sample of an index becomes: its text, its placeholders, and what counts in the loss."""

    id: str | None = _option("ID", "the id of the sample in the store; default: that of the first")
    picture: Path | None = _option("FILE", "write its images, side by side, into this file", Path)


@attrs.frozen(kw_only=True)
class DataStatsArgs(IndexArgs):
    """Show how long the samples of an index are, and how many images they have. Needs no torch."""

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
}


DATA = "data"
"""The first word of the commands on data, which have two."""


# -- parsing -----------------------------------------------------------------------------------------------


def parse(words: Sequence[str]) -> Args:
    """Return the arguments of a command. Raises SystemExit for --help, and with code 2 for what is wrong."""
    if words and words[0] == DATA:
        words = [" ".join(words[:2]), *words[2:]]
    if words and words[0] not in COMMANDS and not words[0].startswith("-"):
        _Parser(prog="mimogrid").error(f"'{words[0]}' is no command. {nearest(words[0], tuple(COMMANDS))}")
    parser = _parser()
    given, late = parser.parse_known_args(words)
    found = vars(given)
    of = COMMANDS[found.pop("command")]
    # argparse of Python 3.11 takes no optional argument behind an option: `export RUN --to hf FOLDER`.
    optional = [f.name for f in attrs.fields(of) if f.metadata.get("nargs") == "?" and found[f.name] is None]
    if len(late) == len(optional) == 1 and not late[0].startswith("-"):
        return of(**{**found, optional[0]: Path(late[0])})
    if late:
        parser.error(f"unrecognized arguments: {' '.join(late)}")
    return of(**found)


def overview() -> str:
    """Return what `mimogrid` alone prints: every command and what it does."""
    nouns = {name: _noun(of) for name, of in COMMANDS.items()}
    commands = (f"    mimogrid {f'{name} {nouns[name]}':<18}{of.__doc__}\n" for name, of in COMMANDS.items())
    return (
        "mimogrid trains multimodal models in which every module has its own grid of ranks.\n\n"
        f"{''.join(commands)}\n"
        "JOB is a TOML file; start with `init`, or with one from examples/. --set train.steps=20 overrides a key.\n"
        "`mimogrid COMMAND --help` lists the options.\n"
    )


def _noun(of: type[Args]) -> str:
    """Return what a command is of: the first of its arguments without a flag."""
    return next(str(f.metadata["metavar"]) for f in attrs.fields(of) if f.metadata.get("flags") == ())


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="mimogrid", description="Run `mimogrid` alone for an overview.")
    parser.add_argument(
        "--version", action=_Version, nargs=0, default=argparse.SUPPRESS, help="print the version"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for name, of in COMMANDS.items():
        # Values that are not given have no place in what argparse returns: the fields say the defaults.
        added = commands.add_parser(
            name, help=of.__doc__, description=of.__doc__, argument_default=argparse.SUPPRESS
        )
        for field in sorted(attrs.fields(of), key=lambda field: field.metadata.get("flags") != ()):
            how = dict(field.metadata)
            flags = how.pop("flags", (f"--{field.name.replace('_', '-')}",))
            added.add_argument(*(flags or (field.name,)), **({"dest": field.name} if flags else {}), **how)
    return parser


class _Version(argparse.Action):
    """Prints the version, which takes time to look up."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415 -- only what is used

        try:
            print(f"mimogrid {version('mimogrid')}")
        except PackageNotFoundError:
            print("mimogrid, not installed")
        parser.exit()


class _Parser(argparse.ArgumentParser):
    """Says in our words what is wrong with a command."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n    See {self.prog} --help.\n")
