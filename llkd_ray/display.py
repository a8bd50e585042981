"""What people see: console output, the format of numbers, and the escapes of untrusted texts and names."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.table import Table
from rich.text import Text

LOG_EVERY_S = 5.0
LOG_AT_MOST_S = 60.0
LOG_SHARE = 0.05
"""The interval between log lines is this share of the elapsed time, between LOG_EVERY_S and LOG_AT_MOST_S.

Lines are frequent at first, when people watch, and a day does not produce ten thousand lines.
"""
LOG_WIDTH = 80
"""Maximum width of a table in a log, in characters."""


class Display:
    """Prints finished steps and shows current progress. Without a terminal it prints plain lines.

    Texts are printed literally, because names and paths may contain characters that rich reads as markup, and
    :func:`printable`, because they may contain those that a terminal obeys.
    """

    def __init__(
        self, console: Console | None = None, *, quiet: bool = False, log_file: str | None = None
    ) -> None:
        """``quiet``: print results only. ``log_file``: append all lines to it, too; may raise OSError."""
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.quiet = quiet
        self._log = open(log_file, "a", encoding="utf-8") if log_file else None  # noqa: SIM115
        self.resume_with = ""
        """The command that continues the current work after a stop; empty if there is nothing to continue."""
        if not self.console.is_terminal:
            self.console.width = LOG_WIDTH
        self._status = self.console.status("") if self.console.is_terminal and not quiet else None
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
        if self._log:
            self._log.close()

    def say(self, line: str) -> None:
        """Print a permanent line about progress, with the time since the start."""
        stamped = printable(f"[{time.monotonic() - self._began:5.0f} s] {line}")
        if not self.quiet:
            self.console.print(Text(stamped))
        self._write_log(stamped)

    def warn(self, line: str) -> None:
        """Print a warning: also when quiet."""
        line = printable(f"warning: {line}")
        self.console.print(Text(line, style="yellow"))
        self._write_log(line)

    def result(self, line: str) -> None:
        """Print a line that is part of the result: also when quiet, and without the time."""
        line = printable(line)
        self.console.print(Text(line))
        self._write_log(line)

    def _write_log(self, line: str) -> None:
        if self._log:
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
            self._log.flush()

    def update(self, line: str, rows: Sequence[tuple[str, str]] = ()) -> None:
        """Show current progress: a line, or on a terminal rows of name and text, if given."""
        if self._status:
            self._status.update(_grid(rows) if rows else _literal(line))
        elif line != self._last_update and time.monotonic() - self._last_time >= self._pause():
            self._last_update, self._last_time = line, time.monotonic()
            self.say(line)

    def _pause(self) -> float:
        """Seconds between two log lines."""
        return min(LOG_AT_MOST_S, max(LOG_EVERY_S, LOG_SHARE * (time.monotonic() - self._began)))

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        table = Table(title=_literal(title, "italic"), title_justify="left", box=None, padding=(0, 2, 0, 0))
        for place, name in enumerate(header):
            table.add_column(_literal(name), no_wrap=place == 0, overflow="fold")
        for row in rows:
            table.add_row(*map(_literal, row))
        self.console.print(table)


def _grid(rows: Sequence[tuple[str, str]]) -> Table:
    grid = Table.grid(padding=(0, 2))
    for name, text in rows:
        grid.add_row(_literal(name, "dim"), _literal(text))
    return grid


def _literal(text: str, style: str = "") -> Text:
    return Text(printable(text), style=style)


MISSING = "–"
SAMPLE_CHARS = 400
"""Maximum characters shown of a sample text."""
NARROW = "\u202f"
"""Narrow no-break space."""


def percent(share: float | None) -> str:
    return MISSING if share is None else f"{100 * share:.1f}{NARROW}%"


def percent_range(interval: Sequence[float] | None) -> str:
    return MISSING if interval is None else f"{100 * interval[0]:.1f}–{100 * interval[1]:.1f}{NARROW}%"


def count(number: float | None) -> str:
    return MISSING if number is None else f"{number:,.0f}"


def decimals(number: float | None, places: int = 3) -> str:
    return MISSING if number is None else f"{number:.{places}f}"


def money(amount: float | None, currency: str) -> str:
    """An amount as text; small amounts have enough digits to be distinguished from zero."""
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


_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters other than tab and line feed, line separators, the marks that reverse or isolate the
direction of what follows, and lone surrogates, which no stream can encode."""
_MARKUP = re.compile(
    r"[\\`*_{}\[\]<>#|&~$]|(?<=http):|(?<=https):|(?<=www)\.|^[-+=]|(?<=^\d)[.)]|(?<=^\d\d)[.)]",
    re.IGNORECASE,
)
# The start of a cell, or what a spreadsheet takes for it where its separator is another (it depends on the
# locale): behind a semicolon, a tab or a line break. Possessive, so that the time is linear.
_CELL = r"(?:^|(?<![\s;])[^\S\t\r\n]*+[;\t\r\n])[\s;]*+"
_FORMULA = re.compile(rf"({_CELL})('*+[=+\-@＝＋－＠])")
_ESCAPED_FORMULA = re.compile(rf"({_CELL})'('*+[=+\-@＝＋－＠])")


def printable(text: str) -> str:
    """Escape what a terminal obeys instead of showing it; may be applied repeatedly."""
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def markdown(text: str) -> str:
    """Escape a name for Markdown, including tables, formulas, bare links and the start of a list."""
    return _MARKUP.sub(lambda found: "\\" + found[0], printable(" ".join(text.split())))


def escape_formula(cell: str) -> str:
    """A cell of a CSV file in which no spreadsheet finds a formula: an apostrophe stands before it."""
    return _FORMULA.sub(r"\1'\2", cell)


def unescape_formula(cell: str) -> str:
    """The inverse of :func:`escape_formula`."""
    return _ESCAPED_FORMULA.sub(r"\1\2", cell)
