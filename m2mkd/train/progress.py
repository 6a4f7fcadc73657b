"""Progress of long work on stderr: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_PLAIN_INTERVAL = 10.0  # seconds between plain lines


class Reporter:
    """Shows messages and the progress of the current stage; use as a context manager."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = Console(file=sys.stderr, quiet=quiet, highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("{task.description:<28}"),
            BarColumn(bar_width=28),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._name = ""
        self._total = 0
        self._last_line = 0.0
        self._began = (0.0, 0)

    def __enter__(self) -> "Reporter":
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def message(self, text: str) -> None:
        """Prints one line."""
        self._console.print(text, markup=False)

    def start(self, name: str, total: int, done: int = 0) -> None:
        """Begins a stage of `total` optimiser steps, `done` of which were done earlier."""
        self._name, self._total, self._last_line = name, total, time.monotonic()
        self._began = (self._last_line, done)
        self._task = self._bar.add_task(name, total=total, completed=done, note="")

    def step(self, done: int, *, loss: float, lr: float, images_per_second: float) -> None:
        """Reports optimiser steps done so far, the latest loss, learning rate and throughput."""
        note = f"loss {loss:.4f}  lr {lr:.1e}  {images_per_second:.0f} img/s"
        if self._task is not None:
            self._bar.update(self._task, completed=done, note=note)
        now = time.monotonic()
        is_due = now - self._last_line >= _PLAIN_INTERVAL
        if is_due and not self._console.is_terminal:
            self._last_line = now
            left = remaining(now - self._began[0], done - self._began[1], self._total - done)
            self.message(f"{self._name}: step {done}/{self._total}  {note}  {left} left")

    def advance(self, note: str) -> None:
        """Reports one more unit of work that is not an optimiser step."""
        if self._task is not None:
            self._bar.update(self._task, advance=1, note=note)

    def finish(self) -> None:
        """Removes the current stage's bar."""
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None


def remaining(seconds: float, done: int, left: int) -> str:
    """Estimates the time that `left` steps take after `done` took `seconds`, as H:MM:SS."""
    return str(timedelta(seconds=round(seconds / max(1, done) * left)))
