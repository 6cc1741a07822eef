"""Data: an index is made of a store, shown sample by sample, and summed up."""

import contextlib
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.data.histogram import Histogram, histogram, operations
from mimogrid.core.data.record import LANGUAGE, Record, expanded
from mimogrid.core.draw.histograms import histogram_text, histograms_svg
from mimogrid.core.models.families import read_config
from mimogrid.core.pricing.flops import sample_flops
from mimogrid.core.step.step import Step
from mimogrid.core.topology.parse import parse
from mimogrid.core.topology.topology import Topology
from mimogrid.shell.cli.arguments import Args, DataIndexArgs, DataShowArgs, DataStatsArgs
from mimogrid.shell.cli.output import print_json, terminal, write
from mimogrid.shell.data.conversations import REASONS, LeftOutError
from mimogrid.shell.data.index import LEFT_OUT, Index
from mimogrid.shell.job import jobfile
from mimogrid.shell.job.jobs import open_job
from mimogrid.shell.job.sources.conversations import facts_of
from mimogrid.shell.job.textfiles import json_of, read_text


def run(args: Args) -> int:
    """Run a command on data."""
    match args:
        case DataIndexArgs():
            return index(args)
        case DataShowArgs():
            return show(args)
        case DataStatsArgs():
            return stats(args)
        case _:
            raise AssertionError(args)


# -- index -------------------------------------------------------------------------------------------------


def index(args: DataIndexArgs) -> int:
    """Make an index; say what was left out, and why."""
    from mimogrid.shell.data.indexing import Making, build, processes  # noqa: PLC0415 -- imports transformers

    # The last part may be a link to a file whose name does not say what it is, as in a cache of downloads.
    store = args.store.absolute().parent.resolve() / args.store.absolute().name
    making = Making(
        store=store,
        media=(args.media or (store if store.is_dir() else store.parent)).resolve(),
        processor=args.processor.resolve(),
        max_tokens=args.max_tokens,
        columns=_columns(args.columns),
    )
    out = (args.out or store.with_suffix(".index")).resolve()
    if args.max_tokens < 0 or args.workers < 0:
        remedy = "Use a number of 1 or more, or leave it out."
        raise PlanError([Problem("--max-tokens, --workers", "is below 0.", remedy)])
    begin = time.monotonic()
    total = sum(file.stat().st_size for file in making.open().files if file.exists())
    with _progress(total, silent=args.json) as tell:
        workers = args.workers or os.cpu_count() or 1
        with processes(workers) as pool:
            facts = build(making, out, pool, ahead=AHEAD * workers, progress=tell)
    samples, seconds = len(Index(out)), time.monotonic() - begin
    left_out = sum(facts.left_out.values())
    if args.json:
        found = attrs.asdict(facts)
        print_json({"ok": True, "index": str(out), "samples": samples, "seconds": seconds, **found})
        return 0
    print(f"{out}: {samples} samples, at most {facts.longest} positions each, in {seconds:.0f} s")
    if left_out:
        print(f"records left out: {left_out}; {out / LEFT_OUT} has their ids")
        for reason, count in facts.left_out.items():
            print(f"  {count:>8}  {reason}: {REASONS[reason]}")
    return 0


def _columns(text: str) -> tuple[tuple[str, str], ...]:
    """Return the columns that are for what, in one order. Raises PlanError."""
    pairs = [pair.partition("=") for pair in text.split(",") if pair]
    if wrong := [role for role, equals, column in pairs if not (role and equals and column)]:
        message = f"'{wrong[0]}' does not say which column it is."
        raise PlanError([Problem("--columns", message, "Write --columns question=COLUMN,answer=COLUMN.")])
    return tuple(sorted((role.strip(), column.strip()) for role, _, column in pairs))


@contextlib.contextmanager
def _progress(total: int, *, silent: bool) -> Iterator[Any]:
    """Show on standard error how much of a store has been read: a bar on a terminal, else a line now and then."""
    from rich.console import Console  # noqa: PLC0415 -- slow to import
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415

    console = Console(file=terminal(sys.stderr), stderr=True)
    read, told = 0, time.monotonic()
    columns = (TextColumn("{task.fields[records]} records"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=silent or not console.is_terminal) as bar:
        task = bar.add_task("", total=total, records=0)

        def tell(records: int, end: int) -> None:
            nonlocal read, told
            read += records
            bar.update(task, completed=end, records=read)
            if not silent and not console.is_terminal and time.monotonic() - told >= LINE_EVERY_S:
                told = time.monotonic()
                print(f"{read} records, {100 * end / max(total, 1):.0f} % of the store", file=sys.stderr)

        yield tell


AHEAD = 4
"""Stretches of the store that wait for each process."""
LINE_EVERY_S = 10.0
"""Seconds from one line of progress to the next, where there is no terminal."""


# -- show --------------------------------------------------------------------------------------------------


def show(args: DataShowArgs) -> int:
    """Print what a sample of an index becomes; write its images and waveforms as one picture."""
    from mimogrid.shell.data.encoding import Encoder  # noqa: PLC0415 -- imports transformers

    opened = Index(args.index)
    row = opened.find(args.id) if args.id is not None else 0
    values, record = opened[row], opened.record(row)
    store = opened.store()
    encoder = Encoder.of((args.index / opened.facts.processor).resolve())
    pieces = list(_pieces(opened, row))
    shown = [(kind, count, encoder.text(tokens)) for kind, count, tokens in pieces]
    if args.picture is not None:
        try:
            media = [encoder.decoded(kind, store.read(place), place) for kind, place, _ in opened.media(row)]
        except LeftOutError as error:
            raise PlanError([Problem(str(args.index), f"{error.fact}.", "Index the store again.")]) from None
        _write_picture(args.picture, media)
    if args.json:
        keys = ("id", "file", "offset", "size", "kinds", "places", "modules", "grids")
        text = [{"kind": kind, "positions": count, "text": words} for kind, count, words in shown]
        print_json({**{key: values[key] for key in keys}, "row": row, "units": record.units, "pieces": text})
        return 0
    offset, size = values["offset"], values["size"]
    where = f"bytes {offset} to {offset + size}" if size else f"row {offset}"
    path = os.path.normpath(args.index.resolve() / opened.facts.store.path)
    print(f"{record.id}: sample {row} of {len(opened)}, {where} of {_below(path, values['file'])}")
    placeholders = sum(count for _, count in record.runs)
    print(f"{record.length} tokens, {placeholders} placeholders, {record.units:g} tokens that count")
    folder = os.path.normpath(args.index.resolve() / opened.facts.store.media)
    for kind, place, _ in opened.media(row):
        print(
            f"{'sound' if kind == 'audio' else kind} {place if store.holds_media else Path(folder) / place}"
        )
    for module, grids in record.segments.items():
        print(f"{module} reads {', '.join(' x '.join(map(str, grid)) for grid in grids)} rows")
    print()
    for kind, count, words in shown:
        print(f"{kind:>12}  {f'{count} rows' if kind == 'placeholders' else words}")
    return 0


def _pieces(opened: Index, row: int) -> Iterator[tuple[str, int, list[int]]]:
    """Yield the stretches of a sequence that are one kind: what it is, its positions, its tokens."""
    text = iter(opened.tokens(row))
    placeholders = set(expanded(opened.runs(row, "runs")))
    counted = {position + 1 for position in expanded(opened.runs(row, "counted"))}
    length = len(opened.tokens(row)) + len(placeholders)

    def kind(position: int) -> str:
        return "placeholders" if position in placeholders else "counts" if position in counted else "text"

    for start, stop, found in _stretches([kind(position) for position in range(length)]):
        tokens = [] if found == "placeholders" else [next(text) for _ in range(start, stop)]
        yield found, stop - start, tokens


def _stretches(kinds: list[str]) -> Iterator[tuple[int, int, str]]:
    start = 0
    for position, kind in enumerate(kinds):
        if position + 1 == len(kinds) or kinds[position + 1] != kind:
            yield start, position + 1, kind
            start = position + 1


def _below(path: str, file: str) -> str:
    """Return a file of a store: the store itself, or one in its folder."""
    return path if not file or Path(path).name == file else str(Path(path) / file)


def _write_picture(path: Path, media: list[Any]) -> None:
    """Write images and waveforms side by side. Raises PlanError."""
    from PIL import Image  # noqa: PLC0415

    if not media:
        message = "the sample has no image and no sound."
        raise PlanError([Problem("--picture", message, "Name another sample with --id.")])
    images = [each if isinstance(each, Image.Image) else _waveform(each) for each in media]
    gap = 4
    width = sum(image.width + gap for image in images) - gap
    page = Image.new("RGB", (width, max(image.height for image in images)), "white")
    left = 0
    for image in images:
        page.paste(image, (left, 0))
        left += image.width + gap
    try:
        page.save(path)
    except (OSError, ValueError) as error:
        remedy = "Name a .png in a folder that exists."
        raise PlanError([Problem(str(path), f"cannot be written: {error}.", remedy)]) from None


def _waveform(samples: Any) -> Any:
    """Return a picture of a sound: from the lowest to the highest sample of each column, on a scale from -1 to 1."""
    import numpy as np  # noqa: PLC0415
    from PIL import Image, ImageDraw  # noqa: PLC0415

    picture = Image.new("RGB", (WAVE_WIDTH, WAVE_HEIGHT), "white")
    draw, middle = ImageDraw.Draw(picture), (WAVE_HEIGHT - 1) / 2
    bounds = np.linspace(0, len(samples), WAVE_WIDTH + 1).astype(int)
    draw.line((0, middle, WAVE_WIDTH, middle), fill="#c0c0c0")
    for column, (start, stop) in enumerate(
        zip(bounds, np.maximum(bounds[1:], bounds[:-1] + 1), strict=False)
    ):
        low, high = (
            float(np.clip(each, -1, 1)) for each in (samples[start:stop].min(), samples[start:stop].max())
        )
        draw.line((column, middle - high * middle, column, middle - low * middle), fill="#1f5fa8")
    return picture


WAVE_WIDTH, WAVE_HEIGHT = 480, 120


# -- stats -------------------------------------------------------------------------------------------------


def stats(args: DataStatsArgs) -> int:
    """Print and draw histograms of the samples of an index."""
    opened = Index(args.index)
    records = [opened.record(row) for row in range(len(opened))]
    found, unknown = list(_histograms(records)), ""
    try:
        found.append(operations("a sample, forward and backward", _flops(opened, records, args.job)))
    except PlanError as error:
        if args.job is not None:
            raise
        unknown = f"the operations of a sample are not known; name a job with --job. {error}"
    if args.svg is not None:
        title = f"{args.index.resolve().name}: {len(opened):,} samples"
        write(args.svg, [histograms_svg(title, found)])
    if args.json:
        print_json({"samples": len(opened), "histograms": [attrs.asdict(each) for each in found]})
        return 0
    print(f"{args.index}: {len(opened):,} samples")
    for each in found:
        print("\n".join(("", *histogram_text(each))))
    left_out: Mapping[str, int] = opened.facts.left_out
    if left_out:
        print("\nleft out: " + ", ".join(f"{count} {reason}" for reason, count in left_out.items()))
    if unknown:
        print(f"\n{unknown}")
    return 0


def _flops(opened: Index, records: Sequence[Record], job: Path | None) -> list[float]:
    """Return the operations of each sample in a training step of a job. Raises PlanError where they are not known."""
    topology = _of_checkpoint(opened) if job is None else open_job(job).topology
    language = next(iter(topology.graph.texts), LANGUAGE)
    samples = (record.described(number, language) for number, record in enumerate(records))
    return sample_flops(Step(topology, tuple(samples)))


def _of_checkpoint(opened: Index) -> Topology:
    """Return the job of one rank for each module of the checkpoint whose processor made an index."""
    config = (opened.folder / opened.facts.processor).resolve() / "config.json"
    model = read_config(json_of(read_text(config, "Index the store with a whole checkpoint.")))
    table = {
        "modules": {name: module.table() for name, module in model.modules.items()},
        "data": {"source": "conversations"},
        "batch": {"global_size": 1},
    }
    return parse(jobfile.read_table(table), facts_of(model, opened.facts.longest))


def _histograms(records: Sequence[Record]) -> Iterator[Histogram]:
    placeholders = [sum(count for _, count in record.runs) for record in records]
    positions = [record.length + count for record, count in zip(records, placeholders, strict=True)]
    yield histogram("positions of a sample", positions)
    yield histogram("text tokens of a sample", [record.length for record in records])
    yield histogram("tokens that count in the loss", [int(record.units) for record in records])
    for module in sorted({module for record in records for module in record.segments}):
        segments = [record.segments.get(module, ()) for record in records]
        yield histogram(f"segments that {module} reads of a sample", [len(each) for each in segments])
        yield histogram(
            f"rows that {module} reads of a sample", [sum(map(math.prod, each)) for each in segments]
        )
