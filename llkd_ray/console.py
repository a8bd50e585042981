"""Progress on a terminal or in a log: one line that moves, or a line now and then."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.table import Table
from rich.text import Text

LOG_EVERY_S = 5.0
LOG_AT_MOST_S = 60.0
LOG_SHARE = 0.05
"""A line comes after so many seconds, or after this share of the time so far where that is more, up to the
most: often at first, when people look, and not ten thousand lines in a day."""
LOG_WIDTH = 110
"""Characters that a table may take in a log."""


class Display:
    """Says what is finished, and shows what is going on. Without a terminal it prints plain lines.

    Texts are shown as they are: names and paths may hold what rich takes for markup.
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
        """What is going on now: a line, and for a terminal perhaps a few rows of a name and a text."""
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
