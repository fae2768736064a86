"""Progress in the terminal: rich bars and lines on stderr."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class TerminalProgress:
    """A `Progress` on stderr: live bars on a terminal, plain lines in a log."""

    def __init__(self) -> None:
        self.console = Console(file=sys.stderr, highlight=False)
        self._bar: RichProgress | None = None
        self._began = time.monotonic()

    def start(self, description: str, total: int) -> None:
        """Begin a bar of `total` steps."""
        self.stop()
        if not self.console.is_terminal:
            return
        self._bar = RichProgress(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metrics]}"),
            console=self.console,
            transient=True,
        )
        self._bar.add_task(description, total=total, metrics="")
        self._bar.start()

    def advance(self, steps: int = 1, **metrics: float) -> None:
        """Move the bar and show the latest metrics."""
        if self._bar is None:
            return
        task = self._bar.tasks[0].id
        if metrics:
            shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            self._bar.update(task, advance=steps, metrics=shown)
        else:
            self._bar.update(task, advance=steps)

    def stop(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def say(self, text: str) -> None:
        """Print one line with the seconds since the start."""
        elapsed = time.monotonic() - self._began
        self.console.print(f"[dim]{elapsed:6.1f} s[/dim]  {text}", soft_wrap=True)
