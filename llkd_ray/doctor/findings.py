"""Findings of the checks, and the isolated execution of checks, so that none affects the others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from llkd_ray.config.base import ConfigError

LIMIT_S = 90.0
"""Time limit per check, so that a check that hangs does not block the others."""
State = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """The result of one check, in one line."""

    check: str
    state: State
    found: str
    remedy: str = ""
    """What to do; empty if nothing is required, or if ``found`` already says it."""


@dataclass(frozen=True)
class Check:
    """A check of one thing. ``run`` returns None if there is nothing to check.

    An exception is reported as a problem: a ConfigError with its own message, any other as a failed check.
    """

    name: str
    run: Callable[[], Finding | None]


def ok(check: str, found: str) -> Finding:
    return Finding(check, "ok", found)


def warning(check: str, found: str, remedy: str) -> Finding:
    return Finding(check, "warning", found, remedy)


def problem(check: str, found: str, remedy: str = "") -> Finding:
    return Finding(check, "problem", found, remedy)


def describe(finding: Finding) -> str:
    """The finding as one line of text."""
    remedy = f"; to do: {finding.remedy}" if finding.remedy else ""
    return f"{finding.check}: {finding.found}{remedy}"


def run_checks(checks: Sequence[Check], limit_s: float = LIMIT_S) -> Iterator[Finding]:
    """The findings of the checks, one after the other, including those of checks that fail or hang."""
    for check in checks:
        yield from _run_check(check, limit_s)


def _run_check(check: Check, limit_s: float) -> list[Finding]:
    findings: list[Finding] = []

    def work() -> None:
        findings[:] = _findings_of(check)

    # A thread of its own: a library that waits for a network cannot be stopped, only abandoned.
    thread = threading.Thread(target=work, name=f"check-{check.name}", daemon=True)
    thread.start()
    thread.join(limit_s)
    if thread.is_alive():
        return [
            problem(
                check.name,
                f"no answer in {limit_s:g} s",
                "see what it waits for: a network, a file system or a server that does not answer",
            )
        ]
    return findings


def _findings_of(check: Check) -> list[Finding]:
    try:
        finding = check.run()
    except ConfigError as error:  # one line per mistake, with its remedy
        return [problem(check.name, line) for line in str(error).splitlines()]
    except Exception as error:
        return [
            problem(
                check.name,
                f"the check itself broke: {describe_error(error)}",
                "fix what the error names; if it names nothing of yours, report it",
            )
        ]
    return [] if finding is None else [finding]


def describe_error(error: BaseException, most: int = 300) -> str:
    """An exception's type and message."""
    said = " ".join(str(error).split())
    shown = said if len(said) <= most else said[:most] + "…"
    return f"{type(error).__name__}: {shown}" if shown else type(error).__name__


def format_bytes(size: float) -> str:
    """A size in a human-readable form."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**29 else f"{size / 2**20:,.1f} MiB"
