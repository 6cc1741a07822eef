"""Logs: JSON lines in the run folder from every rank, readable lines on the terminal from one.

Rank and stages are bound once; a call adds the rest:

    log.info("step", step=20, loss=0.71)
"""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import structlog
from structlog.typing import FilteringBoundLogger

from mimogrid.core.base.text import printable
from mimogrid.core.topology.roles import RankRole
from mimogrid.shell.world.secrets import without_secrets


@contextmanager
def open_log(folder: Path, role: RankRole, *, speaks: bool) -> Iterator[FilteringBoundLogger]:
    """Open this rank's log in a run folder; with `speaks`, its lines go to the terminal, too."""
    folder.mkdir(parents=True, exist_ok=True)
    stages = [str(info.stage) for info in role.stages]
    with (folder / f"rank-{role.rank}.jsonl").open("a", encoding="utf-8") as file:
        log: FilteringBoundLogger = structlog.wrap_logger(
            None,
            processors=[
                structlog.processors.add_log_level,
                structlog.processors.TimeStamper(fmt="iso"),
                _Writer(file, sys.stderr if speaks else None),
            ],
            wrapper_class=structlog.make_filtering_bound_logger(0),
            rank=role.rank,
            stages=stages,
        )
        yield log


class _Writer:
    """The last processor: writes an event into the file as JSON, and on the terminal as a line."""

    def __init__(self, file: TextIO, terminal: TextIO | None) -> None:
        self._file = file
        self._terminal = terminal

    def __call__(self, _: object, __: str, event: Mapping[str, object]) -> str:
        self._file.write(without_secrets(json.dumps(event, default=str)) + "\n")
        self._file.flush()
        if self._terminal:
            bound = ("event", "level", "timestamp", "rank", "stages")
            facts = "  ".join(f"{key} {value}" for key, value in event.items() if key not in bound)
            self._terminal.write(printable(without_secrets(f"{event['event']}  {facts}".rstrip())) + "\n")
            self._terminal.flush()
        raise structlog.DropEvent
