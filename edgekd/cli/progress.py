"""Progress in the terminal: rich bars and lines on stderr."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

LOG_SECONDS = 30.0


class _Log:
    """A bar for a log file: a line now and then instead of a moving bar."""

    def __init__(self, description: str, total: int) -> None:
        self.description, self.total, self.done = description, total, 0
        self.began = self.told = time.monotonic()

    def advance(self, steps: int, metrics: dict[str, float]) -> str | None:
        """Count, and return a line if it is time for one."""
        self.done += steps
        now = time.monotonic()
        if now - self.told < LOG_SECONDS or not self.done:
            return None
        self.told = now
        left = (now - self.began) / self.done * (self.total - self.done)
        shown = "".join(f", {name} {value:.4g}" for name, value in metrics.items())
        return f"  {self.description}: {self.done} of {self.total}{shown}, {left:.0f} s to go"


class TerminalProgress:
    """A `Progress` on stderr: live bars on a terminal, plain lines in a log."""

    def __init__(self) -> None:
        self.console = Console(file=sys.stderr, highlight=False)
        self._bar: RichProgress | None = None
        self._began = time.monotonic()
        self._log: _Log | None = None

    def start(self, description: str, total: int) -> None:
        """Begin a bar of `total` steps."""
        self.stop()
        if not self.console.is_terminal:
            self._log = _Log(description, total)
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
        if self._log is not None and (line := self._log.advance(steps, metrics)):
            self.say(line)
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
        self._log = None
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def say(self, text: str) -> None:
        """Print one line with the seconds since the start."""
        elapsed = time.monotonic() - self._began
        self.console.print(f"[dim]{elapsed:6.1f} s[/dim]  {escape(text)}", soft_wrap=True)
