"""Fuzzing: files and arguments that nobody would write, for the commands that need no torch.

    python fuzzing.py SECONDS [SEED]

Every case is some files in a folder and a command line. It must end within `CPU_SECONDS` and `BYTES` with one of the
documented exit codes, in words: no traceback, and nothing that acts on a terminal. Faults are counted by where they
were raised, one example of each is printed, and the exit code is 1 if there are any.
"""

import contextlib
import copy
import io
import json
import os
import re
import resource
import signal
import sys
import tempfile
import time
import tomllib
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import attrs
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from mimogrid.shell.cli.main import main


CPU_SECONDS, BYTES = 10, 2**30
ROUND = 200
"""Cases of one seed."""
EXAMPLES = Path(__file__).parents[2] / "examples"
JOBS = {name: (EXAMPLES / name / "job.toml").read_text("utf-8") for name in ("first", "three", "digits")}
LARGE = {path.stem: path.read_text("utf-8") for path in sorted((EXAMPLES / "plans").glob("clip*.toml"))}
COSTS = """
origin = "probed"
[stages."vision.0"]
forward = 1.0
backward = 2.0
[stages."language.0"]
forward = 1.0
input_gradient = 1.0
weight_gradient = 1.0
[edges]
latency = 0.001
[edges."vision -> language"]
bytes_per_s = 1e9
[machine]
cores = 2
"""
LLAMA = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
LLAMA |= {"intermediate_size": 128, "vocab_size": 64, "tie_word_embeddings": True, "text_config": {}}
QWEN = {"embed_dim": 64, "depth": 2, "mlp_ratio": 4, "num_heads": 4, "patch_size": 14, "in_channels": 3}
CONFIGS = {
    "gpt": LLAMA,
    "vit": {"model_type": "qwen2_vl", "vision_config": QWEN},
}
MANIFEST = {
    "version": 1,
    "step": 3,
    "steps_taken": 3,
    "watch": {},
    "job": JOBS["first"],
    "files": {"index.json": {"bytes": 2, "sha256": "0" * 64}},
    "layout": {"vision": {"dp": 2}},
    "versions": {"mimogrid": "0"},
    "data": {"source": "synthetic", "next_sample": 3},
    "random": {"seed": 0},
    "precision": "fp32",
    "schedule": "1f1b",
    "created": "now",
}
INDEX = {
    "vision.input.weight": {
        "dtype": "float32",
        "shape": [2, 2],
        "parts": [{"file": "index.json", "offsets": [0, 0], "shape": [2, 2]}],
    }
}
HOSTILE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


@attrs.frozen
class Case:
    """Files by their names, and the words of a command that is run in their folder."""

    files: Mapping[str, bytes]
    words: tuple[str, ...]


# -- values ------------------------------------------------------------------------------------------------

INTEGERS = st.sampled_from(
    (0, 1, 2, 3, 4, 7, 8, 64, -1, 1000, 10**5, 10**6, 10**7, 2**31, 2**63 - 1, -(2**63), 2**64)
)
NUMBERS = st.sampled_from((16, 100, 1000, 4096, 10_000, 65_536, 100_000, 1_000_000))
WORDS = st.sampled_from(
    (
        "",
        ".",
        "..",
        "/",
        "/dev/zero",
        "/dev/null",
        "/proc/self/mem",
        "vision",
        "language",
        "gpt",
        "vit",
        "block",
        "regressor",
        "auto",
        "interleaved",
        "bf16",
        "full",
        "subprocess:getoutput",
        "os:system",
        "x:y",
        "a.b.c:d",
        "*",
        "*" * 40 + "a",
        "[!a",
        "x" * 300,
        "x\x00y",
        "\x1b]0;title\x07\x1b[2J",
        "\u202egpj\u2066",
        "naïve ─ ·",
        "9" * 5000,
        "1e400",
        "nan",
        "0.1",
    )
)
PLAIN = st.one_of(INTEGERS, st.floats(), st.booleans(), WORDS, st.text(max_size=8))
VALUES = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3), max_leaves=6
)


def _deep(depth: int, leaf: object, key: str | None) -> object:
    for _ in range(depth):
        leaf = [leaf] if key is None else {key: leaf}
    return leaf


DEEP = st.builds(_deep, st.sampled_from((5, 31, 40, 300)), PLAIN, st.sampled_from((None, "a")))
ANY = VALUES | DEEP


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of everything within a value."""
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, inner in entries:
        yield (*path, key)
        yield from _places(inner, (*path, key))


def _near(value: object, numbers: st.SearchStrategy[int]) -> st.SearchStrategy[Any]:
    """Values that could stand in place of one, and are mostly legal."""
    match value:
        case bool():
            return st.booleans()
        case int():
            return st.one_of(st.sampled_from((1, 2, 3, 4, 6, 8)), st.just(min(value * 2, 2**40)), numbers)
        case float():
            return st.floats(0, 10)
        case str():
            return WORDS
        case list():
            return st.permutations(value).flatmap(
                lambda items: st.sampled_from((items, items[1:], items * 2))
            )
        case _:
            return st.just(value)


@st.composite
def changed(
    draw: st.DrawFn,
    value: Any,
    values: st.SearchStrategy[Any] = ANY,
    *,
    numbers: st.SearchStrategy[int] = NUMBERS,
) -> Any:
    """Draw a value with up to four changes; `numbers` may stand where there are others."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(0, 4))):
        places = list(_places(value))
        if not places:
            break
        *path, key = draw(st.sampled_from(places))
        inner = value
        for step in path:
            inner = inner[step]
        match draw(st.sampled_from(("near",) * 7 + ("set", "drop", "rename", "copy", "add"))):
            case "near":
                inner[key] = draw(_near(inner[key], numbers))
            case "drop":
                del inner[key]
            case "rename" if isinstance(inner, dict):
                inner[draw(WORDS)] = inner.pop(key)
            case "copy" if isinstance(inner, dict):
                inner[draw(WORDS)] = copy.deepcopy(inner[key])
            case "add" if isinstance(inner[key], dict):
                inner[key][draw(WORDS)] = draw(values)
            case _:
                inner[key] = draw(values)
    return value


def toml(value: object) -> str:
    """Write a value as TOML."""
    match value:
        case dict():
            return "{" + ", ".join(f"{toml(str(key))} = {toml(inner)}" for key, inner in value.items()) + "}"
        case list():
            return f"[{', '.join(map(toml, value))}]"
        case bool():
            return str(value).lower()
        case str():
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case _:
            return str(value)


def toml_file(table: Mapping[str, object]) -> bytes:
    """Write tables as a file of TOML."""
    lines = (f"{toml(str(key))} = {toml(value)}\n" for key, value in table.items())
    return "".join(lines).encode("utf-8", "surrogatepass")


@st.composite
def spoilt(draw: st.DrawFn, text: bytes) -> bytes:
    """Draw bytes: any, or those of a text with pieces cut, doubled, moved or replaced."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200))
    for _ in range(draw(st.integers(0, 2))):
        begin, end = sorted(draw(st.tuples(*[st.integers(0, len(text))] * 2)))
        end = min(end, begin + draw(st.sampled_from((1, 10, 100, 10**6))))
        piece = text[begin:end]
        new = draw(
            st.sampled_from(
                (b"", piece * 2, piece[::-1], b"\xff", b"[" * 2000, b"9" * 5000, b"a." * 4000, b"\r")
            )
            | st.binary(max_size=4)
        )
        text = text[:begin] + new + text[end:]
    return text


# -- cases -------------------------------------------------------------------------------------------------

KEYS = [
    "batch.global_size",
    "batch.microbatches",
    "modules.vision.grid.dp",
    "modules.language.grid.pp",
    "modules.language.grid.tp",
    "modules.vision.options.layers",
    "modules.language.chunks",
    "schedule.name",
    "schedule.costs",
    "train.run_dir",
    "data.options",
    "world_size",
    "precision",
    "modules.vision.feeds",
    "optimizer.groups",
    "seed",
    "modules",
    "a.b.c",
    "train.skip_steps",
    "modules.language.grid.ep",
    "modules.language.options.experts",
    "modules.vision.grid.offset",
]
TEXTS = st.one_of(
    ANY.map(toml),
    WORDS,
    st.sampled_from(("[" * 3000, "{a=" * 3000, "9" * 5000, "0x" + "f" * 5000, "'", "1_")),
)
OVERRIDES = st.one_of(
    st.builds("{}={}".format, st.sampled_from(KEYS), TEXTS),
    st.builds("{}={}".format, WORDS, TEXTS),
    st.builds("{}=1".format, st.sampled_from(("a." * 5000 + "a", '"' * 99, "a", "=", "a..b"))),
    st.text(max_size=12),
)
FLAGS = st.lists(st.sampled_from(("--json", "--no-code")), unique=True).map(tuple)


@st.composite
def jobs(draw: st.DrawFn) -> Case:
    """A job, changed as a table or as text, under any command."""
    texts = JOBS | LARGE
    text = texts[draw(st.sampled_from([*texts]))]
    table = changed(tomllib.loads(text)).map(toml_file)
    content = draw(table | table | table | spoilt(text.encode()))
    return Case({"job.toml": content}, ("check", "job.toml", *draw(FLAGS)))


@st.composite
def overridden(draw: st.DrawFn) -> Case:
    """A job with overrides."""
    found = draw(st.lists(OVERRIDES, min_size=1, max_size=3))
    text = JOBS[draw(st.sampled_from([*JOBS]))]
    words = (draw(st.sampled_from(("check", "roles"))), "job.toml", *(f"--set={each}" for each in found))
    return Case({"job.toml": text.encode()}, (*words, *draw(FLAGS)))


SMALL = st.one_of(st.sampled_from((0, 1, 2, 3, 4, 8, -1, 10**18)), st.floats(), st.booleans(), WORDS)


@st.composite
def small_jobs(draw: st.DrawFn) -> Case:
    """A job with small numbers, under commands that take longer where they are large."""
    table = draw(changed(tomllib.loads(JOBS[draw(st.sampled_from([*JOBS]))]), SMALL, numbers=st.just(5)))
    more = {
        "show": (),
        "verify": ("--strict",),
        "roles": ("--svg", "roles.svg"),
        "simulate": draw(
            st.sampled_from(
                (
                    ("--ragged", "--jitter", "0.1"),
                    ("--svg", "a.svg", "--trace", "a.json"),
                    ("--schedule", "all"),
                    ("--gpu", "h100"),
                    ("--jitter", "1e308"),
                    ("--step", "-1"),
                    ("--compare", "job.toml"),
                )
            )
        ),
    }
    command = draw(st.sampled_from([*more]))
    return Case({"job.toml": toml_file(table)}, (command, "job.toml", *more[command], *draw(FLAGS)))


@st.composite
def costs(draw: st.DrawFn) -> Case:
    """A costs file, or a path to one that is none."""
    table = tomllib.loads(COSTS)
    content = draw(st.one_of(changed(table).map(toml_file), spoilt(COSTS.encode())))
    words = draw(
        st.sampled_from((("--costs", "costs.toml"),) * 4 + (("--set=schedule.costs=costs.toml",),))
        | WORDS.filter(lambda word: "\x00" not in word).map(lambda word: ("--costs", word))
        | WORDS.map(lambda word: (f"--set=schedule.costs={word}",))
    )
    files = {"job.toml": JOBS["first"].encode(), "costs.toml": content}
    return Case(files, ("simulate", "job.toml", *words, *draw(FLAGS)))


@st.composite
def programs(draw: st.DrawFn) -> Case:
    """A program in its notation, with lines or letters changed."""
    lines = _program().splitlines()
    for _ in range(draw(st.integers(0, 4))):
        i, j = draw(st.tuples(*[st.integers(0, len(lines) - 1)] * 2))
        match draw(st.sampled_from(("drop", "double", "swap", "number", "word"))):
            case "drop" if len(lines) > 1:
                del lines[i]
            case "double":
                lines.insert(j, lines[i])
            case "swap":
                lines[i], lines[j] = lines[j], lines[i]
            case "number":
                number = draw(INTEGERS.map(str) | st.just("1" * 5000))
                lines[i] = re.sub(r"\d+", number, lines[i], count=1)
            case _:
                words = lines[i].split(" ")
                words[draw(st.integers(0, len(words) - 1))] = draw(WORDS)
                lines[i] = " ".join(words)
    text = "\n".join(lines).encode("utf-8", "surrogatepass")
    content = draw(spoilt(text)) if draw(st.integers(0, 3)) == 0 else text
    files = {"job.toml": JOBS["first"].encode(), "program.txt": content}
    return Case(files, ("verify", "job.toml", "--program", "program.txt", *draw(FLAGS)))


_shown: list[str] = []


def _program() -> str:
    if not _shown:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            assert 0 == main(["show", str(EXAMPLES / "first/job.toml")])
        _shown.append(out.getvalue())
    return _shown[0]


@st.composite
def configs(draw: st.DrawFn) -> Case:
    """A config.json of Hugging Face."""
    model = draw(st.sampled_from([*CONFIGS]))
    text = json.dumps(CONFIGS[model]).encode()
    content = draw(
        st.one_of(changed(CONFIGS[model]).map(lambda value: json.dumps(value).encode()), spoilt(text))
    )
    path = draw(
        st.sampled_from(("config.json", "config.json", "config.json", "/dev/zero", ".", "x" * 300, "x\x00"))
    )
    feeds = "" if model == "gpt" else 'feeds = ["out"]\n[modules.out]\nmodel = "gpt"\noptions = '
    feeds += "{ layers = 2, hidden = 64, heads = 4, vocab = 64 }" if feeds else ""
    job = f'[modules.m]\nmodel = "{model}"\noptions = {{ config = {toml(path)} }}\ngrid = {{ pp = 2 }}\n{feeds}\n'
    job += '[data]\nsource = "synthetic"\n[batch]\nglobal_size = 4\n'
    files = {"job.toml": job.encode(), "config.json": content}
    return Case(files, ("check", "job.toml", *draw(FLAGS)))


@st.composite
def checkpoints(draw: st.DrawFn) -> Case:
    """The manifest and the index of a checkpoint, whose other files are not there."""
    names = {"manifest.json": MANIFEST, "index.json": INDEX}
    content = {
        f"run/checkpoints/step-00000003/{name}": draw(
            st.one_of(
                changed(value).map(lambda each: json.dumps(each).encode()),
                spoilt(json.dumps(value).encode()),
            )
        )
        for name, value in names.items()
    }
    job = draw(st.sampled_from(((), ("--job", "job.toml"))))
    return Case({**content, "job.toml": JOBS["first"].encode()}, ("inspect", "run", *job, *draw(FLAGS)))


CASES = st.one_of(
    jobs(), jobs(), overridden(), overridden(), small_jobs(), costs(), programs(), configs(), checkpoints()
)


# -- running -----------------------------------------------------------------------------------------------


class TooSlow(BaseException):
    """A case takes more than `CPU_SECONDS`."""


def _too_slow(_: int, frame: FrameType | None) -> None:
    raise TooSlow(f"more than {CPU_SECONDS} s")


def fault_of(case: Case, codes: Counter[int]) -> str | None:
    """Run a case in an empty folder; return what is wrong with how it ended."""
    for name, content in case.files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content)
    out, err = io.StringIO(), io.StringIO()
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            code = main(case.words)
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if "mimogrid" in frame.filename] or list(frames)
        return f"{type(error).__name__} at {ours[-1].filename}:{ours[-1].lineno}\n{traceback.format_exc()[-3000:]}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    codes[code] += 1
    words = out.getvalue() + err.getvalue()
    if code not in {0, 2}:
        return f"exit code {code}\n{words[-1000:]}"
    if code == 2 and not words:
        return "exit code 2 without a word"
    if hostile := HOSTILE.search(words):
        return f"prints {hostile[0]!r}\n{words[max(hostile.start() - 200, 0) : hostile.end() + 20]!r}"
    return None


def session(seconds: float, first: int = 0) -> tuple[Counter[int], Counter[str], dict[str, tuple[Case, str]]]:
    """Fuzz for a time; return the exit codes, the faults by their first line, and an example of each."""
    codes, faults, examples = Counter[int](), Counter[str](), dict[str, tuple[Case, str]]()
    end = time.monotonic() + seconds
    signal.signal(signal.SIGPROF, _too_slow)

    def run(case: Case) -> None:
        if time.monotonic() > end:
            return
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            fault = fault_of(case, codes)
        if fault:
            head = fault.partition("\n")[0]
            faults[head] += 1
            examples.setdefault(head, (case, fault))

    quiet = settings(
        max_examples=ROUND,
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    while time.monotonic() < end:
        seed(first)(quiet(given(CASES)(run)))()
        first += 1
    return codes, faults, examples


def _limited() -> None:
    """Give this process `BYTES` beyond what it has."""
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    most = pages * os.sysconf("SC_PAGESIZE") + BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


if __name__ == "__main__":
    _program()
    _limited()
    began = time.monotonic()
    codes, found, shown = session(float(sys.argv[1]), *map(int, sys.argv[2:]))
    for place, times in found.most_common():
        one, told = shown[place]
        print(f"---- {times} x {told}\n{one.words}")
        for file, held in one.files.items():
            print(f"  {file}: {held[:1500]!r}")
    ended = ", ".join(f"{times} with {code}" for code, times in sorted(codes.items()))
    print(f"{codes.total()} cases in {time.monotonic() - began:.0f} s ({ended}), {len(found)} faults")
    raise SystemExit(1 if found else 0)
