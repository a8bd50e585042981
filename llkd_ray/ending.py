"""How the programs end: a user's mistake is one line, and has an exit status of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable

from llkd_ray.config import ConfigError
from llkd_ray.console import Display

USER_MISTAKE, TEACHER_DOWN = 2, 3


def status_of(work: Callable[[Display], int | None], in_words: Callable[[str], str] = str) -> int:
    """Do a program's work; returns its exit status, which is 0 where ``work`` returns none.

    A :class:`ConfigError` goes to stderr, in one line, by way of ``in_words``.
    """
    try:
        with Display() as display:
            return work(display) or 0
    except ConfigError as error:
        print(f"error: {in_words(str(error))}", file=sys.stderr)
        return USER_MISTAKE
