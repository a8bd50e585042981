"""Several things awaited at once."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


async def together(tasks: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Like asyncio.gather, but what fails ends the others, and its exception comes alone."""
    try:
        async with asyncio.TaskGroup() as group:
            started = [group.create_task(task) for task in tasks]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in started]
