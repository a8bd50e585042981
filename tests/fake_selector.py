"""A selector without an actor, and tickets for a teacher stage."""

from __future__ import annotations

import asyncio
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa

from llkd_ray.teacher.base import Usage
from llkd_ray.teacher.worker import Stage


class FakeSelector:
    """Notes what it is told, as an actor's handle would take it; ``fails`` times put_labels breaks before."""

    def __init__(self, fails: int = 0, tokens: int = 10**9) -> None:
        self.calls: list[tuple[str, tuple]] = []
        self.fails = fails
        self.tokens = tokens
        """That it still grants."""
        self.is_taught = False
        self.leases: dict[int, tuple[int, np.ndarray]] = {}

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=partial(self._call, name))

    async def _call(self, name: str, *arguments: Any) -> Any:
        if name == "put_labels" and self.fails:
            self.fails -= 1
            raise ConnectionError("the selector is away")
        self.calls.append((name, arguments))
        if name == "lease":
            return self.leases[arguments[0]]
        if name == "reserve":
            self.tokens -= (tokens := Usage(**arguments[-1]).tokens)
            if self.tokens < 0:
                self.tokens += tokens
                return False
            return True
        while name == "wait_taught" and not self.is_taught:
            await asyncio.sleep(0.001)
        return None

    def told(self, name: str) -> list[tuple]:
        return [arguments for called, arguments in self.calls if called == name]


async def go(stage: Stage, block: pa.Table) -> pa.Table:
    """What goes on of a block."""
    return pa.concat_tables([piece async for piece in stage(block)])


def pass_through(stage: Stage, block: pa.Table) -> list[dict]:
    return asyncio.run(go(stage, block)).to_pylist()
