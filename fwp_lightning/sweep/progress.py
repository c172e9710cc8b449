"""What a sweep shows: a live bar on a terminal, plain lines elsewhere, a table at the end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from fwp_lightning.experiment import Run
from fwp_lightning.results import RowStatus

PLAIN_SECONDS = 10.0


class Display(Protocol):
    """What the sweep tells while it goes on."""

    def update(self, done: int, total: int, seconds_left: float | None, running: list[Run]) -> None:
        """Show how far the sweep is."""

    def line(self, text: str) -> None:
        """Show one line that stays."""

    def ended(self, run: Run, text: str, *, notable: bool) -> None:
        """Show that a run has ended."""

    def close(self) -> None:
        """Leave the terminal in order."""


def console() -> Console:
    """Return a console that does not fold lines where there is no terminal."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=160)


def display_for(out: Console) -> Display:
    """Return the display that suits the output."""
    return LiveBar(out) if out.is_terminal else PlainLines(out)


def duration(seconds: float) -> str:
    """Return a duration as people say it.

    >>> duration(42), duration(720), duration(9000)
    ('42 s', '12 min', '2.5 h')
    """
    if seconds < 90:
        return f"{max(seconds, 0):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def summary(done: int, total: int, seconds_left: float | None) -> str:
    """Return how far a sweep is, as in ``57/320 done, 12 min left``."""
    left = "" if done >= total else ", time left not known yet"
    if seconds_left is not None and done < total:
        left = f", {duration(seconds_left)} left"
    return f"{done}/{total} done{left}"


class LiveBar:
    """One bar that moves, the names of the running runs behind it."""

    def __init__(self, out: Console) -> None:
        self._progress = Progress(
            BarColumn(bar_width=30), TextColumn("{task.description}", markup=False), console=out, transient=True
        )
        self._task = self._progress.add_task("starting")
        self._progress.start()

    def update(self, done: int, total: int, seconds_left: float | None, running: list[Run]) -> None:
        """Move the bar."""
        names = "  " + ", ".join(run.name for run in running[:2]) if running else ""
        text = summary(done, total, seconds_left) + names + (" ..." if len(running) > 2 else "")
        self._progress.update(self._task, completed=done, total=total, description=text)

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(text, markup=False)

    def ended(self, run: Run, text: str, *, notable: bool) -> None:
        """Print only what the bar does not say."""
        if notable:
            self.line(text)

    def close(self) -> None:
        """Remove the bar."""
        self._progress.stop()


class PlainLines:
    """A line per ended run, at most one every ten seconds for those that ended well."""

    def __init__(self, out: Console) -> None:
        self._out = out
        self._last = time.monotonic()
        self._state = ""
        self._unsaid = 0

    def update(self, done: int, total: int, seconds_left: float | None, running: list[Run]) -> None:
        """Print the state if nothing has been printed for a while."""
        self._state = summary(done, total, seconds_left)
        if time.monotonic() - self._last >= PLAIN_SECONDS:
            names = f": {running[0].name}" + (" ..." if len(running) > 1 else "") if running else ""
            self.line(f"{self._state}{names}")

    def line(self, text: str) -> None:
        """Print a line at once."""
        self._out.print(text, markup=False, soft_wrap=True)
        self._out.file.flush()
        self._last = time.monotonic()

    def ended(self, run: Run, text: str, *, notable: bool) -> None:
        """Print the run; where runs end by the dozen only some of them."""
        if notable or time.monotonic() - self._last >= 1:
            self.line(f"{text} ({self._state})")

    def close(self) -> None:
        """Do nothing: every line is out already."""


@contextlib.contextmanager
def transfer_display(title: str) -> Iterator[Callable[[int, int | None], None]]:
    """Yield what shows how many bytes of how many are here: a bar on a terminal, a line every tenth elsewhere."""
    out = console()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=out, disable=not out.is_terminal) as progress:
        task = progress.add_task(title, total=None)
        tenths = -1

        def show(done: int, total: int | None) -> None:
            nonlocal tenths
            progress.update(task, completed=done, total=total)
            if total and not out.is_terminal and 10 * done // total > tenths:
                tenths = 10 * done // total
                out.print(f"{title}: {done / 1e6:.1f} of {total / 1e6:.1f} MB", highlight=False)

        yield show


def rows_table(lines: Iterable[RowStatus], *, title: str | None = None) -> Table:
    """Return a table with one line per row: how many runs are done, diverged, failed, running; queued where any is."""
    lines = list(lines)
    names = ["diverged", "failed", "running", "interrupted"]
    if any(line.queued for line in lines):
        names.append("queued")
    table = Table(title=title, box=None, pad_edge=False, title_justify="left")
    for name in ("experiment", "profile", "protocol", "row"):
        table.add_column(name, no_wrap=True)
    for name in ("done", *names):
        table.add_column(name, justify="right")
    for line in lines:
        counts = [getattr(line, name) for name in names]
        table.add_row(
            *(line.experiment, line.profile, line.protocol, line.row.replace("[", r"\[")),
            f"{line.done}/{line.total}",
            *(str(count) if count else "-" for count in counts),
        )
    return table
