"""Output for people: progress on a terminal or in a log, numbers as text, exit status of a program."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llkd_ray.config.base import ConfigError

LOG_EVERY_S = 5.0
LOG_AT_MOST_S = 60.0
LOG_SHARE = 0.05
"""A log line comes after LOG_EVERY_S, or after this share of the time so far where that is more, up to
LOG_AT_MOST_S: often at first, when people look, and not ten thousand lines in a day."""
LOG_WIDTH = 110
"""Characters that a table may take in a log."""


class Display:
    """Prints what is finished and shows what is in progress. Without a terminal it prints plain lines.

    Texts are printed literally: names and paths may hold what rich takes for markup.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        if not self.console.is_terminal:
            self.console.width = LOG_WIDTH
        self._status = self.console.status("") if self.console.is_terminal else None
        self._last_update, self._last_time = "", -LOG_EVERY_S
        self._began = time.monotonic()

    def __enter__(self) -> Display:
        if self._status:
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status:
            self._status.stop()

    def say(self, line: str) -> None:
        """A line that stays."""
        self.console.print(Text(f"[{time.monotonic() - self._began:5.0f} s] {line}"))

    def update(self, line: str, rows: Sequence[tuple[str, str]] = ()) -> None:
        """Show what is in progress: a line, and for a terminal rows of a name and a text, if given."""
        if self._status:
            self._status.update(_grid(rows) if rows else Text(line))
        elif line != self._last_update and time.monotonic() - self._last_time >= self._pause():
            self._last_update, self._last_time = line, time.monotonic()
            self.say(line)

    def _pause(self) -> float:
        """Seconds between two lines of a log."""
        return min(LOG_AT_MOST_S, max(LOG_EVERY_S, LOG_SHARE * (time.monotonic() - self._began)))

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        table = Table(title=Text(title, style="italic"), title_justify="left")
        for name in header:
            table.add_column(Text(name))
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        self.console.print(table)


def _grid(rows: Sequence[tuple[str, str]]) -> Table:
    grid = Table.grid(padding=(0, 2))
    for name, text in rows:
        grid.add_row(Text(name, style="dim"), Text(text))
    return grid


MISSING = "–"
SAMPLE_CHARS = 400
"""Of a sample text; the rest is cut off."""
NARROW = "\u202f"
"""A narrow space that does not break."""


def percent(share: float | None) -> str:
    return MISSING if share is None else f"{100 * share:.1f}{NARROW}%"


def percent_range(interval: Sequence[float] | None) -> str:
    return MISSING if interval is None else f"{100 * interval[0]:.1f}–{100 * interval[1]:.1f}{NARROW}%"


def count(number: float | None) -> str:
    return MISSING if number is None else f"{number:,.0f}"


def decimals(number: float | None, places: int = 3) -> str:
    return MISSING if number is None else f"{number:.{places}f}"


def money(amount: float | None, currency: str) -> str:
    """Small amounts with enough digits to tell them from zero."""
    if amount is None:
        return MISSING
    return f"{amount:,.2f}{NARROW}{currency}" if not 0 < amount < 0.1 else f"{amount:.2g}{NARROW}{currency}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return MISSING
    if seconds < 59.5:
        return f"{seconds:.3g}{NARROW}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}{NARROW}h {minutes}{NARROW}min" if hours else f"{minutes}{NARROW}min {rest}{NARROW}s"


def shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SAMPLE_CHARS else text[:SAMPLE_CHARS].rstrip() + "…"


def markdown(text: str) -> str:
    """A name as plain text in Markdown, in tables too."""
    return re.sub(r"([\\`*_{}\[\]<>#|&])", r"\\\1", " ".join(text.split()))


USER_MISTAKE, TEACHER_DOWN = 2, 3


def run_program(work: Callable[[Display], int | None], describe: Callable[[str], str] = str) -> int:
    """Run a program; returns its exit status, which is 0 where ``work`` returns none.

    A :class:`ConfigError` goes to stderr, its message passed through ``describe``.
    """
    try:
        with Display() as display:
            return work(display) or 0
    except ConfigError as error:
        print(f"error: {describe(str(error))}", file=sys.stderr)
        return USER_MISTAKE
