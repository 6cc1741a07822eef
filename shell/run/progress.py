"""Progress: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


EVERY_S = 10.0


class Progress:
    """Shows steps as they are done."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._spoke = self._begun = time.monotonic()
        columns = [
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        ]
        console = Console(stderr=True)
        self._bar = Bar(*columns, console=console) if sys.stderr.isatty() else None

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task("training", total=self._steps)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def show(self, done: int, facts: Mapping[str, Any]) -> None:
        """Show how far the run is."""
        now = time.monotonic()
        text = (
            f"loss {facts['loss']:.4f}  {facts['samples_per_s']:.0f} samples/s  "
            f"{facts['tokens_per_s']:.0f} tokens/s"
        )
        if self._bar:
            self._bar.update(self._task, completed=done, description=text)
        elif done in (1, self._steps) or now - self._spoke > EVERY_S:
            left = (now - self._begun) / done * (self._steps - done)
            print(f"step {done}/{self._steps}  {text}  {left:.0f} s left", file=sys.stderr, flush=True)  # noqa: T201
            self._spoke = now
