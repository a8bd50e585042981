"""Staging: what a read task leaves behind, before repeated texts are known. Needs no Ray."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from llkd_ray import schemas
from llkd_ray.cleaning import Example, Refusal
from llkd_ray.store import QUARANTINE_DIR, RunStore

STAGING = "examples/staging"
SHARD_ROWS = 50_000
SHARD_CHARS = 16 << 20  # of text in one shard: 64 MiB at most
GROUP_ROWS = 1024  # the least that Examples.read reads for one row
QUARANTINE_ROWS = 10_000  # in one file

# Beside each staging shard: what de-duplication and the quarantine need of its rows.
KEYS = pa.schema(
    [
        pa.field("hash", pa.uint64(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("position", pa.int64(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Staged:
    """A staging shard of the pool or the test set; its files are in STAGING."""

    part: str
    name: str
    rows: int

    @property
    def file(self) -> str:
        return f"{STAGING}/{self.name}.parquet"

    @property
    def keys_file(self) -> str:
        return f"{STAGING}/{self.name}.keys.parquet"


class StagingWriter:
    """Collects rows and writes a file whenever enough are together."""

    def __init__(self, store: RunStore, stem: str) -> None:
        self._store = store
        self._stem = stem
        self._examples: list[tuple[str, str, int]] = []
        self._keys: list[tuple[int, str, int]] = []
        self._chars = 0
        self._refused: list[tuple[str, int, str, str, str]] = []
        self._quarantine_files = 0
        self.shards: list[dict[str, Any]] = []
        self.reasons: Counter[str] = Counter()

    def keep(self, source: str, position: int, example: Example) -> None:
        self._examples.append(example[:3])
        self._keys.append((example.hash, source, position))
        self._chars += len(example.text)
        if len(self._examples) >= SHARD_ROWS or self._chars >= SHARD_CHARS:
            self._write_shard()

    def refuse(self, source: str, position: int, refusal: Refusal, start: str) -> None:
        self._refused.append((source, position, *refusal, start))
        self.reasons[refusal.reason] += 1
        if len(self._refused) >= QUARANTINE_ROWS:
            self._write_quarantine()

    def flush(self) -> None:
        if self._examples:
            self._write_shard()
        if self._refused:
            self._write_quarantine()

    def _write_shard(self) -> None:
        shard = Staged("", f"{self._stem}-{len(self.shards):05d}", len(self._examples))
        self._store.write_table(shard.file, _table(self._examples, schemas.EXAMPLES), GROUP_ROWS)
        self._store.write_table(shard.keys_file, _table(self._keys, KEYS))
        self.shards.append({"name": shard.name, "rows": shard.rows})
        self._examples, self._keys, self._chars = [], [], 0

    def _write_quarantine(self) -> None:
        name = f"{QUARANTINE_DIR}/{self._stem}-{self._quarantine_files:05d}.parquet"
        self._store.write_table(name, _table(self._refused, schemas.QUARANTINE))
        self._quarantine_files += 1
        self._refused = []


def _table(rows: Sequence[tuple[Any, ...]], schema: pa.Schema) -> pa.Table:
    columns = zip(*rows, strict=True)
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)
