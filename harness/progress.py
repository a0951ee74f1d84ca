"""Progress of long work on standard error: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from types import TracebackType

from .machine import rank

LINE_SECONDS = 15.0  # without a terminal, a stage reports at most this often


class Display:
    """Shows how many of `total` cells are done, what the current one is doing, and when all will be done.

    `weights` are the expected costs of the cells in any unit; the time left is learned from those already done.
    """

    def __init__(self, weights: list[float], quiet: bool = False) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self.weights, self.spent, self.seconds, self.number = weights, 0.0, 0.0, 0
        quiet = quiet or rank() > 0
        self.console = Console(stderr=True, highlight=False, quiet=quiet)
        self.live = self.console.is_terminal and not quiet
        if not self.live:
            self.console = Console(stderr=True, highlight=False, width=200, quiet=quiet)  # logs need no wrapping
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self.console,
            transient=True,
        )
        self.overall = self.progress.add_task("cells", total=max(1, len(weights)), left="")
        self.stage = self.progress.add_task("", total=1, left="", visible=False)
        self._reported = monotonic()

    def __enter__(self) -> Display:
        if self.live:
            self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.live:
            self.progress.stop()

    def __call__(self, text: str, done: float, total: float) -> None:
        """Reports a stage of the current cell."""
        self.progress.update(self.stage, description=f"  {text}", completed=done, total=max(total, 1e-9), visible=True)
        if not self.live and monotonic() - self._reported > LINE_SECONDS:
            self._reported = monotonic()
            self.console.print(f"  {text}: {100 * min(1.0, done / max(total, 1e-9)):.0f} %")

    def say(self, text: str) -> None:
        self.console.print(text)

    @contextmanager
    def cell(self, label: str) -> Iterator[None]:
        """Wraps the work on one cell."""
        start = monotonic()
        weight = self.weights[self.number]
        self.number += 1
        place = f"[{self.number}/{len(self.weights)}]"
        self.progress.update(self.overall, description=f"{place} {label}", left=self._left())
        took = "stopped after "
        try:
            yield
            took = ""
        finally:
            self.spent += weight
            self.seconds += monotonic() - start
            self.progress.update(self.overall, completed=self.number, left=self._left())
            self.progress.update(self.stage, visible=False)
            self._reported = monotonic()
            self.say(f"{place} {label}: {took}{monotonic() - start:.0f} s{self._left(', ')}")

    def _left(self, before: str = "") -> str:
        """The time left, from the time per unit of weight so far."""
        rest = sum(self.weights) - self.spent
        if not self.spent or rest <= 0:
            return ""
        seconds = self.seconds / self.spent * rest
        return f"{before}about {seconds / 60:.0f} min left" if seconds > 90 else f"{before}about {seconds:.0f} s left"
